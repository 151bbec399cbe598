// Bytes of safetensors and GGUF files for tests, valid or not: nothing here checks anything.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace walsh::testing {

// Eight bytes of header length, the header, the data.
std::string SafetensorsBytes(std::string_view header, std::string_view data);

// The little-endian bytes of a number.
template <typename T>
std::string Raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Floats as F32, F16 or BF16 (`dtype`), rounded to nearest even.
std::string FloatBytes(const std::vector<float>& values, std::string_view dtype);

void WriteFile(const std::string& path, std::string_view contents);

// Composes a GGUF file. The typed adders write well-formed entries; the raw ones whatever they get.
class GgufBuilder {
 public:
  GgufBuilder& String(std::string_view key, std::string_view value);
  GgufBuilder& Uint32(std::string_view key, uint32_t value);
  GgufBuilder& Int32(std::string_view key, int32_t value);
  GgufBuilder& Float32(std::string_view key, float value);
  GgufBuilder& Bool(std::string_view key, bool value);
  GgufBuilder& Strings(std::string_view key, const std::vector<std::string>& values);
  GgufBuilder& Floats(std::string_view key, const std::vector<float>& values);
  GgufBuilder& Ints(std::string_view key, const std::vector<int32_t>& values);
  // `type` and `value` as they stand in the file.
  GgufBuilder& RawValue(std::string_view key, uint32_t type, std::string_view value);

  // `dims` fastest first. The data follow the tensor before, rounded up to the alignment.
  GgufBuilder& Tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                      std::string_view data);
  // An info that carries no data, with an offset of the caller's choice.
  GgufBuilder& RawTensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                         uint64_t offset);

  // Fields of the preamble, for broken files; the counts are right unless overridden.
  GgufBuilder& Version(uint32_t version);
  GgufBuilder& Counts(uint64_t n_tensors, uint64_t n_keys);

  std::string Build() const;

 private:
  std::string metadata_;
  std::string infos_;
  std::string data_;
  uint32_t version_ = 3;
  uint64_t n_keys_ = 0;
  uint64_t n_tensors_ = 0;
  bool has_counts_ = false;
  uint64_t counts_[2] = {0, 0};
};

}  // namespace walsh::testing
