// A checkpoint's weights on the device, as they are or folded and rotated.
//
// What is stored arrives through pinned memory, read by several threads while the device works on
// what came before (read_ahead.h): layers one after another, embedding and head in pieces. Tensors
// arrive as they are stored (16 bits, mostly) and are converted there; those of ggml's block
// formats are dequantized on the host.
//
// Nothing waits for the device: what is returned is for work on the context's stream, and values
// that are not finite are found by CheckFinite, which the caller asks before it relies on them.
//
// Source:  worker/rotate/fold.h: what is folded and rotated, and why it is exact
// Errors:  those of worker/io/checkpoint.h; RESOURCE_EXHAUSTED
// Memory:  LayerBytes, VocabularyBytes, StoredBytes; HostBytes
// Threads: used by one thread
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/rotate/rotation.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::PinnedPool;

class WeightLoader {
 public:
  // All but the rotations outlive the loader. `r1` of width hidden, `r2` of width head_dim;
  // identities: none.
  static absl::StatusOr<std::unique_ptr<WeightLoader>> Create(Context* context, PinnedPool* pinned,
                                                              const Checkpoint& checkpoint,
                                                              const rotate::Rotation& r1,
                                                              const rotate::Rotation& r2);
  virtual ~WeightLoader() = default;

  // Layer `index` as it is stored. The next one is read meanwhile; any order works.
  virtual absl::StatusOr<DeviceLayer<float>> Layer(int64_t index) = 0;
  // Folds the norms and rotates; nothing when r1 is the identity.
  virtual absl::Status Rotate(DeviceLayer<float>& layer) = 0;

  // [vocab, hidden], [hidden], [vocab, hidden]. RotateHead folds the final norm and rotates.
  virtual absl::StatusOr<DeviceBuffer<float>> Embedding() = 0;
  virtual absl::StatusOr<DeviceBuffer<float>> FinalNorm() = 0;
  virtual absl::StatusOr<DeviceBuffer<float>> Head() = 0;
  // The head rounded to bf16, never there in floats as a whole.
  virtual absl::StatusOr<DeviceBuffer<bf16>> RoundedHead() = 0;
  // The embedding's rows of `ids`, [ids, hidden]; no others are read.
  virtual absl::StatusOr<DeviceBuffer<float>> Embedded(std::span<const int32_t> ids) = 0;
  // All rows of the embedding, or some.
  virtual absl::Status RotateEmbedding(DeviceBuffer<float>& rows) = 0;
  virtual absl::Status RotateHead(const DeviceBuffer<float>& final_norm,
                                  DeviceBuffer<float>& head) = 0;
  // That the calls above have waited for reading so far.
  virtual double seconds_waited() const = 0;
  // Waits for all that was converted; DATA_LOSS names the tensor and the index of a value in it
  // that is not finite.
  virtual absl::Status CheckFinite() = 0;
  // Whether anything is folded and rotated.
  virtual bool is_rotated() const = 0;

  // On the device: a layer in floats, embedding or head in floats, what is stored on its way there.
  // On the host: the pinned memory, and what is dequantized there.
  static int64_t LayerBytes(const LayerShape& shape);
  static int64_t VocabularyBytes(const ModelConfig& config);
  static int64_t StoredBytes(const LayerShape& shape);
  static int64_t HostBytes(const LayerShape& shape);
};

}  // namespace walsh::pipeline::cuda
