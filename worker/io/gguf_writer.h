// Writes one GGUF file, version 3, little-endian: metadata, tensor infos, tensors without gaps.
//
// Infos stand before the data, so all tensors are announced first and their bytes follow in that
// order. Nothing but the metadata is held in memory.
//
// Source:  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
// Errors:  those of worker/io/output_file.h
// Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/output_file.h"
#include "worker/io/storage_type.h"

namespace walsh {

// Typed key-value pairs, in the order in which they are set; a key is set once.
class GgufMetadata {
 public:
  void SetString(std::string_view key, std::string_view value);
  void SetUint32(std::string_view key, uint32_t value);
  void SetFloat32(std::string_view key, float value);
  void SetBool(std::string_view key, bool value);
  void SetStrings(std::string_view key, const std::vector<std::string>& values);
  void SetFloats(std::string_view key, const std::vector<float>& values);
  void SetInts(std::string_view key, const std::vector<int32_t>& values);

  int64_t count() const { return count_; }
  const std::string& bytes() const { return bytes_; }

 private:
  void BeginValue(std::string_view key, uint32_t type);
  void BeginArray(std::string_view key, uint32_t type, size_t n);

  int64_t count_ = 0;
  std::string bytes_;
};

struct GgufTensorInfo {
  std::string name;
  std::vector<int64_t> dims;  // fastest first; dims[0] is a whole number of the type's blocks
  StorageType type = StorageType::kF32;

  int64_t size_bytes() const;
};

class GgufWriter {
 public:
  // Creates `path`, which must not exist, and writes everything but the tensors' data.
  static absl::StatusOr<std::unique_ptr<GgufWriter>> Create(const std::string& path,
                                                            const GgufMetadata& metadata,
                                                            std::vector<GgufTensorInfo> tensors);
  // The next bytes of the first tensor that is not complete; never beyond its end.
  absl::Status Append(std::span<const std::byte> bytes);
  // All tensors are complete.
  absl::Status Finish();

  int64_t size() const { return file_->size(); }

 private:
  GgufWriter(std::unique_ptr<OutputFile> file, std::vector<GgufTensorInfo> tensors)
      : file_(std::move(file)), tensors_(std::move(tensors)) {}
  absl::Status Pad();

  const std::unique_ptr<OutputFile> file_;
  const std::vector<GgufTensorInfo> tensors_;
  size_t current_ = 0;
  int64_t current_bytes_ = 0;  // written of it
};

}  // namespace walsh
