#include "worker/engine/cuda/device_weights.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "worker/io/checkpoint.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/dense_matmul.h"
#include "worker/kernels/cuda/low_bit_matmul.h"
#include "worker/kernels/cuda/paged_attention.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/kernels/cuda/read_ahead.h"
#include "worker/kernels/cuda/row_stream.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/kernels/thread_pool.h"
#include "worker/model/decoder_layer.h"
#include "worker/rotate/walsh_matrix.h"
#include "worker/tensor/half.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;
using ops::ServingRows;

// Positions of kLayerLinears that share an input, and where the product goes.
struct LinearSet {
  Product LayerWeights::*product;
  size_t first, last;
};
constexpr std::array<LinearSet, 4> kSets = {{
    {&LayerWeights::qkv, 0, 2},
    {&LayerWeights::o, 3, 3},
    {&LayerWeights::gate_up, 4, 5},
    {&LayerWeights::down, 6, 6},
}};
constexpr size_t kGate = 4;
constexpr size_t kDown = 6;
constexpr size_t kLinears = kLayerLinears.size();

bool HaveOneForm(const GptqShape& a, const GptqShape& b) {
  return a.bits == b.bits && a.group_size == b.group_size &&
         (a.grid == StoredGrid::kCodebook) == (b.grid == StoredGrid::kCodebook);
}

// Where a layer's norms go.
struct NormBuffer {
  std::vector<float> DecoderLayer::*weights;
  DeviceBuffer<float> LayerWeights::*buffer;
};
constexpr std::array<NormBuffer, 6> kNormBuffers = {{
    {&DecoderLayer::input_norm, &LayerWeights::input_norm},
    {&DecoderLayer::post_attention_norm, &LayerWeights::post_attention_norm},
    {&DecoderLayer::q_norm, &LayerWeights::q_norm},
    {&DecoderLayer::k_norm, &LayerWeights::k_norm},
    {&DecoderLayer::attention_output_norm, &LayerWeights::attention_output_norm},
    {&DecoderLayer::mlp_output_norm, &LayerWeights::mlp_output_norm},
}};
DeviceBuffer<float>& BufferOf(const LayerNorm& norm, LayerWeights& layer) {
  const auto it =
      std::find_if(kNormBuffers.begin(), kNormBuffers.end(),
                   [&norm](const NormBuffer& entry) { return entry.weights == norm.weights; });
  WALSH_CHECK(it != kNormBuffers.end());
  return layer.*it->buffer;
}

// order[i]: what must be at i of each block for the Hadamard matrix in natural order to make what
// the Walsh matrix makes: both are symmetric, so W[s, j] = H[n(s), j] = H[s, n(j)], where row s of
// Walsh's is row n(s) of Hadamard's.
std::vector<int32_t> WalshInputOrder(int64_t width, const rotate::HadamardOrder& block) {
  const std::vector<int32_t> natural = rotate::WalshRowOrder(block);
  std::vector<int32_t> order(static_cast<size_t>(width));
  for (int64_t first = 0; first < width; first += block.n()) {
    for (int64_t s = 0; s < block.n(); ++s) {
      order[static_cast<size_t>(first + natural[static_cast<size_t>(s)])] =
          static_cast<int32_t>(first + s);
    }
  }
  return order;
}

absl::Status NotServed(const std::string& what) {
  return absl::UnimplementedError(absl::StrCat("no CUDA kernels for ", what));
}

template <typename T>
std::span<T> SpanAt(std::span<std::byte> memory, int64_t offset, int64_t n) {
  return {reinterpret_cast<T*>(memory.data() + offset), static_cast<size_t>(n)};
}

class Loader {
 public:
  Loader(Context* context, const ArtifactReader& artifact)
      : context_(*context),
        artifact_(artifact),
        config_(artifact.config()),
        shapes_(LinearShapes(config_)),
        norms_(LayerNorms(config_)),
        readers_(std::min(ops::kReaders, ThreadPool::HardwareThreads())) {}

  absl::StatusOr<DeviceWeights> Load() {
    DeviceWeights weights;
    WALSH_RETURN_IF_ERROR(ReadOrders());
    WALSH_RETURN_IF_ERROR(LoadLayers(weights));
    WALSH_ASSIGN_OR_RETURN(weights.embedding, LoadTable(std::string(kEmbeddingTensor)));
    WALSH_RETURN_IF_ERROR(LoadHead(weights));
    WALSH_ASSIGN_OR_RETURN(weights.final_norm, LoadNorm(std::string(kFinalNormTensor)));
    WALSH_ASSIGN_OR_RETURN(weights.inverse_frequencies,
                           ops::Upload<float>(context_, RopeInverseFrequencies(config_)));
    WALSH_ASSIGN_OR_RETURN(weights.sliding_inverse_frequencies,
                           ops::Upload<float>(context_, SlidingRopeInverseFrequencies(config_)));
    WALSH_RETURN_IF_ERROR(context_.Synchronize());
    return weights;
  }

 private:
  // Where the stored tensors of a layer lie behind each other, in bytes.
  struct PlacedLinear {
    std::string name;
    GptqShape shape;
    int64_t qweight = 0, qzeros = 0, scales = 0, zeros = 0, levels = 0;
    int64_t dense = -1;  // −1: it is quantized; else there is none of the above
    int64_t bias = -1;   // −1: none
    int64_t weight_words() const { return is_dense() ? 0 : shape.weight_words() * shape.rows; }
    // Of the tensors of its grid; 0 where it has no such tensor.
    int64_t zero_words() const {
      return shape.grid == StoredGrid::kGptq && !is_dense() ? shape.groups() * shape.zero_words()
                                                            : 0;
    }
    int64_t n_scales() const { return has_codebook() ? 0 : n_grids(); }
    int64_t n_zeros() const { return shape.grid == StoredGrid::kFloatZeros ? n_grids() : 0; }
    int64_t n_levels() const { return has_codebook() ? n_grids() << shape.bits : 0; }
    int64_t n_dense() const { return is_dense() ? shape.rows * shape.cols : 0; }
    bool is_dense() const { return dense >= 0; }

   private:
    bool has_codebook() const { return shape.grid == StoredGrid::kCodebook; }
    int64_t n_grids() const { return is_dense() ? 0 : shape.groups() * shape.rows; }
  };
  struct PlacedLayer {
    std::array<PlacedLinear, kLinears> linears;  // in kLayerLinears' order
    std::vector<int64_t> norms;                  // in norms_' order
    int64_t n_bytes = 0;
  };

  absl::StatusOr<PlacedLayer> PlaceLayer(int64_t index) const {
    PlacedLayer layer;
    const auto place = [&layer](int64_t n_bytes) {
      return std::exchange(layer.n_bytes, layer.n_bytes + ops::TensorRoom(n_bytes));
    };
    constexpr auto kHalf = static_cast<int64_t>(sizeof(uint16_t));
    constexpr auto kWord = static_cast<int64_t>(sizeof(uint32_t));
    constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
    for (size_t i = 0; i < kLinears; ++i) {
      PlacedLinear& linear = layer.linears[i];
      linear.name = LayerTensor(index, kLayerLinears[i].name);
      if (artifact_.IsQuantized(linear.name)) {
        WALSH_ASSIGN_OR_RETURN(linear.shape, artifact_.ShapeOf(linear.name));
      } else {
        linear.shape = {.rows = shapes_[i].out, .cols = shapes_[i].in};
        linear.dense = place(linear.shape.rows * linear.shape.cols * kHalf);
      }
      linear.qweight = place(linear.weight_words() * kWord);
      linear.qzeros = place(linear.zero_words() * kWord);
      linear.scales = place(linear.n_scales() * kHalf);
      linear.zeros = place(linear.n_zeros() * kHalf);
      linear.levels = place(linear.n_levels() * kHalf);
      if (config_.has_bias(kLayerLinears[i].name)) linear.bias = place(linear.shape.rows * kHalf);
    }
    for (const LayerNorm& norm : norms_) layer.norms.push_back(place(norm.width * kFloat));
    return layer;
  }

  absl::StatusOr<int64_t> FillLayer(int64_t index, std::span<std::byte> host) {
    WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(index));
    std::array<absl::Status, kLinears> statuses;
    readers_.ParallelFor(static_cast<int64_t>(kLinears), [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      const bool has_row_order = at == kGate || at == kGate + 1;
      statuses[at] = ReadLinear(layer.linears[at],
                                has_row_order ? RowOrder(index) : std::span<const int32_t>(), host);
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    for (size_t i = 0; i < norms_.size(); ++i) {
      WALSH_RETURN_IF_ERROR(ReadNorm(LayerTensor(index, norms_[i].name),
                                     SpanAt<float>(host, layer.norms[i], norms_[i].width)));
    }
    return layer.n_bytes;
  }

  // `row_order` of the outputs, or empty: weights are brought into it when they are laid out, the
  // bias at once.
  absl::Status ReadLinear(const PlacedLinear& linear, std::span<const int32_t> row_order,
                          std::span<std::byte> host) const {
    if (linear.is_dense()) return ReadDense(linear, row_order, host);
    WALSH_RETURN_IF_ERROR(artifact_.ReadPacked(
        linear.name, {.qweight = SpanAt<uint32_t>(host, linear.qweight, linear.weight_words()),
                      .qzeros = SpanAt<uint32_t>(host, linear.qzeros, linear.zero_words()),
                      .scales = SpanAt<uint16_t>(host, linear.scales, linear.n_scales()),
                      .zeros = SpanAt<uint16_t>(host, linear.zeros, linear.n_zeros()),
                      .levels = SpanAt<uint16_t>(host, linear.levels, linear.n_levels()),
                      .in_any_order = true}));
    return ReadBias(linear, row_order, host);
  }

  absl::Status ReadDense(const PlacedLinear& linear, std::span<const int32_t> row_order,
                         std::span<std::byte> host) const {
    const std::span<uint16_t> weights = SpanAt<uint16_t>(host, linear.dense, linear.n_dense());
    const std::string name = linear.name + ".weight";
    if (row_order.empty()) {
      WALSH_RETURN_IF_ERROR(artifact_.ReadBf16(name, 0, linear.shape.rows, weights));
    }
    const auto cols = static_cast<size_t>(linear.shape.cols);
    for (size_t row = 0; row < row_order.size(); ++row) {
      WALSH_RETURN_IF_ERROR(
          artifact_.ReadBf16(name, row_order[row], 1, weights.subspan(row * cols, cols)));
    }
    return ReadBias(linear, row_order, host);
  }

  absl::Status ReadBias(const PlacedLinear& linear, std::span<const int32_t> row_order,
                        std::span<std::byte> host) const {
    if (linear.bias < 0) return absl::OkStatus();
    const std::span<uint16_t> bias = SpanAt<uint16_t>(host, linear.bias, linear.shape.rows);
    WALSH_RETURN_IF_ERROR(artifact_.ReadBf16(linear.name + ".bias", 0, 1, bias));
    if (row_order.empty()) return absl::OkStatus();
    const std::vector<uint16_t> stored(bias.begin(), bias.end());
    std::transform(row_order.begin(), row_order.end(), bias.begin(),
                   [&](int32_t row) { return stored[static_cast<size_t>(row)]; });
    return absl::OkStatus();
  }

  // What is in another order, before any layer is loaded.
  absl::Status ReadOrders() {
    const OnlineTransforms::BlockRotation& rotation = artifact_.online().down_input;
    if (rotation.block != 0 && rotation.sequency) {
      WALSH_ASSIGN_OR_RETURN(const rotate::HadamardOrder block,
                             rotate::FactorHadamardOrder(rotation.block));
      walsh_order_ = WalshInputOrder(config_.intermediate, block);
    }
    input_orders_.resize(static_cast<size_t>(config_.n_layers));
    for (int64_t l = 0; l < config_.n_layers; ++l) {
      auto& orders = input_orders_[static_cast<size_t>(l)];
      for (size_t i = 0; i < kLinears; ++i) {
        const std::string name = LayerTensor(l, kLayerLinears[i].name);
        if (!artifact_.IsQuantized(name)) continue;
        WALSH_ASSIGN_OR_RETURN(orders[i], artifact_.ReadInputOrder(name));
      }
    }
    return absl::OkStatus();
  }
  // Of gate and up, so that their product is in the order that down_proj wants; empty: as stored.
  std::span<const int32_t> RowOrder(int64_t layer) const {
    return walsh_order_.empty() ? input_orders_[static_cast<size_t>(layer)][kDown] : walsh_order_;
  }

  absl::Status LoadLayers(DeviceWeights& weights) {
    int64_t largest = 0;
    for (int64_t l = 0; l < config_.n_layers; ++l) {
      WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(l));
      largest = std::max(largest, layer.n_bytes);
    }
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ops::ReadAhead> layers,
                           ops::ReadAhead::Create(&context_, &pinned_, config_.n_layers, largest,
                                                  [this](int64_t index, std::span<std::byte> host) {
                                                    return FillLayer(index, host);
                                                  }));
    for (int64_t l = 0; l < config_.n_layers; ++l) {
      WALSH_ASSIGN_OR_RETURN(const std::byte* stored, layers->Take(l));
      WALSH_ASSIGN_OR_RETURN(const PlacedLayer placed, PlaceLayer(l));
      LayerWeights layer;
      for (const LinearSet& set : kSets) {
        WALSH_ASSIGN_OR_RETURN(layer.*set.product, MakeProduct(l, placed, set, stored));
      }
      layer.down.rotation_block = artifact_.online().down_input.block;
      for (size_t i = 0; i < norms_.size(); ++i) {
        DeviceBuffer<float>& norm = BufferOf(norms_[i], layer);
        WALSH_ASSIGN_OR_RETURN(norm,
                               DeviceBuffer<float>::Allocate(norms_[i].width, context_.stream()));
        WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(norm.data(), stored + placed.norms[i],
                                                   static_cast<size_t>(norm.size_bytes()),
                                                   cudaMemcpyDeviceToDevice, context_.stream()));
      }
      weights.layers.push_back(std::move(layer));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Product> MakeProduct(int64_t index, const PlacedLayer& placed,
                                      const LinearSet& set, const std::byte* stored) {
    Product product;
    product.cols = placed.linears[set.first].shape.cols;
    const auto& orders = input_orders_[static_cast<size_t>(index)];
    DeviceBuffer<int32_t> row_order;
    if (set.first == kGate) {
      WALSH_ASSIGN_OR_RETURN(row_order, UploadOrder(RowOrder(index)));
    }
    for (size_t first = set.first; first <= set.last;) {
      if (placed.linears[first].is_dense()) {
        WALSH_RETURN_IF_ERROR(AddDensePart(placed.linears[first], stored, product));
        ++first;
        continue;
      }
      // As many as have one form lie in one matrix.
      std::vector<ops::StoredLinear> linears;
      const GptqShape& shape = placed.linears[first].shape;
      size_t next = first;
      for (; next <= set.last && !placed.linears[next].is_dense() &&
             HaveOneForm(placed.linears[next].shape, shape) && orders[next] == orders[first];
           ++next) {
        linears.push_back(LinearAt(placed.linears[next], stored));
        linears.back().row_order = row_order.data();
      }
      const bool is_pair = set.first == kGate && linears.size() == 2;
      Product::Part part{.first_row = product.rows};
      WALSH_ASSIGN_OR_RETURN(part.input_order, UploadOrder(orders[first]));
      WALSH_ASSIGN_OR_RETURN(
          part.weights, ServingMatrix::Build(
                            {.linears = linears,
                             .cols = shape.cols,
                             .bits = shape.bits,
                             .group_size = shape.group_size,
                             .order = is_pair ? ServingRows::kInterleaved : ServingRows::kStacked,
                             .column_order = part.input_order.data()},
                            context_.stream()));
      // The rows of gate and up have seen to it.
      if (set.first == kDown) part.input_order.Reset();
      part.rows = part.weights.shape().rows;
      product.rows += part.rows;
      product.parts.push_back(std::move(part));
      first = next;
    }
    if (placed.linears[set.first].bias < 0) return product;
    WALSH_ASSIGN_OR_RETURN(product.bias,
                           DeviceBuffer<float>::Allocate(product.rows, context_.stream()));
    int64_t row = 0;
    for (size_t i = set.first; i <= set.last; ++i) {
      const PlacedLinear& linear = placed.linears[i];
      WALSH_RETURN_IF_ERROR((ops::Convert<bf16, float>(
          context_, linear.shape.rows, reinterpret_cast<const bf16*>(stored + linear.bias),
          product.bias.data() + row)));
      row += linear.shape.rows;
    }
    return product;
  }

  absl::Status AddDensePart(const PlacedLinear& linear, const std::byte* stored, Product& product) {
    Product::Part part{.first_row = product.rows, .rows = linear.shape.rows};
    WALSH_ASSIGN_OR_RETURN(part.dense,
                           DeviceBuffer<bf16>::Allocate(linear.n_dense(), context_.stream()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(part.dense.data(), stored + linear.dense,
                                               static_cast<size_t>(part.dense.size_bytes()),
                                               cudaMemcpyDeviceToDevice, context_.stream()));
    product.rows += part.rows;
    product.parts.push_back(std::move(part));
    return absl::OkStatus();
  }

  static ops::StoredLinear LinearAt(const PlacedLinear& linear, const std::byte* stored) {
    const auto halves = [&](int64_t offset, int64_t n) {
      return n == 0 ? nullptr : reinterpret_cast<const __half*>(stored + offset);
    };
    return {.rows = linear.shape.rows,
            .qweight = reinterpret_cast<const uint32_t*>(stored + linear.qweight),
            .qzeros = linear.zero_words() == 0
                          ? nullptr
                          : reinterpret_cast<const uint32_t*>(stored + linear.qzeros),
            .scales = halves(linear.scales, linear.n_scales()),
            .zeros = halves(linear.zeros, linear.n_zeros()),
            .levels = halves(linear.levels, linear.n_levels())};
  }

  // Empty where that is empty.
  absl::StatusOr<DeviceBuffer<int32_t>> UploadOrder(std::span<const int32_t> order) {
    return ops::Upload<int32_t>(context_, std::vector<int32_t>(order.begin(), order.end()));
  }

  // What the norm multiplies by, which some families store less 1.
  absl::Status ReadNorm(const std::string& name, std::span<float> into) const {
    std::vector<uint16_t> stored(into.size());
    WALSH_RETURN_IF_ERROR(artifact_.ReadStoredBf16(name, 0, 1, stored));
    std::transform(stored.begin(), stored.end(), into.begin(),
                   [this](uint16_t value) { return config_.norm_offset + Bf16ToFloat(value); });
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceBuffer<float>> LoadNorm(const std::string& name) {
    std::vector<float> norm(static_cast<size_t>(config_.hidden));
    WALSH_RETURN_IF_ERROR(ReadNorm(name, norm));
    return ops::Upload<float>(context_, norm);
  }

  // [vocab, hidden] as it is stored.
  absl::StatusOr<DeviceBuffer<bf16>> LoadTable(const std::string& name) {
    const int64_t width = config_.hidden;
    const int64_t row_bytes = width * static_cast<int64_t>(sizeof(bf16));
    WALSH_ASSIGN_OR_RETURN(auto table,
                           DeviceBuffer<bf16>::Allocate(config_.vocab * width, context_.stream()));
    WALSH_RETURN_IF_ERROR(ops::StreamRows(
        context_, pinned_, readers_,
        {.rows = config_.vocab,
         .row_bytes = row_bytes,
         .read =
             [&](int64_t first, int64_t n, std::byte* to) {
               return artifact_.ReadBf16(
                   name, first, n,
                   {reinterpret_cast<uint16_t*>(to), static_cast<size_t>(n * width)});
             },
         .consume = [&](const std::byte* stored, int64_t first, int64_t n) -> absl::Status {
           WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(table.data() + first * width, stored,
                                                      static_cast<size_t>(n * row_bytes),
                                                      cudaMemcpyDeviceToDevice, context_.stream()));
           return absl::OkStatus();
         }}));
    return table;
  }

  absl::Status LoadHead(DeviceWeights& weights) {
    const std::string name(kLmHeadTensor);
    WALSH_ASSIGN_OR_RETURN(const auto table, LoadTable(name));
    constexpr int64_t kNoneBad = std::numeric_limits<int64_t>::max();
    WALSH_ASSIGN_OR_RETURN(auto first_bad,
                           ops::Upload<int64_t>(context_, std::vector<int64_t>{kNoneBad}));
    WALSH_ASSIGN_OR_RETURN(weights.head, ServingMatrix::Quantize({.rows = config_.vocab,
                                                                  .cols = config_.hidden,
                                                                  .weights = table.data(),
                                                                  .first_bad = first_bad.data()},
                                                                 context_.stream()));
    WALSH_ASSIGN_OR_RETURN(const std::vector<int64_t> bad,
                           ops::Download<int64_t>(context_, first_bad.data(), 1));
    if (bad[0] == kNoneBad) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("tensor '", name, "': value ", bad[0], " is not finite"));
  }

  Context& context_;
  const ArtifactReader& artifact_;
  const ModelConfig& config_;
  const std::vector<LinearShape> shapes_;
  const std::vector<LayerNorm> norms_;
  // Of each layer's linears, in kLayerLinears' order; empty ones are in order.
  std::vector<std::array<std::vector<int32_t>, kLinears>> input_orders_;
  std::vector<int32_t> walsh_order_;  // of down_proj's input; empty: no Walsh matrix
  ops::PinnedPool pinned_;
  ThreadPool readers_;
};

}  // namespace

bool Product::has_transform() const {
  return rotation_block != 0 || std::any_of(parts.begin(), parts.end(), [](const Part& part) {
           return part.input_order.size() > 0;
         });
}

int64_t Product::size_bytes() const {
  int64_t bytes = 0;
  for (const Part& part : parts) bytes += part.weights.size_bytes() + part.dense.size_bytes();
  return bytes;
}

int64_t DeviceWeights::packed_bytes() const {
  int64_t bytes = head.size_bytes();
  for (const LayerWeights& layer : layers) {
    for (const LinearSet& set : kSets) bytes += (layer.*set.product).size_bytes();
  }
  return bytes;
}

int64_t DeviceWeights::size_bytes() const { return packed_bytes() + embedding.size_bytes(); }

absl::Status CheckServable(const ArtifactReader& artifact) {
  const ModelConfig& config = artifact.config();
  // Keys and values: kv_storage.h.
  const OnlineTransforms& online = artifact.online();
  if (online.activations.is_on()) return NotServed("rounding of activations at run time");
  const int64_t block = online.down_input.block;
  if (block != 0 && !ops::IsLowBitRotation(block)) {
    return NotServed(absl::StrCat("a rotation of down_proj's input in blocks of ", block,
                                  "; served are 16, 32, 64 and 128"));
  }
  if (!ops::IsPagedHeadDim(config.head_dim)) {
    return NotServed(absl::StrCat("heads of ", config.head_dim));
  }
  const std::vector<LinearShape> shapes = LinearShapes(config);
  for (int64_t l = 0; l < config.n_layers; ++l) {
    for (size_t i = 0; i < kLinears; ++i) {
      const std::string name = LayerTensor(l, shapes[i].name);
      const bool is_rotated = block != 0 && i == kDown;
      if (!artifact.IsQuantized(name)) {
        if (is_rotated) {
          return NotServed(absl::StrCat("'", name, "': a rotated input and unquantized weights"));
        }
        if (shapes[i].in % ops::kDenseColsMultiple != 0) {
          return NotServed(absl::StrCat("'", name, "': unquantized weights of ", shapes[i].in,
                                        " columns, must be a multiple of ",
                                        ops::kDenseColsMultiple));
        }
        continue;
      }
      if (is_rotated) {
        WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> order, artifact.ReadInputOrder(name));
        if (!order.empty()) {
          return NotServed(
              absl::StrCat("'", name, "': a rotated input and columns in another order"));
        }
      }
      WALSH_ASSIGN_OR_RETURN(const GptqShape shape, artifact.ShapeOf(name));
      const absl::Status status =
          ops::ValidateServingShape({.rows = shape.rows,
                                     .cols = shape.cols,
                                     .bits = shape.bits,
                                     .group_size = shape.group_size,
                                     .has_codebook = shape.grid == StoredGrid::kCodebook});
      if (!status.ok()) return NotServed(absl::StrCat("'", name, "': ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<DeviceWeights> LoadWeights(Context& context, const ArtifactReader& artifact) {
  WALSH_RETURN_IF_ERROR(CheckServable(artifact));
  return Loader(&context, artifact).Load();
}

}  // namespace walsh::engine::cuda
