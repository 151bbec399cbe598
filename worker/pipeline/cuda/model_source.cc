#include "worker/pipeline/cuda/model_source.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/read_ahead.h"
#include "worker/kernels/cuda/row_stream.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/kernels/thread_pool.h"
#include "worker/model/decoder_layer.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::kReaders;
using kernels::cuda::PinnedPool;
using kernels::cuda::ReadAhead;
using kernels::cuda::StreamRows;
using kernels::cuda::TensorRoom;
using kernels::cuda::Upload;
namespace {

namespace ops = kernels::cuda;

class CheckpointModel final : public ModelSource {
 public:
  CheckpointModel(Context* context, WeightLoader* loader) : context_(*context), loader_(*loader) {}

  absl::StatusOr<DeviceBuffer<float>> Embedded(std::span<const int32_t> ids) override {
    return loader_.Embedded(ids);
  }
  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override { return loader_.FinalNorm(); }
  absl::StatusOr<DeviceBuffer<bf16>> Head() override { return loader_.RoundedHead(); }
  absl::Status CheckFinite() override { return loader_.CheckFinite(); }
  absl::StatusOr<DeviceLayer<bf16>> Layer(int64_t index) override {
    WALSH_ASSIGN_OR_RETURN(DeviceLayer<float> floats, loader_.Layer(index));
    DeviceLayer<bf16> layer;
    const std::pair<DeviceBuffer<float>*, DeviceBuffer<bf16>*> weights[] = {
        {&floats.qkv, &layer.qkv},
        {&floats.o, &layer.o},
        {&floats.gate_up, &layer.gate_up},
        {&floats.down, &layer.down}};
    for (const auto& [from, to] : weights) {
      WALSH_ASSIGN_OR_RETURN(*to, ToBf16(context_, *from));
      from->Reset();
    }
    layer.qkv_bias = std::move(floats.qkv_bias);
    layer.o_bias = std::move(floats.o_bias);
    layer.gate_up_bias = std::move(floats.gate_up_bias);
    layer.down_bias = std::move(floats.down_bias);
    layer.input_norm = std::move(floats.input_norm);
    layer.post_attention_norm = std::move(floats.post_attention_norm);
    return layer;
  }

 private:
  Context& context_;
  WeightLoader& loader_;
};

template <typename T>
std::span<T> SpanAt(std::span<std::byte> memory, int64_t offset, int64_t n) {
  return {reinterpret_cast<T*>(memory.data() + offset), static_cast<size_t>(n)};
}

class ArtifactModel final : public ModelSource {
 public:
  ArtifactModel(Context* context, PinnedPool* pinned, const ArtifactReader& artifact)
      : context_(*context),
        pinned_(*pinned),
        artifact_(artifact),
        config_(artifact.config()),
        shape_(LayerShape::Of(config_)),
        readers_(std::min(kReaders, ThreadPool::HardwareThreads())) {}

  absl::Status Prepare() {
    int64_t largest = 0;
    for (int64_t l = 0; l < config_.n_layers; ++l) {
      WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(l));
      largest = std::max(largest, layer.n_bytes);
    }
    WALSH_ASSIGN_OR_RETURN(layers_,
                           ReadAhead::Create(&context_, &pinned_, config_.n_layers, largest,
                                             [this](int64_t index, std::span<std::byte> host) {
                                               return FillLayer(index, host);
                                             }));
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceBuffer<float>> Embedded(std::span<const int32_t> ids) override {
    const int64_t width = config_.hidden;
    const auto n_ids = static_cast<int64_t>(ids.size());
    WALSH_ASSIGN_OR_RETURN(auto rows,
                           DeviceBuffer<float>::Allocate(n_ids * width, context_.stream()));
    const auto read = [&](int64_t first, int64_t n, std::byte* to) -> absl::Status {
      for (int64_t i = 0; i < n; ++i) {
        WALSH_RETURN_IF_ERROR(
            artifact_.ReadBf16(kEmbeddingTensor, ids[static_cast<size_t>(first + i)], 1,
                               {reinterpret_cast<uint16_t*>(to) + i * width, RowSize()}));
      }
      return absl::OkStatus();
    };
    WALSH_RETURN_IF_ERROR(
        Stream(n_ids, read, [&](const std::byte* stored, int64_t first, int64_t n) {
          return ops::Convert<bf16, float>(context_, n * width,
                                           reinterpret_cast<const bf16*>(stored),
                                           rows.data() + first * width);
        }));
    return rows;
  }

  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override {
    std::vector<uint16_t> norm(static_cast<size_t>(config_.hidden));
    WALSH_RETURN_IF_ERROR(artifact_.ReadBf16(kFinalNormTensor, 0, 1, norm));
    WALSH_ASSIGN_OR_RETURN(const auto stored, Upload<bf16>(context_, norm));
    return Floats(stored.data(), stored.size());
  }

  absl::StatusOr<DeviceBuffer<bf16>> Head() override {
    const int64_t width = config_.hidden;
    WALSH_ASSIGN_OR_RETURN(auto head,
                           DeviceBuffer<bf16>::Allocate(config_.vocab * width, context_.stream()));
    const auto read = [&](int64_t first, int64_t n, std::byte* to) {
      return artifact_.ReadBf16(
          kLmHeadTensor, first, n,
          {reinterpret_cast<uint16_t*>(to), static_cast<size_t>(n) * RowSize()});
    };
    WALSH_RETURN_IF_ERROR(Stream(
        config_.vocab, read,
        [&](const std::byte* stored, int64_t first, int64_t n) -> absl::Status {
          WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(head.data() + first * width, stored,
                                                     static_cast<size_t>(n * RowBytes()),
                                                     cudaMemcpyDeviceToDevice, context_.stream()));
          return absl::OkStatus();
        }));
    return head;
  }

  absl::StatusOr<DeviceLayer<bf16>> Layer(int64_t index) override {
    WALSH_ASSIGN_OR_RETURN(const std::byte* stored, layers_->Take(index));
    WALSH_ASSIGN_OR_RETURN(const PlacedLayer placed, PlaceLayer(index));
    DeviceLayer<bf16> layer;
    const struct {
      DeviceBuffer<bf16>* weights;
      DeviceBuffer<float>* biases;
      int64_t rows, cols;
      size_t first, last;  // linears
    } sets[] = {
        {&layer.qkv, &layer.qkv_bias, shape_.qkv_rows(), shape_.hidden, 0, 2},
        {&layer.o, &layer.o_bias, shape_.hidden, shape_.q_width(), 3, 3},
        {&layer.gate_up, &layer.gate_up_bias, 2 * shape_.intermediate, shape_.hidden, 4, 5},
        {&layer.down, &layer.down_bias, shape_.hidden, shape_.intermediate, 6, 6},
    };
    for (const auto& set : sets) {
      WALSH_ASSIGN_OR_RETURN(*set.weights,
                             DeviceBuffer<bf16>::Allocate(set.rows * set.cols, context_.stream()));
      if (placed.linears[set.first].bias >= 0) {
        WALSH_ASSIGN_OR_RETURN(*set.biases,
                               DeviceBuffer<float>::Allocate(set.rows, context_.stream()));
      }
      int64_t row = 0;
      for (size_t i = set.first; i <= set.last; ++i) {
        const PlacedLinear& linear = placed.linears[i];
        WALSH_RETURN_IF_ERROR(Unpack(linear, stored, set.weights->data() + row * set.cols));
        if (linear.bias >= 0) {
          WALSH_RETURN_IF_ERROR((ops::Convert<bf16, float>(
              context_, linear.shape.rows, reinterpret_cast<const bf16*>(stored + linear.bias),
              set.biases->data() + row)));
        }
        row += linear.shape.rows;
      }
    }
    for (const auto& [norm, offset] :
         {std::pair(&layer.input_norm, placed.input_norm),
          std::pair(&layer.post_attention_norm, placed.post_attention_norm)}) {
      WALSH_ASSIGN_OR_RETURN(*norm,
                             Floats(reinterpret_cast<const bf16*>(stored + offset), shape_.hidden));
    }
    return layer;
  }

  // The reader has looked at all values.
  absl::Status CheckFinite() override { return absl::OkStatus(); }

 private:
  // Where the stored tensors of a layer lie behind each other, in bytes.
  struct PlacedLinear {
    std::string name;
    GptqShape shape;
    int64_t qweight = 0, qzeros = 0, scales = 0;
    int64_t bias = -1;  // -1: none
    int64_t weight_words() const { return shape.weight_words() * shape.rows; }
    int64_t zero_words() const { return shape.groups() * shape.zero_words(); }
    int64_t n_scales() const { return shape.groups() * shape.rows; }
  };
  struct PlacedLayer {
    std::array<PlacedLinear, kLayerLinears.size()> linears;
    int64_t input_norm = 0, post_attention_norm = 0;
    int64_t n_bytes = 0;
  };

  absl::StatusOr<PlacedLayer> PlaceLayer(int64_t index) const {
    PlacedLayer layer;
    const auto place = [&layer](int64_t n_bytes) {
      return std::exchange(layer.n_bytes, layer.n_bytes + TensorRoom(n_bytes));
    };
    const std::vector<LinearShape> linears = LinearShapes(config_);
    for (size_t i = 0; i < linears.size(); ++i) {
      PlacedLinear& linear = layer.linears[i];
      linear.name = LayerTensor(index, linears[i].name);
      WALSH_ASSIGN_OR_RETURN(linear.shape, artifact_.ShapeOf(linear.name));
      if (linear.shape.grid != StoredGrid::kGptq) {
        return absl::UnimplementedError(absl::StrCat(
            "linear '", linear.name, "' has ",
            linear.shape.grid == StoredGrid::kCodebook ? "a codebook" : "float zero points",
            ", which only the CPU backend reads"));
      }
      linear.qweight = place(linear.weight_words() * static_cast<int64_t>(sizeof(uint32_t)));
      linear.qzeros = place(linear.zero_words() * static_cast<int64_t>(sizeof(uint32_t)));
      linear.scales = place(linear.n_scales() * static_cast<int64_t>(sizeof(uint16_t)));
      if (config_.has_bias(linears[i].name)) {
        linear.bias = place(linear.shape.rows * static_cast<int64_t>(sizeof(uint16_t)));
      }
    }
    const int64_t norm_bytes = config_.hidden * static_cast<int64_t>(sizeof(uint16_t));
    layer.input_norm = place(norm_bytes);
    layer.post_attention_norm = place(norm_bytes);
    return layer;
  }

  absl::StatusOr<int64_t> FillLayer(int64_t index, std::span<std::byte> host) {
    WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(index));
    std::array<absl::Status, kLayerLinears.size()> statuses;
    readers_.ParallelFor(static_cast<int64_t>(statuses.size()), [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      statuses[at] = ReadLinear(layer.linears[at], host);
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    for (const auto& [name, offset] :
         {std::pair("input_layernorm.weight", layer.input_norm),
          std::pair("post_attention_layernorm.weight", layer.post_attention_norm)}) {
      WALSH_RETURN_IF_ERROR(artifact_.ReadBf16(LayerTensor(index, name), 0, 1,
                                               SpanAt<uint16_t>(host, offset, config_.hidden)));
    }
    return layer.n_bytes;
  }

  absl::Status ReadLinear(const PlacedLinear& linear, std::span<std::byte> host) const {
    WALSH_RETURN_IF_ERROR(artifact_.ReadPacked(
        linear.name, {SpanAt<uint32_t>(host, linear.qweight, linear.weight_words()),
                      SpanAt<uint32_t>(host, linear.qzeros, linear.zero_words()),
                      SpanAt<uint16_t>(host, linear.scales, linear.n_scales())}));
    if (linear.bias < 0) return absl::OkStatus();
    return artifact_.ReadBf16(linear.name + ".bias", 0, 1,
                              SpanAt<uint16_t>(host, linear.bias, linear.shape.rows));
  }

  absl::StatusOr<DeviceBuffer<float>> Floats(const bf16* stored, int64_t n) {
    WALSH_ASSIGN_OR_RETURN(auto values, DeviceBuffer<float>::Allocate(n, context_.stream()));
    WALSH_RETURN_IF_ERROR((ops::Convert<bf16, float>(context_, n, stored, values.data())));
    return values;
  }

  absl::Status Unpack(const PlacedLinear& linear, const std::byte* stored, bf16* y) {
    return ops::Unpack({.rows = linear.shape.rows,
                        .cols = linear.shape.cols,
                        .bits = linear.shape.bits,
                        .group_size = linear.shape.group_size,
                        .qweight = reinterpret_cast<const uint32_t*>(stored + linear.qweight),
                        .qzeros = reinterpret_cast<const uint32_t*>(stored + linear.qzeros),
                        .scales = reinterpret_cast<const __half*>(stored + linear.scales),
                        .y = y,
                        .stream = context_.stream()});
  }

  size_t RowSize() const { return static_cast<size_t>(config_.hidden); }
  int64_t RowBytes() const { return config_.hidden * static_cast<int64_t>(sizeof(bf16)); }

  // Rows of embedding or head.
  absl::Status Stream(
      int64_t rows, const std::function<absl::Status(int64_t, int64_t, std::byte*)>& read,
      const std::function<absl::Status(const std::byte*, int64_t, int64_t)>& consume) {
    return StreamRows(context_, pinned_, readers_,
                      {.rows = rows, .row_bytes = RowBytes(), .read = read, .consume = consume});
  }

  Context& context_;
  PinnedPool& pinned_;
  const ArtifactReader& artifact_;
  const ModelConfig& config_;
  const LayerShape shape_;
  ThreadPool readers_;
  std::unique_ptr<ReadAhead> layers_;  // reads with what stands above
};

}  // namespace

std::unique_ptr<ModelSource> MakeCheckpointSource(Context* context, WeightLoader* loader) {
  return std::make_unique<CheckpointModel>(context, loader);
}
absl::StatusOr<std::unique_ptr<ModelSource>> MakeArtifactSource(Context* context,
                                                                PinnedPool* pinned,
                                                                const ArtifactReader& artifact) {
  auto model = std::make_unique<ArtifactModel>(context, pinned, artifact);
  WALSH_RETURN_IF_ERROR(model->Prepare());
  return model;
}

absl::StatusOr<DeviceBuffer<bf16>> ToBf16(Context& context, const DeviceBuffer<float>& values) {
  WALSH_ASSIGN_OR_RETURN(auto rounded,
                         DeviceBuffer<bf16>::Allocate(values.size(), context.stream()));
  WALSH_RETURN_IF_ERROR(
      (ops::Convert<float, bf16>(context, values.size(), values.data(), rounded.data())));
  return rounded;
}

}  // namespace walsh::pipeline::cuda
