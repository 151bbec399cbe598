// Objects as files. A version is the SHA-256 of the contents; conditions are compared under a lock,
// which the system releases when a process dies. An ETag is what tells one file from another that
// has replaced it: inode, time and size.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/output_file.h"
#include "worker/io/random_access_file.h"
#include "worker/objects/object_store.h"

namespace walsh::objects {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::milliseconds kLockInterval{10};

class DirectoryStore final : public ObjectStore {
 public:
  DirectoryStore(std::string directory, absl::Duration lock_timeout)
      : directory_(std::move(directory)), lock_timeout_(lock_timeout) {}

  absl::StatusOr<Contents> Get(const std::string& key, int64_t bytes_max,
                               const KeepGoing&) const override {
    WALSH_ASSIGN_OR_RETURN(const auto file, OpenObject(key));
    if (file->size() > bytes_max) {
      return absl::ResourceExhaustedError(absl::StrCat("a stored object has ", file->size(),
                                                       " bytes, at most ", bytes_max, " are read"));
    }
    Contents contents;
    contents.bytes.resize(static_cast<size_t>(file->size()));
    WALSH_RETURN_IF_ERROR(file->ReadAt(0, std::as_writable_bytes(std::span(contents.bytes))));
    contents.version = Sha256Hex(contents.bytes);
    return contents;
  }

  absl::Status ReadAt(const std::string& key, int64_t offset, std::span<std::byte> into,
                      const ReadOptions& options) const override {
    WALSH_RETURN_IF_ERROR(Ask(options.keep_going));
    WALSH_ASSIGN_OR_RETURN(const auto file, OpenObject(key));
    if (!options.must_have_etag.empty()) {
      WALSH_ASSIGN_OR_RETURN(const Listed now, Find(key, {}));
      if (now.etag != options.must_have_etag) {
        return absl::AbortedError("a stored object is not what the read expects");
      }
    }
    if (file->size() - offset < static_cast<int64_t>(into.size())) {
      return absl::DataLossError("a stored object is shorter than it should be");
    }
    return file->ReadAt(offset, into);
  }

  absl::StatusOr<std::string> Put(const std::string& key, std::string_view contents,
                                  const WriteCondition& condition) override {
    WALSH_RETURN_IF_ERROR(Prepare(key));
    WALSH_ASSIGN_OR_RETURN(const Lock lock, TakeLock());
    WALSH_RETURN_IF_ERROR(CheckCondition(key, condition));
    WALSH_RETURN_IF_ERROR(PublishFile(Path(key), contents));
    return Sha256Hex(contents);
  }

  absl::Status PutFile(const std::string& key, const std::string& path, const std::string& sha256,
                       const KeepGoing& keep_going) override {
    WALSH_RETURN_IF_ERROR(Prepare(key));
    const std::string temporary = TemporaryName(Path(key));
    absl::Status status = Copy(path, sha256, temporary, keep_going);
    if (status.ok()) status = ReplaceFile(temporary, Path(key));
    if (!status.ok()) unlink(temporary.c_str());
    return status;
  }

  absl::StatusOr<std::vector<Listed>> List(const std::string& folder,
                                           const KeepGoing& keep_going) const override {
    WALSH_RETURN_IF_ERROR(CheckKey(folder));
    std::vector<Listed> listed;
    std::error_code error;
    for (fs::recursive_directory_iterator it(Path(folder), error), end; !error && it != end;
         it.increment(error)) {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      if (it->path().filename().string().starts_with('.')) continue;
      // What vanishes meanwhile is no longer there.
      absl::StatusOr<Listed> object = Describe(it->path().lexically_relative(directory_).string());
      if (object.ok()) listed.push_back(*std::move(object));
    }
    if (error && error != std::errc::no_such_file_or_directory) {
      return ErrnoStatus(error.value(), "listing stored objects");
    }
    std::sort(listed.begin(), listed.end(),
              [](const Listed& a, const Listed& b) { return a.key < b.key; });
    return listed;
  }

  absl::StatusOr<Listed> Find(const std::string& key, const KeepGoing&) const override {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    return Describe(key);
  }

  absl::Status Delete(const std::string& key) override {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    if (unlink(Path(key).c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
    return ErrnoStatus(errno, "removing a stored object");
  }

  void Stop() override {
    const std::lock_guard lock(stop_mu_);
    is_stopped_ = true;
    stopped_.notify_all();
  }

 private:
  class Lock {
   public:
    explicit Lock(int fd) : fd_(fd) {}
    Lock(Lock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Lock& operator=(Lock&&) = delete;
    ~Lock() {
      if (fd_ >= 0) close(fd_);
    }

   private:
    int fd_;
  };

  // Whoever has it holds it for the length of one small write, unless its process or its file
  // system stands still.
  absl::StatusOr<Lock> TakeLock() const {
    const std::string path = directory_ + "/.lock";
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd < 0) return ErrnoStatus(errno, "opening the lock of stored objects");
    Lock lock(fd);
    const absl::Time until = absl::Now() + lock_timeout_;
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK && errno != EINTR) {
        return ErrnoStatus(errno, "locking stored objects");
      }
      if (absl::Now() >= until) {
        return absl::UnavailableError("another writer has locked the stored objects");
      }
      std::unique_lock waiting(stop_mu_);
      if (stopped_.wait_for(waiting, kLockInterval, [this] { return is_stopped_; })) {
        return absl::CancelledError("the worker is stopping");
      }
    }
    return lock;
  }

  std::string Path(const std::string& key) const { return absl::StrCat(directory_, "/", key); }

  absl::StatusOr<Listed> Describe(std::string key) const {
    struct stat file;
    if (stat(Path(key).c_str(), &file) != 0 || !S_ISREG(file.st_mode)) {
      return absl::NotFoundError("no such stored object");
    }
    return Listed{.key = std::move(key),
                  .size_bytes = file.st_size,
                  .modified = absl::TimeFromTimespec(file.st_mtim),
                  .etag = absl::StrCat(file.st_ino, "-", file.st_mtim.tv_sec, "-",
                                       file.st_mtim.tv_nsec, "-", file.st_size)};
  }

  absl::Status Prepare(const std::string& key) const {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    return MakeDirectories(fs::path(Path(key)).parent_path().string());
  }

  absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenObject(const std::string& key) const {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    absl::StatusOr<std::unique_ptr<RandomAccessFile>> file = OpenRandomAccessFile(Path(key));
    if (absl::IsNotFound(file.status())) return absl::NotFoundError("no such stored object");
    return file;
  }

  absl::Status CheckCondition(const std::string& key, const WriteCondition& condition) const {
    if (!condition.must_be_absent && condition.must_be_version.empty()) return absl::OkStatus();
    const absl::StatusOr<Contents> there = Get(key, kPieceBytes, {});
    if (absl::IsNotFound(there.status())) {
      return condition.must_be_absent ? absl::OkStatus() : there.status();
    }
    WALSH_RETURN_IF_ERROR(there.status());
    if (!condition.must_be_absent && there->version == condition.must_be_version) {
      return absl::OkStatus();
    }
    return absl::AbortedError("a stored object is not what the write expects");
  }

  static absl::Status Copy(const std::string& path, const std::string& sha256,
                           const std::string& to, const KeepGoing& keep_going) {
    WALSH_ASSIGN_OR_RETURN(const auto file, OpenRandomAccessFile(path));
    WALSH_ASSIGN_OR_RETURN(const auto output, OutputFile::Create(to));
    std::vector<std::byte> buffer(static_cast<size_t>(std::min(file->size(), kPieceBytes)));
    Sha256 hash;
    for (int64_t offset = 0; offset < file->size();) {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      const auto piece = std::span(buffer).first(
          static_cast<size_t>(std::min(file->size() - offset, kPieceBytes)));
      WALSH_RETURN_IF_ERROR(file->ReadAt(offset, piece));
      WALSH_RETURN_IF_ERROR(output->Append(piece));
      hash.Update(piece.data(), piece.size());
      offset += static_cast<int64_t>(piece.size());
    }
    if (hash.HexDigest() != sha256) {
      return absl::DataLossError(absl::StrCat(file->name(), " differs from its digest"));
    }
    return output->Finish();
  }

  const std::string directory_;
  const absl::Duration lock_timeout_;
  mutable std::mutex stop_mu_;
  mutable std::condition_variable stopped_;
  bool is_stopped_ = false;  // guarded by stop_mu_
};

}  // namespace

absl::StatusOr<std::unique_ptr<ObjectStore>> OpenDirectoryStore(const std::string& directory,
                                                                absl::Duration lock_timeout) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(directory));
  return std::make_unique<DirectoryStore>(fs::path(directory).lexically_normal().string(),
                                          lock_timeout);
}

}  // namespace walsh::objects
