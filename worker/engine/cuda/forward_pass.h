// A model's forward pass on the device, for rows of several sequences at once.
//
//   h = embedding of the rows' tokens
//   each layer:  q, k, v = norm(h) · W;  rotary embedding; k, v to the pool;  h += attention · W
//                h += (SiLU(norm(h) · W) ⊙ (norm(h) · W)) · W
//                (Gemma 3: GELU for SiLU, and a norm of each of the two before it is added)
//   logits = norm(h) · head, of the rows that are asked for
//
// How products are made, products.h says.
//
// Shapes:  hidden [n_rows, hidden] in fp32; activations in bf16
// Errors:  INVALID_ARGUMENT for what a kernel does not take; RESOURCE_EXHAUSTED; the device's
// Memory:  allocated by Create
// Threads: used by one thread; asynchronous on the context's stream
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/cuda/device_weights.h"
#include "worker/engine/cuda/kv_storage.h"
#include "worker/engine/cuda/products.h"
#include "worker/io/model_config.h"
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
    bool batch_invariant = false;  // rows do not depend on others
  };
  // All outlive the pass.
  static absl::StatusOr<ForwardPass> Create(Context* context, const ModelConfig* config,
                                            const DeviceWeights* weights, const Limits& limits);

  // Device memory that Create allocates beside the KV pool.
  static int64_t StepBytes(const ModelConfig& config, const DeviceWeights& weights,
                           const Limits& limits);

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

 private:
  static constexpr int64_t kLogitsAlignment = 4;  // of ArgMax

  ForwardPass(Context* context, const ModelConfig* config, const DeviceWeights* weights,
              const Limits& limits)
      : context_(context),
        config_(config),
        weights_(weights),
        limits_(limits),
        products_(context, config, weights,
                  {.n_rows = limits.n_rows, .batch_invariant = limits.batch_invariant}),
        logits_stride_((config->vocab + kLogitsAlignment - 1) / kLogitsAlignment *
                       kLogitsAlignment) {}
  absl::Status Allocate();
  // Calls visit(buffer, its elements) for all but the KV pool.
  template <typename Visit>
  void ForEachBuffer(Visit&& visit);
  kernels::cuda::KvPoolLayer PoolOf(int64_t layer);

  absl::Status Layer(int64_t index, const Rows& rows);
  absl::Status Attend(int64_t index, const Rows& rows);
  // Where sublayers write: into the residual stream, or beside it where they have norms of their
  // own.
  float* SublayerOutput();
  // hidden += norm(output), in that case.
  absl::Status AddOutput(const DeviceBuffer<float>& output_norm, int64_t n_rows);

  Context* context_;
  const ModelConfig* config_;
  const DeviceWeights* weights_;
  Limits limits_;
  Products products_;

  DeviceBuffer<std::byte> pool_;  // [n_layers, …], a layer as paged_kv.h has it
  DeviceBuffer<float> hidden_, qkv_;
  DeviceBuffer<float> output_;  // of a sublayer, before its norm; empty where there is none
  DeviceBuffer<bf16> q_, attended_;
  DeviceBuffer<float> logits_;
  int64_t logits_stride_;
  DeviceBuffer<unsigned long long> arg_max_workspace_;
};

}  // namespace walsh::engine::cuda
