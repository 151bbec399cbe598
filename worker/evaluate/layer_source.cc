#include "worker/evaluate/layer_source.h"

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/model/linear.h"

namespace walsh::evaluate {
namespace {

std::vector<float> ToVector(const Matrix& m) { return {m.span().begin(), m.span().end()}; }

absl::StatusOr<std::unique_ptr<Linear>> ReadLinear(const ArtifactReader& artifact, int64_t layer,
                                                   std::string_view suffix, bool has_bias) {
  const std::string name = LayerTensor(layer, suffix);
  Matrix weights;
  if (artifact.IsQuantized(name)) {
    WALSH_ASSIGN_OR_RETURN(const QuantizedMatrix quantized, artifact.ReadQuantized(name));
    weights = Dequantize(quantized);
  } else {
    WALSH_ASSIGN_OR_RETURN(weights, artifact.ReadDense(name + ".weight"));
  }
  std::vector<float> bias;
  if (has_bias) {
    WALSH_ASSIGN_OR_RETURN(const Matrix row, artifact.ReadDense(name + ".bias"));
    bias = ToVector(row);
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
  const bool attention_bias = config().attention_bias;
  const bool mlp_bias = config().mlp_bias;
  DecoderLayer layer;
  struct Part {
    std::string_view suffix;
    bool has_bias;
    std::unique_ptr<Linear>* linear;
  };
  const Part parts[] = {
      {"self_attn.q_proj", attention_bias, &layer.q_proj},
      {"self_attn.k_proj", attention_bias, &layer.k_proj},
      {"self_attn.v_proj", attention_bias, &layer.v_proj},
      {"self_attn.o_proj", attention_bias, &layer.o_proj},
      {"mlp.gate_proj", mlp_bias, &layer.gate_proj},
      {"mlp.up_proj", mlp_bias, &layer.up_proj},
      {"mlp.down_proj", mlp_bias, &layer.down_proj},
  };
  for (const Part& part : parts) {
    WALSH_ASSIGN_OR_RETURN(*part.linear, ReadLinear(artifact_, index, part.suffix, part.has_bias));
  }
  WALSH_ASSIGN_OR_RETURN(const Matrix input_norm,
                         artifact_.ReadDense(LayerTensor(index, "input_layernorm.weight")));
  WALSH_ASSIGN_OR_RETURN(
      const Matrix post_attention_norm,
      artifact_.ReadDense(LayerTensor(index, "post_attention_layernorm.weight")));
  layer.input_norm = ToVector(input_norm);
  layer.post_attention_norm = ToVector(post_attention_norm);
  return layer;
}

absl::StatusOr<std::vector<float>> ArtifactSource::FinalNorm() {
  WALSH_ASSIGN_OR_RETURN(const Matrix norm, artifact_.ReadDense(kFinalNormTensor));
  return ToVector(norm);
}

absl::StatusOr<Matrix> ArtifactSource::Head() { return artifact_.ReadDense(kLmHeadTensor); }

}  // namespace walsh::evaluate
