// Logits of an artifact as it is served, and of a checkpoint in floats.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "tests/testing/hand_cache.h"
#include "tests/testing/status_matchers.h"
#include "worker/engine/loaded_model.h"
#include "worker/io/checkpoint.h"

namespace walsh::interop {

inline std::vector<int32_t> PromptIds(int64_t vocab) {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 24; ++i) ids.push_back((i * 37 + 5) % static_cast<int32_t>(vocab));
  return ids;
}

// Of the prompt's last token.
inline std::vector<float> LogitsOf(const engine::LoadedModel& model) {
  const ModelConfig& config = model.config();
  engine::LoadedModel::Batch batch;
  batch.tokens = PromptIds(config.vocab);
  const auto n_tokens = static_cast<int64_t>(batch.tokens.size());
  batch.positions.resize(batch.tokens.size());
  std::iota(batch.positions.begin(), batch.positions.end(), 0);
  testing::HandCache cache(config, n_tokens);
  const std::vector<engine::BlockId> blocks = cache.Take(n_tokens);
  batch.kv = cache.pool();
  batch.sequences.push_back({.n_rows = n_tokens, .blocks = blocks, .needs_logits = true});
  ForwardScratch scratch;
  Matrix logits;
  EXPECT_OK(model.Forward(batch, {}, scratch, logits));
  return {logits.span().begin(), logits.span().end()};
}

// max |difference| / max |logit|.
inline double RelativeDifference(const std::vector<float>& actual,
                                 const std::vector<float>& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double difference = 0;
  double largest = 0;
  for (size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    difference = std::max(difference, std::abs(double{actual[i]} - double{expected[i]}));
    largest = std::max(largest, std::abs(double{expected[i]}));
  }
  return difference / largest;
}

// The engine rounds activations to 8 bits where it multiplies packed weights: 1 to 2 % of these
// random models' logits. Whoever calls this compares the weights exactly.
inline void ExpectSameLogits(const Checkpoint& exported, const std::string& artifact) {
  constexpr double kTolerance = 0.04;
  ASSERT_OK_AND_ASSIGN(const auto served,
                       engine::LoadedModel::LoadArtifact(artifact, {.head_8bit = false}));
  ASSERT_OK_AND_ASSIGN(const auto dense, engine::LoadedModel::LoadDense(exported));
  EXPECT_LE(RelativeDifference(LogitsOf(*dense), LogitsOf(*served)), kTolerance);
}

}  // namespace walsh::interop
