#include "worker/io/safetensors_writer.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "worker/io/safetensors.h"

namespace walsh {
namespace {

constexpr int64_t kLengthBytes = 8;

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
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<OutputFile> file, OutputFile::Create(path));
  // The data begin at a multiple of 8 bytes, as the format recommends.
  const int64_t rounded = (header_bytes + 7) / 8 * 8;
  file->Skip(kLengthBytes + rounded);
  return std::unique_ptr<SafetensorsWriter>(new SafetensorsWriter(std::move(file), rounded));
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
  WALSH_RETURN_IF_ERROR(file_->Append(bytes));
  data_bytes_ += n_bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  WALSH_CHECK_EQ(data_bytes_, expected_end_);
  std::string text = header_.dump();
  WALSH_CHECK(static_cast<int64_t>(text.size()) <= header_bytes_);
  text.resize(static_cast<size_t>(header_bytes_), ' ');
  std::string length(static_cast<size_t>(kLengthBytes), '\0');
  std::memcpy(length.data(), &header_bytes_, sizeof(header_bytes_));
  text.insert(0, length);
  WALSH_RETURN_IF_ERROR(file_->WriteAt(0, std::as_bytes(std::span(text))));
  return file_->Finish();
}

}  // namespace walsh
