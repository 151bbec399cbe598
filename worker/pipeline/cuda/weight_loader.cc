#include "worker/pipeline/cuda/weight_loader.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/read_ahead.h"
#include "worker/kernels/cuda/rotate.h"
#include "worker/kernels/cuda/row_stream.h"
#include "worker/kernels/cuda/stored_weights.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::Download;
using kernels::cuda::kPieceBytes;
using kernels::cuda::kRangeBytes;
using kernels::cuda::kReaders;
using kernels::cuda::kTensorAlignment;
using kernels::cuda::PieceBytes;
using kernels::cuda::PinnedPool;
using kernels::cuda::ReadAhead;
using kernels::cuda::RowsAtOnce;
using kernels::cuda::RowsOf;
using kernels::cuda::StreamRows;
using kernels::cuda::TensorRoom;
namespace {

namespace ops = kernels::cuda;

// What first_bad_ holds where nothing is bad: each byte is this.
constexpr int kNoneBadByte = 0x7f;
constexpr int64_t kNoneBad = 0x7f7f7f7f7f7f7f7f;
constexpr int64_t kWidestElement = sizeof(float);

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

// A tensor's form, and its place in a slab and on the device.
struct Piece {
  std::string name;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_bytes = 0;
  int64_t offset = 0;  // of the first row
  ops::ScalarType type = ops::ScalarType::kF32;
  bool is_dequantized_here = false;

  int64_t n() const { return rows * cols; }
  int64_t n_bytes() const { return rows * row_bytes; }
};

absl::StatusOr<Piece> Place(const Checkpoint& checkpoint, std::string name, int64_t offset) {
  WALSH_ASSIGN_OR_RETURN(const StoredForm form, checkpoint.FormOf(name));
  Piece piece;
  piece.name = std::move(name);
  piece.rows = form.rows;
  piece.cols = form.cols;
  piece.offset = offset;
  const std::optional<ops::ScalarType> type = ScalarTypeOf(form.type);
  piece.is_dequantized_here = !type.has_value();
  piece.type = type.value_or(ops::ScalarType::kF32);
  piece.row_bytes = type.has_value() ? form.size_bytes / form.rows : form.cols * kWidestElement;
  return piece;
}

// Rows [first, first + n) of a tensor, to `to`.
absl::Status ReadRows(const Checkpoint& checkpoint, const Piece& piece, int64_t first, int64_t n,
                      std::byte* to) {
  const std::span<std::byte> bytes(to, static_cast<size_t>(n * piece.row_bytes));
  if (!piece.is_dequantized_here) return checkpoint.ReadStored(piece.name, first, n, bytes);
  WALSH_ASSIGN_OR_RETURN(const Matrix values, checkpoint.ReadRows(piece.name, first, n));
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
  return LayerElements(s) * kWidestElement + static_cast<int64_t>(kParts.size()) * kTensorAlignment;
}
// Tensors beside the layers', by their places behind those in first_bad_.
enum Beside { kEmbedding, kFinalNorm, kHead, kEmbeddedRows, kBeside };

class Loader final : public WeightLoader {
 public:
  Loader(Context* context, PinnedPool* pinned, const Checkpoint& checkpoint)
      : context_(*context),
        pinned_(*pinned),
        checkpoint_(checkpoint),
        n_layers_(checkpoint.config().n_layers),
        shape_(LayerShape::Of(checkpoint.config())),
        readers_(std::min(kReaders, ThreadPool::HardwareThreads())) {}

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
    WALSH_ASSIGN_OR_RETURN(first_bad_, DeviceBuffer<int64_t>::Allocate(BadIndex(n_layers_, kBeside),
                                                                       context_.stream()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(first_bad_.data(), kNoneBadByte,
                                               static_cast<size_t>(first_bad_.size_bytes()),
                                               context_.stream()));
    WALSH_ASSIGN_OR_RETURN(const int64_t slab_bytes, LargestLayerBytes());
    WALSH_ASSIGN_OR_RETURN(layers_,
                           ReadAhead::Create(&context_, &pinned_, n_layers_, slab_bytes,
                                             [this](int64_t index, std::span<std::byte> host) {
                                               return FillLayer(index, host);
                                             }));
    return absl::OkStatus();
  }

  absl::StatusOr<DeviceLayer<float>> Layer(int64_t index) override {
    WALSH_ASSIGN_OR_RETURN(const std::byte* stored, layers_->Take(index));
    WALSH_ASSIGN_OR_RETURN(const PlacedLayer placed, PlaceLayer(index));
    const cudaStream_t stream = context_.stream();
    DeviceLayer<float> layer;
    for (size_t i = 0; i < placed.pieces.size(); ++i) {
      if (!placed.parts[i]->is_first) continue;
      int64_t n = placed.pieces[i].n();
      for (size_t j = i + 1; j < placed.pieces.size() && !placed.parts[j]->is_first; ++j) {
        n += placed.pieces[j].n();
      }
      WALSH_ASSIGN_OR_RETURN(layer.*placed.parts[i]->buffer,
                             DeviceBuffer<float>::Allocate(n, stream));
    }
    int64_t offset = 0;
    for (size_t i = 0; i < placed.pieces.size(); ++i) {
      const Piece& piece = placed.pieces[i];
      if (placed.parts[i]->is_first) offset = 0;
      DeviceBuffer<float>& buffer = layer.*placed.parts[i]->buffer;
      WALSH_RETURN_IF_ERROR(Convert(piece, 0, piece.rows, stored + piece.offset,
                                    buffer.data() + offset,
                                    BadIndex(index, static_cast<int64_t>(i))));
      offset += piece.n();
    }
    return layer;
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
    return Floats(kEmbeddingTensor, kEmbedding);
  }
  absl::StatusOr<DeviceBuffer<float>> FinalNorm() override {
    return Floats(kFinalNormTensor, kFinalNorm);
  }
  absl::StatusOr<DeviceBuffer<float>> Head() override { return Floats(kLmHeadTensor, kHead); }

  absl::StatusOr<DeviceBuffer<bf16>> RoundedHead() override {
    WALSH_ASSIGN_OR_RETURN(const Piece piece, Place(checkpoint_, std::string(kLmHeadTensor), 0));
    WALSH_ASSIGN_OR_RETURN(auto head, DeviceBuffer<bf16>::Allocate(piece.n(), context_.stream()));
    const int64_t at_once = RowsAtOnce(piece.rows, piece.row_bytes);
    WALSH_ASSIGN_OR_RETURN(auto floats,
                           DeviceBuffer<float>::Allocate(at_once * piece.cols, context_.stream()));
    const auto round = [&](const std::byte* stored, int64_t first, int64_t n) -> absl::Status {
      WALSH_RETURN_IF_ERROR(
          Convert(piece, first, n, stored, floats.data(), BadIndex(n_layers_, kHead)));
      return ops::Convert<float, bf16>(context_, n * piece.cols, floats.data(),
                                       head.data() + first * piece.cols);
    };
    WALSH_RETURN_IF_ERROR(Stream(piece, round));
    return head;
  }

  absl::StatusOr<DeviceBuffer<float>> Embedded(std::span<const int32_t> ids) override {
    WALSH_ASSIGN_OR_RETURN(const Piece piece, Place(checkpoint_, std::string(kEmbeddingTensor), 0));
    embedded_ids_.assign(ids.begin(), ids.end());
    const auto n_ids = static_cast<int64_t>(ids.size());
    WALSH_ASSIGN_OR_RETURN(auto rows,
                           DeviceBuffer<float>::Allocate(n_ids * piece.cols, context_.stream()));
    // Ids follow each other as they like: each row is read on its own.
    const auto read = [&](int64_t first, int64_t n, std::byte* to) -> absl::Status {
      for (int64_t i = 0; i < n; ++i) {
        const int32_t id = ids[static_cast<size_t>(first + i)];
        WALSH_RETURN_IF_ERROR(ReadRows(checkpoint_, piece, id, 1, to + i * piece.row_bytes));
      }
      return absl::OkStatus();
    };
    const auto convert = [&](const std::byte* stored, int64_t first, int64_t n) {
      return Convert(piece, first, n, stored, rows.data() + first * piece.cols,
                     BadIndex(n_layers_, kEmbeddedRows));
    };
    WALSH_RETURN_IF_ERROR(
        StreamRows(context_, pinned_, readers_,
                   {.rows = n_ids, .row_bytes = piece.row_bytes, .read = read, .consume = convert},
                   &seconds_waited_));
    return rows;
  }

  absl::Status RotateEmbedding(DeviceBuffer<float>& rows) override {
    if (!is_rotated()) return absl::OkStatus();
    return r1_->RotateRows(context_, rows.size() / shape_.hidden, shape_.hidden, nullptr,
                           rows.data());
  }
  absl::Status RotateHead(const DeviceBuffer<float>& final_norm,
                          DeviceBuffer<float>& head) override {
    if (!is_rotated()) return absl::OkStatus();
    return r1_->RotateRows(context_, checkpoint_.config().vocab, shape_.hidden, final_norm.data(),
                           head.data());
  }
  bool is_rotated() const override { return r1_.has_value(); }
  double seconds_waited() const override { return seconds_waited_ + layers_->seconds_waited(); }

  absl::Status CheckFinite() override {
    WALSH_ASSIGN_OR_RETURN(const std::vector<int64_t> first_bad,
                           (Download<int64_t>(context_, first_bad_.data(), first_bad_.size())));
    const auto bad = std::find_if(first_bad.begin(), first_bad.end(),
                                  [](int64_t element) { return element != kNoneBad; });
    if (bad == first_bad.end()) return absl::OkStatus();
    int64_t element = *bad;
    const int64_t layer = (bad - first_bad.begin()) / kPartsMax;
    const auto part = static_cast<size_t>((bad - first_bad.begin()) % kPartsMax);
    std::string name;
    if (layer < n_layers_) {
      WALSH_ASSIGN_OR_RETURN(const PlacedLayer placed, PlaceLayer(layer));
      name = placed.pieces[part].name;
    } else if (part == kEmbeddedRows) {
      name = kEmbeddingTensor;
      element = embedded_ids_[static_cast<size_t>(element / shape_.hidden)] * shape_.hidden +
                element % shape_.hidden;
    } else {
      name = part == kEmbedding ? kEmbeddingTensor
             : part == kHead    ? kLmHeadTensor
                                : kFinalNormTensor;
    }
    return absl::DataLossError(
        absl::StrCat("tensor '", name, "': element ", element, " is not finite"));
  }

 private:
  static constexpr auto kPartsMax = static_cast<int64_t>(kParts.size());
  static int64_t BadIndex(int64_t layer, int64_t part) { return layer * kPartsMax + part; }

  // The pieces of a layer, one behind the other.
  struct PlacedLayer {
    std::vector<Piece> pieces;
    std::vector<const Part*> parts;  // of the pieces
    int64_t n_bytes = 0;
  };
  absl::StatusOr<PlacedLayer> PlaceLayer(int64_t index) const {
    PlacedLayer layer;
    for (const Part& part : kParts) {
      std::string name = LayerTensor(index, part.suffix);
      if (part.is_optional && !checkpoint_.Has(name)) continue;
      WALSH_ASSIGN_OR_RETURN(Piece piece, Place(checkpoint_, std::move(name), layer.n_bytes));
      layer.n_bytes += TensorRoom(piece.n_bytes());
      layer.pieces.push_back(std::move(piece));
      layer.parts.push_back(&part);
    }
    return layer;
  }

  absl::StatusOr<int64_t> LargestLayerBytes() const {
    int64_t largest = 0;
    for (int64_t l = 0; l < n_layers_; ++l) {
      WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(l));
      largest = std::max(largest, layer.n_bytes);
    }
    return largest;
  }

  absl::StatusOr<int64_t> FillLayer(int64_t index, std::span<std::byte> host) {
    WALSH_ASSIGN_OR_RETURN(const PlacedLayer layer, PlaceLayer(index));
    struct Range {
      const Piece* piece;
      int64_t first, n;
    };
    std::vector<Range> ranges;
    for (const Piece& piece : layer.pieces) {
      const int64_t at_once = RowsOf(kRangeBytes, piece.row_bytes);
      for (int64_t first = 0; first < piece.rows; first += at_once) {
        ranges.push_back({&piece, first, std::min(at_once, piece.rows - first)});
      }
    }
    std::vector<absl::Status> statuses(ranges.size());
    readers_.ParallelFor(static_cast<int64_t>(ranges.size()), [&](int64_t i) {
      const auto& [piece, first, n] = ranges[static_cast<size_t>(i)];
      statuses[static_cast<size_t>(i)] = ReadRows(
          checkpoint_, *piece, first, n, host.data() + piece->offset + first * piece->row_bytes);
    });
    for (const absl::Status& status : statuses) WALSH_RETURN_IF_ERROR(status);
    return layer.n_bytes;
  }

  // Rows [first, first + n) of a piece, from the device's copy of its bytes.
  absl::Status Convert(const Piece& piece, int64_t first, int64_t n, const std::byte* stored,
                       float* floats, int64_t bad_index) {
    return ops::ConvertStored({.n = n * piece.cols,
                               .type = piece.type,
                               .x = stored,
                               .y = floats,
                               .first = first * piece.cols,
                               .first_bad = first_bad_.data() + bad_index,
                               .stream = context_.stream()});
  }

  // A whole tensor: consume(stored bytes on the device, first row, rows) queues what reads them.
  absl::Status Stream(
      const Piece& piece,
      const std::function<absl::Status(const std::byte*, int64_t, int64_t)>& consume) {
    const auto read = [&](int64_t first, int64_t n, std::byte* to) {
      return ReadRows(checkpoint_, piece, first, n, to);
    };
    return StreamRows(
        context_, pinned_, readers_,
        {.rows = piece.rows, .row_bytes = piece.row_bytes, .read = read, .consume = consume},
        &seconds_waited_);
  }

  absl::StatusOr<DeviceBuffer<float>> Floats(std::string_view name, Beside which) {
    WALSH_ASSIGN_OR_RETURN(const Piece piece, Place(checkpoint_, std::string(name), 0));
    WALSH_ASSIGN_OR_RETURN(auto values,
                           DeviceBuffer<float>::Allocate(piece.n(), context_.stream()));
    WALSH_RETURN_IF_ERROR(Stream(piece, [&](const std::byte* stored, int64_t first, int64_t n) {
      return Convert(piece, first, n, stored, values.data() + first * piece.cols,
                     BadIndex(n_layers_, which));
    }));
    return values;
  }

  Context& context_;
  PinnedPool& pinned_;
  const Checkpoint& checkpoint_;
  const int64_t n_layers_;
  const LayerShape shape_;
  std::optional<ops::DeviceRotation> r1_, r2_;
  ThreadPool readers_;
  DeviceBuffer<int64_t> first_bad_;  // [layers, kPartsMax], [kBeside]; of all that was converted
  std::vector<int32_t> embedded_ids_;
  double seconds_waited_ = 0;          // for all but the layers
  std::unique_ptr<ReadAhead> layers_;  // reads with what stands above
};

}  // namespace

absl::StatusOr<std::unique_ptr<WeightLoader>> WeightLoader::Create(Context* context,
                                                                   PinnedPool* pinned,
                                                                   const Checkpoint& checkpoint,
                                                                   const rotate::Rotation& r1,
                                                                   const rotate::Rotation& r2) {
  auto loader = std::make_unique<Loader>(context, pinned, checkpoint);
  WALSH_RETURN_IF_ERROR(loader->Prepare(r1, r2));
  return loader;
}

int64_t WeightLoader::LayerBytes(const LayerShape& shape) {
  return LayerElements(shape) * kWidestElement;
}
int64_t WeightLoader::VocabularyBytes(const ModelConfig& config) {
  return config.vocab * config.hidden * kWidestElement;
}
int64_t WeightLoader::StoredBytes(const LayerShape& shape) {
  return ReadAhead::kSlots * (SlabBytes(shape) + PieceBytes(shape.hidden * kWidestElement));
}
int64_t WeightLoader::HostBytes(const LayerShape& shape) {
  // Downloads have pieces of their own where those of whole rows are smaller.
  return StoredBytes(shape) + kReaders * kRangeBytes + 2 * kPieceBytes;
}

}  // namespace walsh::pipeline::cuda
