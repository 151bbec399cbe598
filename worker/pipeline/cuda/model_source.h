// A model whose layers come to the device in bf16, one after another: a checkpoint as it is, or an
// artifact's stored integers, dequantized.
//
// Errors:  those of worker/io/checkpoint.h, worker/io/artifact.h and the device
// Threads: used by one thread
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/kernels/thread_pool.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/pipeline/cuda/weight_loader.h"

namespace walsh::pipeline::cuda {

class ModelSource {
 public:
  virtual ~ModelSource() = default;
  virtual absl::StatusOr<DeviceBuffer<float>> Embedding() = 0;  // [vocab, hidden]
  virtual absl::StatusOr<DeviceLayer<bf16>> Layer(int64_t index) = 0;
  virtual absl::StatusOr<DeviceBuffer<float>> FinalNorm() = 0;  // [hidden]
  virtual absl::StatusOr<DeviceBuffer<bf16>> Head() = 0;        // [vocab, hidden]
};

// Both outlive the source.
std::unique_ptr<ModelSource> MakeCheckpointSource(Context* context, WeightLoader* loader);
std::unique_ptr<ModelSource> MakeArtifactSource(Context* context, const ArtifactReader& artifact);

// `values` rounded to bf16.
absl::StatusOr<DeviceBuffer<bf16>> ToBf16(Context& context, const DeviceBuffer<float>& values);

}  // namespace walsh::pipeline::cuda
