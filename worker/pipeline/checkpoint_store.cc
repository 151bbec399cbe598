#include "worker/pipeline/checkpoint_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/random_access_file.h"
#include "worker/pipeline/stored_generation.h"

namespace walsh::pipeline {
namespace {

namespace fs = std::filesystem;

constexpr char kCurrent[] = "CURRENT";
constexpr size_t kPieceBytes = size_t{1} << 20;

class DirectoryCheckpointStore final : public CheckpointStore {
 public:
  DirectoryCheckpointStore(std::string directory, int64_t fencing_token)
      : directory_(std::move(directory)), fencing_token_(fencing_token) {}

  absl::StatusOr<Found> Claim() override {
    WALSH_RETURN_IF_ERROR(MakeDirectories(ObjectsDirectory()));
    WALSH_ASSIGN_OR_RETURN(const Lock lock, Lock::Take(LockPath(), O_CREAT));
    WALSH_ASSIGN_OR_RETURN(const Pair pair, ReadPair());
    WALSH_RETURN_IF_ERROR(CheckToken(pair));
    Found found;
    found.n_damaged = pair.n_damaged;
    if (pair.current.has_value()) found.generations.push_back(pair.current->generation);
    if (pair.previous.has_value()) found.generations.push_back(pair.previous->generation);
    // The newest, under a new token; an empty one where there is none.
    StoredGeneration claimed{fencing_token_, {}};
    if (!found.generations.empty()) claimed.generation = found.generations.front();
    WALSH_RETURN_IF_ERROR(PublishFile(CurrentPath(), ToText(claimed)));
    std::erase_if(found.generations, [](const Generation& g) { return g.manifest.empty(); });
    return found;
  }

  absl::StatusOr<Object> Put(std::string_view contents) override {
    Object object{Sha256Hex(contents), static_cast<int64_t>(contents.size())};
    // Also where it is there already: it may be damaged.
    WALSH_RETURN_IF_ERROR(PublishFile(ObjectPath(object), contents));
    return object;
  }

  absl::Status Get(const Object& object, std::span<std::byte> into) const override {
    if (static_cast<int64_t>(into.size()) != object.size_bytes) return DamagedObject(object);
    return Read(object, [&](int64_t offset, int64_t n_bytes) {
      return into.subspan(static_cast<size_t>(offset), static_cast<size_t>(n_bytes));
    });
  }

  absl::Status Check(const Object& object) const override {
    std::vector<std::byte> piece(kPieceBytes);
    return Read(object, [&](int64_t, int64_t n_bytes) {
      return std::span(piece).first(static_cast<size_t>(n_bytes));
    });
  }

  absl::Status Commit(const Generation& generation) override {
    // Not created here: a checkpoint that is gone is of a job that has ended.
    WALSH_ASSIGN_OR_RETURN(const Lock lock, Lock::Take(LockPath(), 0));
    WALSH_ASSIGN_OR_RETURN(Pair pair, ReadPair());
    WALSH_RETURN_IF_ERROR(CheckToken(pair));
    if (pair.current.has_value()) {
      WALSH_RETURN_IF_ERROR(PublishFile(PreviousPath(), ToText(*pair.current)));
      pair.previous = std::move(pair.current);
    }
    pair.current = {fencing_token_, generation};
    WALSH_RETURN_IF_ERROR(PublishFile(CurrentPath(), ToText(*pair.current)));
    return RemoveAllBut(pair);
  }

  absl::Status Discard() override {
    WALSH_ASSIGN_OR_RETURN(const Lock lock, Lock::Take(LockPath(), 0));
    WALSH_ASSIGN_OR_RETURN(const Pair pair, ReadPair());
    WALSH_RETURN_IF_ERROR(CheckToken(pair));
    return RemoveAllBut(pair);
  }

  absl::StatusOr<int64_t> FreeBytes() const override { return walsh::FreeBytes(directory_); }

 private:
  // The system releases the lock of a process that dies.
  class Lock {
   public:
    static absl::StatusOr<Lock> Take(const std::string& path, int flags) {
      const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | flags, 0644);
      if (fd < 0) return ErrnoStatus(errno, "opening the checkpoint's lock");
      Lock lock(fd);
      if (flock(fd, LOCK_EX | LOCK_NB) == 0) return lock;
      if (errno != EWOULDBLOCK) return ErrnoStatus(errno, "locking the checkpoint");
      return absl::UnavailableError("another writer has the checkpoint locked");
    }
    Lock(Lock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Lock& operator=(Lock&&) = delete;
    ~Lock() {
      if (fd_ >= 0) close(fd_);
    }

   private:
    explicit Lock(int fd) : fd_(fd) {}
    int fd_;
  };

  struct Pair {
    std::optional<StoredGeneration> current, previous;
    int n_damaged = 0;
  };

  absl::StatusOr<Pair> ReadPair() const {
    Pair pair;
    WALSH_RETURN_IF_ERROR(ReadGeneration(CurrentPath(), pair.current, pair.n_damaged));
    WALSH_RETURN_IF_ERROR(ReadGeneration(PreviousPath(), pair.previous, pair.n_damaged));
    return pair;
  }

  static absl::Status ReadGeneration(const std::string& path, std::optional<StoredGeneration>& into,
                                     int& n_damaged) {
    const absl::StatusOr<std::string> text = ReadFile(path, limits::kJsonFileBytesMax);
    if (absl::IsNotFound(text.status())) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(text.status());
    absl::StatusOr<StoredGeneration> stored = FromText(*text);
    if (stored.ok()) {
      into = *std::move(stored);
    } else {
      ++n_damaged;
    }
    return absl::OkStatus();
  }

  absl::Status CheckToken(const Pair& pair) const {
    for (const auto* stored : {&pair.current, &pair.previous}) {
      if (!stored->has_value()) continue;
      WALSH_RETURN_IF_ERROR(pipeline::CheckToken((*stored)->fencing_token, fencing_token_));
    }
    return absl::OkStatus();
  }

  template <typename Piece>
  absl::Status Read(const Object& object, const Piece& piece) const {
    const auto file = OpenRandomAccessFile(ObjectPath(object));
    if (!file.ok() || (*file)->size() != object.size_bytes) return DamagedObject(object);
    Sha256 hash;
    for (int64_t offset = 0; offset < object.size_bytes;) {
      const int64_t n_bytes =
          std::min(object.size_bytes - offset, static_cast<int64_t>(kPieceBytes));
      const std::span<std::byte> bytes = piece(offset, n_bytes);
      if (!(*file)->ReadAt(offset, bytes).ok()) return DamagedObject(object);
      hash.Update(bytes.data(), bytes.size());
      offset += n_bytes;
    }
    return hash.HexDigest() == object.sha256 ? absl::OkStatus() : DamagedObject(object);
  }

  // Temporary files of writers that died, too.
  absl::Status RemoveAllBut(const Pair& pair) const {
    std::set<std::string> needed;
    for (const auto* stored : {&pair.current, &pair.previous}) {
      if (!stored->has_value()) continue;
      for (const Object& object : (*stored)->generation.objects) needed.insert(object.sha256);
    }
    std::error_code error;
    std::vector<fs::path> unneeded;
    for (fs::directory_iterator it(ObjectsDirectory(), error), end; !error && it != end;
         it.increment(error)) {
      if (!needed.contains(it->path().filename().string())) unneeded.push_back(it->path());
    }
    for (const fs::path& path : unneeded) {
      if (error) break;
      fs::remove(path, error);
    }
    if (error) return ErrnoStatus(error.value(), "removing objects of the checkpoint");
    return absl::OkStatus();
  }

  std::string ObjectsDirectory() const { return directory_ + "/objects"; }
  std::string ObjectPath(const Object& object) const {
    return absl::StrCat(ObjectsDirectory(), "/", object.sha256);
  }
  std::string CurrentPath() const { return absl::StrCat(directory_, "/", kCurrent); }
  std::string PreviousPath() const { return directory_ + "/PREVIOUS"; }
  std::string LockPath() const { return directory_ + "/lock"; }

  const std::string directory_;
  const int64_t fencing_token_;
};

}  // namespace

std::unique_ptr<CheckpointStore> MakeDirectoryCheckpointStore(std::string directory,
                                                              int64_t fencing_token) {
  return std::make_unique<DirectoryCheckpointStore>(std::move(directory), fencing_token);
}

absl::Status RemoveStaleCheckpoints(const std::string& directory, absl::Duration age) {
  const auto stale_before = fs::file_time_type::clock::now() - absl::ToChronoSeconds(age);
  std::error_code error;
  for (fs::directory_iterator jobs(directory, error), end; !error && jobs != end;
       jobs.increment(error)) {
    // Of each kernel family that has had the job. What vanishes meanwhile is somebody else's.
    bool is_stale = true;
    std::error_code vanished;
    for (fs::directory_iterator it(jobs->path(), vanished); !vanished && it != end;
         it.increment(vanished)) {
      std::error_code unknown;
      const auto changed = fs::last_write_time(it->path() / kCurrent, unknown);
      is_stale = is_stale && !unknown && changed < stale_before;
    }
    if (is_stale && !vanished) WALSH_RETURN_IF_ERROR(RemoveTree(jobs->path().string()));
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return ErrnoStatus(error.value(), "listing the checkpoints");
  }
  return absl::OkStatus();
}

}  // namespace walsh::pipeline
