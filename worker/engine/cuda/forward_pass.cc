#include "worker/engine/cuda/forward_pass.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <utility>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/qkv_to_cache.h"
#include "worker/kernels/cuda/token_rows.h"
#include "worker/kernels/cuda/transform_activations.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;
using ops::LowBitOutput;

int64_t QkvRows(const ModelConfig& config) { return config.q_width() + 2 * config.kv_width(); }

// Calls multiply(first, n) for pieces of rows that LowBitMatmul takes at once.
template <typename Multiply>
absl::Status InChunks(int64_t n_rows, const Multiply& multiply) {
  for (int64_t first = 0; first < n_rows; first += ops::kLowBitTokensMax) {
    WALSH_RETURN_IF_ERROR(multiply(first, std::min(ops::kLowBitTokensMax, n_rows - first)));
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status AllocateZeros(DeviceBuffer<T>& buffer, int64_t n, cudaStream_t stream) {
  WALSH_ASSIGN_OR_RETURN(buffer, DeviceBuffer<T>::Allocate(n, stream));
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(buffer.size_bytes()), stream));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ForwardPass> ForwardPass::Create(Context* context, const ModelConfig* config,
                                                const DeviceWeights* weights,
                                                const Limits& limits) {
  ForwardPass pass(context, config, weights, limits);
  WALSH_RETURN_IF_ERROR(pass.Allocate());
  return pass;
}

absl::Status ForwardPass::Allocate() {
  const cudaStream_t stream = context_->stream();
  const ModelConfig& c = *config_;
  const ops::KvPoolShape pool = limits_.kv.PoolShape(c, limits_.n_blocks);
  const int64_t n = limits_.n_rows;
  WALSH_ASSIGN_OR_RETURN(pool_,
                         DeviceBuffer<std::byte>::Allocate(c.n_layers * pool.size_bytes(), stream));
  // Zeros, as rows of no sequence are computed with what lies there.
  WALSH_RETURN_IF_ERROR(AllocateZeros(hidden_, n * c.hidden, stream));
  WALSH_RETURN_IF_ERROR(AllocateZeros(qkv_, n * QkvRows(c), stream));
  if (c.has_output_norms) WALSH_RETURN_IF_ERROR(AllocateZeros(output_, n * c.hidden, stream));
  WALSH_RETURN_IF_ERROR(AllocateZeros(q_, n * c.q_width(), stream));
  WALSH_RETURN_IF_ERROR(AllocateZeros(attended_, n * c.q_width(), stream));
  WALSH_RETURN_IF_ERROR(AllocateZeros(activation_, n * c.intermediate, stream));
  const bool is_pair_apart =
      std::any_of(weights_->layers.begin(), weights_->layers.end(),
                  [](const LayerWeights& layer) { return layer.gate_up.parts.size() > 1; });
  if (AreMany(n) || is_pair_apart) {
    WALSH_RETURN_IF_ERROR(AllocateZeros(gate_, n * c.intermediate, stream));
    WALSH_RETURN_IF_ERROR(AllocateZeros(up_, n * c.intermediate, stream));
  }
  if (AreMany(n)) {
    WALSH_RETURN_IF_ERROR(AllocateZeros(normed_, n * c.hidden, stream));
    int64_t largest = 0;
    int64_t widest_transformed = 0;
    for (const LayerWeights& layer : weights_->layers) {
      for (const Product* product : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
        largest = std::max(largest, product->rows * product->cols);
        if (!product->has_transform()) continue;
        widest_transformed = std::max(widest_transformed, product->cols);
      }
    }
    if (widest_transformed > 0) {
      WALSH_RETURN_IF_ERROR(AllocateZeros(transformed_, n * widest_transformed, stream));
    }
    WALSH_ASSIGN_OR_RETURN(bf16_weights_, DeviceBuffer<bf16>::Allocate(largest, stream));
  }

  const int64_t widest = std::max({c.hidden, c.q_width(), c.intermediate});
  const int64_t workspace_bytes =
      ops::LowBitWorkspaceBytes(std::min(n, ops::kLowBitTokensMax), widest);
  WALSH_ASSIGN_OR_RETURN(workspace_, DeviceBuffer<std::byte>::Allocate(workspace_bytes, stream));

  constexpr int64_t kLogitsAlignment = 4;  // of ArgMax
  logits_stride_ = (c.vocab + kLogitsAlignment - 1) / kLogitsAlignment * kLogitsAlignment;
  WALSH_RETURN_IF_ERROR(AllocateZeros(logits_, limits_.n_logits * logits_stride_, stream));
  return AllocateZeros(arg_max_workspace_, 2 * limits_.n_logits, stream);
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
  WALSH_RETURN_IF_ERROR(Project(layer.qkv, layer.input_norm, rows.n, qkv_.data()));
  WALSH_RETURN_IF_ERROR(Attend(index, rows));
  WALSH_RETURN_IF_ERROR(
      AddTo(layer.o, layer.attention_output_norm, attended_.data(), rows.n, hidden_.data()));
  WALSH_RETURN_IF_ERROR(
      GateUp(layer.gate_up, layer.post_attention_norm, rows.n, activation_.data()));
  return AddTo(layer.down, layer.mlp_output_norm, activation_.data(), rows.n, hidden_.data());
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

absl::Status ForwardPass::Norm(const DeviceBuffer<float>& weight, int64_t n_rows) {
  return ops::RmsNorm<bf16>(*context_, n_rows, config_->hidden, hidden_.data(), weight.data(),
                            static_cast<float>(config_->rms_norm_eps), normed_.data());
}

ops::LowBitMatmulParams ForwardPass::Multiply(const ServingMatrix& weights, int64_t n) {
  return {.n_tokens = n,
          .weights = &weights,
          .overlap_previous = true,
          .workspace = workspace_.data(),
          .workspace_bytes = workspace_.size_bytes(),
          .stream = context_->stream()};
}

ops::LowBitMatmulParams ForwardPass::MultiplyNormed(const ServingMatrix& weights,
                                                    const DeviceBuffer<float>& norm,
                                                    const float* hidden, int64_t n) {
  ops::LowBitMatmulParams params = Multiply(weights, n);
  AddNorm(norm, hidden, params);
  return params;
}

void ForwardPass::AddNorm(const DeviceBuffer<float>& norm, const float* hidden,
                          ops::LowBitMatmulParams& params) const {
  params.x_float = hidden;
  params.has_norm = true;
  params.norm_weight = norm.data();
  params.eps = static_cast<float>(config_->rms_norm_eps);
}

ops::LowBitMatmulParams ForwardPass::Multiply(const Product& product, const Product::Part& part,
                                              int64_t n) {
  ops::LowBitMatmulParams params = Multiply(part.weights, n);
  params.input_order = part.input_order.data();
  params.rotation_block = product.rotation_block;
  return params;
}

ops::LowBitMatmulParams ForwardPass::MultiplyNormed(const Product& product,
                                                    const Product::Part& part,
                                                    const DeviceBuffer<float>& norm,
                                                    const float* hidden, int64_t n) {
  ops::LowBitMatmulParams params = Multiply(product, part, n);
  AddNorm(norm, hidden, params);
  return params;
}

absl::Status ForwardPass::Run(const Product::Part& part, const ops::LowBitMatmulParams& params) {
  if (part.dense.size() == 0) return ops::LowBitMatmul(params);
  return ops::DenseMatmul({.n_tokens = params.n_tokens,
                           .rows = part.rows,
                           .cols = part.dense.size() / part.rows,
                           .weights = part.dense.data(),
                           .x = params.x,
                           .x_float = params.x_float,
                           .has_norm = params.has_norm,
                           .norm_weight = params.norm_weight,
                           .eps = params.eps,
                           .bias = params.bias,
                           .accumulate = params.output == LowBitOutput::kAdd,
                           .y_float = params.y_float,
                           .y_bf16 = params.y_bf16,
                           .y_stride = params.y_stride,
                           .overlap_previous = params.overlap_previous,
                           .stream = params.stream});
}

absl::StatusOr<const bf16*> ForwardPass::Transformed(const Product& product,
                                                     const Product::Part& part, const bf16* x,
                                                     int64_t n_rows) {
  const int32_t* order = part.input_order.data();
  if (order == nullptr && product.rotation_block == 0) return x;
  WALSH_RETURN_IF_ERROR(ops::TransformActivations({.n_tokens = n_rows,
                                                   .cols = product.cols,
                                                   .x = x,
                                                   .input_order = order,
                                                   .rotation_block = product.rotation_block,
                                                   .y = transformed_.data(),
                                                   .stream = context_->stream()}));
  return transformed_.data();
}

absl::Status ForwardPass::MultiplyMany(const Product& product, const bf16* x, int64_t n_rows,
                                       float* y, bool accumulate) {
  WALSH_ASSIGN_OR_RETURN(const bf16* weights, Dequantized(product));
  const std::vector<Product::Part>& parts = product.parts;
  for (size_t i = 0; i < parts.size();) {
    // As many as take the input as it is are one.
    const Product::Part& part = parts[i];
    int64_t rows = part.rows;
    for (++i; i < parts.size() && part.input_order.size() == 0 && parts[i].input_order.size() == 0;
         ++i) {
      rows += parts[i].rows;
    }
    WALSH_ASSIGN_OR_RETURN(const bf16* transformed, Transformed(product, part, x, n_rows));
    WALSH_RETURN_IF_ERROR(ops::Gemm(
        *context_, ops::GemmParams<float>{.n_tokens = n_rows,
                                          .in = product.cols,
                                          .out = rows,
                                          .x = transformed,
                                          .weights = weights + part.first_row * product.cols,
                                          .y = y + part.first_row,
                                          .y_stride = product.rows,
                                          .accumulate = accumulate}));
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::Project(const Product& product, const DeviceBuffer<float>& norm,
                                  int64_t n_rows, float* y) {
  if (AreMany(n_rows)) {
    WALSH_RETURN_IF_ERROR(Norm(norm, n_rows));
    return MultiplyMany(product, normed_.data(), n_rows, y, /*accumulate=*/false);
  }
  return InChunks(n_rows, [&](int64_t first, int64_t n) -> absl::Status {
    for (const Product::Part& part : product.parts) {
      ops::LowBitMatmulParams params =
          MultiplyNormed(product, part, norm, hidden_.data() + first * product.cols, n);
      params.y_float = y + first * product.rows + part.first_row;
      params.y_stride = product.rows;
      WALSH_RETURN_IF_ERROR(Run(part, params));
    }
    return absl::OkStatus();
  });
}

absl::Status ForwardPass::AddTo(const Product& product, const DeviceBuffer<float>& output_norm,
                                const bf16* x, int64_t n_rows, float* hidden) {
  if (output_norm.size() == 0) return Output(product, x, n_rows, hidden, /*accumulate=*/true);
  WALSH_RETURN_IF_ERROR(Output(product, x, n_rows, output_.data(), /*accumulate=*/false));
  return ops::AddNormedRows({.n_rows = n_rows,
                             .dim = config_->hidden,
                             .x = output_.data(),
                             .weight = output_norm.data(),
                             .eps = static_cast<float>(config_->rms_norm_eps),
                             .hidden = hidden,
                             .overlap_previous = true,
                             .stream = context_->stream()});
}

absl::Status ForwardPass::Output(const Product& product, const bf16* x, int64_t n_rows, float* y,
                                 bool accumulate) {
  if (AreMany(n_rows)) {
    WALSH_RETURN_IF_ERROR(MultiplyMany(product, x, n_rows, y, accumulate));
    if (product.bias.size() == 0) return absl::OkStatus();
    return ops::AddBias<float>(*context_, n_rows, product.rows, product.bias.data(), y);
  }
  return InChunks(n_rows, [&](int64_t first, int64_t n) -> absl::Status {
    for (const Product::Part& part : product.parts) {
      ops::LowBitMatmulParams params = Multiply(product, part, n);
      params.x = x + first * product.cols;
      params.shared_part = ops::SharedPart::kLarger;  // Project's and GateUp's is the smaller
      params.bias = product.BiasOf(part);
      params.output = accumulate ? LowBitOutput::kAdd : LowBitOutput::kStore;
      params.y_float = y + first * product.rows + part.first_row;
      params.y_stride = product.rows;
      WALSH_RETURN_IF_ERROR(Run(part, params));
    }
    return absl::OkStatus();
  });
}

absl::Status ForwardPass::GateUp(const Product& product, const DeviceBuffer<float>& norm,
                                 int64_t n_rows, bf16* y) {
  if (AreMany(n_rows)) return GateUpOfMany(product, norm, n_rows, y);
  const int64_t width = product.rows / 2;
  const bool is_pair = product.parts.size() == 1;  // whose rows are interleaved
  const LowBitOutput of_pairs = config_->activation == MlpActivation::kGeluTanh
                                    ? LowBitOutput::kGeluMul
                                    : LowBitOutput::kSiluMul;
  const std::array<bf16*, 2> to = {is_pair ? y : gate_.data(), up_.data()};
  const absl::Status status = InChunks(n_rows, [&](int64_t first, int64_t n) -> absl::Status {
    for (size_t i = 0; i < product.parts.size(); ++i) {
      const Product::Part& part = product.parts[i];
      ops::LowBitMatmulParams params =
          MultiplyNormed(product, part, norm, hidden_.data() + first * product.cols, n);
      params.bias = product.BiasOf(part);
      params.output = is_pair ? of_pairs : LowBitOutput::kStore;
      params.y_bf16 = to[i] + first * width;
      WALSH_RETURN_IF_ERROR(Run(part, params));
    }
    return absl::OkStatus();
  });
  if (!status.ok() || is_pair) return status;
  return Activate(n_rows * width, y);
}

absl::Status ForwardPass::GateUpOfMany(const Product& product, const DeviceBuffer<float>& norm,
                                       int64_t n_rows, bf16* y) {
  const int64_t width = product.rows / 2;
  WALSH_RETURN_IF_ERROR(Norm(norm, n_rows));
  WALSH_ASSIGN_OR_RETURN(const bf16* weights, Dequantized(product));
  int64_t row = 0;
  const bf16* x = nullptr;
  for (bf16* to : {gate_.data(), up_.data()}) {
    if (x == nullptr || product.parts.size() > 1) {
      WALSH_ASSIGN_OR_RETURN(
          x, Transformed(product, row == 0 ? product.parts.front() : product.parts.back(),
                         normed_.data(), n_rows));
    }
    WALSH_RETURN_IF_ERROR(
        ops::Gemm(*context_, ops::GemmParams<bf16>{.n_tokens = n_rows,
                                                   .in = product.cols,
                                                   .out = width,
                                                   .x = x,
                                                   .weights = weights + row * product.cols,
                                                   .y = to}));
    if (product.bias.size() > 0) {
      WALSH_RETURN_IF_ERROR(
          ops::AddBias<bf16>(*context_, n_rows, width, product.bias.data() + row, to));
    }
    row += width;
  }
  return Activate(n_rows * width, y);
}

absl::Status ForwardPass::Activate(int64_t n, bf16* y) {
  return config_->activation == MlpActivation::kGeluTanh
             ? ops::GeluMultiply<bf16>(*context_, n, gate_.data(), up_.data(), y)
             : ops::SiluMultiply<bf16>(*context_, n, gate_.data(), up_.data(), y);
}

absl::StatusOr<const bf16*> ForwardPass::Dequantized(const Product& product) {
  for (const Product::Part& part : product.parts) {
    bf16* to = bf16_weights_.data() + part.first_row * product.cols;
    if (part.dense.size() == 0) {
      WALSH_RETURN_IF_ERROR(part.weights.Dequantize(to, context_->stream()));
      continue;
    }
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(to, part.dense.data(),
                                               static_cast<size_t>(part.dense.size_bytes()),
                                               cudaMemcpyDeviceToDevice, context_->stream()));
  }
  return bf16_weights_.data();
}

absl::Status ForwardPass::Head(const float* hidden, int64_t n, int64_t first,
                               ops::SampleRowsParams choice) {
  WALSH_RETURN_IF_ERROR(InChunks(n, [&](int64_t row, int64_t n_chunk) {
    ops::LowBitMatmulParams params = MultiplyNormed(weights_->head, weights_->final_norm,
                                                    hidden + row * config_->hidden, n_chunk);
    params.y_float = logits_.data() + (first + row) * logits_stride_;
    params.y_stride = logits_stride_;
    return ops::LowBitMatmul(params);
  }));
  float* logits = logits_.data() + first * logits_stride_;
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
