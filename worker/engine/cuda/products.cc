#include "worker/engine/cuda/products.h"

#include <algorithm>
#include <array>
#include <vector>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/low_bit_gemm.h"
#include "worker/kernels/cuda/transform_activations.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;
using ops::LowBitOutput;

// As measured on an H200: with more, LowBitGemm is faster (docs/results).
constexpr int64_t kFewRowsMax = 16;
// Three products of as many rows as LowBitMatmul takes: with more, dequantizing pays for itself.
constexpr int64_t kChunkedRowsMax = 192;

// Calls multiply(first, n) for pieces of rows that LowBitMatmul takes at once.
template <typename Multiply>
absl::Status InChunks(int64_t n_rows, const Multiply& multiply) {
  for (int64_t first = 0; first < n_rows; first += ops::kLowBitTokensMax) {
    WALSH_RETURN_IF_ERROR(multiply(first, std::min(ops::kLowBitTokensMax, n_rows - first)));
  }
  return absl::OkStatus();
}

bool IsQuantized(const Product& product) {
  return std::all_of(product.parts.begin(), product.parts.end(),
                     [](const Product::Part& part) { return part.dense.size() == 0; });
}
std::array<const Product*, 4> ProductsOf(const LayerWeights& layer) {
  return {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
}

}  // namespace

Products::Products(Context* context, const ModelConfig* config, const DeviceWeights* weights,
                   const Limits& limits)
    : context_(context),
      config_(config),
      weights_(weights),
      limits_(limits),
      has_gemm_(ops::HasLowBitGemm()),
      capacity_(ops::TokenTilesCapacity(limits.n_rows)) {}

template <typename Visit>
void Products::ForEachBuffer(Visit&& visit) {
  const ModelConfig& c = *config_;
  const int64_t n = limits_.n_rows;
  int64_t widest = c.hidden;
  int64_t largest_dequantized = 0;
  bool is_pair_apart = false;
  for (const LayerWeights& layer : weights_->layers) {
    is_pair_apart = is_pair_apart || layer.gate_up.parts.size() > 1;
    for (const Product* product : ProductsOf(layer)) {
      widest = std::max(widest, product->cols);
      if (WayOf(*product, n) != Way::kDequantized) continue;
      largest_dequantized = std::max(largest_dequantized, product->rows * product->cols);
    }
  }
  visit(activation_, n * c.intermediate);
  visit(workspace_, ops::LowBitWorkspaceBytes(std::min(n, ops::kLowBitTokensMax), widest));
  if (WayOf(n, /*is_quantized=*/true) == Way::kTiles) {
    visit(tiles_, ops::TokenTilesSize(capacity_, widest));
    visit(activation_tiles_, ops::TokenTilesSize(capacity_, c.intermediate));
  }
  if (largest_dequantized > 0 || is_pair_apart) {
    visit(gate_, n * c.intermediate);
    visit(up_, n * c.intermediate);
  }
  if (largest_dequantized > 0) {
    visit(normed_, n * c.hidden);
    visit(transformed_, n * widest);
    visit(bf16_weights_, largest_dequantized);
  }
}

int64_t Products::size_bytes() {
  ops::BufferBytes bytes;
  ForEachBuffer(bytes);
  return bytes.bytes();
}

absl::Status Products::Allocate() {
  // Zeros, as rows of no sequence are computed with what lies there, and as nothing is written to
  // the columns that fill up tiles.
  absl::Status status;
  ForEachBuffer([&]<typename T>(DeviceBuffer<T>& buffer, int64_t n) {
    if (status.ok()) status = ops::AllocateZeros(buffer, n, context_->stream());
  });
  return status;
}

Products::Way Products::WayOf(int64_t n_rows, bool is_quantized) const {
  if (limits_.batch_invariant || n_rows <= kFewRowsMax) return Way::kFew;
  if (has_gemm_ && is_quantized) return Way::kTiles;
  return n_rows > kChunkedRowsMax ? Way::kDequantized : Way::kFew;
}
Products::Way Products::WayOf(const Product& product, int64_t n_rows) const {
  return WayOf(n_rows, IsQuantized(product));
}

absl::Status Products::Project(const Product& product, const DeviceBuffer<float>& norm,
                               const float* hidden, int64_t n_rows, float* y) {
  return Multiply(product, {.hidden = hidden, .norm = &norm}, n_rows, y, /*accumulate=*/false,
                  /*has_bias=*/false);
}

absl::Status Products::Output(const Product& product, const bf16* x, int64_t n_rows, float* y,
                              bool accumulate) {
  return Multiply(product, {.x = x}, n_rows, y, accumulate, /*has_bias=*/true);
}

absl::Status Products::FeedForward(const LayerWeights& layer, const float* hidden, int64_t n_rows,
                                   float* y, bool accumulate) {
  WALSH_ASSIGN_OR_RETURN(
      const Input activation,
      Activate(layer, {.hidden = hidden, .norm = &layer.post_attention_norm}, n_rows));
  return Multiply(layer.down, activation, n_rows, y, accumulate, /*has_bias=*/true);
}

absl::Status Products::Head(const float* hidden, int64_t n_rows, float* logits, int64_t stride) {
  const Input input{.hidden = hidden, .norm = &weights_->final_norm};
  const ServingMatrix& head = weights_->head;
  if (WayOf(n_rows, /*is_quantized=*/true) == Way::kTiles) {
    WALSH_ASSIGN_OR_RETURN(const ops::TokenTiles tiles,
                           Tiles(input, n_rows, config_->hidden, nullptr, 0));
    return ops::LowBitGemm({.n_tokens = n_rows,
                            .weights = &head,
                            .x = tiles,
                            .y_float = logits,
                            .y_stride = stride,
                            .overlap_previous = true,
                            .stream = context_->stream()});
  }
  return InChunks(n_rows, [&](int64_t first, int64_t n) {
    ops::LowBitMatmulParams params = FewParams(head, input, config_->hidden, first, n);
    params.y_float = logits + first * stride;
    params.y_stride = stride;
    return ops::LowBitMatmul(params);
  });
}

absl::Status Products::Multiply(const Product& product, const Input& input, int64_t n_rows,
                                float* y, bool accumulate, bool has_bias) {
  has_bias = has_bias && product.bias.size() > 0;
  switch (WayOf(product, n_rows)) {
    case Way::kFew:
      return MultiplyFew(product, input, n_rows, y, accumulate, has_bias);
    case Way::kTiles:
      return MultiplyTiles(product, input, n_rows, y, accumulate, has_bias);
    case Way::kDequantized:
      break;
  }
  return MultiplyDequantized(product, input, n_rows, y, accumulate, has_bias);
}

absl::StatusOr<Products::Input> Products::Activate(const LayerWeights& layer, const Input& input,
                                                   int64_t n_rows) {
  const Product& gate_up = layer.gate_up;
  bf16* const y = activation_.data();
  switch (WayOf(gate_up, n_rows)) {
    case Way::kFew:
      WALSH_RETURN_IF_ERROR(ActivateFew(gate_up, input, n_rows, y));
      break;
    case Way::kTiles: {
      // Straight into what down reads, if nothing is done to it in between.
      ops::TokenTiles tiles;
      if (gate_up.parts.size() == 1 && !layer.down.has_transform() &&
          WayOf(layer.down, n_rows) == Way::kTiles) {
        tiles = {
            .data = activation_tiles_.data(), .capacity = capacity_, .cols = config_->intermediate};
      }
      WALSH_RETURN_IF_ERROR(ActivateTiles(gate_up, input, n_rows, y, tiles));
      if (tiles.data != nullptr) return Input{.tiles = tiles};
      break;
    }
    case Way::kDequantized:
      WALSH_RETURN_IF_ERROR(ActivateDequantized(gate_up, input, n_rows, y));
      break;
  }
  return Input{.x = y};
}

LowBitOutput Products::GatedOutput() const {
  return config_->activation == MlpActivation::kGeluTanh ? LowBitOutput::kGeluMul
                                                         : LowBitOutput::kSiluMul;
}

absl::Status Products::ActivatePair(int64_t n, bf16* y) {
  return config_->activation == MlpActivation::kGeluTanh
             ? ops::GeluMultiply<bf16>(*context_, n, gate_.data(), up_.data(), y)
             : ops::SiluMultiply<bf16>(*context_, n, gate_.data(), up_.data(), y);
}

// Few rows.

ops::LowBitMatmulParams Products::FewParams(const ServingMatrix& weights, const Input& input,
                                            int64_t cols, int64_t first, int64_t n) {
  ops::LowBitMatmulParams params{.n_tokens = n,
                                 .weights = &weights,
                                 .overlap_previous = true,
                                 .workspace = workspace_.data(),
                                 .workspace_bytes = workspace_.size_bytes(),
                                 .stream = context_->stream()};
  if (input.norm == nullptr) {
    params.x = input.x + first * cols;
    params.shared_part = ops::SharedPart::kLarger;  // those behind a norm have the smaller
    return params;
  }
  params.x_float = input.hidden + first * cols;
  params.has_norm = true;
  params.norm_weight = input.norm->data();
  params.eps = eps();
  return params;
}

absl::Status Products::RunFew(const Product& product, const Product::Part& part,
                              ops::LowBitMatmulParams params) {
  if (part.dense.size() == 0) {
    params.input_order = part.input_order.data();
    params.rotation_block = product.rotation_block;
    return ops::LowBitMatmul(params);
  }
  return ops::DenseMatmul({.n_tokens = params.n_tokens,
                           .rows = part.rows,
                           .cols = product.cols,
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

absl::Status Products::MultiplyFew(const Product& product, const Input& input, int64_t n_rows,
                                   float* y, bool accumulate, bool has_bias) {
  return InChunks(n_rows, [&](int64_t first, int64_t n) -> absl::Status {
    for (const Product::Part& part : product.parts) {
      ops::LowBitMatmulParams params = FewParams(part.weights, input, product.cols, first, n);
      if (has_bias) params.bias = product.BiasOf(part);
      params.output = accumulate ? LowBitOutput::kAdd : LowBitOutput::kStore;
      params.y_float = y + first * product.rows + part.first_row;
      params.y_stride = product.rows;
      WALSH_RETURN_IF_ERROR(RunFew(product, part, params));
    }
    return absl::OkStatus();
  });
}

absl::Status Products::ActivateFew(const Product& gate_up, const Input& input, int64_t n_rows,
                                   bf16* y) {
  const int64_t width = gate_up.rows / 2;
  const bool is_pair = gate_up.parts.size() == 1;  // whose rows are interleaved
  const std::array<bf16*, 2> to = {is_pair ? y : gate_.data(), up_.data()};
  const absl::Status status = InChunks(n_rows, [&](int64_t first, int64_t n) -> absl::Status {
    for (size_t i = 0; i < gate_up.parts.size(); ++i) {
      const Product::Part& part = gate_up.parts[i];
      ops::LowBitMatmulParams params = FewParams(part.weights, input, gate_up.cols, first, n);
      params.bias = gate_up.BiasOf(part);
      params.output = is_pair ? GatedOutput() : LowBitOutput::kStore;
      params.y_bf16 = to[i] + first * width;
      WALSH_RETURN_IF_ERROR(RunFew(gate_up, part, params));
    }
    return absl::OkStatus();
  });
  if (!status.ok() || is_pair) return status;
  return ActivatePair(n_rows * width, y);
}

// More rows.

absl::StatusOr<ops::TokenTiles> Products::Tiles(const Input& input, int64_t n_rows, int64_t cols,
                                                const int32_t* order, int64_t rotation_block) {
  if (input.tiles.data != nullptr) return input.tiles;
  const ops::TokenTiles tiles{.data = tiles_.data(), .capacity = capacity_, .cols = cols};
  const bool has_norm = input.norm != nullptr;
  WALSH_RETURN_IF_ERROR(ops::MakeTokenTiles({.n_tokens = n_rows,
                                             .tiles = tiles,
                                             .x = input.x,
                                             .x_float = input.hidden,
                                             .has_norm = has_norm,
                                             .norm_weight = has_norm ? input.norm->data() : nullptr,
                                             .eps = has_norm ? eps() : 0,
                                             .input_order = order,
                                             .rotation_block = rotation_block,
                                             .overlap_previous = true,
                                             .stream = context_->stream()}));
  return tiles;
}

absl::StatusOr<ops::TokenTiles> Products::TilesOf(const Product& product, const Product::Part& part,
                                                  const Input& input, int64_t n_rows) {
  return Tiles(input, n_rows, product.cols, part.input_order.data(), product.rotation_block);
}

absl::Status Products::MultiplyTiles(const Product& product, const Input& input, int64_t n_rows,
                                     float* y, bool accumulate, bool has_bias) {
  ops::TokenTiles tiles;
  for (const Product::Part& part : product.parts) {
    // Parts that take the input as it is share its tiles.
    if (tiles.data == nullptr || product.has_transform()) {
      WALSH_ASSIGN_OR_RETURN(tiles, TilesOf(product, part, input, n_rows));
    }
    WALSH_RETURN_IF_ERROR(
        ops::LowBitGemm({.n_tokens = n_rows,
                         .weights = &part.weights,
                         .x = tiles,
                         .bias = has_bias ? product.BiasOf(part) : nullptr,
                         .output = accumulate ? LowBitOutput::kAdd : LowBitOutput::kStore,
                         .y_float = y + part.first_row,
                         .y_stride = product.rows,
                         .overlap_previous = true,
                         .stream = context_->stream()}));
  }
  return absl::OkStatus();
}

absl::Status Products::ActivateTiles(const Product& gate_up, const Input& input, int64_t n_rows,
                                     bf16* y, const ops::TokenTiles& y_tiles) {
  const int64_t width = gate_up.rows / 2;
  const bool is_pair = gate_up.parts.size() == 1;
  const std::array<bf16*, 2> to = {is_pair ? y : gate_.data(), up_.data()};
  ops::TokenTiles tiles;
  for (size_t i = 0; i < gate_up.parts.size(); ++i) {
    const Product::Part& part = gate_up.parts[i];
    if (tiles.data == nullptr || gate_up.has_transform()) {
      WALSH_ASSIGN_OR_RETURN(tiles, TilesOf(gate_up, part, input, n_rows));
    }
    WALSH_RETURN_IF_ERROR(ops::LowBitGemm({.n_tokens = n_rows,
                                           .weights = &part.weights,
                                           .x = tiles,
                                           .bias = gate_up.BiasOf(part),
                                           .output = is_pair ? GatedOutput() : LowBitOutput::kStore,
                                           .y_bf16 = y_tiles.data == nullptr ? to[i] : nullptr,
                                           .y_tiles = y_tiles,
                                           .overlap_previous = true,
                                           .stream = context_->stream()}));
  }
  if (is_pair) return absl::OkStatus();
  return ActivatePair(n_rows * width, y);
}

// Many rows.

absl::StatusOr<const bf16*> Products::Rows(const Product& product, const Input& input,
                                           int64_t n_rows) {
  if (input.norm == nullptr) return input.x;
  WALSH_RETURN_IF_ERROR(ops::RmsNorm<bf16>(*context_, n_rows, product.cols, input.hidden,
                                           input.norm->data(), eps(), normed_.data()));
  return normed_.data();
}

absl::StatusOr<const bf16*> Products::Transformed(const Product& product, const Product::Part& part,
                                                  const bf16* x, int64_t n_rows) {
  if (part.input_order.data() == nullptr && product.rotation_block == 0) return x;
  WALSH_RETURN_IF_ERROR(ops::TransformActivations({.n_tokens = n_rows,
                                                   .cols = product.cols,
                                                   .x = x,
                                                   .input_order = part.input_order.data(),
                                                   .rotation_block = product.rotation_block,
                                                   .y = transformed_.data(),
                                                   .stream = context_->stream()}));
  return transformed_.data();
}

absl::StatusOr<const bf16*> Products::Dequantized(const Product& product) {
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

absl::Status Products::MultiplyDequantized(const Product& product, const Input& input,
                                           int64_t n_rows, float* y, bool accumulate,
                                           bool has_bias) {
  WALSH_ASSIGN_OR_RETURN(const bf16* x, Rows(product, input, n_rows));
  WALSH_ASSIGN_OR_RETURN(const bf16* weights, Dequantized(product));
  const std::vector<Product::Part>& parts = product.parts;
  for (size_t i = 0; i < parts.size();) {
    // As many as take the input as it is are one.
    const Product::Part& part = parts[i];
    int64_t rows = part.rows;
    for (++i; i < parts.size() && part.input_order.data() == nullptr &&
              parts[i].input_order.data() == nullptr;
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
  if (!has_bias) return absl::OkStatus();
  return ops::AddBias<float>(*context_, n_rows, product.rows, product.bias.data(), y);
}

absl::Status Products::ActivateDequantized(const Product& gate_up, const Input& input,
                                           int64_t n_rows, bf16* y) {
  const int64_t width = gate_up.rows / 2;
  WALSH_ASSIGN_OR_RETURN(const bf16* rows, Rows(gate_up, input, n_rows));
  WALSH_ASSIGN_OR_RETURN(const bf16* weights, Dequantized(gate_up));
  int64_t row = 0;
  const bf16* x = nullptr;
  for (bf16* to : {gate_.data(), up_.data()}) {
    if (x == nullptr || gate_up.parts.size() > 1) {
      WALSH_ASSIGN_OR_RETURN(
          x, Transformed(gate_up, row == 0 ? gate_up.parts.front() : gate_up.parts.back(), rows,
                         n_rows));
    }
    WALSH_RETURN_IF_ERROR(
        ops::Gemm(*context_, ops::GemmParams<bf16>{.n_tokens = n_rows,
                                                   .in = gate_up.cols,
                                                   .out = width,
                                                   .x = x,
                                                   .weights = weights + row * gate_up.cols,
                                                   .y = to}));
    if (gate_up.bias.size() > 0) {
      WALSH_RETURN_IF_ERROR(
          ops::AddBias<bf16>(*context_, n_rows, width, gate_up.bias.data() + row, to));
    }
    row += width;
  }
  return ActivatePair(n_rows * width, y);
}

}  // namespace walsh::engine::cuda
