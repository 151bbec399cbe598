// A model that is read one layer at a time: a checkpoint as it is, or an artifact's stored
// integers.
//
// What streams through it (perplexity, the equivalence gate, calibration) needs the memory of one
// layer, whatever the model's size. Each call reads from disk again and the caller owns the result.
//
// Errors:  those of worker/io/checkpoint.h and worker/io/artifact.h
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/model/decoder_layer.h"
#include "worker/tensor/matrix.h"

namespace walsh::evaluate {

class LayerSource {
 public:
  virtual ~LayerSource() = default;
  virtual const ModelConfig& config() const = 0;
  virtual absl::StatusOr<Matrix> Embedding() = 0;  // [vocab, hidden]
  virtual absl::StatusOr<DecoderLayer> Layer(int64_t index) = 0;
  virtual absl::StatusOr<std::vector<float>> FinalNorm() = 0;  // [hidden]; empty: ones
  virtual absl::StatusOr<Matrix> Head() = 0;                   // [vocab, hidden]
};

// A checkpoint's own weights in floats.
class CheckpointSource : public LayerSource {
 public:
  explicit CheckpointSource(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}
  const ModelConfig& config() const override { return checkpoint_.config(); }
  absl::StatusOr<Matrix> Embedding() override;
  absl::StatusOr<DecoderLayer> Layer(int64_t index) override;
  absl::StatusOr<std::vector<float>> FinalNorm() override;
  absl::StatusOr<Matrix> Head() override;

 private:
  const Checkpoint& checkpoint_;
};

// An artifact's weights, dequantized: exactly what its integers and scales stand for, act-order's
// columns at their inputs; its layers do its online transforms.
class ArtifactSource : public LayerSource {
 public:
  explicit ArtifactSource(const ArtifactReader& artifact) : artifact_(artifact) {}
  const ModelConfig& config() const override { return artifact_.config(); }
  absl::StatusOr<Matrix> Embedding() override;
  absl::StatusOr<DecoderLayer> Layer(int64_t index) override;
  absl::StatusOr<std::vector<float>> FinalNorm() override;
  absl::StatusOr<Matrix> Head() override;

 private:
  const ArtifactReader& artifact_;
  std::shared_ptr<const OnlineForward>
      online_;  // made with the first layer; null where there is none
};

}  // namespace walsh::evaluate
