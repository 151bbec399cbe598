// Quantized weights in the layout that the CPU's integer dot products read, made at load.
//
// Weights stay packed in memory (2, 3, 4 or 8 bits) and are multiplied packed: activations are
// quantized to int8 per token and group of columns, products are summed in int32 per group, zero
// points enter through the activations' group sums. The layout is private to worker/kernels/cpu.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/tensor/matrix.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::kernels {

class PackedMatrix {
 public:
  static absl::StatusOr<PackedMatrix> Pack(const QuantizedMatrix& matrix);
  // Rounds a dense matrix to 8 bits, symmetric, per group of 32 columns: for lm_head.
  static absl::StatusOr<PackedMatrix> PackDense8(const Matrix& matrix);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int bits() const { return bits_; }
  int64_t group_size() const { return group_size_; }
  // Everything that a multiplication by one token reads.
  int64_t size_bytes() const;
  // The weights as floats, exactly: scale · (code − zero).
  Matrix Dequantize() const;

  struct Storage;
  const Storage& storage() const { return *storage_; }

 private:
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  int bits_ = 0;
  int64_t group_size_ = 0;
  std::shared_ptr<const Storage> storage_;
};

// y[n_tokens, out] = x[n_tokens, in] · dequantized(W)ᵀ + bias, with x rounded to int8 first.
struct PackedMatmulParams {
  int64_t n_tokens = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const PackedMatrix* weights = nullptr;
  const float* bias = nullptr;  // [out] or null
  float* y = nullptr;
  int64_t y_stride = 0;
};

}  // namespace walsh::kernels
