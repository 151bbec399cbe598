// Log-likelihoods of continuations after contexts, by layers.
//
// For each continuation c of a context x it gives Σ log p(cᵢ | x, c₁ … cᵢ₋₁). A context goes
// through the model once, whatever the number of its continuations: they attend to its keys and
// values. Contexts go through the layers in blocks of some thousand tokens, and each layer is read
// once a block, so that a model of any size needs the memory of one layer, of a block's hidden
// states and of the head; and of the keys and values, in one layer, of some thousand tokens or of a
// longest context twice, whatever the number of its continuations.
//
// Units:   nats
// Errors:  INVALID_ARGUMENT  a continuation without tokens or longer than the model's context; an
//                            id outside the vocabulary
//          DATA_LOSS         a log-likelihood that is not finite
//          and what the source or `progress` returns
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/perplexity.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::evaluate {

// A context and what may follow it. Together they have at most one token more than the model's
// context: the last one is predicted and not read.
struct ContextTokens {
  std::vector<int32_t> context;                     // at least one token
  std::vector<std::vector<int32_t>> continuations;  // each of at least one
};

struct Likelihood {
  double log_likelihood = 0;
  bool is_greedy = false;  // each token is the likeliest after what is before it
};

// In the order of `contexts` and of their continuations. `progress` is called between batches of
// some thousand tokens through a layer, or a longest context, and between rows of logits.
absl::StatusOr<std::vector<std::vector<Likelihood>>> LogLikelihoods(
    LayerSource& source, std::span<const ContextTokens> contexts, ThreadPool& pool,
    const Progress& progress);

// Tokens of a block: a layer's reading, which costs as much as a few hundred tokens' way through
// it, is spread over so many. And of those that go through a layer at once. A single context with
// its continuations may be more.
inline constexpr int64_t kTaskBlockTokens = 16384;
inline constexpr int64_t kTaskBatchTokens = 2048;
// Rows of keys and values of the continuations that go through a layer at once, with the contexts
// before them: a context of any length with any number of continuations is held twice, not once for
// each of them.
inline constexpr int64_t kTaskCachedRows = 8192;

// Tokens that go through the model for a context.
int64_t ForwardedTokens(const ContextTokens& context);

}  // namespace walsh::evaluate
