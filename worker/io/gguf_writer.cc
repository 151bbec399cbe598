#include "worker/io/gguf_writer.h"

#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint32_t kVersion = 3;
constexpr int64_t kAlignment = 32;  // the format's default

enum ValueType : uint32_t {
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
};

// Of this machine, which is little-endian like the format.
template <typename T>
void Put(T value, std::string& out) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void PutString(std::string_view text, std::string& out) {
  Put<uint64_t>(text.size(), out);
  out.append(text);
}

int64_t Aligned(int64_t offset) { return (offset + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

void GgufMetadata::BeginValue(std::string_view key, uint32_t type) {
  PutString(key, bytes_);
  Put(type, bytes_);
  ++count_;
}

void GgufMetadata::BeginArray(std::string_view key, uint32_t type, size_t n) {
  BeginValue(key, kArray);
  Put(type, bytes_);
  Put<uint64_t>(n, bytes_);
}

void GgufMetadata::SetString(std::string_view key, std::string_view value) {
  BeginValue(key, kString);
  PutString(value, bytes_);
}

void GgufMetadata::SetUint32(std::string_view key, uint32_t value) {
  BeginValue(key, kUint32);
  Put(value, bytes_);
}

void GgufMetadata::SetFloat32(std::string_view key, float value) {
  BeginValue(key, kFloat32);
  Put(value, bytes_);
}

void GgufMetadata::SetBool(std::string_view key, bool value) {
  BeginValue(key, kBool);
  Put<uint8_t>(value ? 1 : 0, bytes_);
}

void GgufMetadata::SetStrings(std::string_view key, const std::vector<std::string>& values) {
  BeginArray(key, kString, values.size());
  for (const std::string& value : values) PutString(value, bytes_);
}

void GgufMetadata::SetFloats(std::string_view key, const std::vector<float>& values) {
  BeginArray(key, kFloat32, values.size());
  for (const float value : values) Put(value, bytes_);
}

void GgufMetadata::SetInts(std::string_view key, const std::vector<int32_t>& values) {
  BeginArray(key, kInt32, values.size());
  for (const int32_t value : values) Put(value, bytes_);
}

int64_t GgufTensorInfo::size_bytes() const {
  int64_t n_elements = 1;
  for (const int64_t dim : dims) n_elements *= dim;
  const StorageTypeInfo& info = Info(type);
  return n_elements / info.block_elements * info.block_bytes;
}

absl::StatusOr<std::unique_ptr<GgufWriter>> GgufWriter::Create(
    const std::string& path, const GgufMetadata& metadata, std::vector<GgufTensorInfo> tensors) {
  std::string head;
  Put(kMagic, head);
  Put(kVersion, head);
  Put<uint64_t>(tensors.size(), head);
  Put<uint64_t>(static_cast<uint64_t>(metadata.count()), head);
  head += metadata.bytes();
  int64_t offset = 0;
  for (const GgufTensorInfo& tensor : tensors) {
    WALSH_CHECK_EQ(tensor.dims[0] % Info(tensor.type).block_elements, 0);
    PutString(tensor.name, head);
    Put(static_cast<uint32_t>(tensor.dims.size()), head);
    for (const int64_t dim : tensor.dims) Put(static_cast<uint64_t>(dim), head);
    Put(Info(tensor.type).ggml_id, head);
    Put(static_cast<uint64_t>(offset), head);
    offset = Aligned(offset + tensor.size_bytes());
  }
  head.resize(static_cast<size_t>(Aligned(static_cast<int64_t>(head.size()))), '\0');
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<OutputFile> file, OutputFile::Create(path));
  WALSH_RETURN_IF_ERROR(file->Append(std::as_bytes(std::span(head))));
  return std::unique_ptr<GgufWriter>(new GgufWriter(std::move(file), std::move(tensors)));
}

absl::Status GgufWriter::Append(std::span<const std::byte> bytes) {
  WALSH_CHECK(current_ < tensors_.size());
  const int64_t size_bytes = tensors_[current_].size_bytes();
  current_bytes_ += static_cast<int64_t>(bytes.size());
  WALSH_CHECK(current_bytes_ <= size_bytes);
  WALSH_RETURN_IF_ERROR(file_->Append(bytes));
  if (current_bytes_ < size_bytes) return absl::OkStatus();
  ++current_;
  current_bytes_ = 0;
  return Pad();
}

absl::Status GgufWriter::Pad() {
  const std::string zeros(static_cast<size_t>(Aligned(file_->size()) - file_->size()), '\0');
  return file_->Append(std::as_bytes(std::span(zeros)));
}

absl::Status GgufWriter::Finish() {
  WALSH_CHECK_EQ(current_, tensors_.size());
  return file_->Finish();
}

}  // namespace walsh
