#include "worker/model/decoder_layer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "common/status_macros.h"

namespace walsh {
namespace {

absl::StatusOr<std::vector<float>> ReadVector(const Checkpoint& checkpoint, int64_t layer,
                                              std::string_view suffix) {
  WALSH_ASSIGN_OR_RETURN(const Matrix matrix, checkpoint.Read(LayerTensor(layer, suffix)));
  return std::vector<float>(matrix.span().begin(), matrix.span().end());
}

absl::StatusOr<std::unique_ptr<Linear>> ReadLinear(const Checkpoint& checkpoint, int64_t layer,
                                                   const std::string& name) {
  WALSH_ASSIGN_OR_RETURN(Matrix weights, checkpoint.Read(LayerTensor(layer, name + ".weight")));
  std::vector<float> bias;
  if (checkpoint.Has(LayerTensor(layer, name + ".bias"))) {
    WALSH_ASSIGN_OR_RETURN(bias, ReadVector(checkpoint, layer, name + ".bias"));
  }
  return std::make_unique<DenseLinear>(std::move(weights), std::move(bias));
}

absl::Status Norm(const ForwardContext& context, const std::vector<float>& weight,
                  const float* hidden, int64_t n_tokens, float* normed) {
  return kernels::RmsNorm({.n_tokens = n_tokens,
                           .dim = context.config->hidden,
                           .x = hidden,
                           .weight = weight.empty() ? nullptr : weight.data(),
                           .eps = static_cast<float>(context.config->rms_norm_eps),
                           .y = normed},
                          context.stream);
}

absl::Status Rope(const ForwardContext& context, std::span<const int32_t> positions,
                  int64_t n_heads, float* x) {
  const int64_t head_dim = context.config->head_dim;
  return kernels::Rope({.n_tokens = static_cast<int64_t>(positions.size()),
                        .n_heads = n_heads,
                        .head_dim = head_dim,
                        .positions = positions.data(),
                        .inverse_frequencies = context.inverse_frequencies.data(),
                        .x = x,
                        .x_stride = n_heads * head_dim},
                       context.stream);
}

// hidden += linear(x)
absl::Status AddOutput(const ForwardContext& context, const Linear& linear, const float* x,
                       int64_t n_tokens, float* hidden, float* scratch) {
  WALSH_RETURN_IF_ERROR(linear.Apply(x, n_tokens, scratch, context.stream));
  return kernels::Add({.n = n_tokens * linear.out(), .x = scratch, .y = hidden}, context.stream);
}

}  // namespace

absl::StatusOr<DecoderLayer> LoadDenseLayer(const Checkpoint& checkpoint, int64_t index) {
  DecoderLayer layer;
  WALSH_ASSIGN_OR_RETURN(layer.input_norm, ReadVector(checkpoint, index, "input_layernorm.weight"));
  WALSH_ASSIGN_OR_RETURN(layer.post_attention_norm,
                         ReadVector(checkpoint, index, "post_attention_layernorm.weight"));
  const std::array<std::pair<std::unique_ptr<Linear>*, const char*>, 7> linears = {{
      {&layer.q_proj, "self_attn.q_proj"},
      {&layer.k_proj, "self_attn.k_proj"},
      {&layer.v_proj, "self_attn.v_proj"},
      {&layer.o_proj, "self_attn.o_proj"},
      {&layer.gate_proj, "mlp.gate_proj"},
      {&layer.up_proj, "mlp.up_proj"},
      {&layer.down_proj, "mlp.down_proj"},
  }};
  for (const auto& [linear, name] : linears) {
    WALSH_ASSIGN_OR_RETURN(*linear, ReadLinear(checkpoint, index, name));
  }
  return layer;
}

ForwardContext ForwardContext::Create(const ModelConfig& config, const kernels::Stream& stream) {
  return {
      .config = &config, .inverse_frequencies = RopeInverseFrequencies(config), .stream = stream};
}

absl::Status AttentionInput(const ForwardContext& context, const DecoderLayer& layer,
                            const float* hidden, int64_t n_tokens, float* normed) {
  return Norm(context, layer.input_norm, hidden, n_tokens, normed);
}

absl::Status Project(const ForwardContext& context, const DecoderLayer& layer, const float* normed,
                     std::span<const int32_t> positions, float* q, float* k, float* v) {
  const std::array<LinearOutput, 3> outputs = {
      {{layer.q_proj.get(), q}, {layer.k_proj.get(), k}, {layer.v_proj.get(), v}}};
  WALSH_RETURN_IF_ERROR(
      ApplyTogether(outputs, normed, static_cast<int64_t>(positions.size()), context.stream));
  WALSH_RETURN_IF_ERROR(Rope(context, positions, context.config->n_heads, q));
  return Rope(context, positions, context.config->n_kv_heads, k);
}

absl::Status Attend(const ForwardContext& context, const float* q,
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
                      .scale = static_cast<float>(1.0 / std::sqrt(config.head_dim)),
                      .q = q + sequence.first_row * config.q_width(),
                      .q_stride = config.q_width(),
                      .k = sequence.keys,
                      .v = sequence.values,
                      .kv_stride = config.kv_width(),
                      .y = attended + sequence.first_row * config.q_width(),
                      .y_stride = config.q_width()});
  }
  return kernels::AttentionBatch(params, context.stream);
}

absl::Status AttentionOutput(const ForwardContext& context, const DecoderLayer& layer,
                             const float* attended, int64_t n_tokens, float* hidden,
                             float* scratch) {
  return AddOutput(context, *layer.o_proj, attended, n_tokens, hidden, scratch);
}

absl::Status MlpInput(const ForwardContext& context, const DecoderLayer& layer, const float* hidden,
                      int64_t n_tokens, float* normed) {
  return Norm(context, layer.post_attention_norm, hidden, n_tokens, normed);
}

absl::Status MlpActivation(const ForwardContext& context, const DecoderLayer& layer,
                           const float* normed, int64_t n_tokens, float* activation,
                           float* scratch) {
  const std::array<LinearOutput, 2> outputs = {
      {{layer.gate_proj.get(), activation}, {layer.up_proj.get(), scratch}}};
  WALSH_RETURN_IF_ERROR(ApplyTogether(outputs, normed, n_tokens, context.stream));
  const int64_t dim = layer.gate_proj->out();
  return kernels::SiluMultiply({.n_tokens = n_tokens,
                                .dim = dim,
                                .gate = activation,
                                .gate_stride = dim,
                                .up = scratch,
                                .up_stride = dim,
                                .y = activation,
                                .y_stride = dim},
                               context.stream);
}

absl::Status MlpOutput(const ForwardContext& context, const DecoderLayer& layer,
                       const float* activation, int64_t n_tokens, float* hidden, float* scratch) {
  return AddOutput(context, *layer.down_proj, activation, n_tokens, hidden, scratch);
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
    const int64_t width = context.config->kv_width();
    std::copy_n(scratch.k.row(sequence.first_row), sequence.n_rows * width,
                sequence.keys + sequence.n_past * width);
    std::copy_n(scratch.v.row(sequence.first_row), sequence.n_rows * width,
                sequence.values + sequence.n_past * width);
  }
  WALSH_RETURN_IF_ERROR(Attend(context, q, sequences, attended));
  WALSH_RETURN_IF_ERROR(AttentionOutput(context, layer, attended, n_tokens, hidden, out));
  WALSH_RETURN_IF_ERROR(MlpInput(context, layer, hidden, n_tokens, normed));
  WALSH_RETURN_IF_ERROR(MlpActivation(context, layer, normed, n_tokens, gate, scratch.up.data()));
  return MlpOutput(context, layer, gate, n_tokens, hidden, out);
}

}  // namespace walsh
