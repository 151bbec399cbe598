#include "tests/unit/worker/model/dense_model.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "common/status_macros.h"

namespace walsh::testing {

absl::StatusOr<DenseModel> DenseModel::Load(const Checkpoint& checkpoint) {
  DenseModel model;
  model.config = checkpoint.config();
  WALSH_ASSIGN_OR_RETURN(model.embedding, checkpoint.Read(kEmbeddingTensor));
  for (int64_t i = 0; i < model.config.n_layers; ++i) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, LoadDenseLayer(checkpoint, i));
    model.layers.push_back(std::move(layer));
  }
  WALSH_ASSIGN_OR_RETURN(const Matrix norm, checkpoint.Read(kFinalNormTensor));
  model.final_norm.assign(norm.span().begin(), norm.span().end());
  if (!model.config.tied_embeddings) {
    WALSH_ASSIGN_OR_RETURN(model.head, checkpoint.Read(kLmHeadTensor));
  }
  return model;
}

Sequence::Sequence(const DenseModel& model, const kernels::Stream& stream, int64_t capacity)
    : model_(model), context_(ForwardContext::Create(model.config, stream)), capacity_(capacity) {
  for (size_t i = 0; i < model.layers.size(); ++i) {
    keys_.emplace_back(capacity, model.config.kv_width());
    values_.emplace_back(capacity, model.config.kv_width());
  }
}

absl::StatusOr<Matrix> Sequence::Append(std::span<const int32_t> tokens) {
  const ModelConfig& config = model_.config;
  const auto n_tokens = static_cast<int64_t>(tokens.size());
  WALSH_CHECK_LE(n_past_ + n_tokens, capacity_);
  Matrix hidden(n_tokens, config.hidden);
  for (int64_t t = 0; t < n_tokens; ++t) {
    std::copy_n(model_.embedding.row(tokens[t]), config.hidden, hidden.row(t));
  }
  ScaleEmbedding(config, hidden.span());
  std::vector<int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), static_cast<int32_t>(n_past_));
  for (size_t i = 0; i < model_.layers.size(); ++i) {
    const SequenceSlice slice{.n_rows = n_tokens,
                              .n_past = n_past_,
                              .keys = keys_[i].data(),
                              .values = values_[i].data()};
    WALSH_RETURN_IF_ERROR(ForwardLayer(context_, model_.layers[i], positions, {&slice, 1}, n_tokens,
                                       hidden.data(), scratch_));
  }
  n_past_ += n_tokens;
  WALSH_RETURN_IF_ERROR(kernels::RmsNorm({.n_tokens = n_tokens,
                                          .dim = config.hidden,
                                          .x = hidden.data(),
                                          .weight = model_.final_norm.data(),
                                          .eps = static_cast<float>(config.rms_norm_eps),
                                          .y = hidden.data()},
                                         context_.stream));
  const Matrix& head = model_.head.empty() ? model_.embedding : model_.head;
  Matrix logits(n_tokens, config.vocab);
  WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = n_tokens,
                                         .in = config.hidden,
                                         .out = config.vocab,
                                         .x = hidden.data(),
                                         .x_stride = config.hidden,
                                         .weights = head.data(),
                                         .y = logits.data(),
                                         .y_stride = config.vocab},
                                        context_.stream));
  return logits;
}

absl::StatusOr<std::vector<int32_t>> GreedyIds(const DenseModel& model,
                                               const kernels::Stream& stream,
                                               std::span<const int32_t> prompt, int n_new) {
  std::vector<int32_t> ids(prompt.begin(), prompt.end());
  Sequence sequence(model, stream, static_cast<int64_t>(prompt.size()) + n_new);
  std::vector<int32_t> input = ids;
  for (int i = 0; i < n_new; ++i) {
    WALSH_ASSIGN_OR_RETURN(const Matrix logits, sequence.Append(input));
    const float* last = logits.row(logits.rows() - 1);
    input = {static_cast<int32_t>(std::max_element(last, last + model.config.vocab) - last)};
    ids.push_back(input.front());
  }
  return ids;
}

absl::StatusOr<double> NegativeLogLikelihood(const DenseModel& model, const kernels::Stream& stream,
                                             std::span<const int32_t> ids) {
  Sequence sequence(model, stream, static_cast<int64_t>(ids.size()));
  WALSH_ASSIGN_OR_RETURN(const Matrix logits, sequence.Append(ids.first(ids.size() - 1)));
  std::vector<double> loss(ids.size() - 1);
  WALSH_RETURN_IF_ERROR(kernels::CrossEntropy({.n_tokens = logits.rows(),
                                               .vocab = model.config.vocab,
                                               .logits = logits.data(),
                                               .targets = ids.data() + 1,
                                               .loss = loss.data()},
                                              stream));
  return std::accumulate(loss.begin(), loss.end(), 0.0);
}

}  // namespace walsh::testing
