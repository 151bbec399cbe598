// A checkpoint with its norms folded and its rotations applied, one layer at a time.
//
// Without a rotation of the residual stream the norms stay where they are, and without any the
// weights are the checkpoint's own.
// Rotations that are done at run time are folded into the weights after them, and its layers do
// them.
//
// Source:  worker/rotate/fold.h
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/evaluate/layer_source.h"
#include "worker/kernels/thread_pool.h"
#include "worker/rotate/rotation.h"

namespace walsh::pipeline {

class RotatedSource : public evaluate::LayerSource {
 public:
  // All outlive the source. `r1` has the width of the residual stream, `r2` that of a head;
  // `online` (null: none) rotates only.
  RotatedSource(const Checkpoint& checkpoint, const rotate::Rotation& r1,
                const rotate::Rotation& r2, ThreadPool& pool,
                std::shared_ptr<const OnlineForward> online = nullptr)
      : original_(checkpoint), r1_(r1), r2_(r2), pool_(pool), online_(std::move(online)) {}

  const ModelConfig& config() const override { return original_.config(); }
  absl::StatusOr<Matrix> Embedding() override;
  absl::StatusOr<DecoderLayer> Layer(int64_t index) override;
  absl::StatusOr<std::vector<float>> FinalNorm() override;
  absl::StatusOr<Matrix> Head() override;

  // The same, for a caller that has the original layer already.
  void RotateLayer(DecoderLayer& layer);

 private:
  evaluate::CheckpointSource original_;
  const rotate::Rotation& r1_;
  const rotate::Rotation& r2_;
  ThreadPool& pool_;
  const std::shared_ptr<const OnlineForward> online_;
};

// A linear of a layer that was loaded as floats.
DenseLinear& Dense(const std::unique_ptr<Linear>& linear);

}  // namespace walsh::pipeline
