#include "worker/io/output_file.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/io/random_access_file.h"

namespace walsh {
namespace {

absl::Status WriteError(int error, int fd, size_t n_bytes) {
  absl::Status status = ErrnoStatus(error, "writing weights");
  struct statvfs disk {};
  if (!absl::IsResourceExhausted(status) || fstatvfs(fd, &disk) != 0) return status;
  return absl::ResourceExhaustedError(absl::StrCat(
      status.message(), ": ", n_bytes, " bytes needed, ", disk.f_bavail * disk.f_frsize, " free"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<OutputFile>> OutputFile::Create(const std::string& path) {
  const std::string name = BaseName(path);
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoStatus(errno, absl::StrCat("creating ", name));
  return std::unique_ptr<OutputFile>(new OutputFile(fd, name));
}

OutputFile::OutputFile(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status OutputFile::WriteAt(int64_t offset, std::span<const std::byte> bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        pwrite(fd_, bytes.data() + done, bytes.size() - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return WriteError(errno, fd_, bytes.size() - done);
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status OutputFile::Append(std::span<const std::byte> bytes) {
  WALSH_RETURN_IF_ERROR(WriteAt(end_, bytes));
  end_ += static_cast<int64_t>(bytes.size());
  StartWriteback();
  return absl::OkStatus();
}

// What waits in the page cache until Finish() syncs would all have to reach the disk then.
void OutputFile::StartWriteback() {
  constexpr int64_t kPieceBytes = int64_t{32} << 20;
  if (end_ - handed_over_ < kPieceBytes) return;
  // A hint: where the system refuses it, Finish() waits longer.
  (void)sync_file_range(fd_, handed_over_, end_ - handed_over_, SYNC_FILE_RANGE_WRITE);
  handed_over_ = end_;
}

absl::Status OutputFile::Finish() {
  if (fsync(fd_) != 0) return ErrnoStatus(errno, "syncing weights");
  const int fd = std::exchange(fd_, -1);
  if (close(fd) != 0) return ErrnoStatus(errno, "closing weights");
  return absl::OkStatus();
}

}  // namespace walsh
