#include "worker/io/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/io/random_access_file.h"
#include "worker/io/safetensors.h"

namespace walsh {
namespace {

constexpr int64_t kLengthBytes = 8;

absl::Status WriteAll(int fd, int64_t offset, const char* data, int64_t n_bytes) {
  int64_t done = 0;
  while (done < n_bytes) {
    const ssize_t n = pwrite(fd, data + done, static_cast<size_t>(n_bytes - done), offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, "writing weights");
    done += n;
  }
  return absl::OkStatus();
}

// An upper bound of what a tensor adds to the header.
int64_t EntryBytesMax(const std::string& name, const std::vector<int64_t>& shape) {
  constexpr int64_t kPunctuationAndKeys = 80;
  constexpr int64_t kDigitsMax = 20;
  return static_cast<int64_t>(name.size()) + kPunctuationAndKeys +
         kDigitsMax * (static_cast<int64_t>(shape.size()) + 2);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, int64_t header_bytes) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return ErrnoStatus(errno, absl::StrCat("creating ", BaseName(path)));
  // The data begin at a multiple of 8 bytes, as the format recommends.
  const int64_t rounded = (header_bytes + 7) / 8 * 8;
  return std::unique_ptr<SafetensorsWriter>(new SafetensorsWriter(fd, rounded));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ >= 0) close(fd_);
}

bool SafetensorsWriter::HasRoom(const std::string& name, const std::vector<int64_t>& shape) const {
  return header_bytes_used_ + EntryBytesMax(name, shape) <= header_bytes_;
}

void SafetensorsWriter::Begin(const std::string& name, const std::string& dtype,
                              const std::vector<int64_t>& shape) {
  WALSH_CHECK_EQ(data_bytes_, expected_end_);
  WALSH_CHECK(HasRoom(name, shape));
  int64_t n_bytes = SafetensorsDtypeBytes(dtype);
  for (const int64_t dim : shape) n_bytes *= dim;
  expected_end_ = data_bytes_ + n_bytes;
  header_[name] = {
      {"dtype", dtype}, {"shape", shape}, {"data_offsets", {data_bytes_, expected_end_}}};
  header_bytes_used_ += EntryBytesMax(name, shape);
  tensors_.push_back(name);
}

absl::Status SafetensorsWriter::Append(std::span<const std::byte> bytes) {
  const auto n_bytes = static_cast<int64_t>(bytes.size());
  WALSH_CHECK(data_bytes_ + n_bytes <= expected_end_);
  WALSH_RETURN_IF_ERROR(WriteAll(fd_, kLengthBytes + header_bytes_ + data_bytes_,
                                 reinterpret_cast<const char*>(bytes.data()), n_bytes));
  data_bytes_ += n_bytes;
  StartWriteback();
  return absl::OkStatus();
}

// What waits in the page cache until Finish() syncs would all have to reach the disk then.
void SafetensorsWriter::StartWriteback() {
  constexpr int64_t kPieceBytes = int64_t{32} << 20;
  if (data_bytes_ - handed_over_bytes_ < kPieceBytes) return;
  // A hint: where the system refuses it, Finish() waits longer.
  (void)sync_file_range(fd_, kLengthBytes + header_bytes_ + handed_over_bytes_,
                        data_bytes_ - handed_over_bytes_, SYNC_FILE_RANGE_WRITE);
  handed_over_bytes_ = data_bytes_;
}

absl::Status SafetensorsWriter::Finish() {
  WALSH_CHECK_EQ(data_bytes_, expected_end_);
  std::string text = header_.dump();
  WALSH_CHECK(static_cast<int64_t>(text.size()) <= header_bytes_);
  text.resize(static_cast<size_t>(header_bytes_), ' ');
  std::string length(static_cast<size_t>(kLengthBytes), '\0');
  std::memcpy(length.data(), &header_bytes_, sizeof(header_bytes_));
  text.insert(0, length);
  WALSH_RETURN_IF_ERROR(WriteAll(fd_, 0, text.data(), static_cast<int64_t>(text.size())));
  if (fsync(fd_) != 0) return ErrnoStatus(errno, "syncing weights");
  const int fd = fd_;
  fd_ = -1;
  if (close(fd) != 0) return ErrnoStatus(errno, "closing weights");
  return absl::OkStatus();
}

}  // namespace walsh
