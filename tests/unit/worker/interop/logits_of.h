// Logits of an artifact as it is served, and of a checkpoint in floats.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "worker/engine/kv_cache.h"
#include "worker/engine/loaded_model.h"
#include "worker/io/checkpoint.h"

namespace walsh::interop {

// Of the last token of a short prompt.
inline std::vector<float> LogitsOf(const engine::LoadedModel& model) {
  const ModelConfig& config = model.config();
  auto slot = engine::KvSlot::Allocate(config.n_layers, config.kv_width(), config.max_position);
  EXPECT_OK(slot);
  if (!slot.ok()) return {};
  engine::LoadedModel::Batch batch;
  for (int32_t i = 0; i < 24; ++i) {
    batch.tokens.push_back((i * 37 + 5) % static_cast<int32_t>(config.vocab));
    batch.positions.push_back(i);
  }
  batch.sequences.push_back({.n_rows = 24,
                             .keys = slot->keys(),
                             .values = slot->values(),
                             .capacity = slot->capacity(),
                             .needs_logits = true});
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
