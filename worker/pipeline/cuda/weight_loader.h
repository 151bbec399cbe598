// A checkpoint's weights on the device, as they are or folded and rotated.
//
// A thread reads the next layer into pinned memory and copies it over while the device works on the
// running one; tensors arrive as they are stored (16 bits, mostly) and are converted there. Those
// of ggml's block formats are dequantized on the host.
//
// Source:  worker/rotate/fold.h: what is folded and rotated, and why it is exact
// Errors:  those of worker/io/checkpoint.h; DATA_LOSS names the tensor and the index of a value
// that
//          is not finite; RESOURCE_EXHAUSTED
// Memory:  LayerBytes, SlabsBytes, VocabularyBytes; PinnedBytes
// Threads: used by one thread
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/rotate/rotation.h"

namespace walsh::pipeline::cuda {

// Threads that read the tensors of a layer: pread copies out of the page cache at a few GB/s a
// thread, the device takes fifty.
inline constexpr int kReaders = 8;

class WeightLoader {
 public:
  // All outlive the loader. `r1` of width hidden, `r2` of width head_dim; identities: none.
  static absl::StatusOr<std::unique_ptr<WeightLoader>> Create(Context* context,
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
  virtual absl::Status RotateEmbedding(DeviceBuffer<float>& embedding) = 0;
  virtual absl::Status RotateHead(const DeviceBuffer<float>& final_norm,
                                  DeviceBuffer<float>& head) = 0;
  // That the calls above have waited for reading so far.
  virtual double seconds_waited() const = 0;
  // Whether anything is folded and rotated.
  virtual bool is_rotated() const = 0;

  // On the device: a layer in floats, the stored forms of two, and embedding or head while it is
  // converted. In pinned memory of the host: two stored layers.
  static int64_t LayerBytes(const LayerShape& shape);
  static int64_t SlabsBytes(const LayerShape& shape);
  static int64_t VocabularyBytes(const ModelConfig& config);
  static int64_t PinnedBytes(const LayerShape& shape);
};

}  // namespace walsh::pipeline::cuda
