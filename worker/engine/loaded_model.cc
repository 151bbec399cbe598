#include "worker/engine/loaded_model.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "worker/engine/kv_cache_transforms.h"
#include "worker/engine/model_text.h"
#include "worker/kernels/packed_matrix.h"
#include "worker/model/linear.h"
#include "worker/model/reordered_linear.h"
#include "worker/tensor/half.h"

namespace walsh::engine {
namespace {

// Token embeddings as stored: 16 bits each, and widened by row when they are looked up.
class EmbeddingTable {
 public:
  EmbeddingTable() = default;
  explicit EmbeddingTable(const Matrix& rows) : width_(rows.cols()) {
    values_.resize(static_cast<size_t>(rows.size()));
    std::transform(rows.data(), rows.data() + rows.size(), values_.begin(), FloatToBf16);
  }
  void Lookup(int32_t token, float* row) const {
    const uint16_t* values = values_.data() + token * width_;
    std::transform(values, values + width_, row, Bf16ToFloat);
  }
  int64_t size_bytes() const { return static_cast<int64_t>(values_.size() * sizeof(uint16_t)); }

 private:
  int64_t width_ = 0;
  std::vector<uint16_t> values_;
};

struct Weights {
  ModelConfig config;
  ArtifactInfo info;
  ModelText text;
  EmbeddingTable embedding;
  // LoadDense keeps its embeddings exactly; empty otherwise.
  Matrix dense_embedding;
  std::vector<DecoderLayer> layers;
  std::vector<float> final_norm;
  std::unique_ptr<Linear> head;
};

class TransformerModel final : public LoadedModel {
 public:
  explicit TransformerModel(Weights weights)
      : weights_(std::move(weights)), context_(ForwardContext::Create(weights_.config, {})) {}

  const ModelConfig& config() const override { return weights_.config; }
  const ArtifactInfo& info() const override { return weights_.info; }
  const Tokenizer& tokenizer() const override { return *weights_.text.tokenizer; }
  const ChatTemplate* chat_template() const override { return weights_.text.chat_template.get(); }
  int64_t packed_bytes_per_token() const override {
    int64_t bytes = weights_.head->size_bytes();
    for (const DecoderLayer& layer : weights_.layers) {
      for (const LayerLinear& linear : kLayerLinears) bytes += (layer.*linear.linear)->size_bytes();
    }
    return bytes;
  }
  int64_t memory_bytes() const override {
    return packed_bytes_per_token() + weights_.embedding.size_bytes() +
           weights_.dense_embedding.size() * 4;
  }
  absl::Status Forward(const Batch& batch, const kernels::Stream& stream, ForwardScratch& scratch,
                       Matrix& logits) const override;

 private:
  absl::Status CheckBatch(const Batch& batch) const;
  void LookUp(int32_t token, float* row) const;
  absl::Status Head(const Batch& batch, const Matrix& hidden, const kernels::Stream& stream,
                    Matrix& logits) const;

  const Weights weights_;
  const ForwardContext context_;  // but for its stream
};

absl::Status TransformerModel::CheckBatch(const Batch& batch) const {
  if (batch.tokens.size() != batch.positions.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat(batch.tokens.size(), " tokens with ", batch.positions.size(), " positions"));
  }
  for (const int32_t token : batch.tokens) {
    if (token < 0 || token >= config().vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", token, " is outside the vocabulary of ", config().vocab));
    }
  }
  for (const Batch::Sequence& sequence : batch.sequences) {
    const auto n_blocks = static_cast<int64_t>(sequence.blocks.size());
    if (KvBlocks(sequence.n_past + sequence.n_rows) > n_blocks) {
      return absl::InvalidArgumentError(
          absl::StrCat("a sequence of ", sequence.n_past + sequence.n_rows,
                       " tokens does not fit its KV cache of ", n_blocks * kKvBlockTokens));
    }
    for (const BlockId block : sequence.blocks) {
      if (block < 0 || block >= batch.kv->n_blocks()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "block ", block, " is outside a KV cache of ", batch.kv->n_blocks(), " blocks"));
      }
    }
  }
  return absl::OkStatus();
}

void TransformerModel::LookUp(int32_t token, float* row) const {
  if (weights_.dense_embedding.empty()) {
    weights_.embedding.Lookup(token, row);
  } else {
    std::copy_n(weights_.dense_embedding.row(token), config().hidden, row);
  }
  ScaleEmbedding(config(), {row, static_cast<size_t>(config().hidden)});
}

absl::Status TransformerModel::Forward(const Batch& batch, const kernels::Stream& stream,
                                       ForwardScratch& scratch, Matrix& logits) const {
  WALSH_RETURN_IF_ERROR(CheckBatch(batch));
  const auto n_rows = static_cast<int64_t>(batch.tokens.size());
  scratch.Reserve(config(), n_rows);
  Matrix hidden(n_rows, config().hidden);
  for (int64_t i = 0; i < n_rows; ++i) LookUp(batch.tokens[i], hidden.row(i));

  ForwardContext context = context_;
  context.stream = stream;
  std::vector<SequenceSlice> slices(batch.sequences.size());
  for (int64_t l = 0; l < config().n_layers; ++l) {
    if (batch.on_layer) batch.on_layer();
    for (size_t s = 0; s < slices.size(); ++s) {
      const Batch::Sequence& sequence = batch.sequences[s];
      slices[s] = {.first_row = sequence.first_row,
                   .n_rows = sequence.n_rows,
                   .n_past = sequence.n_past,
                   .keys = batch.kv->keys(l),
                   .values = batch.kv->values(l),
                   .blocks = sequence.blocks.data(),
                   .block_stride = batch.kv->block_stride()};
    }
    WALSH_RETURN_IF_ERROR(ForwardLayer(context, weights_.layers[static_cast<size_t>(l)],
                                       batch.positions, slices, n_rows, hidden.data(), scratch));
  }
  return Head(batch, hidden, stream, logits);
}

absl::Status TransformerModel::Head(const Batch& batch, const Matrix& hidden,
                                    const kernels::Stream& stream, Matrix& logits) const {
  std::vector<int64_t> rows;
  for (const Batch::Sequence& sequence : batch.sequences) {
    if (sequence.needs_logits) rows.push_back(sequence.first_row + sequence.n_rows - 1);
  }
  const auto n_rows = static_cast<int64_t>(rows.size());
  if (n_rows == 0) return absl::OkStatus();
  Matrix last(n_rows, config().hidden);
  for (int64_t i = 0; i < n_rows; ++i) {
    std::copy_n(hidden.row(rows[i]), config().hidden, last.row(i));
  }
  WALSH_RETURN_IF_ERROR(kernels::RmsNorm(
      {.n_tokens = n_rows,
       .dim = config().hidden,
       .x = last.data(),
       .weight = weights_.final_norm.empty() ? nullptr : weights_.final_norm.data(),
       .eps = static_cast<float>(config().rms_norm_eps),
       .y = last.data()},
      stream));
  if (logits.rows() < n_rows) logits = Matrix(n_rows, config().vocab);
  return weights_.head->Apply(last.data(), n_rows, logits.data(), stream);
}

// -- Loading ------------------------------------------------------------------------------------

std::vector<float> ToVector(const Matrix& matrix) {
  return {matrix.data(), matrix.data() + matrix.size()};
}

absl::StatusOr<Weights> LoadAllButMatrices(const Checkpoint& checkpoint) {
  Weights weights;
  weights.config = checkpoint.config();
  WALSH_ASSIGN_OR_RETURN(weights.text, LoadText(checkpoint.tokenizer()));
  WALSH_ASSIGN_OR_RETURN(const Matrix norm, checkpoint.Read(kFinalNormTensor));
  weights.final_norm = ToVector(norm);
  return weights;
}

// Replaces a linear of floats, which is freed before the caller goes on to the next.
absl::Status PackTo8Bit(std::unique_ptr<Linear>& linear) {
  auto* dense = dynamic_cast<DenseLinear*>(linear.get());
  WALSH_CHECK(dense != nullptr);
  WALSH_ASSIGN_OR_RETURN(kernels::PackedMatrix packed,
                         kernels::PackedMatrix::PackDense8(dense->weights()));
  linear = std::make_unique<PackedLinear>(std::move(packed), std::move(dense->bias()));
  return absl::OkStatus();
}

class ArtifactLoader {
 public:
  ArtifactLoader(const ArtifactReader* reader, std::shared_ptr<const OnlineForward> online)
      : reader_(reader), online_(std::move(online)) {}

  absl::StatusOr<std::unique_ptr<Linear>> LoadLinear(const std::string& name, bool has_bias) const {
    std::vector<float> bias;
    if (has_bias) {
      WALSH_ASSIGN_OR_RETURN(const Matrix row, reader_->ReadDense(name + ".bias"));
      bias = ToVector(row);
    }
    if (!reader_->IsQuantized(name)) {
      WALSH_ASSIGN_OR_RETURN(Matrix weights, reader_->ReadDense(name + ".weight"));
      return std::make_unique<DenseLinear>(std::move(weights), std::move(bias));
    }
    WALSH_ASSIGN_OR_RETURN(OrderedMatrix ordered, reader_->ReadOrdered(name));
    WALSH_ASSIGN_OR_RETURN(kernels::PackedMatrix packed,
                           kernels::PackedMatrix::Pack(ordered.matrix));
    auto linear = std::make_unique<PackedLinear>(std::move(packed), std::move(bias));
    if (ordered.input_order.empty()) return linear;
    return std::make_unique<ReorderedLinear>(std::move(linear), std::move(ordered.input_order));
  }

  absl::StatusOr<std::vector<float>> LoadNorm(const std::string& name) const {
    WALSH_ASSIGN_OR_RETURN(const Matrix row, reader_->ReadDense(name));
    return ToVector(row);
  }

  absl::StatusOr<DecoderLayer> LoadLayer(int64_t index) const {
    WALSH_ASSIGN_OR_RETURN(
        DecoderLayer layer,
        ReadLayer(
            reader_->config(), index, [this](const std::string& name) { return LoadNorm(name); },
            [this](const std::string& name, bool has_bias) { return LoadLinear(name, has_bias); }));
    layer.online = online_;
    return layer;
  }

  absl::StatusOr<std::unique_ptr<Linear>> LoadHead(bool head_8bit) const {
    WALSH_ASSIGN_OR_RETURN(Matrix weights, reader_->ReadDense(kLmHeadTensor));
    if (!head_8bit) return std::make_unique<DenseLinear>(std::move(weights));
    WALSH_ASSIGN_OR_RETURN(kernels::PackedMatrix packed,
                           kernels::PackedMatrix::PackDense8(weights));
    return std::make_unique<PackedLinear>(std::move(packed));
  }

 private:
  const ArtifactReader* reader_;
  const std::shared_ptr<const OnlineForward> online_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<LoadedModel>> LoadedModel::LoadArtifact(const std::string& directory,
                                                                       const Options& options) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactReader> reader,
                         ArtifactReader::Open(directory, options.verify, options.n_threads));
  Weights weights;
  weights.config = reader->config();
  weights.info = reader->info();
  WALSH_ASSIGN_OR_RETURN(weights.text, LoadText(reader->tokenizer()));
  WALSH_ASSIGN_OR_RETURN(
      std::shared_ptr<const OnlineForward> online,
      OnlineForward::Create(WithKvCache(reader->online(), options.kv_cache_dtype, weights.config),
                            weights.config));
  const ArtifactLoader loader(reader.get(), std::move(online));
  {
    WALSH_ASSIGN_OR_RETURN(const Matrix embedding, reader->ReadDense(kEmbeddingTensor));
    weights.embedding = EmbeddingTable(embedding);
  }
  for (int64_t l = 0; l < weights.config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, loader.LoadLayer(l));
    weights.layers.push_back(std::move(layer));
  }
  WALSH_ASSIGN_OR_RETURN(weights.final_norm, loader.LoadNorm(std::string(kFinalNormTensor)));
  WALSH_ASSIGN_OR_RETURN(weights.head, loader.LoadHead(options.head_8bit));
  return std::make_shared<TransformerModel>(std::move(weights));
}

absl::StatusOr<std::shared_ptr<LoadedModel>> LoadedModel::LoadDense(const Checkpoint& checkpoint) {
  WALSH_ASSIGN_OR_RETURN(Weights weights, LoadAllButMatrices(checkpoint));
  for (int64_t l = 0; l < weights.config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, LoadDenseLayer(checkpoint, l));
    weights.layers.push_back(std::move(layer));
  }
  WALSH_ASSIGN_OR_RETURN(weights.dense_embedding, checkpoint.Read(kEmbeddingTensor));
  WALSH_ASSIGN_OR_RETURN(Matrix head, checkpoint.Read(kLmHeadTensor));
  weights.head = std::make_unique<DenseLinear>(std::move(head));
  return std::make_shared<TransformerModel>(std::move(weights));
}

absl::StatusOr<std::shared_ptr<LoadedModel>> LoadedModel::Load8Bit(const Checkpoint& checkpoint) {
  WALSH_ASSIGN_OR_RETURN(Weights weights, LoadAllButMatrices(checkpoint));
  for (int64_t l = 0; l < weights.config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, LoadDenseLayer(checkpoint, l));
    for (const LayerLinear& linear : kLayerLinears) {
      WALSH_RETURN_IF_ERROR(PackTo8Bit(layer.*linear.linear));
    }
    weights.layers.push_back(std::move(layer));
  }
  // A tied embedding is read once.
  WALSH_ASSIGN_OR_RETURN(Matrix rows, checkpoint.Read(kEmbeddingTensor));
  weights.embedding = EmbeddingTable(rows);
  if (!weights.config.tied_embeddings) {
    rows = Matrix();
    WALSH_ASSIGN_OR_RETURN(rows, checkpoint.Read(kLmHeadTensor));
  }
  weights.head = std::make_unique<DenseLinear>(std::move(rows));
  WALSH_RETURN_IF_ERROR(PackTo8Bit(weights.head));
  return std::make_shared<TransformerModel>(std::move(weights));
}

}  // namespace walsh::engine
