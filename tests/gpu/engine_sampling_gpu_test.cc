// Tokens that the CUDA engine's device chooses, beside those that the CPU's sampler chooses by the
// same logits. It runs on a device, or on the host in its place (tests/testing/host_device).
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/recording_sink.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "worker/engine/cuda/cuda_model.h"
#include "worker/engine/sampler.h"

namespace walsh::engine {
namespace {

using ::testing::HasSubstr;
using testing::MetricValue;
using testing::RecordingSink;
using testing::StatusIs;
using testing::TempDir;
using testing::TinyModel;
using testing::TinyModelOptions;

#ifdef WALSH_DEVICE_IS_HOST
constexpr bool kIsHost = true;
#else
constexpr bool kIsHost = false;
#endif
// Sums that are rounded at other places: a draw may fall to the other side of a boundary.
constexpr double kDrawsApart = 1e-3;
// And, on a device, logits of a position that was computed as part of a prompt differ in the last
// bits from those that came one by one, so that a preemption may change what follows.
constexpr double kRequestsApart = kIsHost ? 0.01 : 0.1;
constexpr double kLogprobError = 1e-4;

class Random {
 public:
  explicit Random(uint64_t seed) : rng_(seed) {}
  int Int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  double Real(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(rng_);
  }
  bool Is(double probability) { return Real(0, 1) < probability; }
  template <typename T>
  void Shuffle(std::vector<T>& values) {
    std::shuffle(values.begin(), values.end(), rng_);
  }

 private:
  std::mt19937_64 rng_;
};

// A mix of all that a token may be chosen by.
SamplingOptions RandomOptions(Random& random, int vocab) {
  SamplingOptions options;
  options.max_tokens = random.Int(1, 40);
  if (random.Is(0.4)) options.min_tokens = random.Int(1, 20);
  options.temperature = random.Is(0.3) ? 0.0 : random.Real(0.3, 2.0);
  if (random.Is(0.4)) options.top_p = random.Real(0.1, 1.0);
  if (random.Is(0.4)) options.top_k = random.Int(1, vocab + 10);
  if (random.Is(0.3)) options.min_p = random.Real(0.0, 0.3);
  if (random.Is(0.4)) options.repetition_penalty = random.Real(0.6, 1.8);
  if (random.Is(0.3)) options.presence_penalty = random.Real(-1.0, 2.0);
  if (random.Is(0.3)) options.frequency_penalty = random.Real(-0.5, 1.5);
  options.seed = static_cast<uint64_t>(random.Int(0, std::numeric_limits<int>::max()));
  // Likely ones, as a third of the vocabulary is; some are no tokens, some are there twice.
  if (random.Is(0.4)) {
    for (int n = random.Int(1, 60); n > 0; --n) {
      options.stop_tokens.push_back(random.Int(0, 3) == 0 ? 7 : random.Int(-2, vocab + 3));
    }
  }
  options.ignore_eos = random.Is(0.5);
  options.logprobs = random.Is(0.5);
  options.top_logprobs = random.Int(0, 20);
  return options;
}

// Like what it wraps, but that it can leave every choice but that of the largest logit to the host.
class WatchedRunner final : public ModelRunner {
 public:
  struct Figures {
    std::atomic<int64_t> n_ahead = 0;  // steps started before the one before was waited for
    std::atomic<int64_t> n_penalized_ahead = 0;  // choices with penalties in them
    std::atomic<int64_t> n_logits = 0;           // rows of logits that were fetched
  };
  WatchedRunner(std::unique_ptr<ModelRunner> inner, bool chooses, Figures* figures)
      : inner_(std::move(inner)), chooses_(chooses), figures_(*figures) {}

  bool can_run_ahead() const override { return chooses_ && inner_->can_run_ahead(); }
  bool can_choose(const Choice& choice) const override {
    return chooses_ && inner_->can_choose(choice);
  }
  absl::Status Start(const StepBatch& batch) override {
    const bool is_ahead = n_started_++ > 0;
    figures_.n_ahead += is_ahead ? 1 : 0;
    for (const StepBatch::Sequence& sequence : batch.sequences) {
      figures_.n_logits += sequence.wanted == Wanted::kLogits ? 1 : 0;
      figures_.n_penalized_ahead += is_ahead && sequence.choice.has_penalties() ? 1 : 0;
    }
    return inner_->Start(batch);
  }
  absl::Status Wait() override {
    --n_started_;
    return inner_->Wait();
  }
  int32_t best(size_t index) const override { return inner_->best(index); }
  TokenLogprob chosen(size_t index) const override { return inner_->chosen(index); }
  std::span<float> logits(size_t index) override { return inner_->logits(index); }
  void Discard(BlockId block) override { inner_->Discard(block); }
  int64_t kv_cache_bytes() const override { return inner_->kv_cache_bytes(); }

 private:
  const std::unique_ptr<ModelRunner> inner_;
  const bool chooses_;
  Figures& figures_;
  int n_started_ = 0;
};

class WatchedModel final : public ServedModel {
 public:
  WatchedModel(std::shared_ptr<ServedModel> inner, bool chooses)
      : inner_(std::move(inner)), chooses_(chooses) {}
  const WatchedRunner::Figures& figures() const { return figures_; }

  const ModelConfig& config() const override { return inner_->config(); }
  const ArtifactInfo& info() const override { return inner_->info(); }
  const Tokenizer& tokenizer() const override { return inner_->tokenizer(); }
  const ChatTemplate* chat_template() const override { return inner_->chat_template(); }
  int64_t memory_bytes() const override { return inner_->memory_bytes(); }
  int64_t packed_bytes_per_token() const override { return inner_->packed_bytes_per_token(); }
  absl::StatusOr<std::unique_ptr<ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const override {
    auto runner = inner_->MakeRunner(limits);
    if (!runner.ok()) return runner.status();
    return std::make_unique<WatchedRunner>(*std::move(runner), chooses_, &figures_);
  }
  int64_t kv_token_bytes() const override { return inner_->kv_token_bytes(); }
  int64_t step_bytes(const RunnerLimits& limits) const override {
    return inner_->step_bytes(limits);
  }

 private:
  const std::shared_ptr<ServedModel> inner_;
  const bool chooses_;
  mutable WatchedRunner::Figures figures_;
};

class CudaSamplingTest : public ::testing::Test {
 protected:
  // Null without a device: the test has been skipped then.
  std::shared_ptr<ServedModel> LoadModel(const TinyModelOptions& options) {
    const std::string name = absl::StrCat("model-", n_models_++);
    TinyModel(options).WriteHf(dir_ / (name + "-source"));
    const auto checkpoint = Checkpoint::Open(dir_ / (name + "-source"));
    EXPECT_OK(checkpoint);
    EXPECT_OK(testing::WriteTinyArtifact(**checkpoint, dir_ / name));
    auto model = LoadCudaModel(dir_ / name, {.batch_invariant = true, .use_graphs = !kIsHost});
    if (absl::IsFailedPrecondition(model.status())) {
      [&] { GTEST_SKIP() << "no GPU: " << model.status().message(); }();
      return nullptr;
    }
    EXPECT_OK(model);
    return model.ok() ? *std::move(model) : nullptr;
  }

  TempDir dir_;
  int n_models_ = 0;
};

// -- Through the engine -------------------------------------------------------------------------

Request RandomRequest(Random& random, int index, int vocab) {
  Request request{.id = std::to_string(index)};
  // Beginnings that several share, so that the prefix cache has them.
  request.prompt.assign(static_cast<size_t>(random.Int(0, 70)), random.Int('a', 'c'));
  for (int extra = random.Int(1, 20); extra > 0; --extra) {
    request.prompt.push_back(random.Int(0, vocab - 1));
  }
  request.sampling = RandomOptions(random, vocab);
  return request;
}

using Sinks = std::vector<std::shared_ptr<RecordingSink>>;

// As many at once as `n_at_once`.
Sinks RunAll(std::shared_ptr<ServedModel> model, const Options& options, size_t n_at_once,
             const std::vector<Request>& requests) {
  auto engine = Engine::Create(std::move(model), options, Clock::Real());
  EXPECT_OK(engine);
  Sinks sinks;
  for (const Request& request : requests) {
    if (sinks.size() >= n_at_once) sinks[sinks.size() - n_at_once]->WaitForEnd();
    sinks.push_back(std::make_shared<RecordingSink>());
    EXPECT_OK((*engine)->Submit(request, sinks.back()));
  }
  for (const auto& sink : sinks) {
    sink->WaitForEnd();
    EXPECT_OK(sink->status());
  }
  return sinks;
}

// Log-probabilities of the tokens that two have in common.
void ExpectLogprobs(const std::vector<TokenLogprob>& actual,
                    const std::vector<TokenLogprob>& expected, size_t n, double error) {
  if (expected.empty()) {
    EXPECT_TRUE(actual.empty());
    return;
  }
  for (size_t t = 0; t < n; ++t) {
    EXPECT_EQ(actual[t].token, expected[t].token);
    EXPECT_NEAR(actual[t].logprob, expected[t].logprob, error);
    ASSERT_EQ(actual[t].top.size(), expected[t].top.size());
    for (size_t i = 0; i < expected[t].top.size(); ++i) {
      EXPECT_NEAR(actual[t].top[i].second, expected[t].top[i].second, error);
      if (kIsHost) {
        EXPECT_EQ(actual[t].top[i].first, expected[t].top[i].first);
      }
    }
  }
}

TEST_F(CudaSamplingTest, AnyMixOfRequestsGetsTheTokensOfTheCpusSampler) {
  struct Case {
    int vocab;
    int max_sequences;
    size_t n_at_once;
    int64_t kv_cache_tokens;
    bool prefix_cache;
  };
  // Few blocks lead to preemptions, as many sequences as there are requests to steps ahead.
  for (const Case& c : {Case{320, 8, 8, 4096, true}, Case{320, 12, 100, 256, true},
                        Case{259, 12, 14, 256, false}, Case{261, 1, 1, 2048, true}}) {
    const std::string name = absl::StrCat("sampling-", c.vocab, "-", c.max_sequences, "-",
                                          c.kv_cache_tokens, c.prefix_cache ? "" : "-uncached");
    SCOPED_TRACE(name);
    const std::shared_ptr<ServedModel> model = LoadModel({.vocab = c.vocab});
    if (model == nullptr) return;
    Random random(static_cast<uint64_t>(c.vocab * c.max_sequences));
    std::vector<Request> requests;
    for (int i = 0; i < 100; ++i) requests.push_back(RandomRequest(random, i, c.vocab));
    const Options options{.model_name = name,
                          .max_sequences = c.max_sequences,
                          .max_waiting = static_cast<int>(requests.size()),
                          .max_batch_tokens = 64,
                          .kv_cache_tokens = c.kv_cache_tokens,
                          .prefix_cache = c.prefix_cache,
                          .n_threads = 2};
    const auto on_host = std::make_shared<WatchedModel>(model, /*chooses=*/false);
    const auto on_device = std::make_shared<WatchedModel>(model, /*chooses=*/true);
    const Sinks expected = RunAll(on_host, options, c.n_at_once, requests);
    EXPECT_GT(on_host->figures().n_logits, 0);
    const Sinks actual = RunAll(on_device, options, c.n_at_once, requests);
    EXPECT_EQ(on_device->figures().n_logits, 0);
    EXPECT_GT(on_device->figures().n_ahead, 0);
    EXPECT_GT(on_device->figures().n_penalized_ahead, 0);
    const auto counted = [&](const char* metric) {
      return MetricValue(metric, {"model_name=\"" + name + "\""});
    };
    // How many requests meet depends on how fast steps are.
    const bool has_few_blocks = c.kv_cache_tokens == 256;
    if (kIsHost || !has_few_blocks) {
      EXPECT_EQ(counted("walsh_num_preemptions_total") > 0, has_few_blocks);
    }
    EXPECT_EQ(counted("walsh_prefix_cache_hit_tokens_total") > 0, c.prefix_cache);

    int n_apart = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(absl::StrCat("request ", i));
      const std::vector<int32_t>& got = actual[i]->tokens();
      const std::vector<int32_t>& wanted = expected[i]->tokens();
      const auto end = std::mismatch(got.begin(), got.end(), wanted.begin(), wanted.end());
      n_apart += got == wanted ? 0 : 1;
      ExpectLogprobs(actual[i]->logprobs(), expected[i]->logprobs(),
                     static_cast<size_t>(end.first - got.begin()), kIsHost ? kLogprobError : 0.1);
      if (got == wanted) {
        EXPECT_EQ(actual[i]->text(), expected[i]->text());
        EXPECT_EQ(actual[i]->outcome().reason, expected[i]->outcome().reason);
      }
    }
    EXPECT_LE(n_apart, static_cast<int>(kRequestsApart * static_cast<double>(requests.size())));
  }
}

// Makes a tensor's values the largest that there are, of floats with 8 bits of exponent: what is
// computed with them is infinite. (A load refuses weights that are.)
void SpoilTensor(const std::string& directory, const std::string& name) {
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".safetensors") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    uint64_t n_header = 0;
    file.read(reinterpret_cast<char*>(&n_header), sizeof(n_header));
    std::string header(n_header, ' ');
    file.read(header.data(), static_cast<std::streamsize>(n_header));
    const auto tensors = nlohmann::json::parse(header, nullptr, /*allow_exceptions=*/false);
    if (!tensors.contains(name)) continue;
    const auto& tensor = tensors.at(name);
    ASSERT_NE(tensor.at("dtype"), "F16");
    const auto first = tensor.at("data_offsets").at(0).get<uint64_t>();
    const auto end = tensor.at("data_offsets").at(1).get<uint64_t>();
    file.seekp(static_cast<std::streamoff>(sizeof(n_header) + n_header + first));
    for (uint64_t i = first; i < end; ++i) file.put('\x7f');
    return;
  }
  FAIL() << "no tensor '" << name << "' in " << directory;
}

TEST_F(CudaSamplingTest, LogitsThatAreNotFiniteAreTheSameErrorHoweverATokenIsChosen) {
  if (LoadModel({}) == nullptr) return;
  ASSERT_NO_FATAL_FAILURE(SpoilTensor(dir_ / "model-0", "model.norm.weight"));
  auto loaded = LoadCudaModel(dir_ / "model-0", {.verify = false, .use_graphs = !kIsHost});
  ASSERT_OK(loaded);
  const std::shared_ptr<ServedModel> model = *std::move(loaded);
  auto engine = Engine::Create(model, {.model_name = "nan", .n_threads = 2}, Clock::Real());
  ASSERT_OK(engine);
  const std::vector<SamplingOptions> kinds = {
      {.temperature = 0},
      {.temperature = 1},
      {.temperature = 0, .logprobs = true, .top_logprobs = 3},
      {.min_tokens = 4, .temperature = 0},
      {.temperature = 1, .repetition_penalty = 1.2, .logprobs = true},
  };
  for (size_t i = 0; i < kinds.size(); ++i) {
    SCOPED_TRACE(i);
    const auto sink = std::make_shared<RecordingSink>();
    ASSERT_OK((*engine)->Submit({.id = "a", .prompt = {1, 2, 3}, .sampling = kinds[i]}, sink));
    sink->WaitForEnd();
    EXPECT_THAT(sink->status(),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("new token 0 are not finite")));
    EXPECT_TRUE(sink->tokens().empty());
  }
}

// -- Through the runner -------------------------------------------------------------------------

constexpr int64_t kContext = 256;

// One sequence that the runner has, by its own steps.
struct Course {
  uint64_t id = 0;
  SamplingOptions options;
  std::vector<int32_t> prompt;
  std::vector<BlockId> blocks;
  std::unique_ptr<Sampler> sampler;
  std::vector<TokenLogprob> made;
  int n_ahead = 0;  // of the tokens, those whose step was started before the one before was over

  int32_t TokenAt(size_t position) const {
    return position < prompt.size() ? prompt[position] : made[position - prompt.size()].token;
  }
  size_t n_tokens() const { return prompt.size() + made.size(); }
};

const std::vector<int32_t> kEnds = {2, 9};

Course MakeCourse(Random& random, uint64_t id, int64_t place) {
  Course run{.id = id, .options = RandomOptions(random, 320)};
  for (int n = random.Int(1, 30); n > 0; --n) run.prompt.push_back(random.Int(0, 40));
  for (int64_t i = 0; i < KvBlocks(kContext); ++i) {
    run.blocks.push_back(static_cast<BlockId>(place * KvBlocks(kContext) + i));
  }
  run.sampler = std::make_unique<Sampler>(run.options, run.prompt, kEnds);
  return run;
}

// Steps of whatever is there, in any order: some sequences stand still for a while, some steps are
// started before the one before is over.
class RandomSteps {
 public:
  RandomSteps(ModelRunner& runner, Random& random) : runner_(runner), random_(random) {}

  // The prompt's rows, or the next token's, of some of `runs`.
  void Step(std::vector<Course*> runs) {
    random_.Shuffle(runs);
    StepBatch batch;
    for (Course* run : runs) {
      const size_t first = run->made.empty() ? 0 : run->n_tokens() - 1;
      Add(*run, first, 0, batch);
      for (size_t i = first; i < run->n_tokens(); ++i) batch.tokens.push_back(run->TokenAt(i));
    }
    ASSERT_OK(runner_.Start(batch));
    while (!runs.empty() && random_.Is(0.6)) {
      std::vector<Course*> next;
      for (Course* run : runs) {
        if (random_.Is(0.9)) next.push_back(run);
      }
      random_.Shuffle(next);
      StepBatch ahead;
      for (Course* run : next) {
        Add(*run, run->n_tokens(), 1, ahead);
        ahead.tokens.push_back(StepBatch::FromStepBefore(
            static_cast<size_t>(std::find(runs.begin(), runs.end(), run) - runs.begin())));
      }
      if (!next.empty()) {
        ASSERT_OK(runner_.Start(ahead));
      }
      ASSERT_NO_FATAL_FAILURE(Take(runs));
      for (Course* run : next) ++run->n_ahead;
      runs = next;
    }
    if (!runs.empty()) Take(runs);
  }

 private:
  void Add(const Course& run, size_t first, uint64_t n_ahead, StepBatch& batch) {
    batch.sequences.push_back(
        {.first_row = static_cast<int64_t>(batch.tokens.size()),
         .n_rows = n_ahead > 0 ? 1 : static_cast<int64_t>(run.n_tokens() - first),
         .n_past = static_cast<int64_t>(first),
         .blocks = run.blocks,
         .wanted = Wanted::kChosen,
         .choice = run.sampler->ChoiceOf(n_ahead),
         .id = run.id});
  }
  void Take(const std::vector<Course*>& runs) {
    ASSERT_OK(runner_.Wait());
    for (size_t i = 0; i < runs.size(); ++i) {
      const auto token = runs[i]->sampler->Take(runner_.chosen(i));
      ASSERT_OK(token);
      runs[i]->made.push_back(*token);
    }
  }

  ModelRunner& runner_;
  Random& random_;
};

// The same steps alone, for their logits: how many tokens of the run another sampler would not have
// chosen by these.
int CountApart(ModelRunner& runner, const Course& run) {
  Sampler sampler(run.options, run.prompt, kEnds);
  int n_apart = 0;
  for (size_t t = 0; t < run.made.size(); ++t) {
    const size_t first = t == 0 ? 0 : run.prompt.size() + t - 1;
    StepBatch batch;
    for (size_t i = first; i < run.prompt.size() + t; ++i) batch.tokens.push_back(run.TokenAt(i));
    batch.sequences.push_back({.n_rows = static_cast<int64_t>(batch.tokens.size()),
                               .n_past = static_cast<int64_t>(first),
                               .blocks = run.blocks,
                               .wanted = Wanted::kLogits});
    EXPECT_OK(runner.Run(batch));
    Sampler chooser = sampler;
    const auto expected = chooser.Sample(runner.logits(0));
    EXPECT_OK(expected);
    if (expected->token != run.made[t].token) {
      ++n_apart;
    } else if (run.options.logprobs) {
      EXPECT_NEAR(run.made[t].logprob, expected->logprob, kLogprobError);
    }
    EXPECT_EQ(run.made[t].top.size(), expected->top.size());
    for (size_t i = 0; i < std::min(run.made[t].top.size(), expected->top.size()); ++i) {
      EXPECT_EQ(run.made[t].top[i].first, expected->top[i].first);
      EXPECT_NEAR(run.made[t].top[i].second, expected->top[i].second, kLogprobError);
    }
    EXPECT_OK(sampler.Take({.token = run.made[t].token}));
  }
  return n_apart;
}

TEST_F(CudaSamplingTest, TokensAreThoseOfTheSamplerForTheSameLogits) {
  const std::shared_ptr<ServedModel> model = LoadModel({});
  if (model == nullptr) return;
  constexpr int kSequences = 6;
  ThreadPool pool{2};
  // Others have come meanwhile when a sequence goes on that stood still.
  auto runner = model->MakeRunner({.n_blocks = 2 * kSequences * KvBlocks(kContext),
                                   .n_rows = 2 * kSequences * 32,
                                   .n_sequences = kSequences,
                                   .n_context = kContext,
                                   .pool = &pool});
  ASSERT_OK(runner);
  Random random(3);
  RandomSteps steps(**runner, random);
  std::vector<Course> runs;
  uint64_t n_runs = 0;
  for (int64_t place = 0; place < 2 * kSequences; ++place) {
    runs.push_back(MakeCourse(random, ++n_runs, place));
  }
  int n_tokens = 0;
  int n_ahead = 0;
  int n_apart = 0;
  while (n_runs < 250) {
    std::vector<Course*> some;
    for (Course& run : runs) some.push_back(&run);
    random.Shuffle(some);
    some.resize(static_cast<size_t>(random.Int(1, kSequences)));
    ASSERT_NO_FATAL_FAILURE(steps.Step(some));
    for (size_t place = 0; place < runs.size(); ++place) {
      if (runs[place].made.size() < static_cast<size_t>(random.Int(1, 25))) continue;
      n_tokens += static_cast<int>(runs[place].made.size());
      n_ahead += runs[place].n_ahead;
      n_apart += CountApart(**runner, runs[place]);
      runs[place] = MakeCourse(random, ++n_runs, static_cast<int64_t>(place));
    }
  }
  EXPECT_GT(n_tokens, 1000);
  EXPECT_GT(n_ahead, n_tokens / 5);
  EXPECT_LE(n_apart, static_cast<int>(kDrawsApart * n_tokens));
}

TEST_F(CudaSamplingTest, ChoicesThatDoNotFitAreRefused) {
  const std::shared_ptr<ServedModel> model = LoadModel({});
  if (model == nullptr) return;
  ThreadPool pool{1};
  auto runner = model->MakeRunner(
      {.n_blocks = KvBlocks(64), .n_rows = 8, .n_sequences = 1, .n_context = 64, .pool = &pool});
  ASSERT_OK(runner);
  const std::vector<BlockId> blocks = {0, 1, 2, 3};
  const auto run = [&](const Choice& choice) {
    StepBatch batch{.tokens = {5}};
    batch.sequences = {
        {.n_rows = 1, .blocks = blocks, .wanted = Wanted::kChosen, .choice = choice}};
    return (*runner)->Run(batch);
  };
  const std::vector<int32_t> many(257, 1);
  EXPECT_FALSE((*runner)->can_choose({.excluded = many}));
  EXPECT_THAT(run({.excluded = many}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("257 excluded")));
  EXPECT_FALSE((*runner)->can_choose({.n_top_logprobs = 21}));
  EXPECT_THAT(run({.n_top_logprobs = 21}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("21 log-probabilities")));
  const std::vector<SeenToken> seen(65);
  EXPECT_THAT(run({.presence_penalty = 1, .seen = seen}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("65 seen")));
  // A token that nobody makes.
  EXPECT_THAT(run({.presence_penalty = 1, .position = 2, .seen = {seen.data(), 1}, .n_counted = 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("none on its way")));
  EXPECT_OK(run({.presence_penalty = 1,
                 .position = 2,
                 .n_top_logprobs = 20,
                 .excluded = {many.data(), 256},
                 .seen = {seen.data(), 1},
                 .n_counted = 2}));
}

}  // namespace
}  // namespace walsh::engine
