// A model's forward pass on the device, for rows of several sequences at once.
//
//   h = embedding of the rows' tokens
//   each layer:  q, k, v = norm(h) · W;  rotary embedding; k, v to the pool;  h += attention · W
//                h += (SiLU(norm(h) · W) ⊙ (norm(h) · W)) · W
//                (Gemma 3: GELU for SiLU, and a norm of each of the two before it is added)
//   logits = norm(h) · head, of the rows that are asked for
//
// Up to kChunkedRowsMax rows the quantized weights are multiplied as they are (low_bit_matmul.h),
// and a row's result has the same bits whatever the others are. More rows are multiplied by cuBLAS
// with weights that are dequantized to bf16 for them: there are enough to pay for it. Not where
// batches must not matter (Limits::batch_invariant), as cuBLAS' order of sums depends on their
// size.
//
// Shapes:  hidden [n_rows, hidden] in fp32; activations in bf16
// Errors:  INVALID_ARGUMENT for what a kernel does not take; RESOURCE_EXHAUSTED; the device's
// Memory:  allocated by Create
// Threads: used by one thread; asynchronous on the context's stream
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/cuda/device_weights.h"
#include "worker/engine/cuda/kv_storage.h"
#include "worker/io/model_config.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/paged_attention.h"
#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/sample_rows.h"

namespace walsh::engine::cuda {

class ForwardPass {
 public:
  struct Limits {
    int64_t n_rows = 0;            // of a pass
    int64_t n_logits = 0;          // rows of logits at once
    int64_t n_blocks = 0;          // of the KV pool
    KvStorage kv;                  // how it stores
    bool batch_invariant = false;  // no row is multiplied by cuBLAS
  };
  // All outlive the pass.
  static absl::StatusOr<ForwardPass> Create(Context* context, const ModelConfig* config,
                                            const DeviceWeights* weights, const Limits& limits);

  struct Rows {
    int64_t n = 0;
    // [n] on the device; −1 − i: the token at made[i].
    const int32_t* tokens = nullptr;
    const int32_t* made = nullptr;
    kernels::cuda::KvBatch kv;  // all n rows
    bool is_decode = false;     // a row for each sequence
  };
  absl::Status Layers(const Rows& rows);
  // Logits of rows of `hidden` [n, hidden], in logits() from `first` on, and their tokens in
  // choice.ids: the positions of their largest, or where choice.rows is set what SampleRows makes
  // of it. Logits and their sizes are filled in here.
  absl::Status Head(const float* hidden, int64_t n, int64_t first,
                    kernels::cuda::SampleRowsParams choice);

  // What Layers left.
  const float* hidden() const { return hidden_.data(); }
  const float* logits(int64_t row) const { return logits_.data() + row * logits_stride_; }
  int64_t kv_bytes() const { return pool_.size_bytes(); }

  // Three products of as many rows as LowBitMatmul takes.
  static constexpr int64_t kChunkedRowsMax = 192;

 private:
  ForwardPass(Context* context, const ModelConfig* config, const DeviceWeights* weights,
              const Limits& limits)
      : context_(context), config_(config), weights_(weights), limits_(limits) {}
  // Whether n rows are worth dequantizing the weights for.
  bool AreMany(int64_t n) const { return n > kChunkedRowsMax && !limits_.batch_invariant; }
  absl::Status Allocate();
  kernels::cuda::KvPoolLayer PoolOf(int64_t layer);

  absl::Status Layer(int64_t index, const Rows& rows);
  absl::Status Attend(int64_t index, const Rows& rows);
  // normed = RMSNorm of what is in hidden
  absl::Status Norm(const DeviceBuffer<float>& weight, int64_t n_rows);
  // A product of n rows with what it needs of this pass; and one of the norm of `hidden`.
  kernels::cuda::LowBitMatmulParams Multiply(const ServingMatrix& weights, int64_t n);
  kernels::cuda::LowBitMatmulParams MultiplyNormed(const ServingMatrix& weights,
                                                   const DeviceBuffer<float>& norm,
                                                   const float* hidden, int64_t n);
  // The same of a part of a product, whose input is transformed on the way.
  kernels::cuda::LowBitMatmulParams Multiply(const Product& product, const Product::Part& part,
                                             int64_t n);
  kernels::cuda::LowBitMatmulParams MultiplyNormed(const Product& product,
                                                   const Product::Part& part,
                                                   const DeviceBuffer<float>& norm,
                                                   const float* hidden, int64_t n);
  // The product of a part, quantized or not.
  absl::Status Run(const Product::Part& part, const kernels::cuda::LowBitMatmulParams& params);
  void AddNorm(const DeviceBuffer<float>& norm, const float* hidden,
               kernels::cuda::LowBitMatmulParams& params) const;
  // y (+)= x · Wᵀ of many rows, by cuBLAS, without bias.
  absl::Status MultiplyMany(const Product& product, const bf16* x, int64_t n_rows, float* y,
                            bool accumulate);
  // x as a part wants its columns; valid until the next call.
  absl::StatusOr<const bf16*> Transformed(const Product& product, const Product::Part& part,
                                          const bf16* x, int64_t n_rows);
  // y = norm(hidden) · Wᵀ without bias.
  absl::Status Project(const Product& product, const DeviceBuffer<float>& norm, int64_t n_rows,
                       float* y);
  // hidden += x · Wᵀ + bias, through `output_norm` where the family has one
  absl::Status AddTo(const Product& product, const DeviceBuffer<float>& output_norm, const bf16* x,
                     int64_t n_rows, float* hidden);
  // y (+)= x · Wᵀ + bias
  absl::Status Output(const Product& product, const bf16* x, int64_t n_rows, float* y,
                      bool accumulate);
  // y = act(norm(hidden) · gateᵀ) ⊙ (norm(hidden) · upᵀ)
  absl::Status GateUp(const Product& product, const DeviceBuffer<float>& norm, int64_t n_rows,
                      bf16* y);
  absl::Status GateUpOfMany(const Product& product, const DeviceBuffer<float>& norm, int64_t n_rows,
                            bf16* y);
  // y = act(gate) ⊙ up of what lies in gate_ and up_
  absl::Status Activate(int64_t n, bf16* y);
  // The product's weights in bf16, [rows, cols], valid until the next call.
  absl::StatusOr<const bf16*> Dequantized(const Product& product);

  Context* context_;
  const ModelConfig* config_;
  const DeviceWeights* weights_;
  Limits limits_;

  DeviceBuffer<std::byte> pool_;  // [n_layers, …], a layer as paged_kv.h has it
  DeviceBuffer<float> hidden_, qkv_;
  DeviceBuffer<float> output_;  // of a sublayer, before its norm; empty where there is none
  DeviceBuffer<bf16> normed_, q_, attended_, gate_, up_, activation_;
  DeviceBuffer<bf16> bf16_weights_;  // of the largest product; empty where no pass has so many rows
  DeviceBuffer<bf16> transformed_;   // of the widest input that is; empty likewise
  DeviceBuffer<std::byte> workspace_;  // of products
  DeviceBuffer<float> logits_;
  int64_t logits_stride_ = 0;
  DeviceBuffer<unsigned long long> arg_max_workspace_;
};

}  // namespace walsh::engine::cuda
