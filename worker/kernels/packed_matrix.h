// Quantized weights in the layout that the CPU's integer dot products read, made at load.
//
// Weights stay packed in memory (2, 3, 4 or 8 bits) and are multiplied packed: activations are
// rounded to int8, products are summed in int32, zero points enter through the sums of the rounded
// activations. A codebook's four levels are those of two bits h and l of a code,
//   level(2h + l) = L0 + l · (L1 − L0) + h · (L2 − L0) + h l · (L3 − L2 − L1 + L0),
// so that its product is three sums in int32 and that of the activations. The layout is private to
// worker/kernels/cpu.
//
// Rounding of activations, whatever the weights' groups: each token's columns are cut into blocks
// of kActivationBlock from column 0 (the last may be shorter), and in each block
//   scale = max |x| / 127,  code = round-to-nearest-even(x · (127 / max |x|)),
// all in float. A block whose largest magnitude is below 2^-100 is zero; one that holds a value
// that is not finite makes every output of its token NaN.
//
// A row of the result depends on its own token only: alone or in any batch, with any number of
// threads, it has the same bits.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/tensor/matrix.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::kernels {

inline constexpr int64_t kActivationBlock = 32;

class PackedMatrix {
 public:
  // INVALID_ARGUMENT when sizes do not fit together, the group is neither a multiple of 32 nor the
  // whole row, a code or zero is out of range, a scale, level or float zero is not exactly a
  // half-precision number, or a codebook is not of 2 bits.
  static absl::StatusOr<PackedMatrix> Pack(const QuantizedMatrix& matrix);
  // Rounds a dense matrix to 8 bits, symmetric, per group of 32 columns (of the whole row when 32
  // does not divide it): for lm_head. INVALID_ARGUMENT when a value is not finite.
  static absl::StatusOr<PackedMatrix> PackDense8(const Matrix& matrix);

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int bits() const { return bits_; }
  int64_t group_size() const { return group_size_; }
  // Everything that a multiplication by one token reads.
  int64_t size_bytes() const;
  // The weights as floats, exactly what the matrix that was packed stands for.
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
