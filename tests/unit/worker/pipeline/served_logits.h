// A finished job's model as the evaluation and as the engine compute it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "tests/testing/hand_cache.h"
#include "worker/engine/loaded_model.h"
#include "worker/evaluate/perplexity.h"
#include "worker/io/artifact.h"

namespace walsh::testing {

// Last-token logits of one window as the evaluation computes them.
inline absl::StatusOr<std::vector<float>> EvaluatedLogits(const ArtifactReader& artifact,
                                                          const std::vector<int32_t>& ids,
                                                          bool with_transforms = true) {
  evaluate::ArtifactSource source(artifact);
  ThreadPool pool(2);
  const ForwardContext context = ForwardContext::Create(artifact.config(), {.pool = &pool});
  WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source.Embedding());
  Matrix hidden = evaluate::Embed(artifact.config(), embedding, ids);
  ForwardScratch scratch;
  for (int64_t l = 0; l < artifact.config().n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, source.Layer(l));
    if (!with_transforms) layer.online = nullptr;
    WALSH_RETURN_IF_ERROR(evaluate::ForwardWindows(context, layer, static_cast<int64_t>(ids.size()),
                                                   hidden, scratch,
                                                   [](int64_t) { return absl::OkStatus(); }));
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> norm, source.FinalNorm());
  WALSH_ASSIGN_OR_RETURN(const Matrix head, source.Head());
  Matrix logits;
  WALSH_RETURN_IF_ERROR(
      evaluate::Logits(context, norm, head, hidden.row(hidden.rows() - 1), 1, logits));
  return std::vector<float>(logits.span().begin(), logits.span().end());
}

// The same as the engine computes them, in steps of so many tokens.
inline absl::StatusOr<std::vector<float>> ServedLogits(const std::string& directory,
                                                       const std::vector<int32_t>& ids,
                                                       size_t step) {
  WALSH_ASSIGN_OR_RETURN(const auto model,
                         engine::LoadedModel::LoadArtifact(directory, {.head_8bit = false}));
  const ModelConfig& config = model->config();
  const auto n_tokens = static_cast<int64_t>(ids.size());
  HandCache cache(config, n_tokens);
  const std::vector<engine::BlockId> blocks = cache.Take(n_tokens);
  ForwardScratch scratch;
  Matrix logits;
  for (size_t first = 0; first < ids.size(); first += step) {
    const size_t n = std::min(step, ids.size() - first);
    engine::LoadedModel::Batch batch;
    batch.kv = cache.pool();
    batch.sequences = {{.n_rows = static_cast<int64_t>(n),
                        .n_past = static_cast<int64_t>(first),
                        .blocks = blocks,
                        .needs_logits = true}};
    for (size_t i = first; i < first + n; ++i) {
      batch.tokens.push_back(ids[i]);
      batch.positions.push_back(static_cast<int32_t>(i));
    }
    WALSH_RETURN_IF_ERROR(model->Forward(batch, {}, scratch, logits));
  }
  return std::vector<float>(logits.row(0), logits.row(0) + logits.cols());
}

// max |a − b| / max |b|
inline double RelativeDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(double{b[i]}));
    difference = std::max(difference, std::abs(double{a[i]} - b[i]));
  }
  return difference / largest;
}

}  // namespace walsh::testing
