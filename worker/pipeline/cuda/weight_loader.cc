#include "worker/pipeline/cuda/weight_loader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <future>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/rotate.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/kernels/thread_pool.h"
#include "worker/pipeline/cuda/pinned_buffer.h"
#include "worker/pipeline/cuda/wait_timer.h"

namespace walsh::pipeline::cuda {
namespace {

namespace ops = kernels::cuda;

constexpr int kSlabs = 2;
// Every tensor starts where vectorized loads may.
constexpr int64_t kAlignment = 256;
constexpr int64_t kWidestElement = sizeof(float);

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::optional<ops::ScalarType> ScalarTypeOf(StorageType type) {
  switch (type) {
    case StorageType::kF32:
      return ops::ScalarType::kF32;
    case StorageType::kF16:
      return ops::ScalarType::kF16;
    case StorageType::kBf16:
      return ops::ScalarType::kBf16;
    default:
      return std::nullopt;  // block formats become floats on the host
  }
}

// A tensor's place in a slab and on the device.
struct Piece {
  std::string name;
  int64_t n = 0;  // elements
  int64_t cols = 0;
  int64_t offset = 0;
  int64_t n_bytes = 0;
  ops::ScalarType type = ops::ScalarType::kF32;
  bool is_dequantized_here = false;
};

absl::StatusOr<Piece> Place(const Checkpoint& checkpoint, std::string name, int64_t offset) {
  WALSH_ASSIGN_OR_RETURN(const StoredForm form, checkpoint.FormOf(name));
  Piece piece;
  piece.name = std::move(name);
  piece.n = form.rows * form.cols;
  piece.cols = form.cols;
  piece.offset = offset;
  const std::optional<ops::ScalarType> type = ScalarTypeOf(form.type);
  piece.is_dequantized_here = !type.has_value();
  piece.type = type.value_or(ops::ScalarType::kF32);
  piece.n_bytes = type.has_value() ? form.size_bytes : piece.n * kWidestElement;
  return piece;
}

absl::Status Fill(const Checkpoint& checkpoint, const Piece& piece, std::span<std::byte> slab) {
  const std::span<std::byte> bytes =
      slab.subspan(static_cast<size_t>(piece.offset), static_cast<size_t>(piece.n_bytes));
  if (!piece.is_dequantized_here) return checkpoint.ReadStored(piece.name, bytes);
  WALSH_ASSIGN_OR_RETURN(const Matrix values, checkpoint.Read(piece.name));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return absl::OkStatus();
}

// Tensors of a layer in the order of the layer's buffers, with the buffer that takes each.
using FloatLayer = DeviceLayer<float>;
struct Part {
  const char* suffix;
  DeviceBuffer<float> FloatLayer::*buffer;
  bool is_first;  // of its buffer
  bool is_optional;
};
constexpr std::array<Part, 16> kParts = {{
    {"self_attn.q_proj.weight", &FloatLayer::qkv, true, false},
    {"self_attn.k_proj.weight", &FloatLayer::qkv, false, false},
    {"self_attn.v_proj.weight", &FloatLayer::qkv, false, false},
    {"self_attn.o_proj.weight", &FloatLayer::o, true, false},
    {"mlp.gate_proj.weight", &FloatLayer::gate_up, true, false},
    {"mlp.up_proj.weight", &FloatLayer::gate_up, false, false},
    {"mlp.down_proj.weight", &FloatLayer::down, true, false},
    {"input_layernorm.weight", &FloatLayer::input_norm, true, false},
    {"post_attention_layernorm.weight", &FloatLayer::post_attention_norm, true, false},
    {"self_attn.q_proj.bias", &FloatLayer::qkv_bias, true, true},
    {"self_attn.k_proj.bias", &FloatLayer::qkv_bias, false, true},
    {"self_attn.v_proj.bias", &FloatLayer::qkv_bias, false, true},
    {"self_attn.o_proj.bias", &FloatLayer::o_bias, true, true},
    {"mlp.gate_proj.bias", &FloatLayer::gate_up_bias, true, true},
    {"mlp.up_proj.bias", &FloatLayer::gate_up_bias, false, true},
    {"mlp.down_proj.bias", &FloatLayer::down_bias, true, true},
}};

int64_t LayerElements(const LayerShape& s) {
  const int64_t weights = s.hidden * (s.qkv_rows() + s.q_width()) + 3 * s.hidden * s.intermediate;
  const int64_t vectors = 4 * s.hidden + s.qkv_rows() + 2 * s.intermediate;
  return weights + vectors;
}
int64_t SlabBytes(const LayerShape& s) {
  return LayerElements(s) * kWidestElement + static_cast<int64_t>(kParts.size()) * kAlignment;
}

class Event {
 public:
  absl::Status Create() {
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    return absl::OkStatus();
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// A layer on its way from the file to the device.
struct Slab {
  PinnedBuffer host;
  DeviceBuffer<std::byte> device;
  Event arrived;   // of the copy
  Event consumed;  // of the conversion that read the device's form
  int64_t layer = -1;
  std::vector<Piece> pieces;
  std::vector<const Part*> parts;  // of the pieces
};

class Loader final : public WeightLoader {
 public:
  Loader(Context* context, const Checkpoint& checkpoint)
      : context_(*context),
        checkpoint_(checkpoint),
        shape_(LayerShape::Of(checkpoint.config())),
        readers_(std::min(kReaders, ThreadPool::HardwareThreads())) {}
  ~Loader() override {
    if (reading_.valid()) reading_.wait();
    (void)context_.Synchronize();
  }

  absl::Status Prepare(const rotate::Rotation& r1, const rotate::Rotation& r2) {
    const auto tables = [](const rotate::Rotation& rotation) {
      const rotate::Rotation::Parts parts = rotation.parts();
      return ops::DeviceRotation::Tables{.width = rotation.width(),
                                         .block = parts.block,
                                         .core = parts.core,
                                         .core_matrix = parts.core_matrix,
                                         .row_order = parts.row_order,
                                         .signs = parts.signs,
                                         .normalizer = parts.normalizer};
    };
    if (!r1.is_identity()) {
      WALSH_ASSIGN_OR_RETURN(r1_, ops::DeviceRotation::Create(context_, tables(r1)));
      if (!r2.is_identity()) {
        WALSH_ASSIGN_OR_RETURN(r2_, ops::DeviceRotation::Create(context_, tables(r2)));
      }
    }
    WALSH_RETURN_IF_ERROR(PlaceLargestLayer());
    for (Slab& slab : slabs_) {
      WALSH_RETURN_IF_ERROR(slab.arrived.Create());
      WALSH_RETURN_IF_ERROR(slab.consumed.Create());
      WALSH_ASSIGN_OR_RETURN(slab.host, PinnedBuffer::Allocate(slab_bytes_));
      WALSH_ASSIGN_OR_RETURN(slab.device,
                             DeviceBuffer<std::byte>::Allocate(slab_bytes_, context_.stream()));
    }
    WALSH_ASSIGN_OR_RETURN(first_bad_, DeviceBuffer<int64_t>::Allocate(
                                           static_cast<int64_t>(kParts.size()), context_.stream()));
    return context_.Synchronize();
  }

  absl::StatusOr<DeviceLayer<float>> Layer(int64_t index) override {
    WALSH_ASSIGN_OR_RETURN(Slab * slab, Await(index));
    if (index + 1 < checkpoint_.config().n_layers) {
      Slab* next = slab == slabs_.data() ? &slabs_[1] : &slabs_[0];
      reading_ = std::async(std::launch::async, [this, index, next]() -> absl::Status {
        WALSH_RETURN_IF_ERROR(context_.MakeCurrent());
        return Read(index + 1, *next);
      });
    }
    return Convert(*slab);
  }

  absl::Status Rotate(DeviceLayer<float>& layer) override {
    if (!is_rotated()) return absl::OkStatus();
    const LayerShape& s = shape_;
    WALSH_RETURN_IF_ERROR(r1_->RotateRows(context_, s.qkv_rows(), s.hidden, layer.input_norm.data(),
                                          layer.qkv.data()));
    WALSH_RETURN_IF_ERROR(r1_->RotateRows(context_, 2 * s.intermediate, s.hidden,
                                          layer.post_attention_norm.data(), layer.gate_up.data()));
    if (r2_.has_value()) {
      const int64_t v_row = s.q_width() + s.kv_width();
      WALSH_RETURN_IF_ERROR(r2_->RotateColumns(context_, s.kv_width(), s.hidden,
                                               layer.qkv.data() + v_row * s.hidden));
      if (layer.qkv_bias.size() > 0) {
        WALSH_RETURN_IF_ERROR(
            r2_->RotateRows(context_, 1, s.kv_width(), nullptr, layer.qkv_bias.data() + v_row));
      }
      WALSH_RETURN_IF_ERROR(
          r2_->RotateRows(context_, s.hidden, s.q_width(), nullptr, layer.o.data()));
    }
    WALSH_RETURN_IF_ERROR(r1_->RotateColumns(context_, s.hidden, s.q_width(), layer.o.data()));
    WALSH_RETURN_IF_ERROR(
        r1_->RotateColumns(context_, s.hidden, s.intermediate, layer.down.data()));
    for (DeviceBuffer<float>* bias : {&layer.o_bias, &layer.down_bias}) {
      if (bias->size() == 0) continue;
      WALSH_RETURN_IF_ERROR(r1_->RotateRows(context_, 1, s.hidden, nullptr, bias->data()));
    }
    layer.input_norm.Reset();
    layer.post_attention_norm.Reset();
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceBuffer<float>> Embedding() override {
    return Whole(std::string(kEmbeddingTensor));
  }
  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override {
    return Whole(std::string(kFinalNormTensor));
  }
  absl::StatusOr<DeviceBuffer<float>> Head() override { return Whole(std::string(kLmHeadTensor)); }

  absl::Status RotateEmbedding(DeviceBuffer<float>& embedding) override {
    if (!is_rotated()) return absl::OkStatus();
    return r1_->RotateRows(context_, checkpoint_.config().vocab, shape_.hidden, nullptr,
                           embedding.data());
  }
  absl::Status RotateHead(const DeviceBuffer<float>& final_norm,
                          DeviceBuffer<float>& head) override {
    if (!is_rotated()) return absl::OkStatus();
    return r1_->RotateRows(context_, checkpoint_.config().vocab, shape_.hidden, final_norm.data(),
                           head.data());
  }
  double seconds_waited() const override { return seconds_waited_; }
  bool is_rotated() const override { return r1_.has_value(); }

 private:
  // The slab with a layer that has been read.
  absl::StatusOr<Slab*> Await(int64_t index) {
    const WaitTimer timer(&seconds_waited_);
    if (reading_.valid()) WALSH_RETURN_IF_ERROR(reading_.get());
    Slab* slab = std::find_if(std::begin(slabs_), std::end(slabs_),
                              [&](const Slab& s) { return s.layer == index; });
    if (slab != std::end(slabs_)) return slab;
    slab = &slabs_[static_cast<size_t>(index % kSlabs)];
    WALSH_RETURN_IF_ERROR(Read(index, *slab));
    return slab;
  }

  // The pieces of a layer, one behind the other.
  absl::Status PlaceLayer(int64_t index, std::vector<Piece>& pieces,
                          std::vector<const Part*>& parts, int64_t& n_bytes) const {
    pieces.clear();
    parts.clear();
    n_bytes = 0;
    for (const Part& part : kParts) {
      std::string name = LayerTensor(index, part.suffix);
      if (part.is_optional && !checkpoint_.Has(name)) continue;
      WALSH_ASSIGN_OR_RETURN(Piece piece, Place(checkpoint_, std::move(name), n_bytes));
      n_bytes += Aligned(piece.n_bytes);
      pieces.push_back(std::move(piece));
      parts.push_back(&part);
    }
    return absl::OkStatus();
  }

  absl::Status PlaceLargestLayer() {
    std::vector<Piece> pieces;
    std::vector<const Part*> parts;
    for (int64_t l = 0; l < checkpoint_.config().n_layers; ++l) {
      int64_t n_bytes = 0;
      WALSH_RETURN_IF_ERROR(PlaceLayer(l, pieces, parts, n_bytes));
      slab_bytes_ = std::max(slab_bytes_, n_bytes);
    }
    return absl::OkStatus();
  }

  // On the caller's thread or on the reading one, never on both.
  absl::Status Read(int64_t index, Slab& slab) {
    slab.layer = -1;
    int64_t n_bytes = 0;
    WALSH_RETURN_IF_ERROR(PlaceLayer(index, slab.pieces, slab.parts, n_bytes));
    // The copy before has read the pinned memory, and the conversion the device's.
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(slab.arrived.get()));
    std::vector<absl::Status> statuses(slab.pieces.size());
    readers_.ParallelFor(static_cast<int64_t>(slab.pieces.size()), [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      statuses[at] = Fill(checkpoint_, slab.pieces[at], slab.host.span());
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(context_.copies(), slab.consumed.get()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(slab.device.data(), slab.host.span().data(),
                                               static_cast<size_t>(n_bytes), cudaMemcpyHostToDevice,
                                               context_.copies()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(slab.arrived.get(), context_.copies()));
    slab.layer = index;
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceLayer<float>> Convert(Slab& slab) {
    const cudaStream_t stream = context_.stream();
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream, slab.arrived.get()));
    DeviceLayer<float> layer;
    for (size_t i = 0; i < slab.pieces.size(); ++i) {
      if (!slab.parts[i]->is_first) continue;
      int64_t n = slab.pieces[i].n;
      for (size_t j = i + 1; j < slab.pieces.size() && !slab.parts[j]->is_first; ++j) {
        n += slab.pieces[j].n;
      }
      WALSH_ASSIGN_OR_RETURN(layer.*slab.parts[i]->buffer,
                             DeviceBuffer<float>::Allocate(n, stream));
    }
    WALSH_RETURN_IF_ERROR(ClearFirstBad());
    int64_t offset = 0;
    for (size_t i = 0; i < slab.pieces.size(); ++i) {
      const Piece& piece = slab.pieces[i];
      if (slab.parts[i]->is_first) offset = 0;
      DeviceBuffer<float>& buffer = layer.*slab.parts[i]->buffer;
      WALSH_RETURN_IF_ERROR(
          ops::ConvertStored(piece.n, piece.type, slab.device.data() + piece.offset,
                             buffer.data() + offset, first_bad_.data() + i, stream));
      offset += piece.n;
    }
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(slab.consumed.get(), stream));
    WALSH_RETURN_IF_ERROR(CheckFinite(slab.pieces));
    return layer;
  }

  // Embedding, norm or head: read as a whole, once or twice a job.
  absl::StatusOr<DeviceBuffer<float>> Whole(std::string name) {
    const cudaStream_t stream = context_.stream();
    WALSH_ASSIGN_OR_RETURN(const Piece piece, Place(checkpoint_, std::move(name), 0));
    std::vector<std::byte> host(static_cast<size_t>(piece.n_bytes));
    {
      const WaitTimer timer(&seconds_waited_);
      WALSH_RETURN_IF_ERROR(Fill(checkpoint_, piece, host));
    }
    WALSH_ASSIGN_OR_RETURN(auto stored, DeviceBuffer<std::byte>::Allocate(piece.n_bytes, stream));
    WALSH_ASSIGN_OR_RETURN(auto values, DeviceBuffer<float>::Allocate(piece.n, stream));
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(stored.data(), host.data(), host.size(), cudaMemcpyHostToDevice, stream));
    WALSH_RETURN_IF_ERROR(ClearFirstBad());
    WALSH_RETURN_IF_ERROR(ops::ConvertStored(piece.n, piece.type, stored.data(), values.data(),
                                             first_bad_.data(), stream));
    WALSH_RETURN_IF_ERROR(CheckFinite({piece}));
    return values;
  }

  absl::Status ClearFirstBad() {
    // Bytes of 0x7f: larger than any index.
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(
        first_bad_.data(), 0x7f, static_cast<size_t>(first_bad_.size_bytes()), context_.stream()));
    return absl::OkStatus();
  }
  absl::Status CheckFinite(const std::vector<Piece>& pieces) {
    std::array<int64_t, kParts.size()> first_bad{};
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(first_bad.data(), first_bad_.data(),
                                               sizeof(first_bad), cudaMemcpyDeviceToHost,
                                               context_.stream()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.stream()));
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (first_bad[i] >= pieces[i].n) continue;
      return absl::DataLossError(
          absl::StrCat("tensor '", pieces[i].name, "': element ", first_bad[i], " is not finite"));
    }
    return absl::OkStatus();
  }

  Context& context_;
  const Checkpoint& checkpoint_;
  const LayerShape shape_;
  std::optional<ops::DeviceRotation> r1_, r2_;
  ThreadPool readers_;
  int64_t slab_bytes_ = 0;
  std::array<Slab, kSlabs> slabs_;
  DeviceBuffer<int64_t> first_bad_;  // [kParts]
  std::future<absl::Status> reading_;
  double seconds_waited_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightLoader>> WeightLoader::Create(Context* context,
                                                                   const Checkpoint& checkpoint,
                                                                   const rotate::Rotation& r1,
                                                                   const rotate::Rotation& r2) {
  auto loader = std::make_unique<Loader>(context, checkpoint);
  WALSH_RETURN_IF_ERROR(loader->Prepare(r1, r2));
  return loader;
}

int64_t WeightLoader::LayerBytes(const LayerShape& shape) {
  return LayerElements(shape) * kWidestElement;
}
int64_t WeightLoader::SlabsBytes(const LayerShape& shape) { return kSlabs * SlabBytes(shape); }
int64_t WeightLoader::VocabularyBytes(const ModelConfig& config) {
  return config.vocab * config.hidden * 2 * kWidestElement;
}
int64_t WeightLoader::PinnedBytes(const LayerShape& shape) { return kSlabs * SlabBytes(shape); }

}  // namespace walsh::pipeline::cuda
