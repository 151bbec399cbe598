// Products of a pass's rows with a layer's weights, in whichever of three ways suits their number:
//
//   up to 16 rows  weights multiplied as they are (low_bit_matmul.h), in chunks of what it takes; a
//                  row's result has the same bits whatever the others are
//   more           weights dequantized on the way to the tensor cores (low_bit_gemm.h)
//   more than 192  where that cannot be, as a linear was left unquantized or the device has no
//   wgmma:
//                  weights dequantized to memory for each product, which cuBLAS multiplies; up to
//                  there such rows go the first way
//
// Where batches must not matter (Limits::batch_invariant) all rows are multiplied in the first way.
//
// Shapes:  rows of activations and results, row-major
// Errors:  INVALID_ARGUMENT for what a kernel does not take; RESOURCE_EXHAUSTED; the device's
// Memory:  allocated by Allocate
// Threads: used by one thread; asynchronous on the context's stream
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/cuda/device_weights.h"
#include "worker/io/model_config.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/token_tiles.h"

namespace walsh::engine::cuda {

class Products {
 public:
  struct Limits {
    int64_t n_rows = 0;  // of a product
    bool batch_invariant = false;
  };
  // All outlive this.
  Products(Context* context, const ModelConfig* config, const DeviceWeights* weights,
           const Limits& limits);
  // Before all that follows.
  absl::Status Allocate();
  // What it allocates.
  int64_t size_bytes();

  // y = norm(hidden) · Wᵀ, without bias.
  absl::Status Project(const Product& product, const DeviceBuffer<float>& norm, const float* hidden,
                       int64_t n_rows, float* y);
  // y (+)= x · Wᵀ + bias
  absl::Status Output(const Product& product, const bf16* x, int64_t n_rows, float* y,
                      bool accumulate);
  // y (+)= (act(norm(hidden) · gateᵀ) ⊙ (norm(hidden) · upᵀ)) · downᵀ + bias
  absl::Status FeedForward(const LayerWeights& layer, const float* hidden, int64_t n_rows, float* y,
                           bool accumulate);
  // logits = norm(hidden) · headᵀ, `stride` numbers from row to row.
  absl::Status Head(const float* hidden, int64_t n_rows, float* logits, int64_t stride);

 private:
  enum class Way { kFew, kTiles, kDequantized };
  // What is multiplied: rows of the residual stream through a norm, rows of bf16, or tiles that
  // hold either.
  struct Input {
    const float* hidden = nullptr;
    const DeviceBuffer<float>* norm = nullptr;
    const bf16* x = nullptr;
    kernels::cuda::TokenTiles tiles;
  };

  // Calls visit(buffer, its elements) for all.
  template <typename Visit>
  void ForEachBuffer(Visit&& visit);
  Way WayOf(int64_t n_rows, bool is_quantized) const;
  Way WayOf(const Product& product, int64_t n_rows) const;
  float eps() const { return static_cast<float>(config_->rms_norm_eps); }

  // Each of the three.
  absl::Status MultiplyFew(const Product& product, const Input& input, int64_t n_rows, float* y,
                           bool accumulate, bool has_bias);
  absl::Status MultiplyTiles(const Product& product, const Input& input, int64_t n_rows, float* y,
                             bool accumulate, bool has_bias);
  absl::Status MultiplyDequantized(const Product& product, const Input& input, int64_t n_rows,
                                   float* y, bool accumulate, bool has_bias);
  absl::Status Multiply(const Product& product, const Input& input, int64_t n_rows, float* y,
                        bool accumulate, bool has_bias);
  // What down multiplies.
  absl::StatusOr<Input> Activate(const LayerWeights& layer, const Input& input, int64_t n_rows);
  absl::Status ActivateFew(const Product& gate_up, const Input& input, int64_t n_rows, bf16* y);
  absl::Status ActivateTiles(const Product& gate_up, const Input& input, int64_t n_rows, bf16* y,
                             const kernels::cuda::TokenTiles& y_tiles);
  absl::Status ActivateDequantized(const Product& gate_up, const Input& input, int64_t n_rows,
                                   bf16* y);
  // How pairs of rows become what down reads.
  kernels::cuda::LowBitOutput GatedOutput() const;
  // y = act(gate) ⊙ up of what lies in gate_ and up_.
  absl::Status ActivatePair(int64_t n, bf16* y);

  // A product of n rows of the input from `first` on, with what it needs of this.
  kernels::cuda::LowBitMatmulParams FewParams(const ServingMatrix& weights, const Input& input,
                                              int64_t cols, int64_t first, int64_t n);
  // That of a part, quantized or not.
  absl::Status RunFew(const Product& product, const Product::Part& part,
                      kernels::cuda::LowBitMatmulParams params);
  // The input as the tensor cores want it, and as a part of a product does; valid until the next
  // call.
  absl::StatusOr<kernels::cuda::TokenTiles> Tiles(const Input& input, int64_t n_rows, int64_t cols,
                                                  const int32_t* order, int64_t rotation_block);
  absl::StatusOr<kernels::cuda::TokenTiles> TilesOf(const Product& product,
                                                    const Product::Part& part, const Input& input,
                                                    int64_t n_rows);
  absl::StatusOr<const bf16*> Rows(const Product& product, const Input& input, int64_t n_rows);
  absl::StatusOr<const bf16*> Transformed(const Product& product, const Product::Part& part,
                                          const bf16* x, int64_t n_rows);
  // The product's weights in bf16, [rows, cols], valid until the next call.
  absl::StatusOr<const bf16*> Dequantized(const Product& product);

  Context* context_;
  const ModelConfig* config_;
  const DeviceWeights* weights_;
  Limits limits_;
  bool has_gemm_;

  DeviceBuffer<bf16> activation_;      // [n_rows, intermediate]
  DeviceBuffer<std::byte> workspace_;  // of products of few rows
  // Of the second way: tiles of an input, and of what gate and up make.
  int64_t capacity_;
  DeviceBuffer<bf16> tiles_, activation_tiles_;
  // Of the third; empty where no pass has so many rows.
  DeviceBuffer<bf16> normed_, transformed_, bf16_weights_;
  DeviceBuffer<bf16> gate_, up_;  // also of pairs that are apart
};

}  // namespace walsh::engine::cuda
