#include "common/publish.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

namespace fs = std::filesystem;

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&&) = delete;
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  bool ok() const { return fd_ >= 0; }
  // Reports what close says: on network file systems it is where a failed write shows.
  int Close() { return close(std::exchange(fd_, -1)); }

 private:
  int fd_;
};

std::string ParentOf(const std::string& path) {
  fs::path p(path);
  if (!p.has_filename()) p = p.parent_path();  // "a/b/" names b
  const fs::path parent = p.parent_path();
  return parent.empty() ? "." : parent.string();
}

absl::Status SyncPath(const std::string& path, int flags, std::string_view what) {
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | flags));
  if (!fd.ok()) return ErrnoStatus(errno, what);
  if (fsync(fd.get()) != 0) return ErrnoStatus(errno, what);
  return absl::OkStatus();
}

absl::Status SyncDirectory(const std::string& path) {
  return SyncPath(path, O_DIRECTORY, "syncing a directory");
}

absl::Status WithSpace(absl::Status status, const std::string& directory, int64_t bytes_needed) {
  if (!absl::IsResourceExhausted(status)) return status;
  const auto free_bytes = FreeBytes(directory);
  return absl::ResourceExhaustedError(
      absl::StrCat(status.message(), ": ", bytes_needed, " bytes needed, ",
                   free_bytes.ok() ? absl::StrCat(*free_bytes) : "unknown", " free"));
}

absl::Status WriteAll(int fd, std::string_view contents) {
  while (!contents.empty()) {
    const ssize_t n = write(fd, contents.data(), contents.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      return ErrnoStatus(errno, "writing a file");
    }
    contents.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

absl::Status WriteSynced(Fd fd, std::string_view contents) {
  WALSH_RETURN_IF_ERROR(WriteAll(fd.get(), contents));
  // A failed fsync is final: the kernel may have marked the pages clean, so a second one would lie.
  if (fsync(fd.get()) != 0) return ErrnoStatus(errno, "syncing a file");
  if (fd.Close() != 0) return ErrnoStatus(errno, "closing a file");
  return absl::OkStatus();
}

// Every file and directory below `root`, then `root`; symbolic links are not followed.
absl::Status SyncTree(const std::string& root) {
  std::error_code error;
  fs::recursive_directory_iterator it(root, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    const fs::file_status status = it->symlink_status(error);
    if (error) break;
    if (fs::is_regular_file(status)) {
      WALSH_RETURN_IF_ERROR(SyncPath(it->path().string(), 0, "syncing a file"));
    } else if (fs::is_directory(status)) {
      WALSH_RETURN_IF_ERROR(SyncDirectory(it->path().string()));
    }
  }
  if (error) return ErrnoStatus(error.value(), "listing a directory");
  return SyncDirectory(root);
}

absl::Status RenameToNew(const std::string& from, const std::string& to) {
  // rename() alone would replace an empty directory without a word.
  if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) {
    return absl::OkStatus();
  }
  if (errno != EINVAL && errno != ENOSYS) return ErrnoStatus(errno, "renaming a directory");
  // A file system without RENAME_NOREPLACE (NFS): the check is not atomic, which the coordinator's
  // one writer for each name makes harmless.
  struct stat info {};
  if (lstat(to.c_str(), &info) == 0) return ErrnoStatus(EEXIST, "renaming a directory");
  if (rename(from.c_str(), to.c_str()) != 0) return ErrnoStatus(errno, "renaming a directory");
  return absl::OkStatus();
}

}  // namespace

absl::Status ErrnoStatus(int error, std::string_view what) {
  const std::string message =
      absl::StrCat(std::string(what), ": ", std::generic_category().message(error));
  switch (error) {
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(message);
    case ENOMEM:
      return OutOfMemoryError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOENT:
      return absl::NotFoundError(message);
    case EEXIST:
    case ENOTEMPTY:
      return absl::AlreadyExistsError(message);
    case ENOTDIR:
    case EISDIR:
    case ENAMETOOLONG:
    case ELOOP:
      return absl::InvalidArgumentError(message);
    default:
      return absl::InternalError(message);
  }
}

std::string TemporaryName(const std::string& path) {
  // In containers all processes have the same id, and the folder may be shared.
  static const uint64_t process = [] {
    uint64_t drawn = 0;
    (void)getentropy(&drawn, sizeof drawn);  // cannot fail for so few bytes
    return drawn;
  }();
  static std::atomic<uint64_t> counter{0};
  return absl::StrCat(ParentOf(path), "/.", fs::path(path).filename().string(), ".tmp-", getpid(),
                      "-", absl::Hex(process), "-", counter++);
}

absl::Status PublishFile(const std::string& path, std::string_view contents) {
  const auto with_space = [&](absl::Status status) {
    return WithSpace(std::move(status), ParentOf(path), static_cast<int64_t>(contents.size()));
  };
  const std::string temporary = TemporaryName(path);
  Fd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!fd.ok()) return with_space(ErrnoStatus(errno, "creating a file"));
  absl::Status status = WriteSynced(std::move(fd), contents);
  if (status.ok()) status = ReplaceFile(temporary, path);
  if (status.ok()) return status;
  unlink(temporary.c_str());
  return with_space(std::move(status));
}

absl::Status ReplaceFile(const std::string& from, const std::string& to) {
  if (rename(from.c_str(), to.c_str()) != 0) return ErrnoStatus(errno, "renaming a file");
  return SyncDirectory(ParentOf(to));
}

absl::Status PublishDirectory(const std::string& from, const std::string& to) {
  WALSH_RETURN_IF_ERROR(SyncTree(from));
  return MoveDirectory(from, to);
}

absl::Status MoveDirectory(const std::string& from, const std::string& to) {
  WALSH_RETURN_IF_ERROR(RenameToNew(from, to));
  WALSH_RETURN_IF_ERROR(SyncDirectory(ParentOf(to)));
  if (ParentOf(from) != ParentOf(to)) return SyncDirectory(ParentOf(from));
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t bytes_max) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.ok()) return ErrnoStatus(errno, "opening a file");
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, "reading the size of a file");
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError("not a regular file");
  const auto too_large = [&](int64_t n_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has ", n_bytes, " bytes, at most ", bytes_max, " are read"));
  };
  if (info.st_size > bytes_max) return too_large(info.st_size);
  std::string contents;
  contents.resize(static_cast<size_t>(info.st_size));
  size_t n_read = 0;
  while (true) {
    if (n_read == contents.size()) {
      // Files of /proc say size 0, and a file may grow meanwhile: read until the end, bounded.
      char next = 0;
      const ssize_t n = read(fd.get(), &next, 1);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return ErrnoStatus(errno, "reading a file");
      if (n == 0) break;
      if (static_cast<int64_t>(n_read) + 1 > bytes_max) return too_large(bytes_max + 1);
      contents.push_back(next);
      ++n_read;
      contents.resize(std::min(static_cast<size_t>(bytes_max), n_read + 65536));
    }
    const ssize_t n = read(fd.get(), contents.data() + n_read, contents.size() - n_read);
    if (n < 0) {
      if (errno == EINTR) continue;
      return ErrnoStatus(errno, "reading a file");
    }
    if (n == 0 && n_read < contents.size()) break;
    n_read += static_cast<size_t>(n);
  }
  contents.resize(n_read);
  return contents;
}

absl::Status MakeDirectories(const std::string& path) {
  fs::path made;
  for (const fs::path& part : fs::path(path)) {
    made /= part;
    if (mkdir(made.c_str(), 0755) == 0) {
      // Otherwise a power cut can take away the directory of a file that was published in it.
      WALSH_RETURN_IF_ERROR(SyncDirectory(ParentOf(made.string())));
      continue;
    }
    const int error = errno;
    struct stat info {};
    if (stat(made.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) continue;
    return ErrnoStatus(error == EEXIST ? ENOTDIR : error, "creating a directory");
  }
  return absl::OkStatus();
}

absl::Status RemoveTree(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) return ErrnoStatus(error.value(), "removing a directory");
  return absl::OkStatus();
}

absl::StatusOr<int64_t> FreeBytes(const std::string& path) {
  struct statvfs info {};
  if (statvfs(path.c_str(), &info) != 0) return ErrnoStatus(errno, "reading the free space");
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

absl::StatusOr<int64_t> TreeBytes(const std::string& path) {
  std::error_code error;
  int64_t n_bytes = 0;
  fs::recursive_directory_iterator it(path, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    const fs::file_status status = it->symlink_status(error);
    if (error) break;
    if (fs::is_regular_file(status)) n_bytes += static_cast<int64_t>(it->file_size(error));
    if (error) break;
  }
  if (error) return ErrnoStatus(error.value(), "listing a directory");
  return n_bytes;
}

}  // namespace walsh
