#include "tests/testing/checkpoint_bytes.h"

#include <fstream>

#include "common/check.h"
#include "worker/tensor/half.h"

namespace walsh::testing {
namespace {

constexpr size_t kAlignment = 32;

void PadTo(std::string& bytes, size_t alignment) {
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment, '\0');
}

std::string GgufString(std::string_view text) {
  return Raw(static_cast<uint64_t>(text.size())) + std::string(text);
}

std::string ArrayHead(uint32_t type, size_t count) {
  return Raw(type) + Raw(static_cast<uint64_t>(count));
}

}  // namespace

std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  return Raw(static_cast<uint64_t>(header.size())) + std::string(header) + std::string(data);
}

std::string FloatBytes(const std::vector<float>& values, std::string_view dtype) {
  std::string bytes;
  for (const float value : values) {
    if (dtype == "F16") {
      bytes += Raw(FloatToHalf(value));
    } else if (dtype == "BF16") {
      bytes += Raw(FloatToBf16(value));
    } else {
      WALSH_CHECK_EQ(dtype, "F32");
      bytes += Raw(value);
    }
  }
  return bytes;
}

void WriteFile(const std::string& path, std::string_view contents) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(contents.data(), static_cast<std::streamsize>(contents.size()));
  out.close();
  WALSH_CHECK(out.good());
}

GgufBuilder& GgufBuilder::RawValue(std::string_view key, uint32_t type, std::string_view value) {
  metadata_ += GgufString(key) + Raw(type) + std::string(value);
  ++n_keys_;
  return *this;
}

GgufBuilder& GgufBuilder::String(std::string_view key, std::string_view value) {
  return RawValue(key, 8, GgufString(value));
}
GgufBuilder& GgufBuilder::Uint32(std::string_view key, uint32_t value) {
  return RawValue(key, 4, Raw(value));
}
GgufBuilder& GgufBuilder::Int32(std::string_view key, int32_t value) {
  return RawValue(key, 5, Raw(value));
}
GgufBuilder& GgufBuilder::Float32(std::string_view key, float value) {
  return RawValue(key, 6, Raw(value));
}
GgufBuilder& GgufBuilder::Bool(std::string_view key, bool value) {
  return RawValue(key, 7, value ? std::string(1, '\1') : std::string(1, '\0'));
}

GgufBuilder& GgufBuilder::Strings(std::string_view key, const std::vector<std::string>& values) {
  std::string bytes = ArrayHead(8, values.size());
  for (const std::string& value : values) bytes += GgufString(value);
  return RawValue(key, 9, bytes);
}
GgufBuilder& GgufBuilder::Floats(std::string_view key, const std::vector<float>& values) {
  std::string bytes = ArrayHead(6, values.size());
  for (const float value : values) bytes += Raw(value);
  return RawValue(key, 9, bytes);
}
GgufBuilder& GgufBuilder::Ints(std::string_view key, const std::vector<int32_t>& values) {
  std::string bytes = ArrayHead(5, values.size());
  for (const int32_t value : values) bytes += Raw(value);
  return RawValue(key, 9, bytes);
}

GgufBuilder& GgufBuilder::RawTensor(std::string_view name, const std::vector<uint64_t>& dims,
                                    uint32_t type, uint64_t offset) {
  infos_ += GgufString(name) + Raw(static_cast<uint32_t>(dims.size()));
  for (const uint64_t dim : dims) infos_ += Raw(dim);
  infos_ += Raw(type) + Raw(offset);
  ++n_tensors_;
  return *this;
}

GgufBuilder& GgufBuilder::Tensor(std::string_view name, const std::vector<uint64_t>& dims,
                                 uint32_t type, std::string_view data) {
  RawTensor(name, dims, type, data_.size());
  data_ += data;
  PadTo(data_, kAlignment);
  return *this;
}

GgufBuilder& GgufBuilder::Version(uint32_t version) {
  version_ = version;
  return *this;
}

GgufBuilder& GgufBuilder::Counts(uint64_t n_tensors, uint64_t n_keys) {
  has_counts_ = true;
  counts_[0] = n_tensors;
  counts_[1] = n_keys;
  return *this;
}

std::string GgufBuilder::Build() const {
  std::string bytes = "GGUF" + Raw(version_) + Raw(has_counts_ ? counts_[0] : n_tensors_) +
                      Raw(has_counts_ ? counts_[1] : n_keys_) + metadata_ + infos_;
  if (!data_.empty()) {
    PadTo(bytes, kAlignment);
    bytes += data_;
  }
  return bytes;
}

}  // namespace walsh::testing
