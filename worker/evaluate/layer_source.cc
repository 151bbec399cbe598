#include "worker/evaluate/layer_source.h"

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/io/gptq_packing.h"
#include "worker/model/linear.h"

namespace walsh::evaluate {
namespace {

std::vector<float> ToVector(const Matrix& m) { return {m.span().begin(), m.span().end()}; }

absl::StatusOr<std::unique_ptr<Linear>> ReadLinear(const ArtifactReader& artifact,
                                                   const std::string& name, bool has_bias) {
  std::vector<float> bias;
  if (has_bias) {
    WALSH_ASSIGN_OR_RETURN(const Matrix row, artifact.ReadDense(name + ".bias"));
    bias = ToVector(row);
  }
  Matrix weights;
  if (artifact.IsQuantized(name)) {
    // Act-order's columns come back to their inputs: in floats nothing is gained by their groups.
    WALSH_ASSIGN_OR_RETURN(const OrderedMatrix ordered, artifact.ReadOrdered(name));
    weights = Dequantize(ordered);
  } else {
    WALSH_ASSIGN_OR_RETURN(weights, artifact.ReadDense(name + ".weight"));
  }
  return std::make_unique<DenseLinear>(std::move(weights), std::move(bias));
}

}  // namespace

absl::StatusOr<Matrix> CheckpointSource::Embedding() { return checkpoint_.Read(kEmbeddingTensor); }

absl::StatusOr<DecoderLayer> CheckpointSource::Layer(int64_t index) {
  return LoadDenseLayer(checkpoint_, index);
}

absl::StatusOr<std::vector<float>> CheckpointSource::FinalNorm() {
  WALSH_ASSIGN_OR_RETURN(const Matrix norm, checkpoint_.Read(kFinalNormTensor));
  return ToVector(norm);
}

absl::StatusOr<Matrix> CheckpointSource::Head() { return checkpoint_.Read(kLmHeadTensor); }

absl::StatusOr<Matrix> ArtifactSource::Embedding() { return artifact_.ReadDense(kEmbeddingTensor); }

absl::StatusOr<DecoderLayer> ArtifactSource::Layer(int64_t index) {
  const auto read_norm = [this](const std::string& name) -> absl::StatusOr<std::vector<float>> {
    WALSH_ASSIGN_OR_RETURN(const Matrix norm, artifact_.ReadDense(name));
    return ToVector(norm);
  };
  if (online_ == nullptr) {
    WALSH_ASSIGN_OR_RETURN(online_, OnlineForward::Create(artifact_.online(), config()));
  }
  WALSH_ASSIGN_OR_RETURN(
      DecoderLayer layer,
      ReadLayer(config(), index, read_norm, [this](const std::string& name, bool has_bias) {
        return ReadLinear(artifact_, name, has_bias);
      }));
  layer.online = online_;
  return layer;
}

absl::StatusOr<std::vector<float>> ArtifactSource::FinalNorm() {
  WALSH_ASSIGN_OR_RETURN(const Matrix norm, artifact_.ReadDense(kFinalNormTensor));
  return ToVector(norm);
}

absl::StatusOr<Matrix> ArtifactSource::Head() { return artifact_.ReadDense(kLmHeadTensor); }

}  // namespace walsh::evaluate
