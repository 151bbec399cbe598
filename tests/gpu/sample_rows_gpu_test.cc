// Sampling against the distribution in double, and against the CPU's sampler, whose steps it takes.
//
// What is behind a row is NaN, as are outputs before a call.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/gpu_fixture.h"
#include "worker/engine/cuda/captured_graph.h"
#include "worker/engine/sampler.h"
#include "worker/kernels/counter_rng.h"
#include "worker/kernels/cuda/sample_rows.h"

namespace walsh::kernels::cuda {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Batch {
  int64_t vocab = 0;
  int64_t stride = 0;
  std::vector<float> logits = {};  // [n_rows, stride]
  std::vector<SampleRow> rows = {};
  std::vector<SeenToken> seen = {};
  std::vector<int32_t> excluded = {};
  std::vector<int32_t> made = {};

  explicit Batch(int64_t vocab_size) : vocab(vocab_size), stride((vocab_size + 3) / 4 * 4 + 4) {}
  void Add(const std::vector<float>& row_logits, SampleRow row,
           const std::vector<SeenToken>& row_seen = {},
           const std::vector<int32_t>& row_excluded = {}) {
    logits.insert(logits.end(), row_logits.begin(), row_logits.end());
    logits.resize(logits.size() + static_cast<size_t>(stride - vocab), std::nanf(""));
    row.first_seen = static_cast<int32_t>(seen.size());
    row.n_seen = static_cast<int32_t>(row_seen.size());
    row.first_excluded = static_cast<int32_t>(excluded.size());
    row.n_excluded = static_cast<int32_t>(row_excluded.size());
    seen.insert(seen.end(), row_seen.begin(), row_seen.end());
    excluded.insert(excluded.end(), row_excluded.begin(), row_excluded.end());
    rows.push_back(row);
  }
  std::vector<float> RowLogits(size_t row) const {
    const auto first = logits.begin() + static_cast<int64_t>(row) * stride;
    return {first, first + vocab};
  }
};

struct Result {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// A batch in device memory.
struct DeviceBatch {
  DeviceBuffer<float> logits;
  DeviceBuffer<SampleRow> rows;
  DeviceBuffer<SeenToken> seen;
  DeviceBuffer<int32_t> excluded;
  DeviceBuffer<float> seen_logits;
  DeviceBuffer<int32_t> made;
  DeviceBuffer<int32_t> ids;
  DeviceBuffer<float> logprobs;
  DeviceBuffer<int32_t> top_ids;
  DeviceBuffer<float> top_logprobs;
  SampleRowsParams params;
};

class SampleRowsGpuTest : public GpuTest {
 protected:
  DeviceBatch Send(const Batch& b) {
    const auto n = static_cast<int64_t>(b.rows.size());
    DeviceBatch d{.logits = Upload(b.logits),
                  .rows = Upload(b.rows),
                  .seen = Upload(b.seen),
                  .excluded = Upload(b.excluded),
                  .seen_logits = Poisoned<float>(static_cast<int64_t>(b.seen.size())),
                  .made = Upload(b.made),
                  .ids = Poisoned<int32_t>(n),
                  .logprobs = Poisoned<float>(n),
                  .top_ids = Poisoned<int32_t>(n * kTopLogprobsMax),
                  .top_logprobs = Poisoned<float>(n * kTopLogprobsMax),
                  .params = {}};
    d.params = {.n_rows = n,
                .vocab = b.vocab,
                .logits = d.logits.data(),
                .stride = b.stride,
                .rows = d.rows.data(),
                .seen = d.seen.data(),
                .excluded = d.excluded.data(),
                .seen_logits = d.seen_logits.data(),
                .made = d.made.data(),
                .ids = d.ids.data(),
                .logprobs = d.logprobs.data(),
                .top_ids = d.top_ids.data(),
                .top_logprobs = d.top_logprobs.data(),
                .stream = context().stream()};
    return d;
  }
  Result Fetch(const DeviceBatch& d) {
    return {.ids = Download(d.ids),
            .logprobs = Download(d.logprobs),
            .top_ids = Download(d.top_ids),
            .top_logprobs = Download(d.top_logprobs)};
  }
  Result Run(const Batch& batch) {
    const DeviceBatch d = Send(batch);
    EXPECT_OK(SampleRows(d.params));
    return Fetch(d);
  }
  int32_t RunOne(const std::vector<float>& logits, const SampleRow& row,
                 const std::vector<SeenToken>& seen = {},
                 const std::vector<int32_t>& excluded = {}) {
    Batch batch(static_cast<int64_t>(logits.size()));
    batch.Add(logits, row, seen, excluded);
    return Run(batch).ids.front();
  }
};

// The distribution that a row's parameters define, in double and written for reading.
std::vector<double> Distribution(const std::vector<float>& logits, const SampleRow& row,
                                 const std::vector<SeenToken>& seen,
                                 const std::vector<int32_t>& excluded) {
  std::vector<double> l(logits.begin(), logits.end());
  for (const SeenToken& s : seen) {
    double& x = l[s.token];
    x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    if (s.n_output > 0) x -= row.presence_penalty + row.frequency_penalty * s.n_output;
  }
  for (const int32_t id : excluded) l[id] = -std::numeric_limits<double>::infinity();
  const double max = *std::max_element(l.begin(), l.end());
  std::vector<double> p(l.size());
  for (size_t i = 0; i < l.size(); ++i) p[i] = std::exp((l[i] - max) / row.temperature);
  for (double& x : p) x = x < row.min_p ? 0 : x;
  std::vector<int32_t> order(l.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return l[a] > l[b]; });
  if (row.top_k > 0) {
    for (size_t i = static_cast<size_t>(row.top_k); i < l.size(); ++i) p[order[i]] = 0;
  }
  if (row.top_p < 1) {
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    double mass = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      if (i > 0 && mass >= row.top_p * total) {
        p[order[i]] = 0;
      } else {
        mass += p[order[i]];
      }
    }
  }
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= total;
  return p;
}

struct DrawCase {
  SampleRow row;
  std::vector<SeenToken> seen = {};
  std::vector<int32_t> excluded = {};
};
// Among them such that another order of the steps would give another distribution.
std::vector<DrawCase> DrawCases() {
  const std::vector<SeenToken> seen = {{1, 0}, {2, 3}, {5, 1}, {7, 0}, {11, 12}};
  return {
      {{.temperature = 1.0}},
      {{.temperature = 0.7}},
      {{.temperature = 2.0}},
      {{.temperature = 1.0, .top_k = 5}},
      {{.temperature = 1.0, .top_k = 1}},
      {{.temperature = 1.0, .top_p = 0.8}},
      {{.temperature = 1.0, .top_p = 0.999}},
      {{.temperature = 1.0, .min_p = 0.1}},
      {{.temperature = 2.5, .min_p = 0.3}},
      {{.temperature = 1.3, .top_p = 0.7, .top_k = 8}},
      {{.temperature = 1.5, .top_p = 0.9, .min_p = 0.2, .top_k = 12}},
      {{.temperature = 1.0, .repetition_penalty = 1.8}, seen},
      {{.temperature = 1.0, .presence_penalty = 0.8, .frequency_penalty = 0.3}, seen},
      {{.temperature = 0.8,
        .top_p = 0.9,
        .repetition_penalty = 0.6,
        .presence_penalty = -0.5,
        .frequency_penalty = 0.1,
        .top_k = 10},
       seen,
       {2, 3, 4}},
      {{.temperature = 1.0}, {}, {0, 13, 36}},
      {{.temperature = 1.0, .top_k = 3}, {}, {9, 10}},
  };
}

// Chi-squared of the counts of a launch's rows, each with its own seed and position.
TEST_F(SampleRowsGpuTest, DrawsFollowTheDistribution) {
  constexpr int kDraws = 20000;
  constexpr int64_t kVocab = 37;
  const std::vector<DrawCase> cases = DrawCases();
  for (size_t c = 0; c < cases.size(); ++c) {
    SCOPED_TRACE(c);
    const std::vector<float> logits = RandomNormal(kVocab, static_cast<uint32_t>(c + 3), 1.5f);
    Batch batch(kVocab);
    for (int draw = 0; draw < kDraws; ++draw) {
      SampleRow row = cases[c].row;
      row.seed = static_cast<uint64_t>(draw / 100) * 0x9E3779B97F4A7C15u + c;
      row.position = static_cast<uint64_t>(draw % 100);
      batch.Add(logits, row, cases[c].seen, cases[c].excluded);
    }
    std::vector<int> counts(kVocab);
    for (const int32_t id : Run(batch).ids) {
      ASSERT_GE(id, 0);
      ASSERT_LT(id, kVocab);
      ++counts[id];
    }
    const std::vector<double> p =
        Distribution(logits, cases[c].row, cases[c].seen, cases[c].excluded);
    double chi_squared = 0;
    int n_cells = 0;
    for (int64_t i = 0; i < kVocab; ++i) {
      const double expected = p[i] * kDraws;
      if (expected == 0) {
        ASSERT_EQ(counts[i], 0) << "token " << i << " is outside the distribution";
      } else if (expected >= 5) {
        chi_squared += (counts[i] - expected) * (counts[i] - expected) / expected;
        ++n_cells;
      }
    }
    // Mean n − 1, deviation √(2(n − 1)): five deviations never fail by chance.
    const double freedom = std::max(1, n_cells - 1);
    EXPECT_LT(chi_squared, freedom + 5 * std::sqrt(2 * freedom));
  }
}

// What the CPU's sampler does for a request, token by token, as rows of one launch.
struct CpuRun {
  std::vector<int32_t> tokens;
  Batch batch;
};

CpuRun RunOnCpu(int64_t vocab, float sigma, int n_requests, int n_steps) {
  const std::vector<engine::SamplingOptions> kinds = {
      {.temperature = 0},
      {.temperature = 1.0},
      {.temperature = 0.6, .top_p = 0.95, .top_k = 20},
      {.temperature = 1.0, .top_p = 0.9},
      {.temperature = 1.0, .top_p = 0.5},
      {.temperature = 1.0, .top_k = 50},
      {.temperature = 1.0, .min_p = 0.05},
      {.min_tokens = 4, .temperature = 0.8, .repetition_penalty = 1.2},
      {.temperature = 0, .repetition_penalty = 1.3, .presence_penalty = 0.7},
      {.min_tokens = 100,
       .temperature = 1.2,
       .top_p = 0.9,
       .top_k = 200,
       .min_p = 0.001,
       .repetition_penalty = 0.9,
       .presence_penalty = 1.1,
       .frequency_penalty = -0.4},
  };
  CpuRun run{.batch = Batch(vocab)};
  for (int request = 0; request < n_requests; ++request) {
    engine::SamplingOptions options = kinds[static_cast<size_t>(request) % kinds.size()];
    options.seed = 0x1234567800000000u + static_cast<uint64_t>(request) * 77777;
    options.stop_tokens = {5, static_cast<int32_t>(vocab) - 1, static_cast<int32_t>(vocab) + 7};
    const std::vector<int32_t> prompt = {1, 3, 3, static_cast<int32_t>(vocab) - 2, 17, -4};
    const std::vector<int32_t> eos = {2};
    engine::Sampler sampler(options, prompt, eos);
    std::map<int32_t, int32_t> n_output;
    for (const int32_t token : prompt) n_output[token] = 0;
    std::vector<int32_t> ends = options.stop_tokens;
    ends.insert(ends.end(), eos.begin(), eos.end());
    for (int step = 0; step < n_steps; ++step) {
      std::vector<float> logits =
          RandomNormal(vocab, static_cast<uint32_t>(request * 1000 + step), sigma);
      // What is seen often, so that penalties decide.
      for (const int32_t token : {2, 3, 5, 17}) logits[token] = 3.5f * sigma;
      SampleRow row{.temperature = options.temperature,
                    .top_p = options.top_p,
                    .min_p = options.min_p,
                    .repetition_penalty = options.repetition_penalty,
                    .presence_penalty = options.presence_penalty,
                    .frequency_penalty = options.frequency_penalty,
                    .seed = options.seed,
                    .position = static_cast<uint64_t>(step),
                    .top_k = options.top_k};
      std::vector<SeenToken> seen;
      for (const auto& [token, n] : n_output) seen.push_back({token, n});
      run.batch.Add(logits, row, seen, step < options.min_tokens ? ends : std::vector<int32_t>());
      const absl::StatusOr<engine::TokenLogprob> sampled = sampler.Sample(logits);
      EXPECT_OK(sampled);
      run.tokens.push_back(sampled->token);
      ++n_output[sampled->token];
    }
  }
  return run;
}

// The sums of the two are rounded at different places: one draw in a thousand may be so near to a
// boundary that it falls to its other side.
TEST_F(SampleRowsGpuTest, TokensAreThoseOfTheCpu) {
  struct Case {
    int64_t vocab;
    float sigma;
    int n_requests;
    int n_steps;
  };
  for (const Case& c :
       {Case{40, 1.5f, 100, 20}, Case{1001, 1.0f, 60, 20}, Case{5003, 2.0f, 40, 10},
        Case{32003, 3.0f, 20, 8}, Case{128256, 2.0f, 10, 6}, Case{151936, 0.1f, 10, 3}}) {
    SCOPED_TRACE(c.vocab);
    const CpuRun run = RunOnCpu(c.vocab, c.sigma, c.n_requests, c.n_steps);
    const std::vector<int32_t> ids = Run(run.batch).ids;
    ASSERT_EQ(ids.size(), run.tokens.size());
    int n_different = 0;
    for (size_t i = 0; i < ids.size(); ++i) n_different += ids[i] != run.tokens[i] ? 1 : 0;
    EXPECT_LE(n_different, static_cast<int>(ids.size()) / 1000) << "of " << ids.size();
  }
}

TEST_F(SampleRowsGpuTest, GreedyTakesTheLargestAndTheLowestOfEqualOnes) {
  EXPECT_EQ(RunOne({1, 5, 3, 5}, {}), 1);
  EXPECT_EQ(RunOne({-kInfinity, -7, -kInfinity}, {}), 1);
  EXPECT_EQ(RunOne({-1, 0.0f, -0.0f}, {}), 1);
  EXPECT_EQ(RunOne({-1, -0.0f, 0.0f}, {}), 1);
  EXPECT_EQ(RunOne({1, 5, 3, 5}, {.repetition_penalty = 2}, {{1, 0}}), 3);
  EXPECT_EQ(RunOne({1, 5, 3, 5}, {}, {}, {3, 1}), 2);
}

// All logits equal: which are kept is decided by their ids alone, wherever the CTAs' ranges end.
TEST_F(SampleRowsGpuTest, LowestIdsOfEqualOnesAreKept) {
  constexpr int kDraws = 60;
  for (const int64_t vocab : {7, 130, 1025, 8192, 40000}) {
    for (const bool by_mass : {false, true}) {
      const std::set<int64_t> sizes = {1, 2, vocab / 3, vocab / 2, vocab - 2, vocab};
      for (const int64_t n : sizes) {
        Batch batch(vocab);
        SampleRow row{.temperature = 0.5};
        if (by_mass) {
          row.top_p = (static_cast<double>(n) - 0.5) / static_cast<double>(vocab - 1);
        } else {
          row.top_k = static_cast<int32_t>(n);
        }
        for (int i = 0; i < kDraws; ++i) {
          row.position = static_cast<uint64_t>(i);
          batch.Add(std::vector<float>(static_cast<size_t>(vocab), -3.25f), row, {}, {1});
        }
        const int64_t n_kept = std::min(n, vocab - 1);
        const std::vector<int32_t> ids = Run(batch).ids;
        for (int i = 0; i < kDraws; ++i) {
          // Of the tokens without number 1, all the same.
          const auto place = static_cast<int64_t>(UniformAt(0, static_cast<uint64_t>(i)) *
                                                  static_cast<double>(n_kept));
          EXPECT_EQ(ids[i], place == 0 ? 0 : place + 1)
              << vocab << " tokens, " << n << (by_mass ? " by mass" : " by number");
        }
      }
    }
  }
}

TEST_F(SampleRowsGpuTest, ExtremeParametersStayDefined) {
  const std::vector<float> logits = RandomNormal(1003, 5, 3.0f);
  const auto best =
      static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  EXPECT_EQ(RunOne(logits, {.temperature = 1e-300}), best);
  EXPECT_EQ(RunOne(logits, {.temperature = 1.0, .top_p = 1e-12}), best);
  EXPECT_EQ(RunOne(logits, {.temperature = 1.0, .min_p = 1 - 1e-12}), best);
  EXPECT_EQ(RunOne(logits, {.temperature = 1.0, .min_p = 1}), best);
  EXPECT_EQ(RunOne(logits, {.temperature = 5.0, .top_k = 1}), best);
  const std::vector<SampleRow> others = {
      {.temperature = 1.0, .top_k = 1'000'000},
      {.temperature = 1e300},
      {.temperature = 1e300, .min_p = 1e-300},
      {.temperature = 1.0, .top_p = 1 - 1e-16},
      {.temperature = 1.0, .top_p = 1 - 1e-16, .top_k = 1002},
      {.temperature = 2.0, .repetition_penalty = 1e-9},
      {.temperature = 2.0, .repetition_penalty = 1e-45, .n_top_logprobs = 3}};
  for (size_t i = 0; i < others.size(); ++i) {
    const int32_t id = RunOne(logits, others[i], {{1, 0}, {best, 2}, {-5, 1}, {1003, 1}});
    EXPECT_GE(id, 0) << i;
    EXPECT_LT(id, 1003) << i;
  }
  EXPECT_EQ(RunOne({-2}, {.temperature = 1.0, .top_p = 0.5, .top_k = 1}), 0);
  // One far above the rest, which weigh nothing.
  std::vector<float> peaked(3001, -1e30f);
  peaked[2999] = 1e30f;
  EXPECT_EQ(RunOne(peaked, {.temperature = 1.0, .top_p = 0.99, .top_k = 50}), 2999);
}

TEST_F(SampleRowsGpuTest, NoTokenForWhatIsNotFinite) {
  const std::vector<SampleRow> rows = {
      {}, {.temperature = 1.0, .top_p = 0.9}, {.n_top_logprobs = 2}};
  for (const int64_t vocab : {5, 20001}) {
    Batch batch(vocab);
    std::vector<int32_t> expected;
    for (const SampleRow& row : rows) {
      std::vector<float> logits(static_cast<size_t>(vocab), 1.0f);
      batch.Add(logits, row);
      expected.push_back(row.temperature > 0 ? -7 : 0);
      for (const float bad : {std::nanf(""), -std::nanf(""), kInfinity}) {
        logits.back() = bad;
        batch.Add(logits, row);
        expected.push_back(kNotFinite);
      }
      batch.Add(std::vector<float>(static_cast<size_t>(vocab), -kInfinity), row);
      expected.push_back(kNotFinite);
      std::vector<float> two(static_cast<size_t>(vocab), -kInfinity);
      two[3] = 2;
      two[4] = 1;
      batch.Add(two, row, {}, {4, 3});
      expected.push_back(kNoTokenLeft);
      batch.Add(two, row, {}, {3});
      expected.push_back(4);
    }
    const std::vector<int32_t> ids = Run(batch).ids;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (expected[i] == -7) {
        EXPECT_GE(ids[i], 0);
      } else {
        EXPECT_EQ(ids[i], expected[i]) << i << " of " << vocab;
      }
    }
  }
}

TEST_F(SampleRowsGpuTest, LogprobsAreTheModels) {
  for (const int64_t vocab : {3, 20, 1023, 128256}) {
    Batch batch(vocab);
    const std::vector<int32_t> n_top = {-1, 0, 1, 5, kTopLogprobsMax};
    for (const int32_t n : n_top) {
      for (const bool is_greedy : {false, true}) {
        std::vector<float> logits = RandomNormal(vocab, static_cast<uint32_t>(n + 50), 3.0f);
        // Equal ones among the first, and some that are nothing.
        const float largest = *std::max_element(logits.begin(), logits.end());
        for (int64_t i = 0; i < vocab; i += 1 + vocab / 3) logits[i] = largest;
        for (int64_t i = 1; i < vocab; i += 7) logits[i] = -kInfinity;
        batch.Add(logits,
                  {.temperature = is_greedy ? 0.0 : 1.0,
                   .repetition_penalty = 1.5,
                   .frequency_penalty = 0.5,
                   .seed = 9,
                   .n_top_logprobs = n},
                  // All that is likely is penalized: what is reported must not be.
                  {{0, 1}, {static_cast<int32_t>(1 + vocab / 3), 2}, {1, 0}});
      }
    }
    const Result result = Run(batch);
    for (size_t row = 0; row < batch.rows.size(); ++row) {
      SCOPED_TRACE(absl::StrCat("row ", row, " of ", vocab));
      const std::vector<float> logits = batch.RowLogits(row);
      const int32_t n = batch.rows[row].n_top_logprobs;
      ASSERT_GE(result.ids[row], 0);
      if (n < 0) {
        EXPECT_TRUE(std::isnan(result.logprobs[row]));
        EXPECT_TRUE(std::isnan(result.top_logprobs[row * kTopLogprobsMax]));
        continue;
      }
      const double largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
      double sum = 0;
      for (const float x : logits) sum += std::exp(static_cast<double>(x) - largest);
      const auto logprob = [&](int32_t id) {
        return static_cast<double>(logits[id]) - largest - std::log(sum);
      };
      EXPECT_NEAR(static_cast<double>(result.logprobs[row]), logprob(result.ids[row]), 2e-6);
      std::vector<int32_t> order(logits.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return logits[a] > logits[b]; });
      for (int32_t i = 0; i < kTopLogprobsMax; ++i) {
        const size_t at = row * kTopLogprobsMax + static_cast<size_t>(i);
        if (i >= std::min<int64_t>(n, vocab)) {
          EXPECT_EQ(result.top_ids[at], -1) << "written behind the last";
          EXPECT_TRUE(std::isnan(result.top_logprobs[at]));
          continue;
        }
        EXPECT_EQ(result.top_ids[at], order[i]) << i;
        const auto value = static_cast<double>(result.top_logprobs[at]);
        if (std::isinf(logits[order[i]])) {
          EXPECT_EQ(value, static_cast<double>(-kInfinity));
        } else {
          EXPECT_NEAR(value, logprob(order[i]), 2e-6);
        }
      }
    }
  }
}

TEST_F(SampleRowsGpuTest, SameTokensAloneAndInABatch) {
  const CpuRun run = RunOnCpu(32001, 1.0f, 32, 2);
  const Result together = Run(run.batch);
  EXPECT_EQ(Run(run.batch).ids, together.ids) << "another run";
  for (size_t i = 0; i < run.batch.rows.size(); i += 3) {
    const SampleRow& row = run.batch.rows[i];
    Batch alone(run.batch.vocab);
    alone.Add(run.batch.RowLogits(i), row,
              {run.batch.seen.begin() + row.first_seen,
               run.batch.seen.begin() + row.first_seen + row.n_seen},
              {run.batch.excluded.begin() + row.first_excluded,
               run.batch.excluded.begin() + row.first_excluded + row.n_excluded});
    EXPECT_EQ(Run(alone).ids.front(), together.ids[i]) << i;
  }
}

// However a row is told of its seen tokens, it is the same as when all are in the list; and what
// has changed is in the list from then on.
TEST_F(SampleRowsGpuTest, ChangedAndUncountedTokensAreAsIfTheyWereListed) {
  for (const int64_t vocab : {40, 5003, 40000}) {
    SCOPED_TRACE(vocab);
    CpuRun run = RunOnCpu(vocab, 1.0f, 20, 6);
    std::vector<int> n_of_kind(6);
    Batch told(vocab);
    for (size_t i = 0; i < run.batch.rows.size(); ++i) {
      run.batch.rows[i].n_top_logprobs = static_cast<int32_t>(i % 3) - 1;
      SampleRow row = run.batch.rows[i];
      const auto listed = run.batch.seen.begin() + row.first_seen;
      std::vector<SeenToken> seen(listed, listed + row.n_seen);
      const auto kind = static_cast<int32_t>((i + i / 6) % 6);
      // 0: as it is. 1: another number. 2: a new entry. 3: one more of a token in the list.
      // 4: a token that is not there. 5: one that changes and is made once more.
      int32_t place = kind == 0 ? row.n_seen : row.n_seen - 1;
      if (kind >= 3) {
        const auto is_made = [&](SeenToken s) {
          return kind == 4 ? s.n_output == 1 : s.n_output > 0;
        };
        place =
            static_cast<int32_t>(std::find_if(seen.begin(), seen.end(), is_made) - seen.begin());
      }
      if (place < row.n_seen) {
        ++n_of_kind[static_cast<size_t>(kind)];
        SeenToken& entry = seen[static_cast<size_t>(place)];
        if (kind >= 3) {
          row.uncounted = static_cast<int32_t>(told.made.size());
          told.made.push_back(entry.token);
          --entry.n_output;
        }
        if (kind == 1 || kind == 2 || kind == 5) {
          row.changed_seen = place;
          row.changed = entry;
          entry = kind == 2 ? SeenToken{-7, 99} : SeenToken{entry.token, entry.n_output + 3};
        }
        if (kind == 4) seen.erase(seen.begin() + place);
      }
      const auto excluded = run.batch.excluded.begin() + row.first_excluded;
      told.Add(run.batch.RowLogits(i), row, seen, {excluded, excluded + row.n_excluded});
    }
    told.made.push_back(-1);
    for (size_t kind = 1; kind < 6; ++kind) EXPECT_GT(n_of_kind[kind], 5) << kind;

    const DeviceBatch d = Send(told);
    EXPECT_OK(SampleRows(d.params));
    const Result actual = Fetch(d);
    const Result expected = Run(run.batch);
    EXPECT_EQ(actual.ids, expected.ids);
    EXPECT_EQ(actual.top_ids, expected.top_ids);
    const auto bits = [](const std::vector<float>& values) {
      std::vector<uint32_t> result;
      for (const float value : values) result.push_back(std::bit_cast<uint32_t>(value));
      return result;
    };
    EXPECT_EQ(bits(actual.logprobs), bits(expected.logprobs));
    const std::vector<SeenToken> seen = Download(d.seen);
    for (const SampleRow& row : told.rows) {
      for (int32_t i = 0; i < row.n_seen; ++i) {
        const auto at = static_cast<size_t>(row.first_seen + i);
        const SeenToken& is = i == row.changed_seen ? row.changed : told.seen[at];
        EXPECT_EQ(seen[at].token, is.token);
        EXPECT_EQ(seen[at].n_output, is.n_output);
      }
    }
  }
}

// A sequence whose last token is none.
TEST_F(SampleRowsGpuTest, WhatIsNoTokenIsNotCounted) {
  for (const int32_t none : {kNotFinite, kNoTokenLeft}) {
    Batch batch(8);
    batch.made = {none};
    batch.Add({1, 5, 3, 4, 0, 0, 0, 0},
              {.presence_penalty = 1.5, .uncounted = 0, .n_top_logprobs = 0}, {{1, 1}});
    EXPECT_EQ(Run(batch).ids.front(), 3);
  }
}

// One graph for parameters that change between its replays.
TEST_F(SampleRowsGpuTest, GraphIsReplayedWithOtherParameters) {
#ifdef WALSH_DEVICE_IS_HOST
  GTEST_SKIP() << "the host captures nothing";
#endif
  const CpuRun first = RunOnCpu(5003, 1.0f, 8, 1);
  const CpuRun second = RunOnCpu(5003, 1.0f, 16, 1);
  Batch other(second.batch.vocab);
  for (size_t i = 8; i < 16; ++i) {
    SampleRow row = second.batch.rows[i];
    row.n_top_logprobs = static_cast<int32_t>(i) - 9;
    const std::vector<int32_t> excluded(i % 2, 2);
    other.Add(second.batch.RowLogits(i), row, {{3, 1}, {17, 0}}, excluded);
  }
  DeviceBatch d = Send(first.batch);
  d.params.overlap_previous = true;
  const auto queue = [&]() { return SampleRows(d.params); };
  ASSERT_OK(queue());
  const absl::StatusOr<engine::cuda::CapturedGraph> graph =
      engine::cuda::CapturedGraph::Capture(context().stream(), queue);
  ASSERT_OK(graph);
  const auto copy = [&](auto& to, const auto& from) {
    ASSERT_LE(static_cast<int64_t>(from.size()), to.size());
    EXPECT_EQ(cudaMemcpyAsync(to.data(), from.data(), from.size() * sizeof(from[0]),
                              cudaMemcpyHostToDevice, context().stream()),
              cudaSuccess);
  };
  for (const Batch* batch : {&first.batch, static_cast<const Batch*>(&other), &first.batch}) {
    copy(d.logits, batch->logits);
    copy(d.rows, batch->rows);
    copy(d.seen, batch->seen);
    copy(d.excluded, batch->excluded);
    EXPECT_OK(graph->Launch(context().stream()));
    EXPECT_EQ(Fetch(d).ids, Run(*batch).ids);
  }
}

TEST_F(SampleRowsGpuTest, RefusesWhatItDoesNotTake) {
#ifdef WALSH_DEVICE_IS_HOST
  GTEST_SKIP() << "the host takes everything";
#endif
  EXPECT_THAT(SampleRows({.n_rows = 2, .vocab = 6}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("6 apart")));
  EXPECT_THAT(SampleRows({.n_rows = 70000, .vocab = 8}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("70000 rows")));
  EXPECT_THAT(SampleRows({.n_rows = 1, .vocab = 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("vocabulary of 0")));
  EXPECT_THAT(SampleRows({.n_rows = 1, .vocab = (1 << 20) + 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("limit is 1048576")));
}

}  // namespace
}  // namespace walsh::kernels::cuda
