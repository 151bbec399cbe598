#include "worker/io/random_access_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

absl::Status CheckRange(const std::string& name, int64_t size, int64_t offset, size_t n_bytes) {
  if (offset < 0 || offset > size || n_bytes > static_cast<uint64_t>(size - offset)) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", n_bytes, " bytes at offset ", offset,
                                                   " lie beyond the file's ", size, " bytes"));
  }
  return absl::OkStatus();
}

// What must stay equal while a file is read.
struct FileIdentity {
  int64_t size = 0;
  int64_t modified_seconds = 0;
  int64_t modified_nanoseconds = 0;
  uint64_t inode = 0;

  bool operator==(const FileIdentity&) const = default;
};

FileIdentity Identity(const struct stat& info) {
  return {.size = info.st_size,
          .modified_seconds = info.st_mtim.tv_sec,
          .modified_nanoseconds = info.st_mtim.tv_nsec,
          .inode = info.st_ino};
}

class PreadFile final : public RandomAccessFile {
 public:
  PreadFile(int fd, std::string name, FileIdentity identity)
      : fd_(fd), name_(std::move(name)), identity_(identity) {}
  ~PreadFile() override { close(fd_); }
  PreadFile(const PreadFile&) = delete;
  PreadFile& operator=(const PreadFile&) = delete;

  const std::string& name() const override { return name_; }
  int64_t size() const override { return identity_.size; }

  absl::Status ReadAt(int64_t offset, std::span<std::byte> out) const override {
    WALSH_RETURN_IF_ERROR(CheckRange(name_, identity_.size, offset, out.size()));
    size_t done = 0;
    while (done < out.size()) {
      const ssize_t n = pread(fd_, out.data() + done, out.size() - done,
                              static_cast<off_t>(offset + static_cast<int64_t>(done)));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return ErrnoStatus(errno, absl::StrCat("reading ", name_));
      if (n == 0) {
        return absl::DataLossError(absl::StrCat(
            name_, ": ends at byte ", offset + static_cast<int64_t>(done), ", was ", identity_.size,
            " bytes long when it was opened: it changed while it was read"));
      }
      done += static_cast<size_t>(n);
    }
    return absl::OkStatus();
  }

  absl::Status CheckUnchanged() const override {
    struct stat info {};
    if (fstat(fd_, &info) != 0) return ErrnoStatus(errno, absl::StrCat("examining ", name_));
    if (Identity(info) == identity_) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(name_, ": changed while it was read (", identity_.size,
                                            " bytes at first, now ",
                                            static_cast<int64_t>(info.st_size), ")"));
  }

 private:
  const int fd_;
  const std::string name_;
  const FileIdentity identity_;
};

class SpanFile final : public RandomAccessFile {
 public:
  SpanFile(std::string name, std::span<const std::byte> bytes)
      : name_(std::move(name)), bytes_(bytes) {}
  const std::string& name() const override { return name_; }
  int64_t size() const override { return static_cast<int64_t>(bytes_.size()); }
  absl::Status ReadAt(int64_t offset, std::span<std::byte> out) const override {
    WALSH_RETURN_IF_ERROR(CheckRange(name_, size(), offset, out.size()));
    std::copy_n(bytes_.begin() + offset, out.size(), out.begin());
    return absl::OkStatus();
  }
  absl::Status CheckUnchanged() const override { return absl::OkStatus(); }

 private:
  const std::string name_;
  const std::span<const std::byte> bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenRandomAccessFile(const std::string& path) {
  const std::string name = BaseName(path);
  // O_NONBLOCK: a FIFO in a model folder must not hold the worker.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    if (errno == ENOENT || errno == ENOTDIR) {
      return absl::NotFoundError(absl::StrCat("no such file: '", name, "'"));
    }
    return ErrnoStatus(errno, absl::StrCat("opening ", name));
  }
  struct stat info {};
  if (fstat(fd, &info) != 0) {
    const int error = errno;
    close(fd);
    return ErrnoStatus(error, absl::StrCat("examining ", name));
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat("'", name, "' is not a regular file"));
  }
  return std::make_unique<PreadFile>(fd, name, Identity(info));
}

std::unique_ptr<RandomAccessFile> MemoryFile(std::string name, std::span<const std::byte> bytes) {
  return std::make_unique<SpanFile>(std::move(name), bytes);
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t bytes_max) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<RandomAccessFile> file, OpenRandomAccessFile(path));
  if (file->size() > bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat(file->name(), ": ", file->size(), " bytes, at most ", bytes_max));
  }
  std::string contents(static_cast<size_t>(file->size()), '\0');
  WALSH_RETURN_IF_ERROR(file->ReadAt(0, std::as_writable_bytes(std::span(contents))));
  WALSH_RETURN_IF_ERROR(file->CheckUnchanged());
  return contents;
}

std::string BaseName(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return path;
  const size_t slash = path.find_last_of('/', end);
  return path.substr(slash == std::string::npos ? 0 : slash + 1,
                     end - (slash == std::string::npos ? 0 : slash + 1) + 1);
}

}  // namespace walsh
