// The next token of one sequence from the model's logits.
//
// Steps, in vLLM's order so that the same parameters mean the same distribution:
//   1. penalties: repetition over prompt and output (positive logits divided, negative multiplied),
//      presence and frequency over output (subtracted);
//   2. EOS and stop tokens are excluded until min_tokens were generated;
//   3. temperature 0: the largest logit, the lowest id of equal ones. Otherwise logits /
//      temperature;
//   4. min_p: keep p ≥ min_p · max p;  5. top_k: keep the k largest, lowest ids of equal ones;
//   6. top_p: keep the smallest set of the most probable whose mass reaches top_p of what is left;
//   7. draw by inverting the distribution, in the order of ids, at a uniform number that depends on
//      (seed, number of tokens generated so far) alone, so the result is the same in any batch.
// kernels/cuda/sample_rows.h takes the same steps on a device.
// Log-probabilities are those of the model: log softmax of the logits before step 1.
//
// Errors:  INTERNAL when the logits hold NaN or +infinity, or leave no token to choose
// Threads: one sampler is used by one thread at a time; distinct ones in parallel
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/engine/engine.h"
#include "worker/engine/served_model.h"

namespace walsh::engine {

class Sampler {
 public:
  // `eos` are the model's end tokens; ids outside the vocabulary are ignored.
  Sampler(const SamplingOptions& options, std::span<const int32_t> prompt,
          std::span<const int32_t> eos);

  // Whether the token that is `n_ahead` behind the next takes more than the position of the largest
  // logit: false for plain greedy sampling.
  bool needs_logits(uint64_t n_ahead = 0) const;
  // How a runner chooses that token. Valid until the next token is taken or sampled.
  Choice ChoiceOf(uint64_t n_ahead) const;
  // Takes what a runner chose as the next token, or the position of the largest logit where that is
  // all that it needs; kNotFinite and kNoTokenLeft are errors as below.
  absl::StatusOr<TokenLogprob> Take(TokenLogprob chosen);
  // Chooses a token from one row of logits, which it overwrites, and counts it as generated.
  // `logprob` and `top` (most probable first) are set when the options ask for log-probabilities.
  absl::StatusOr<TokenLogprob> Sample(std::span<float> logits);

  int n_generated() const { return n_generated_; }

 private:
  struct Candidate {
    int32_t token = 0;
    float logit = 0;
    float weight = 0;  // exp((logit − max) / temperature)
  };
  struct MoreProbable {
    bool operator()(const Candidate& a, const Candidate& b) const {
      return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
    }
  };

  bool wants_penalties() const;
  bool excludes_ends(uint64_t n_ahead = 0) const {
    return n_generated_ + static_cast<int64_t>(n_ahead) < options_.min_tokens;
  }
  // Why there is no token.
  absl::Status Failure(int32_t code) const;
  // Counts a token as generated.
  void Count(int32_t token);
  // Where in seen_ a token is.
  size_t PlaceOf(int32_t token);
  void Penalize(std::span<float> logits) const;
  void ExcludeEnds(std::span<float> logits) const;
  // `best`: the position of the largest logit.
  int32_t Choose(std::span<const float> logits, int64_t best);
  // By weights_ and sums_, in the order of ids.
  int32_t DrawFromAll(double uniform, int64_t best) const;
  // Sorts candidates_ until the weight of a prefix reaches `mass`, and drops the rest.
  void KeepMass(double mass);
  double TotalWeight() const;

  SamplingOptions options_;
  std::vector<int32_t> ends_;  // EOS and stop tokens, excluded below min_tokens
  // Tokens of prompt and output, each once, and where they are; empty without penalties.
  std::vector<SeenToken> seen_;
  std::unordered_map<int32_t, size_t> places_;
  size_t last_place_ = 0;  // of the token that was generated last
  int n_generated_ = 0;
  // Reused between calls.
  std::vector<Candidate> candidates_;
  std::vector<float> weights_;  // exp((logit − max) / temperature) of each token, or 0
  std::vector<double> sums_;    // of each block of weights_
};

}  // namespace walsh::engine
