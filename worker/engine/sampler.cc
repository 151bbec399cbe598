#include "worker/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "worker/engine/logits.h"
#include "worker/kernels/counter_rng.h"

namespace walsh::engine {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

double LogSumExp(std::span<const float> logits, float max_logit) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max_logit);
  return static_cast<double>(max_logit) + std::log(sum);
}

// The n largest, most probable first, lowest ids first among equal ones.
std::vector<std::pair<int32_t, double>> TopLogprobs(std::span<const float> logits, int n,
                                                    double log_sum_exp) {
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto end = ids.begin() + std::min<int64_t>(n, static_cast<int64_t>(ids.size()));
  std::partial_sort(ids.begin(), end, ids.end(), [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  std::vector<std::pair<int32_t, double>> top;
  for (auto it = ids.begin(); it != end; ++it) top.emplace_back(*it, logits[*it] - log_sum_exp);
  return top;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options, std::span<const int32_t> prompt,
                 std::span<const int32_t> eos)
    : options_(options), ends_(options.stop_tokens) {
  if (!options.ignore_eos) ends_.insert(ends_.end(), eos.begin(), eos.end());
  if (wants_penalties()) {
    for (const int32_t token : prompt) PlaceOf(token);
  }
}

bool Sampler::wants_penalties() const {
  return options_.repetition_penalty != 1.0 || options_.presence_penalty != 0.0 ||
         options_.frequency_penalty != 0.0;
}

absl::Status Sampler::Failure(int32_t code) const {
  if (code == kNoTokenLeft) {
    return absl::InternalError(
        absl::StrCat("no token is left to choose for new token ", n_generated_));
  }
  return absl::InternalError(
      absl::StrCat("the model's logits for new token ", n_generated_, " are not finite"));
}

size_t Sampler::PlaceOf(int32_t token) {
  const auto [it, is_new] = places_.try_emplace(token, seen_.size());
  if (is_new) seen_.push_back({.token = token});
  return it->second;
}

void Sampler::Count(int32_t token) {
  if (wants_penalties()) {
    last_place_ = PlaceOf(token);
    ++seen_[last_place_].n_output;
  }
  ++n_generated_;
}

bool Sampler::needs_logits(uint64_t n_ahead) const {
  return options_.temperature != 0.0 || options_.logprobs || wants_penalties() ||
         excludes_ends(n_ahead);
}

Choice Sampler::ChoiceOf(uint64_t n_ahead) const {
  Choice choice{.temperature = options_.temperature,
                .top_p = options_.top_p,
                .min_p = options_.min_p,
                .repetition_penalty = options_.repetition_penalty,
                .presence_penalty = options_.presence_penalty,
                .frequency_penalty = options_.frequency_penalty,
                .seed = options_.seed,
                .position = static_cast<uint64_t>(n_generated_) + n_ahead,
                .top_k = options_.top_k,
                .n_top_logprobs = options_.logprobs ? options_.top_logprobs : -1,
                .seen = seen_,
                .n_counted = static_cast<uint64_t>(n_generated_),
                .last_counted = last_place_};
  if (excludes_ends(n_ahead)) choice.excluded = ends_;
  return choice;
}

absl::StatusOr<TokenLogprob> Sampler::Take(TokenLogprob chosen) {
  if (chosen.token < 0) return Failure(chosen.token);
  Count(chosen.token);
  return chosen;
}

absl::StatusOr<TokenLogprob> Sampler::Sample(std::span<float> logits) {
  TokenLogprob result;
  const int64_t raw_best = ArgMax(logits);
  if (raw_best < 0 || std::isinf(logits[raw_best])) return Failure(kNotFinite);
  double log_sum_exp = 0;
  std::vector<float> raw;
  if (options_.logprobs) {
    log_sum_exp = LogSumExp(logits, logits[raw_best]);
    result.top = TopLogprobs(logits, options_.top_logprobs, log_sum_exp);
    raw.assign(logits.begin(), logits.end());
  }

  // Without penalties and exclusions the largest logit is known: a pass over the vocabulary costs a
  // greedy token of a small model about a percent.
  Penalize(logits);
  if (excludes_ends()) ExcludeEnds(logits);
  const int64_t best = wants_penalties() || excludes_ends() ? ArgMax(logits) : raw_best;
  if (best < 0) return Failure(kNoTokenLeft);
  result.token = options_.temperature == 0.0 ? static_cast<int32_t>(best) : Choose(logits, best);
  if (options_.logprobs) result.logprob = raw[result.token] - log_sum_exp;
  Count(result.token);
  return result;
}

void Sampler::Penalize(std::span<float> logits) const {
  const auto repetition = static_cast<float>(options_.repetition_penalty);
  for (const auto& [token, n_output] : seen_) {
    if (token < 0 || static_cast<size_t>(token) >= logits.size()) continue;
    float& logit = logits[token];
    logit = logit > 0 ? logit / repetition : logit * repetition;
    if (n_output > 0) {
      logit -=
          static_cast<float>(options_.presence_penalty + options_.frequency_penalty * n_output);
    }
  }
}

void Sampler::ExcludeEnds(std::span<float> logits) const {
  for (const int32_t token : ends_) {
    if (token >= 0 && static_cast<size_t>(token) < logits.size()) logits[token] = kExcluded;
  }
}

int32_t Sampler::Choose(std::span<const float> logits, int64_t best) {
  const float max_logit = logits[best];
  // min_p as a bound on logits: p / max p = exp((logit − max) / temperature).
  const auto floor = static_cast<float>(
      options_.min_p > 0 ? max_logit + options_.temperature * std::log(options_.min_p) : kExcluded);
  weights_.resize(logits.size());
  sums_.resize((logits.size() + kWeightsBlock - 1) / kWeightsBlock);
  ExpWeights({.logits = logits,
              .max_logit = max_logit,
              .temperature = options_.temperature,
              .floor = floor,
              .weights = weights_.data(),
              .sums = sums_.data()});
  const double uniform = kernels::UniformAt(options_.seed, static_cast<uint64_t>(n_generated_));
  const auto top_k = static_cast<size_t>(options_.top_k);
  if ((top_k == 0 || top_k >= logits.size()) && options_.top_p >= 1.0) {
    return DrawFromAll(uniform, best);
  }

  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] == kExcluded || logits[i] < floor) continue;
    candidates_.push_back({static_cast<int32_t>(i), logits[i], weights_[i]});
  }
  if (options_.top_k > 0 && top_k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(),
                     MoreProbable{});
    candidates_.resize(top_k);
  }
  if (options_.top_p < 1.0) KeepMass(options_.top_p * TotalWeight());
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  const double target = uniform * TotalWeight();
  double cumulative = 0;
  for (const Candidate& candidate : candidates_) {
    cumulative += candidate.weight;
    if (cumulative > target) return candidate.token;
  }
  return static_cast<int32_t>(best);  // rounding let the sum end at the target
}

int32_t Sampler::DrawFromAll(double uniform, int64_t best) const {
  const double target = uniform * std::accumulate(sums_.begin(), sums_.end(), 0.0);
  double cumulative = 0;
  for (size_t block = 0; block < sums_.size(); ++block) {
    if (cumulative + sums_[block] <= target) {
      cumulative += sums_[block];
      continue;
    }
    const size_t end = std::min(weights_.size(), (block + 1) * kWeightsBlock);
    for (size_t i = block * kWeightsBlock; i < end; ++i) {
      cumulative += weights_[i];
      if (cumulative > target) return static_cast<int32_t>(i);
    }
    // One by one they round to a little less than the block's sum: the next block begins there.
  }
  return static_cast<int32_t>(best);  // rounding let the sum end at the target
}

double Sampler::TotalWeight() const {
  double total = 0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  return total;
}

void Sampler::KeepMass(double mass) {
  // The nucleus is mostly small: sort a prefix that grows until it holds the mass.
  double cumulative = 0;
  size_t n_kept = 0;
  for (size_t n_sorted = 0; n_sorted < candidates_.size();) {
    const size_t n_next = std::min(candidates_.size(), std::max<size_t>(64, 8 * n_sorted));
    std::partial_sort(candidates_.begin() + static_cast<int64_t>(n_sorted),
                      candidates_.begin() + static_cast<int64_t>(n_next), candidates_.end(),
                      MoreProbable{});
    for (n_sorted = n_next; n_kept < n_sorted;) {
      cumulative += candidates_[n_kept++].weight;
      if (cumulative >= mass) {
        candidates_.resize(n_kept);
        return;
      }
    }
  }
}

}  // namespace walsh::engine
