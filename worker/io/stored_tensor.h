// A tensor's place in a file, and reading it: as floats, or as it is stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/random_access_file.h"
#include "worker/io/storage_type.h"
#include "worker/tensor/matrix.h"

namespace walsh {

struct StoredTensor {
  std::string name;  // as the file has it, for messages
  StorageType type = StorageType::kF32;
  int64_t offset = 0;  // of the first byte in the file
  int64_t rows = 0;    // 1 for a 1-D tensor
  int64_t cols = 0;
  bool is_one_dimensional = false;
  // GGUF stores Q and K for interleaved RoPE: within each of this many heads, row 2·i + j is HF's
  // row j·(head_dim/2) + i. 0: rows are in HF's order. (A 1-D bias is permuted by elements.)
  int64_t n_interleaved_heads = 0;
  // Added to each value that is read: ModelConfig::norm_offset, where the file leaves it out.
  float added = 0;

  int64_t row_bytes() const { return cols / Info(type).block_elements * Info(type).block_bytes; }
  int64_t size_bytes() const { return rows * row_bytes(); }
};

// Rows [first, first + n) in HF's order. The file is examined for changes after reading.
//
// Errors: INVALID_ARGUMENT rows outside the tensor; DATA_LOSS file changed, or a value is not
//         finite (tensor and index named); RESOURCE_EXHAUSTED no memory
absl::StatusOr<Matrix> ReadStoredRows(const RandomAccessFile& file, const StoredTensor& tensor,
                                      int64_t first, int64_t n);

// The bytes of rows [first, first + n), straight into `bytes`, which has exactly their number; rows
// (elements of a permuted bias) in HF's order. The file is examined for changes after reading,
// values are not.
//
// Errors: INVALID_ARGUMENT rows outside the tensor, another number of bytes; DATA_LOSS file
//         changed; UNIMPLEMENTED a permuted bias in blocks, whose elements cannot change places,
//         and a tensor whose values get something added
absl::Status ReadStoredBytes(const RandomAccessFile& file, const StoredTensor& tensor,
                             int64_t first, int64_t n, std::span<std::byte> bytes);

// DATA_LOSS: `value` is not finite, at `index` of the elements that follow `first_row`.
absl::Status NotFiniteError(const RandomAccessFile& file, const StoredTensor& tensor,
                            int64_t first_row, int64_t index, float value);

}  // namespace walsh
