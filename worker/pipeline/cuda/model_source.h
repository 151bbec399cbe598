// A model whose layers come to the device in bf16, one after another: a checkpoint as it is, or an
// artifact's stored integers, dequantized. What is stored is read ahead (read_ahead.h), and nothing
// waits for the device.
//
// Errors:  those of worker/io/checkpoint.h, worker/io/artifact.h and the device
// Memory:  what a WeightLoader takes, at most
// Threads: used by one thread
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/pipeline/cuda/weight_loader.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::PinnedPool;

class ModelSource {
 public:
  virtual ~ModelSource() = default;
  // The embedding's rows of `ids`, [ids, hidden].
  virtual absl::StatusOr<DeviceBuffer<float>> Embedded(std::span<const int32_t> ids) = 0;
  virtual absl::StatusOr<DeviceLayer<bf16>> Layer(int64_t index) = 0;
  virtual absl::StatusOr<DeviceBuffer<float>> FinalNorm() = 0;  // [hidden]
  virtual absl::StatusOr<DeviceBuffer<bf16>> Head() = 0;        // [vocab, hidden]
  // Waits for all of them; DATA_LOSS names a value that is not finite.
  virtual absl::Status CheckFinite() = 0;
};

// All outlive the source.
std::unique_ptr<ModelSource> MakeCheckpointSource(Context* context, WeightLoader* loader);
absl::StatusOr<std::unique_ptr<ModelSource>> MakeArtifactSource(Context* context,
                                                                PinnedPool* pinned,
                                                                const ArtifactReader& artifact);

// `values` rounded to bf16.
absl::StatusOr<DeviceBuffer<bf16>> ToBf16(Context& context, const DeviceBuffer<float>& values);

}  // namespace walsh::pipeline::cuda
