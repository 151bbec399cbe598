// The run-time transforms of one model (worker/io/online_transforms.h), ready to be applied.
//
// Part of a decoder layer, so that everything that runs a layer (calibration, the rotation's gate,
// evaluation, serving) does the same:
//
//   PrepareInput      x ← Q(x)              inputs of q, k, v, o, gate and up
//   PrepareDownInput  x ← Q(x · R4)         input of down_proj, whose weights are W · R4
//   PrepareHeads      q ← q · R3 by head, k ← Q(k · R3), v ← Q(v); R3 cancels in q · kᵀ
//
// Q rounds to a grid and back (kernels::FakeQuantize). K and V are rounded before they are stored,
// so a cache holds floats that are the values of the grid. Blocks of a power of two are transformed
// in floats by kernels::BlockWalsh, others in double by rotate::Rotation.
//
// Source:  QuaRot (arXiv 2404.00456) section 4
// Threads: const methods are safe from several threads
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/model_config.h"
#include "worker/io/online_transforms.h"
#include "worker/kernels/kernels.h"
#include "worker/rotate/rotation.h"

namespace walsh {

class OnlineForward {
 public:
  // Null where there is nothing to do. INVALID_ARGUMENT: transforms that do not fit the model, or
  // whose Hadamard matrix does not exist.
  static absl::StatusOr<std::shared_ptr<const OnlineForward>> Create(
      const OnlineTransforms& transforms, const ModelConfig& config);

  const OnlineTransforms& transforms() const { return transforms_; }
  // R4, to be folded into down_proj; the identity where there is none.
  const rotate::Rotation& down_rotation() const { return down_; }

  // In place; x [n_tokens, width], contiguous.
  absl::Status PrepareInput(float* x, int64_t n_tokens, int64_t width,
                            const kernels::Stream& stream) const;
  // x [n_tokens, intermediate].
  absl::Status PrepareDownInput(float* x, int64_t n_tokens, const kernels::Stream& stream) const;
  // q [n_tokens, q_width], k and v [n_tokens, kv_width], after RoPE.
  absl::Status PrepareHeads(float* q, float* k, float* v, int64_t n_tokens,
                            const kernels::Stream& stream) const;

 private:
  OnlineForward() = default;

  OnlineTransforms transforms_;
  int64_t intermediate_ = 0, q_width_ = 0, kv_width_ = 0, head_dim_ = 0;
  rotate::Rotation down_, head_;
};

}  // namespace walsh
