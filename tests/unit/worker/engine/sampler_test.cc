#include "worker/engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "tests/testing/status_matchers.h"
#include "worker/kernels/counter_rng.h"

namespace walsh::engine {
namespace {

using ::testing::HasSubstr;
using walsh::testing::StatusIs;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The distribution that the parameters define, in double and written for reading.
std::vector<double> ReferenceDistribution(const std::vector<float>& logits,
                                          const SamplingOptions& options,
                                          const std::vector<int32_t>& prompt,
                                          const std::vector<int32_t>& output) {
  const size_t n = logits.size();
  std::vector<double> l(logits.begin(), logits.end());
  std::set<int32_t> seen(prompt.begin(), prompt.end());
  seen.insert(output.begin(), output.end());
  for (const int32_t t : seen) {
    l[t] = l[t] > 0 ? l[t] / options.repetition_penalty : l[t] * options.repetition_penalty;
    const auto count = std::count(output.begin(), output.end(), t);
    if (count > 0) l[t] -= options.presence_penalty;
    l[t] -= options.frequency_penalty * static_cast<double>(count);
  }
  const double max = *std::max_element(l.begin(), l.end());
  std::vector<double> p(n);
  for (size_t i = 0; i < n; ++i) p[i] = std::exp((l[i] - max) / options.temperature);
  const double p_max = 1.0;
  for (double& x : p) x = x < options.min_p * p_max ? 0 : x;
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return l[a] > l[b]; });
  if (options.top_k > 0) {
    for (size_t i = static_cast<size_t>(options.top_k); i < n; ++i) p[order[i]] = 0;
  }
  if (options.top_p < 1) {
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    double cumulative = 0;
    for (const int32_t i : order) {
      if (cumulative >= options.top_p * total) {
        p[i] = 0;
      } else {
        cumulative += p[i];
      }
    }
  }
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return p;
}

std::vector<float> RandomLogits(std::mt19937_64& rng, size_t n, double deviation) {
  std::normal_distribution<double> normal(0, deviation);
  std::vector<float> logits(n);
  for (float& x : logits) x = static_cast<float>(normal(rng));
  return logits;
}

int32_t SampleOnce(SamplingOptions options, std::vector<float> logits,
                   const std::vector<int32_t>& prompt = {}) {
  Sampler sampler(options, prompt, {});
  const auto result = sampler.Sample(logits);
  EXPECT_OK(result);
  return result->token;
}

TEST(SamplerTest, GreedyTakesTheLargestAndTheLowestOfEqualOnes) {
  SamplingOptions options{.temperature = 0};
  EXPECT_EQ(SampleOnce(options, {1, 5, 3, 5}), 1);
  EXPECT_EQ(SampleOnce(options, {-kInfinity, -7, -kInfinity}), 1);
}

// Chi-squared over parameter sets: observed counts against the reference distribution.
TEST(SamplerTest, DrawsFollowTheReferenceDistribution) {
  std::mt19937_64 rng(7);
  const std::vector<SamplingOptions> cases = {
      {.temperature = 1.0},
      {.temperature = 0.7},
      {.temperature = 2.0},
      {.temperature = 1.0, .top_k = 5},
      {.temperature = 1.0, .top_p = 0.8},
      {.temperature = 1.3, .top_p = 0.9, .top_k = 12},
      {.temperature = 1.0, .min_p = 0.1},
      {.temperature = 0.9, .top_p = 0.95, .top_k = 20, .min_p = 0.02},
      {.temperature = 1.0, .repetition_penalty = 1.5},
      {.temperature = 1.0, .presence_penalty = 0.8, .frequency_penalty = 0.5},
      {.temperature = 1.0, .top_k = 1},
  };
  for (size_t c = 0; c < cases.size(); ++c) {
    SCOPED_TRACE(c);
    const std::vector<float> logits = RandomLogits(rng, 40, 1.5);
    const std::vector<int32_t> prompt = {0, 1, 2, 3};
    constexpr int kDraws = 20000;
    std::vector<int> counts(logits.size());
    std::vector<double> expected(logits.size());
    for (int draw = 0; draw < kDraws; ++draw) {
      SamplingOptions options = cases[c];
      options.seed = static_cast<uint64_t>(draw) * 0x9E3779B97F4A7C15u + c;
      Sampler sampler(options, prompt, {});
      std::vector<float> row = logits;
      // The first token has no output to penalize; the second has.
      const auto first = sampler.Sample(row);
      ASSERT_OK(first);
      row = logits;
      const auto second = sampler.Sample(row);
      ASSERT_OK(second);
      ++counts[second->token];
    }
    // Mixture over first tokens of the distribution of the second.
    const auto first = ReferenceDistribution(logits, cases[c], prompt, {});
    for (size_t t = 0; t < first.size(); ++t) {
      if (first[t] == 0) continue;
      const auto second =
          ReferenceDistribution(logits, cases[c], prompt, {static_cast<int32_t>(t)});
      for (size_t i = 0; i < second.size(); ++i) expected[i] += first[t] * second[i] * kDraws;
    }
    double chi_squared = 0;
    int n_cells = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      if (expected[i] == 0) {
        ASSERT_EQ(counts[i], 0) << "token " << i << " is outside the distribution";
        continue;
      }
      if (expected[i] < 5) continue;
      chi_squared += (counts[i] - expected[i]) * (counts[i] - expected[i]) / expected[i];
      ++n_cells;
    }
    // Mean n − 1, deviation √(2(n − 1)): five deviations never fail by chance.
    const double freedom = std::max(1, n_cells - 1);
    EXPECT_LT(chi_squared, freedom + 5 * std::sqrt(2 * freedom));
  }
}

TEST(SamplerTest, LargeVocabularyNucleusEqualsTheReferenceSet) {
  std::mt19937_64 rng(11);
  for (const double deviation : {0.5, 2.0, 6.0}) {
    const std::vector<float> logits = RandomLogits(rng, 5000, deviation);
    SamplingOptions options{.temperature = 1.0, .top_p = 0.9};
    const auto reference = ReferenceDistribution(logits, options, {}, {});
    for (int draw = 0; draw < 300; ++draw) {
      options.seed = static_cast<uint64_t>(draw);
      EXPECT_GT(reference[SampleOnce(options, logits)], 0);
    }
  }
}

// After a truncation, too, the number that is drawn runs through the tokens in the order of ids.
TEST(SamplerTest, DrawsInTheOrderOfIds) {
  std::mt19937_64 rng(13);
  const std::vector<float> logits = RandomLogits(rng, 300, 2);
  const std::vector<SamplingOptions> cases = {{.temperature = 1.0},
                                              {.temperature = 1.0, .top_p = 0.9},
                                              {.temperature = 1.0, .top_k = 40},
                                              {.temperature = 1.5, .top_p = 0.8, .top_k = 100}};
  for (size_t c = 0; c < cases.size(); ++c) {
    const std::vector<double> p = ReferenceDistribution(logits, cases[c], {}, {});
    for (uint64_t seed = 0; seed < 200; ++seed) {
      SamplingOptions options = cases[c];
      options.seed = seed;
      const double uniform = kernels::UniformAt(seed, 0);
      double cumulative = 0;
      int32_t expected = 0;
      while ((cumulative += p[expected]) <= uniform) ++expected;
      EXPECT_EQ(SampleOnce(options, logits), expected) << "case " << c << ", seed " << seed;
    }
  }
}

TEST(SamplerTest, SeedDecidesAlone) {
  std::mt19937_64 rng(3);
  const std::vector<float> logits = RandomLogits(rng, 1000, 1);
  SamplingOptions options{.temperature = 1.0, .seed = 42};
  const int32_t token = SampleOnce(options, logits);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(SampleOnce(options, logits), token);
  std::set<int32_t> others;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    options.seed = seed;
    others.insert(SampleOnce(options, logits));
  }
  EXPECT_GT(others.size(), 30u);
}

TEST(SamplerTest, LogprobsAreTheModelsAndSumToOne) {
  const std::vector<float> logits = {1.0f, 2.0f, 0.5f, -1.0f, 2.0f};
  Sampler sampler(
      {.temperature = 0, .repetition_penalty = 2.0, .logprobs = true, .top_logprobs = 20},
      std::vector<int32_t>{1, 4}, {});
  std::vector<float> row = logits;
  ASSERT_OK_AND_ASSIGN(const TokenLogprob result, sampler.Sample(row));
  EXPECT_EQ(result.token, 0);  // 1 and 4 were halved to 1.0 and come after the equal 0
  double sum = 0;
  for (const float l : logits) sum += std::exp(static_cast<double>(l));
  EXPECT_NEAR(result.logprob, 1.0 - std::log(sum), 1e-6);
  ASSERT_EQ(result.top.size(), logits.size());
  EXPECT_EQ(result.top[0].first, 1);
  EXPECT_EQ(result.top[1].first, 4);
  double mass = 0;
  for (const auto& [token, logprob] : result.top) {
    mass += std::exp(logprob);
    EXPECT_NEAR(logprob, logits[token] - std::log(sum), 1e-6);
  }
  EXPECT_NEAR(mass, 1.0, 1e-6);
}

TEST(SamplerTest, WithoutTopLogprobsOnlyTheTokensOwnIsReported) {
  Sampler sampler({.temperature = 0, .logprobs = true}, {}, {});
  std::vector<float> row = {0, 1};
  ASSERT_OK_AND_ASSIGN(const TokenLogprob result, sampler.Sample(row));
  EXPECT_TRUE(result.top.empty());
  EXPECT_NEAR(result.logprob, -std::log1p(std::exp(-1.0)), 1e-6);
}

TEST(SamplerTest, EndsAreExcludedBelowMinTokens) {
  const std::vector<int32_t> eos = {3};
  Sampler sampler({.min_tokens = 2, .temperature = 0, .stop_tokens = {2}}, {}, eos);
  const std::vector<float> logits = {0, 1, 5, 6};
  for (const int32_t expected : {1, 1, 3}) {
    std::vector<float> row = logits;
    ASSERT_OK_AND_ASSIGN(const TokenLogprob result, sampler.Sample(row));
    EXPECT_EQ(result.token, expected);
  }
}

TEST(SamplerTest, NonFiniteLogitsFailTheRequest) {
  for (const float bad : {kNan, kInfinity}) {
    for (const double temperature : {0.0, 1.0}) {
      Sampler sampler({.temperature = temperature}, {}, {});
      std::vector<float> row = {0, bad, 1};
      EXPECT_THAT(sampler.Sample(row),
                  StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
    }
  }
  Sampler sampler({.temperature = 1}, {}, {});
  std::vector<float> row(3, -kInfinity);
  EXPECT_THAT(sampler.Sample(row), StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
}

TEST(SamplerTest, NothingLeftToChooseFailsTheRequest) {
  const std::vector<int32_t> eos = {0, 1};
  Sampler sampler({.min_tokens = 1, .temperature = 1}, {}, eos);
  std::vector<float> row = {1, 2};
  EXPECT_THAT(sampler.Sample(row),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("no token is left")));
}

TEST(SamplerTest, ExtremeParametersStayDefined) {
  std::mt19937_64 rng(5);
  const std::vector<float> logits = RandomLogits(rng, 100, 3);
  const auto best =
      static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  EXPECT_EQ(SampleOnce({.temperature = 1e-300}, logits), best);
  EXPECT_EQ(SampleOnce({.temperature = 1.0, .top_p = 1e-12}, logits), best);
  EXPECT_EQ(SampleOnce({.temperature = 1.0, .min_p = 1 - 1e-12}, logits), best);
  EXPECT_GE(SampleOnce({.temperature = 1.0, .top_k = 1'000'000}, logits), 0);
  EXPECT_GE(SampleOnce({.temperature = 2.0, .repetition_penalty = 1e-9}, logits, {1, 2, -5, 999}),
            0);
}

TEST(SamplerTest, OnlyPlainGreedySamplingNeedsNoLogits) {
  const auto needs = [](const SamplingOptions& options) {
    return Sampler(options, {}, {}).needs_logits();
  };
  EXPECT_FALSE(needs({.temperature = 0}));
  EXPECT_FALSE(needs({.temperature = 0, .top_p = 0.5, .top_k = 3, .min_p = 0.1}));
  EXPECT_TRUE(needs({.temperature = 0.1}));
  EXPECT_TRUE(needs({.temperature = 0, .repetition_penalty = 1.1}));
  EXPECT_TRUE(needs({.temperature = 0, .presence_penalty = 0.1}));
  EXPECT_TRUE(needs({.temperature = 0, .frequency_penalty = 0.1}));
  EXPECT_TRUE(needs({.temperature = 0, .logprobs = true}));
}

TEST(SamplerTest, TheBestTokenCountsAsGenerated) {
  Sampler sampler({.min_tokens = 1, .temperature = 0}, {}, std::vector<int32_t>{0});
  EXPECT_TRUE(sampler.needs_logits()) << "the end must not come yet";
  std::vector<float> logits = {9, 3, 5};
  EXPECT_EQ(sampler.Sample(logits)->token, 2);
  ASSERT_FALSE(sampler.needs_logits());
  EXPECT_EQ(sampler.Take({.token = 1})->token, 1);
  EXPECT_EQ(sampler.n_generated(), 2);
  EXPECT_THAT(sampler.Take({.token = kNotFinite}),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("new token 2 are not finite")));
  EXPECT_THAT(sampler.Take({.token = kNoTokenLeft}),
              StatusIs(absl::StatusCode::kInternal,
                       HasSubstr("no token is left to choose for new token 2")));
}

// What a runner is told, token by token, is what the sampler itself goes by.
TEST(SamplerTest, ChoicesTellWhatHasBeenSeenAndWhatIsExcluded) {
  Sampler sampler({.min_tokens = 2,
                   .temperature = 0.5,
                   .frequency_penalty = 0.25,
                   .seed = 11,
                   .stop_tokens = {6},
                   .logprobs = true,
                   .top_logprobs = 4},
                  std::vector<int32_t>{5, 3, 5}, std::vector<int32_t>{1});
  const auto seen = [&] {
    std::vector<std::pair<int32_t, int32_t>> pairs;
    for (const auto& [token, n] : sampler.ChoiceOf(0).seen) pairs.emplace_back(token, n);
    return pairs;
  };
  using Pairs = std::vector<std::pair<int32_t, int32_t>>;
  const Choice first = sampler.ChoiceOf(0);
  EXPECT_EQ(first.position, 0u);
  EXPECT_EQ(first.n_counted, 0u);
  EXPECT_EQ(first.seed, 11u);
  EXPECT_EQ(first.n_top_logprobs, 4);
  EXPECT_TRUE(first.has_penalties());
  EXPECT_EQ(std::vector<int32_t>(first.excluded.begin(), first.excluded.end()),
            (std::vector<int32_t>{6, 1}));
  EXPECT_EQ(seen(), (Pairs{{5, 0}, {3, 0}}));
  EXPECT_EQ(sampler.ChoiceOf(1).excluded.size(), 2u);
  EXPECT_EQ(sampler.ChoiceOf(1).position, 1u);
  EXPECT_EQ(sampler.ChoiceOf(1).n_counted, 0u) << "the one before is not known yet";
  EXPECT_TRUE(sampler.ChoiceOf(2).excluded.empty());
  EXPECT_OK(sampler.Take({.token = 9}));
  EXPECT_EQ(seen(), (Pairs{{5, 0}, {3, 0}, {9, 1}}));
  EXPECT_EQ(sampler.ChoiceOf(0).last_counted, 2u);
  EXPECT_OK(sampler.Take({.token = 3}));
  EXPECT_EQ(seen(), (Pairs{{5, 0}, {3, 1}, {9, 1}}));
  EXPECT_EQ(sampler.ChoiceOf(0).last_counted, 1u);
  EXPECT_EQ(sampler.ChoiceOf(0).n_counted, 2u);
  EXPECT_TRUE(sampler.ChoiceOf(0).excluded.empty());
  EXPECT_EQ(Sampler({.temperature = 1}, {}, {}).ChoiceOf(0).n_top_logprobs, -1);
  EXPECT_TRUE(Sampler({.temperature = 1}, std::vector<int32_t>{4}, {}).ChoiceOf(0).seen.empty());
}

}  // namespace
}  // namespace walsh::engine
