// How weights are stored in checkpoints, and what they mean as floats.
//
// Three scalar formats (safetensors and GGUF) and the block formats of ggml: a row is a sequence of
// blocks of 32 or 256 elements, each with its own scale.
//
// Source:  ggml's block layouts (ggml-common.h) and reference dequantization (ggml-quants.c);
//          golden against the Python package gguf (tests/golden/io)
// Units:   block_bytes counts the bytes of block_elements elements
// Threads: safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace walsh {

enum class StorageType {
  kF32,
  kF16,
  kBf16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};

struct StorageTypeInfo {
  std::string_view name;       // as safetensors and ggml spell it: "BF16", "Q4_K"
  uint32_t ggml_id = 0;        // enum ggml_type
  int64_t block_elements = 0;  // 1, 32 or 256
  int64_t block_bytes = 0;
};

const StorageTypeInfo& Info(StorageType type);
// nullopt when `ggml_id` is a type that walsh does not read.
std::optional<StorageType> StorageTypeFromGgml(uint32_t ggml_id);
// ggml's own name of a type, read by walsh or not; "unknown" for numbers beyond its list.
std::string_view GgmlTypeName(uint32_t ggml_id);

// `values` is a whole number of blocks and `stored` exactly their bytes; neither needs alignment.
void Dequantize(StorageType type, std::span<const std::byte> stored, std::span<float> values);

}  // namespace walsh
