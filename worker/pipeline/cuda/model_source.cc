#include "worker/pipeline/cuda/model_source.h"

#include <algorithm>
#include <array>
#include <future>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/pipeline/cuda/transfer.h"
#include "worker/pipeline/plan.h"
#include "worker/tensor/half.h"

namespace walsh::pipeline::cuda {
namespace {

namespace ops = kernels::cuda;

class CheckpointModel final : public ModelSource {
 public:
  CheckpointModel(Context* context, WeightLoader* loader) : context_(*context), loader_(*loader) {}

  absl::StatusOr<DeviceBuffer<float>> Embedding() override { return loader_.Embedding(); }
  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override { return loader_.FinalNorm(); }
  absl::StatusOr<DeviceBuffer<bf16>> Head() override {
    WALSH_ASSIGN_OR_RETURN(const DeviceBuffer<float> head, loader_.Head());
    return ToBf16(context_, head);
  }
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

// The stored tensors of an artifact's layer, read on the host.
struct StoredLayer {
  std::array<PackedTensors, 7> linears;  // in LinearShapes' order
  std::array<Bf16Matrix, 7> biases;      // empty: none
  Bf16Matrix input_norm, post_attention_norm;
};

class ArtifactModel final : public ModelSource {
 public:
  ArtifactModel(Context* context, const ArtifactReader& artifact)
      : context_(*context),
        artifact_(artifact),
        shape_(LayerShape::Of(artifact.config())),
        readers_(std::min(kReaders, ThreadPool::HardwareThreads())) {}
  ~ArtifactModel() override {
    if (reading_.valid()) reading_.wait();
  }

  absl::StatusOr<DeviceBuffer<float>> Embedding() override {
    WALSH_ASSIGN_OR_RETURN(const Bf16Matrix stored,
                           artifact_.ReadBf16(std::string(kEmbeddingTensor)));
    return Floats(stored);
  }
  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override {
    WALSH_ASSIGN_OR_RETURN(const Bf16Matrix stored,
                           artifact_.ReadBf16(std::string(kFinalNormTensor)));
    return Floats(stored);
  }
  absl::StatusOr<DeviceBuffer<bf16>> Head() override {
    WALSH_ASSIGN_OR_RETURN(const Bf16Matrix stored, artifact_.ReadBf16(std::string(kLmHeadTensor)));
    return Upload<bf16>(context_, stored.values);
  }

  absl::StatusOr<DeviceLayer<bf16>> Layer(int64_t index) override {
    absl::StatusOr<StoredLayer> stored =
        reading_.valid() && read_index_ == index ? reading_.get() : Read(index);
    WALSH_RETURN_IF_ERROR(stored.status());
    if (index + 1 < artifact_.config().n_layers) {
      if (reading_.valid()) reading_.wait();
      read_index_ = index + 1;
      reading_ = std::async(std::launch::async, [this, index] { return Read(index + 1); });
    }
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
      std::vector<float> biases;
      bf16* rows = set.weights->data();
      for (size_t i = set.first; i <= set.last; ++i) {
        const PackedTensors& linear = stored->linears[i];
        WALSH_RETURN_IF_ERROR(Unpack(linear, rows));
        rows += linear.rows * linear.cols;
        for (const uint16_t bits : stored->biases[i].values) biases.push_back(Bf16ToFloat(bits));
      }
      if (!biases.empty()) {
        WALSH_ASSIGN_OR_RETURN(*set.biases, Upload<float>(context_, biases));
      }
    }
    WALSH_ASSIGN_OR_RETURN(layer.input_norm, Floats(stored->input_norm));
    WALSH_ASSIGN_OR_RETURN(layer.post_attention_norm, Floats(stored->post_attention_norm));
    return layer;
  }

 private:
  absl::StatusOr<StoredLayer> Read(int64_t index) {
    const std::vector<LinearShape> shapes = LinearShapes(artifact_.config());
    StoredLayer stored;
    std::vector<absl::Status> statuses(shapes.size());
    readers_.ParallelFor(static_cast<int64_t>(shapes.size()), [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      statuses[at] = ReadLinear(LayerTensor(index, shapes[at].suffix), at < 4, stored.linears[at],
                                stored.biases[at]);
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    WALSH_ASSIGN_OR_RETURN(stored.input_norm,
                           artifact_.ReadBf16(LayerTensor(index, "input_layernorm.weight")));
    WALSH_ASSIGN_OR_RETURN(
        stored.post_attention_norm,
        artifact_.ReadBf16(LayerTensor(index, "post_attention_layernorm.weight")));
    return stored;
  }

  absl::Status ReadLinear(const std::string& name, bool is_attention, PackedTensors& linear,
                          Bf16Matrix& bias) const {
    WALSH_ASSIGN_OR_RETURN(linear, artifact_.ReadPacked(name));
    const ModelConfig& config = artifact_.config();
    if (is_attention ? config.attention_bias : config.mlp_bias) {
      WALSH_ASSIGN_OR_RETURN(bias, artifact_.ReadBf16(name + ".bias"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceBuffer<float>> Floats(const Bf16Matrix& stored) {
    WALSH_ASSIGN_OR_RETURN(const auto rounded, Upload<bf16>(context_, stored.values));
    WALSH_ASSIGN_OR_RETURN(auto values,
                           DeviceBuffer<float>::Allocate(rounded.size(), context_.stream()));
    WALSH_RETURN_IF_ERROR(
        (ops::Convert<bf16, float>(context_, rounded.size(), rounded.data(), values.data())));
    return values;
  }

  absl::Status Unpack(const PackedTensors& linear, bf16* y) {
    WALSH_ASSIGN_OR_RETURN(const auto qweight, Upload<uint32_t>(context_, linear.qweight));
    WALSH_ASSIGN_OR_RETURN(const auto qzeros, Upload<uint32_t>(context_, linear.qzeros));
    WALSH_ASSIGN_OR_RETURN(const auto scales, Upload<__half>(context_, linear.scales));
    return ops::Unpack({.rows = linear.rows,
                        .cols = linear.cols,
                        .bits = linear.bits,
                        .group_size = linear.group_size,
                        .qweight = qweight.data(),
                        .qzeros = qzeros.data(),
                        .scales = scales.data(),
                        .y = y,
                        .stream = context_.stream()});
  }

  Context& context_;
  const ArtifactReader& artifact_;
  const LayerShape shape_;
  ThreadPool readers_;
  std::future<absl::StatusOr<StoredLayer>> reading_;
  int64_t read_index_ = -1;
};

}  // namespace

std::unique_ptr<ModelSource> MakeCheckpointSource(Context* context, WeightLoader* loader) {
  return std::make_unique<CheckpointModel>(context, loader);
}
std::unique_ptr<ModelSource> MakeArtifactSource(Context* context, const ArtifactReader& artifact) {
  return std::make_unique<ArtifactModel>(context, artifact);
}

absl::StatusOr<DeviceBuffer<bf16>> ToBf16(Context& context, const DeviceBuffer<float>& values) {
  WALSH_ASSIGN_OR_RETURN(auto rounded,
                         DeviceBuffer<bf16>::Allocate(values.size(), context.stream()));
  WALSH_RETURN_IF_ERROR(
      (ops::Convert<float, bf16>(context, values.size(), values.data(), rounded.data())));
  return rounded;
}

}  // namespace walsh::pipeline::cuda
