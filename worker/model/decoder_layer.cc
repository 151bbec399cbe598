#include "worker/model/decoder_layer.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common/status_macros.h"

namespace walsh {
namespace {

absl::StatusOr<std::vector<float>> ReadVector(const Checkpoint& checkpoint,
                                              const std::string& name) {
  WALSH_ASSIGN_OR_RETURN(const Matrix matrix, checkpoint.Read(name));
  return std::vector<float>(matrix.span().begin(), matrix.span().end());
}

absl::StatusOr<std::unique_ptr<Linear>> ReadLinear(const Checkpoint& checkpoint,
                                                   const std::string& name, bool has_bias) {
  WALSH_ASSIGN_OR_RETURN(Matrix weights, checkpoint.Read(name + ".weight"));
  std::vector<float> bias;
  if (has_bias) {
    WALSH_ASSIGN_OR_RETURN(bias, ReadVector(checkpoint, name + ".bias"));
  }
  return std::make_unique<DenseLinear>(std::move(weights), std::move(bias));
}

// Rows of `dim`, one behind the other; weights empty: ones.
absl::Status Norm(const ForwardContext& context, const std::vector<float>& weight, int64_t n_rows,
                  int64_t dim, const float* x, float* y) {
  return kernels::RmsNorm({.n_tokens = n_rows,
                           .dim = dim,
                           .x = x,
                           .weight = weight.empty() ? nullptr : weight.data(),
                           .eps = static_cast<float>(context.config->rms_norm_eps),
                           .y = y},
                          context.stream);
}

absl::Status Rope(const ForwardContext& context, const DecoderLayer& layer,
                  std::span<const int32_t> positions, int64_t n_heads, float* x) {
  const int64_t head_dim = context.config->head_dim;
  const std::vector<float>& frequencies =
      layer.is_sliding ? context.sliding_inverse_frequencies : context.inverse_frequencies;
  return kernels::Rope({.n_tokens = static_cast<int64_t>(positions.size()),
                        .n_heads = n_heads,
                        .head_dim = head_dim,
                        .positions = positions.data(),
                        .inverse_frequencies = frequencies.data(),
                        .x = x,
                        .x_stride = n_heads * head_dim},
                       context.stream);
}

absl::Status PrepareInput(const ForwardContext& context, const DecoderLayer& layer,
                          int64_t n_tokens, int64_t width, float* x) {
  if (layer.online == nullptr) return absl::OkStatus();
  return layer.online->PrepareInput(x, n_tokens, width, context.stream);
}

// A sequence's new rows of keys or values, into its cache.
void StoreRows(const SequenceSlice& sequence, const Matrix& rows, int64_t width, float* cache) {
  for (int64_t i = 0; i < sequence.n_rows; ++i) {
    std::copy_n(rows.row(sequence.first_row + i), width,
                cache + kernels::KvRowOffset(sequence.n_past + i, width, sequence.blocks,
                                             sequence.block_stride));
  }
}

// hidden += linear(x), through `norm` where the family has one there.
absl::Status AddOutput(const ForwardContext& context, const Linear& linear,
                       const std::vector<float>& norm, const float* x, int64_t n_tokens,
                       float* hidden, float* scratch) {
  WALSH_RETURN_IF_ERROR(linear.Apply(x, n_tokens, scratch, context.stream));
  if (context.config->has_output_norms) {
    WALSH_RETURN_IF_ERROR(Norm(context, norm, n_tokens, linear.out(), scratch, scratch));
  }
  return kernels::Add({.n = n_tokens * linear.out(), .x = scratch, .y = hidden}, context.stream);
}

}  // namespace

std::vector<LinearShape> LinearShapes(const ModelConfig& config) {
  return {
      {"self_attn.q_proj", config.hidden, config.q_width()},
      {"self_attn.k_proj", config.hidden, config.kv_width()},
      {"self_attn.v_proj", config.hidden, config.kv_width()},
      {"self_attn.o_proj", config.q_width(), config.hidden},
      {"mlp.gate_proj", config.hidden, config.intermediate},
      {"mlp.up_proj", config.hidden, config.intermediate},
      {"mlp.down_proj", config.intermediate, config.hidden},
  };
}

std::vector<LayerNorm> LayerNorms(const ModelConfig& config) {
  const int64_t hidden = config.hidden;
  std::vector<LayerNorm> norms = {{"input_layernorm.weight", &DecoderLayer::input_norm, hidden}};
  const auto add = [&norms](std::string_view name, std::vector<float> DecoderLayer::*weights,
                            int64_t width) {
    norms.push_back({name, weights, width});
  };
  if (config.has_output_norms) {
    add("post_attention_layernorm.weight", &DecoderLayer::attention_output_norm, hidden);
    add("pre_feedforward_layernorm.weight", &DecoderLayer::post_attention_norm, hidden);
    add("post_feedforward_layernorm.weight", &DecoderLayer::mlp_output_norm, hidden);
  } else {
    add("post_attention_layernorm.weight", &DecoderLayer::post_attention_norm, hidden);
  }
  if (config.has_qk_norm) {
    add("self_attn.q_norm.weight", &DecoderLayer::q_norm, config.head_dim);
    add("self_attn.k_norm.weight", &DecoderLayer::k_norm, config.head_dim);
  }
  return norms;
}

absl::StatusOr<DecoderLayer> ReadLayer(const ModelConfig& config, int64_t index,
                                       const NormReader& read_norm,
                                       const LinearReader& read_linear) {
  DecoderLayer layer;
  layer.is_sliding = config.is_sliding(index);
  for (const LayerNorm& norm : LayerNorms(config)) {
    WALSH_ASSIGN_OR_RETURN(layer.*norm.weights, read_norm(LayerTensor(index, norm.name)));
  }
  for (const LayerLinear& linear : kLayerLinears) {
    WALSH_ASSIGN_OR_RETURN(layer.*linear.linear, read_linear(LayerTensor(index, linear.name),
                                                             config.has_bias(linear.name)));
  }
  return layer;
}

absl::StatusOr<DecoderLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t index) {
  return ReadLayer(
      checkpoint.config(), index,
      [&](const std::string& name) { return ReadVector(checkpoint, name); },
      [&](const std::string& name, bool has_bias) {
        return ReadLinear(checkpoint, name, has_bias);
      });
}

void ScaleEmbedding(const ModelConfig& config, std::span<float> row) {
  if (config.embedding_scale == 1) return;
  const auto scale = static_cast<float>(config.embedding_scale);
  for (float& value : row) value *= scale;
}

ForwardContext ForwardContext::Create(const ModelConfig& config, const kernels::Stream& stream) {
  return {.config = &config,
          .inverse_frequencies = RopeInverseFrequencies(config),
          .sliding_inverse_frequencies = SlidingRopeInverseFrequencies(config),
          .stream = stream};
}

absl::Status AttentionInput(const ForwardContext& context, const DecoderLayer& layer,
                            const float* hidden, int64_t n_tokens, float* normed) {
  WALSH_RETURN_IF_ERROR(
      Norm(context, layer.input_norm, n_tokens, context.config->hidden, hidden, normed));
  return PrepareInput(context, layer, n_tokens, context.config->hidden, normed);
}

absl::Status Project(const ForwardContext& context, const DecoderLayer& layer, const float* normed,
                     std::span<const int32_t> positions, float* q, float* k, float* v) {
  const std::array<LinearOutput, 3> outputs = {
      {{layer.q_proj.get(), q}, {layer.k_proj.get(), k}, {layer.v_proj.get(), v}}};
  WALSH_RETURN_IF_ERROR(
      ApplyTogether(outputs, normed, static_cast<int64_t>(positions.size()), context.stream));
  const ModelConfig& config = *context.config;
  const struct {
    int64_t n_heads;
    const std::vector<float>& norm;
    float* x;
  } parts[] = {{config.n_heads, layer.q_norm, q}, {config.n_kv_heads, layer.k_norm, k}};
  for (const auto& part : parts) {
    if (config.has_qk_norm) {
      const int64_t n_rows = static_cast<int64_t>(positions.size()) * part.n_heads;
      WALSH_RETURN_IF_ERROR(Norm(context, part.norm, n_rows, config.head_dim, part.x, part.x));
    }
    WALSH_RETURN_IF_ERROR(Rope(context, layer, positions, part.n_heads, part.x));
  }
  if (layer.online == nullptr) return absl::OkStatus();
  return layer.online->PrepareHeads(q, k, v, static_cast<int64_t>(positions.size()),
                                    context.stream);
}

absl::Status Attend(const ForwardContext& context, const DecoderLayer& layer, const float* q,
                    std::span<const SequenceSlice> sequences, float* attended) {
  const ModelConfig& config = *context.config;
  std::vector<kernels::AttentionParams> params;
  params.reserve(sequences.size());
  for (const SequenceSlice& sequence : sequences) {
    params.push_back({.n_new = sequence.n_rows,
                      .n_past = sequence.n_past,
                      .n_heads = config.n_heads,
                      .n_kv_heads = config.n_kv_heads,
                      .head_dim = config.head_dim,
                      .window = layer.is_sliding ? config.sliding_window : 0,
                      .scale = static_cast<float>(config.attention_scale()),
                      .q = q + sequence.first_row * config.q_width(),
                      .q_stride = config.q_width(),
                      .k = sequence.keys,
                      .v = sequence.values,
                      .kv_stride = config.kv_width(),
                      .blocks = sequence.blocks,
                      .block_stride = sequence.block_stride,
                      .y = attended + sequence.first_row * config.q_width(),
                      .y_stride = config.q_width()});
  }
  WALSH_RETURN_IF_ERROR(kernels::AttentionBatch(params, context.stream));
  for (const SequenceSlice& sequence : sequences) {
    WALSH_RETURN_IF_ERROR(PrepareInput(context, layer, sequence.n_rows, config.q_width(),
                                       attended + sequence.first_row * config.q_width()));
  }
  return absl::OkStatus();
}

absl::Status AttentionOutput(const ForwardContext& context, const DecoderLayer& layer,
                             const float* attended, int64_t n_tokens, float* hidden,
                             float* scratch) {
  return AddOutput(context, *layer.o_proj, layer.attention_output_norm, attended, n_tokens, hidden,
                   scratch);
}

absl::Status MlpInput(const ForwardContext& context, const DecoderLayer& layer, const float* hidden,
                      int64_t n_tokens, float* normed) {
  WALSH_RETURN_IF_ERROR(
      Norm(context, layer.post_attention_norm, n_tokens, context.config->hidden, hidden, normed));
  return PrepareInput(context, layer, n_tokens, context.config->hidden, normed);
}

absl::Status MlpActivation(const ForwardContext& context, const DecoderLayer& layer,
                           const float* normed, int64_t n_tokens, float* activation,
                           float* scratch) {
  const std::array<LinearOutput, 2> outputs = {
      {{layer.gate_proj.get(), activation}, {layer.up_proj.get(), scratch}}};
  WALSH_RETURN_IF_ERROR(ApplyTogether(outputs, normed, n_tokens, context.stream));
  const int64_t dim = layer.gate_proj->out();
  const auto gated = [&](auto params) {
    params.n_tokens = n_tokens;
    params.dim = dim;
    params.gate = activation;
    params.gate_stride = dim;
    params.up = scratch;
    params.up_stride = dim;
    params.y = activation;
    params.y_stride = dim;
    return params;
  };
  WALSH_RETURN_IF_ERROR(
      context.config->activation == MlpActivation::kGeluTanh
          ? kernels::GeluMultiply(gated(kernels::GeluMultiplyParams()), context.stream)
          : kernels::SiluMultiply(gated(kernels::SiluMultiplyParams()), context.stream));
  if (layer.online == nullptr) return absl::OkStatus();
  return layer.online->PrepareDownInput(activation, n_tokens, context.stream);
}

absl::Status MlpOutput(const ForwardContext& context, const DecoderLayer& layer,
                       const float* activation, int64_t n_tokens, float* hidden, float* scratch) {
  return AddOutput(context, *layer.down_proj, layer.mlp_output_norm, activation, n_tokens, hidden,
                   scratch);
}

int64_t ForwardScratch::SizeBytes(const ModelConfig& config, int64_t n_tokens) {
  const int64_t width =
      2 * (config.hidden + config.q_width() + config.kv_width() + config.intermediate);
  return n_tokens * width * static_cast<int64_t>(sizeof(float));
}

void ForwardScratch::Reserve(const ModelConfig& config, int64_t n_tokens) {
  const auto grow = [n_tokens](Matrix& matrix, int64_t cols) {
    if (matrix.rows() < n_tokens || matrix.cols() != cols) matrix = Matrix(n_tokens, cols);
  };
  grow(normed, config.hidden);
  grow(q, config.q_width());
  grow(k, config.kv_width());
  grow(v, config.kv_width());
  grow(attended, config.q_width());
  grow(gate, config.intermediate);
  grow(up, config.intermediate);
  grow(out, config.hidden);
}

absl::Status ForwardLayer(const ForwardContext& context, const DecoderLayer& layer,
                          std::span<const int32_t> positions,
                          std::span<const SequenceSlice> sequences, int64_t n_tokens, float* hidden,
                          ForwardScratch& scratch) {
  scratch.Reserve(*context.config, n_tokens);
  float* normed = scratch.normed.data();
  float* q = scratch.q.data();
  float* attended = scratch.attended.data();
  float* gate = scratch.gate.data();
  float* out = scratch.out.data();
  WALSH_RETURN_IF_ERROR(AttentionInput(context, layer, hidden, n_tokens, normed));
  WALSH_RETURN_IF_ERROR(
      Project(context, layer, normed, positions, q, scratch.k.data(), scratch.v.data()));
  for (const SequenceSlice& sequence : sequences) {
    StoreRows(sequence, scratch.k, context.config->kv_width(), sequence.keys);
    StoreRows(sequence, scratch.v, context.config->kv_width(), sequence.values);
  }
  WALSH_RETURN_IF_ERROR(Attend(context, layer, q, sequences, attended));
  WALSH_RETURN_IF_ERROR(AttentionOutput(context, layer, attended, n_tokens, hidden, out));
  WALSH_RETURN_IF_ERROR(MlpInput(context, layer, hidden, n_tokens, normed));
  WALSH_RETURN_IF_ERROR(MlpActivation(context, layer, normed, n_tokens, gate, scratch.up.data()));
  return MlpOutput(context, layer, gate, n_tokens, hidden, out);
}

}  // namespace walsh
