#include "worker/engine/cuda/forward_pass.h"

#include <utility>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/qkv_to_cache.h"
#include "worker/kernels/cuda/token_rows.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;

int64_t QkvRows(const ModelConfig& config) { return config.q_width() + 2 * config.kv_width(); }

}  // namespace

absl::StatusOr<ForwardPass> ForwardPass::Create(Context* context, const ModelConfig* config,
                                                const DeviceWeights* weights,
                                                const Limits& limits) {
  ForwardPass pass(context, config, weights, limits);
  WALSH_RETURN_IF_ERROR(pass.Allocate());
  return pass;
}

template <typename Visit>
void ForwardPass::ForEachBuffer(Visit&& visit) {
  const ModelConfig& c = *config_;
  const int64_t n = limits_.n_rows;
  visit(hidden_, n * c.hidden);
  visit(qkv_, n * QkvRows(c));
  if (c.has_output_norms) visit(output_, n * c.hidden);
  visit(q_, n * c.q_width());
  visit(attended_, n * c.q_width());
  visit(logits_, limits_.n_logits * logits_stride_);
  visit(arg_max_workspace_, 2 * limits_.n_logits);
}

int64_t ForwardPass::StepBytes(const ModelConfig& config, const DeviceWeights& weights,
                               const Limits& limits) {
  ForwardPass pass(nullptr, &config, &weights, limits);
  ops::BufferBytes bytes;
  pass.ForEachBuffer(bytes);
  return bytes.bytes() + pass.products_.size_bytes();
}

absl::Status ForwardPass::Allocate() {
  const cudaStream_t stream = context_->stream();
  const int64_t layer_bytes = limits_.kv.PoolShape(*config_, limits_.n_blocks).size_bytes();
  WALSH_ASSIGN_OR_RETURN(
      pool_, DeviceBuffer<std::byte>::Allocate(config_->n_layers * layer_bytes, stream));
  // Zeros, as rows of no sequence are computed with what lies there.
  absl::Status status = products_.Allocate();
  ForEachBuffer([&]<typename T>(DeviceBuffer<T>& buffer, int64_t n) {
    if (status.ok()) status = ops::AllocateZeros(buffer, n, stream);
  });
  return status;
}

ops::KvPoolLayer ForwardPass::PoolOf(int64_t layer) {
  const ops::KvPoolShape shape = limits_.kv.PoolShape(*config_, limits_.n_blocks);
  return {.data = pool_.data() + layer * shape.size_bytes(), .shape = shape};
}

absl::Status ForwardPass::Layers(const Rows& rows) {
  WALSH_RETURN_IF_ERROR(ops::EmbedRows({.n_rows = rows.n,
                                        .dim = config_->hidden,
                                        .vocab = config_->vocab,
                                        .ids = rows.tokens,
                                        .made = rows.made,
                                        .table = weights_->embedding.data(),
                                        .scale = static_cast<float>(config_->embedding_scale),
                                        .hidden = hidden_.data(),
                                        .stream = context_->stream()}));
  for (int64_t l = 0; l < config_->n_layers; ++l) WALSH_RETURN_IF_ERROR(Layer(l, rows));
  return absl::OkStatus();
}

absl::Status ForwardPass::Layer(int64_t index, const Rows& rows) {
  const LayerWeights& layer = weights_->layers[static_cast<size_t>(index)];
  const int64_t n = rows.n;
  WALSH_RETURN_IF_ERROR(
      products_.Project(layer.qkv, layer.input_norm, hidden_.data(), n, qkv_.data()));
  WALSH_RETURN_IF_ERROR(Attend(index, rows));
  float* const output = SublayerOutput();
  const bool adds = output == hidden_.data();
  WALSH_RETURN_IF_ERROR(products_.Output(layer.o, attended_.data(), n, output, adds));
  WALSH_RETURN_IF_ERROR(AddOutput(layer.attention_output_norm, n));
  WALSH_RETURN_IF_ERROR(products_.FeedForward(layer, hidden_.data(), n, output, adds));
  return AddOutput(layer.mlp_output_norm, n);
}

float* ForwardPass::SublayerOutput() {
  return config_->has_output_norms ? output_.data() : hidden_.data();
}

absl::Status ForwardPass::AddOutput(const DeviceBuffer<float>& output_norm, int64_t n_rows) {
  if (!config_->has_output_norms) return absl::OkStatus();
  return ops::AddNormedRows({.n_rows = n_rows,
                             .dim = config_->hidden,
                             .x = output_.data(),
                             .weight = output_norm.data(),
                             .eps = static_cast<float>(config_->rms_norm_eps),
                             .hidden = hidden_.data(),
                             .overlap_previous = true,
                             .stream = context_->stream()});
}

absl::Status ForwardPass::Attend(int64_t index, const Rows& rows) {
  const LayerWeights& layer = weights_->layers[static_cast<size_t>(index)];
  const ModelConfig& c = *config_;
  const DeviceBuffer<float>& frequencies =
      c.is_sliding(index) ? weights_->sliding_inverse_frequencies : weights_->inverse_frequencies;
  const ops::QkvTransform transform{.bias = layer.qkv.bias.data(),
                                    .q_norm = layer.q_norm.data(),
                                    .k_norm = layer.k_norm.data(),
                                    .eps = static_cast<float>(c.rms_norm_eps),
                                    .inverse_frequencies = frequencies.data(),
                                    .heads = limits_.kv.heads};
  const auto scale = static_cast<float>(c.attention_scale());
  if (rows.is_decode) {
    return ops::PagedDecodeAttention({.batch = rows.kv,
                                      .pool = PoolOf(index),
                                      .n_heads = c.n_heads,
                                      .window = c.window(index),
                                      .scale = scale,
                                      .qkv = qkv_.data(),
                                      .transform = transform,
                                      .y = attended_.data(),
                                      .overlap_previous = true,
                                      .stream = context_->stream()});
  }
  WALSH_RETURN_IF_ERROR(ops::QkvToCache({.batch = rows.kv,
                                         .pool = PoolOf(index),
                                         .n_heads = c.n_heads,
                                         .qkv_float = qkv_.data(),
                                         .transform = transform,
                                         .q = q_.data(),
                                         .overlap_previous = true,
                                         .stream = context_->stream()}));
  return ops::PagedPrefillAttention({.batch = rows.kv,
                                     .pool = PoolOf(index),
                                     .n_heads = c.n_heads,
                                     .window = c.window(index),
                                     .scale = scale,
                                     .q = q_.data(),
                                     .y = attended_.data(),
                                     .overlap_previous = true,
                                     .stream = context_->stream()});
}

absl::Status ForwardPass::Head(const float* hidden, int64_t n, int64_t first,
                               ops::SampleRowsParams choice) {
  float* logits = logits_.data() + first * logits_stride_;
  WALSH_RETURN_IF_ERROR(products_.Head(hidden, n, logits, logits_stride_));
  if (choice.rows != nullptr) {
    choice.n_rows = n;
    choice.vocab = config_->vocab;
    choice.logits = logits;
    choice.stride = logits_stride_;
    choice.overlap_previous = true;
    choice.stream = context_->stream();
    return ops::SampleRows(choice);
  }
  return ops::ArgMax({.n_rows = n,
                      .vocab = config_->vocab,
                      .logits = logits,
                      .stride = logits_stride_,
                      .ids = choice.ids,
                      .workspace = arg_max_workspace_.data() + 2 * first,
                      .overlap_previous = true,
                      .stream = context_->stream()});
}

}  // namespace walsh::engine::cuda
