#include "worker/engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <future>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "tests/testing/fake_model.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/recording_sink.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "worker/kernels/device_failure.h"

namespace walsh::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::Not;
using walsh::testing::ByteTokens;
using walsh::testing::FakeModel;
using walsh::testing::kFakeEos;
using walsh::testing::MetricValue;
using walsh::testing::RecordingSink;
using walsh::testing::StatusIs;

Options SmallOptions() {
  return {.model_name = "fake",
          .max_sequences = 4,
          .max_waiting = 8,
          .max_batch_tokens = 16,
          .n_threads = 2};
}

// The engines of these tests start steps ahead, or not.
class EngineStepTest : public ::testing::TestWithParam<bool> {
 protected:
  static std::unique_ptr<Engine> MakeEngine(FakeModel::Behaviour behaviour = {},
                                            const Options& options = SmallOptions(),
                                            Clock* clock = Clock::Real());
};
INSTANTIATE_TEST_SUITE_P(, EngineStepTest, ::testing::Bool(),
                         [](const auto& test) { return test.param ? "Ahead" : "OneByOne"; });

std::unique_ptr<Engine> MakeEngine(FakeModel::Behaviour behaviour = {},
                                   const Options& options = SmallOptions(),
                                   Clock* clock = Clock::Real()) {
  auto engine = Engine::Create(FakeModel::Create(std::move(behaviour)), options, clock);
  EXPECT_OK(engine);
  return *std::move(engine);
}

std::unique_ptr<Engine> EngineStepTest::MakeEngine(FakeModel::Behaviour behaviour,
                                                   const Options& options, Clock* clock) {
  behaviour.runs_ahead = GetParam();
  return engine::MakeEngine(std::move(behaviour), options, clock);
}

std::shared_ptr<RecordingSink> Submit(Engine& engine, Request request) {
  auto sink = std::make_shared<RecordingSink>();
  EXPECT_OK(engine.Submit(std::move(request), sink));
  return sink;
}

std::shared_ptr<RecordingSink> Generate(Engine& engine, Request request) {
  auto sink = Submit(engine, std::move(request));
  sink->WaitForEnd();
  return sink;
}

// A gate that holds the model's steps until opened.
class Gate {
 public:
  std::function<absl::Status(const LoadedModel::Batch&)> Hook() {
    return [this](const LoadedModel::Batch&) {
      std::unique_lock lock(mu_);
      ++n_waiting_;
      changed_.notify_all();
      changed_.wait(lock, [this] { return n_permits_ > 0; });
      --n_permits_;
      return absl::OkStatus();
    };
  }
  // Waits until the model stands at the gate for the n-th time.
  void AwaitArrival(int n) {
    std::unique_lock lock(mu_);
    ASSERT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return n_waiting_ >= n; }));
  }
  void Permit(int n_steps) {
    const std::lock_guard lock(mu_);
    n_permits_ += n_steps;
    changed_.notify_all();
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  int n_waiting_ = 0;
  int n_permits_ = 0;
};

TEST(EngineTest, GreedyOutputIsTheModels) {
  const auto engine = MakeEngine();
  const auto& model = static_cast<const FakeModel&>(engine->model());
  const auto sink = Generate(*engine, {.id = "a",
                                       .prompt = ByteTokens("a prompt longer than one chunk of it"),
                                       .sampling = {.max_tokens = 20, .temperature = 0}});
  EXPECT_OK(sink->status());
  EXPECT_EQ(sink->tokens(), model.Greedy(ByteTokens("a prompt longer than one chunk of it"), 20));
  EXPECT_EQ(sink->outcome().reason, FinishReason::kLength);
  EXPECT_EQ(sink->outcome().prompt_tokens, 36);
  EXPECT_EQ(sink->outcome().completion_tokens, 20);
  EXPECT_EQ(sink->text().size(), 20u);
}

// Those that run and those that wait, in all engines that share the count, until each has ended.
TEST(EngineTest, RequestsAreCounted) {
  const auto requests = std::make_shared<RequestCount>();
  Gate gate;
  Options options = SmallOptions();
  options.max_sequences = 2;
  options.requests = requests;
  const auto engine = MakeEngine({.before_forward = gate.Hook()}, options);
  auto other = MakeEngine({.before_forward = gate.Hook()}, options);
  EXPECT_EQ(requests->count(), 0);
  requests->WaitUntilNone(absl::Hours(1));
  const SamplingOptions sampling = {.max_tokens = 2, .temperature = 0};
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (const char* id : {"a", "b", "waits"}) {
    sinks.push_back(Submit(*engine, {.id = id, .prompt = ByteTokens("x"), .sampling = sampling}));
  }
  EXPECT_EQ(requests->count(), 3);
  EXPECT_THAT(engine->Submit({.id = "a", .prompt = ByteTokens("x")}, sinks[0]),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("in use")));
  EXPECT_EQ(requests->count(), 3);
  sinks.push_back(Submit(*other, {.id = "a", .prompt = ByteTokens("x"), .sampling = sampling}));
  EXPECT_EQ(requests->count(), 4);
  requests->WaitUntilNone(absl::Milliseconds(1));
  EXPECT_EQ(requests->count(), 4);
  engine->Cancel("waits");
  gate.Permit(100);
  for (const auto& sink : sinks) sink->WaitForEnd();
  requests->WaitUntilNone(absl::Hours(1));
  EXPECT_EQ(requests->count(), 0);
  gate.Permit(1000);
  ASSERT_OK(
      other->Submit({.id = "late", .prompt = ByteTokens("x"), .sampling = {.max_tokens = 200}},
                    std::make_shared<RecordingSink>()));
  other.reset();
  EXPECT_EQ(requests->count(), 0) << "also of an engine that goes";
}

TEST_P(EngineStepTest, OutputAloneEqualsOutputAmongOthers) {
  std::mt19937 rng(1);
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request request;
    request.id = std::to_string(i);
    for (int n = std::uniform_int_distribution<int>(1, 60)(rng); n > 0; --n) {
      request.prompt.push_back(std::uniform_int_distribution<int>(0, 255)(rng));
    }
    request.sampling.max_tokens = std::uniform_int_distribution<int>(1, 40)(rng);
    request.sampling.seed = static_cast<uint64_t>(i);
    if (i % 2 == 0) {
      request.sampling.temperature = 0;
    } else {
      request.sampling.temperature = 1.0;
      request.sampling.top_p = 0.95;
      request.sampling.repetition_penalty = 1.2;
    }
    requests.push_back(request);
  }
  Options options = SmallOptions();
  options.max_waiting = 12;
  const auto engine = MakeEngine({}, options);
  std::vector<std::shared_ptr<RecordingSink>> together;
  for (const Request& request : requests) together.push_back(Submit(*engine, request));
  for (const auto& sink : together) sink->WaitForEnd();
  const auto alone = MakeEngine({}, options);
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto sink = Generate(*alone, requests[i]);
    EXPECT_EQ(sink->tokens(), together[i]->tokens()) << "request " << i;
    EXPECT_EQ(sink->text(), together[i]->text());
  }
}

// Prompts of a few beginnings, some greedy, some sampled.
std::vector<Request> MixedRequests(int n, uint64_t seed) {
  std::mt19937_64 rng(seed);
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(rng);
  };
  std::vector<Request> requests;
  for (int i = 0; i < n; ++i) {
    Request request;
    request.id = std::to_string(i);
    request.prompt.assign(static_cast<size_t>(uniform(0, 70)), uniform('a', 'c'));
    for (int extra = uniform(1, 20); extra > 0; --extra) {
      request.prompt.push_back(uniform('a', 'z'));
    }
    request.sampling.max_tokens = uniform(1, 60);
    request.sampling.seed = static_cast<uint64_t>(i);
    request.sampling.logprobs = true;
    request.sampling.temperature = i % 2 == 0 ? 0.0 : 1.0;
    request.sampling.top_p = 0.95;
    request.sampling.frequency_penalty = i % 3 == 0 ? 0.5 : 0.0;
    requests.push_back(std::move(request));
  }
  return requests;
}

// Tokens, text and log-probabilities are the same whatever was cached, preempted or batched.
TEST(EngineTest, OutputDoesNotDependOnCachePreemptionOrBatch) {
  const std::vector<Request> requests = MixedRequests(64, 5);
  const auto run = [&](const char* name, int max_sequences, int64_t kv_cache_tokens,
                       bool prefix_cache) {
    const auto engine = MakeEngine({}, {.model_name = name,
                                        .max_sequences = max_sequences,
                                        .max_waiting = 64,
                                        .max_batch_tokens = 48,
                                        .kv_cache_tokens = kv_cache_tokens,
                                        .prefix_cache = prefix_cache,
                                        .n_threads = 2});
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (const Request& request : requests) sinks.push_back(Submit(*engine, request));
    for (const auto& sink : sinks) {
      sink->WaitForEnd();
      EXPECT_OK(sink->status());
    }
    EXPECT_EQ(engine->stats().kv_tokens_used, 0);
    return sinks;
  };
  const auto counted = [](const char* metric, const std::string& name) {
    return MetricValue(metric, {"model_name=\"" + name + "\""});
  };
  const auto expected = run("alone", 1, 4096, false);
  EXPECT_EQ(counted("walsh_num_preemptions_total", "alone"), 0);
  EXPECT_EQ(counted("walsh_prefix_cache_hit_tokens_total", "alone"), 0);
  struct Case {
    const char* name;
    int max_sequences;
    int64_t kv_cache_tokens;
    bool prefix_cache;
  };
  for (const Case& c : {Case{"alone-cached", 1, 4096, true}, Case{"batch", 32, 8192, false},
                        Case{"batch-cached", 32, 8192, true}, Case{"short", 32, 320, false},
                        Case{"short-cached", 32, 320, true}}) {
    SCOPED_TRACE(c.name);
    const auto sinks = run(c.name, c.max_sequences, c.kv_cache_tokens, c.prefix_cache);
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_EQ(sinks[i]->tokens(), expected[i]->tokens()) << "request " << i;
      ASSERT_EQ(sinks[i]->text(), expected[i]->text());
      for (size_t t = 0; t < sinks[i]->logprobs().size(); ++t) {
        ASSERT_EQ(sinks[i]->logprobs()[t].logprob, expected[i]->logprobs()[t].logprob);
      }
    }
    EXPECT_EQ(counted("walsh_num_preemptions_total", c.name) > 0, c.kv_cache_tokens == 320);
    EXPECT_EQ(counted("walsh_prefix_cache_hit_tokens_total", c.name) > 0, c.prefix_cache);
  }
}

TEST(EngineTest, ASharedBeginningIsComputedOnceAndNamedInTheOutcome) {
  for (const bool prefix_cache : {true, false}) {
    Options options = SmallOptions();
    options.prefix_cache = prefix_cache;
    const auto engine = MakeEngine({}, options);
    const auto& model = static_cast<const FakeModel&>(engine->model());
    Request request{.id = "a",
                    .prompt = std::vector<int32_t>(100, 'p'),
                    .sampling = {.max_tokens = 1, .temperature = 0}};
    auto sink = Generate(*engine, request);
    EXPECT_EQ(sink->outcome().cached_tokens, 0);
    EXPECT_EQ(model.n_rows(), 100);
    // It stays while nobody uses it, and only then.
    EXPECT_EQ(engine->stats().kv_tokens_used, 0);
    EXPECT_EQ(engine->stats().kv_tokens_cached, prefix_cache ? 96 : 0);
    request.prompt.push_back('q');
    sink = Generate(*engine, request);
    EXPECT_EQ(sink->tokens(), model.Greedy(request.prompt, 1));
    EXPECT_EQ(sink->outcome().cached_tokens, prefix_cache ? 96 : 0);
    EXPECT_EQ(model.n_rows(), prefix_cache ? 105 : 201);
  }
}

// Neither what it is told nor what is computed tells a request of what another salt's prompts were.
TEST(EngineTest, ABeginningIsNotSharedBetweenSalts) {
  const auto engine = MakeEngine();
  const auto& model = static_cast<const FakeModel&>(engine->model());
  int64_t n_rows = 0;
  const auto expect_cached = [&](const std::string& salt, int n_cached) {
    const Request request{.id = "a",
                          .prompt = std::vector<int32_t>(100, 'p'),
                          .sampling = {.max_tokens = 1, .temperature = 0},
                          .cache_salt = salt};
    const auto sink = Generate(*engine, request);
    EXPECT_EQ(sink->tokens(), model.Greedy(request.prompt, 1));
    EXPECT_EQ(sink->outcome().cached_tokens, n_cached) << salt;
    n_rows += 100 - n_cached;
    EXPECT_EQ(model.n_rows(), n_rows) << salt;
  };
  expect_cached("a", 0);
  expect_cached("b", 0);
  expect_cached("", 0);
  for (const char* salt : {"a", "b", ""}) expect_cached(salt, 96);
}

// A conversation's next turn begins with the answer, too.
TEST(EngineTest, AnAnswerIsPartOfWhatTheNextPromptFinds) {
  const auto engine = MakeEngine();
  const auto& model = static_cast<const FakeModel&>(engine->model());
  Request request{.id = "a",
                  .prompt = std::vector<int32_t>(20, 'p'),
                  .sampling = {.max_tokens = 50, .temperature = 0, .ignore_eos = true}};
  auto sink = Generate(*engine, request);
  request.prompt.insert(request.prompt.end(), sink->tokens().begin(), sink->tokens().end());
  request.prompt.push_back('?');
  sink = Generate(*engine, request);
  EXPECT_EQ(sink->outcome().cached_tokens, 64) << "of the 69 that were computed";
  EXPECT_EQ(sink->tokens(), model.Greedy(request.prompt, 50));
}

// What a step wrote that failed is not found by anyone.
TEST(EngineTest, AFailedStepLeavesNothingInThePrefixCache) {
  std::atomic<bool> is_broken = true;
  const auto engine = MakeEngine({.before_forward = [&](const LoadedModel::Batch&) {
    return is_broken ? absl::DataLossError("bad weights") : absl::OkStatus();
  }});
  const auto& model = static_cast<const FakeModel&>(engine->model());
  const Request request{.id = "a",
                        .prompt = std::vector<int32_t>(40, 'p'),
                        .sampling = {.max_tokens = 3, .temperature = 0}};
  EXPECT_FALSE(Generate(*engine, request)->status().ok());
  is_broken = false;
  const auto sink = Generate(*engine, request);
  EXPECT_EQ(sink->outcome().cached_tokens, 0);
  EXPECT_EQ(sink->tokens(), model.Greedy(request.prompt, 3));
}

TEST_P(EngineStepTest, EndOfSequenceStopsAndIsNotShown) {
  const auto script = [](std::span<const int32_t> history) {
    return history.size() < 6 ? 'x' : kFakeEos;
  };
  const auto engine = MakeEngine({.next = script});
  const SamplingOptions greedy{.max_tokens = 9, .temperature = 0};
  auto sink = Generate(*engine, {.id = "a", .prompt = ByteTokens("abcd"), .sampling = greedy});
  EXPECT_EQ(sink->text(), "xx");
  EXPECT_EQ(sink->outcome().reason, FinishReason::kEos);
  EXPECT_EQ(sink->outcome().completion_tokens, 3);

  SamplingOptions ignoring = greedy;
  ignoring.ignore_eos = true;
  sink = Generate(*engine, {.id = "b", .prompt = ByteTokens("abcd"), .sampling = ignoring});
  EXPECT_EQ(sink->outcome().reason, FinishReason::kLength);
  EXPECT_EQ(sink->outcome().completion_tokens, 9);

  SamplingOptions at_least = greedy;
  at_least.min_tokens = 5;
  sink = Generate(*engine, {.id = "c", .prompt = ByteTokens("abcd"), .sampling = at_least});
  EXPECT_EQ(sink->outcome().reason, FinishReason::kEos);
  EXPECT_EQ(sink->outcome().completion_tokens, 6);
}

TEST(EngineTest, StopTokenAndStopString) {
  const auto alphabet = [](std::span<const int32_t> history) { return history.back() + 1; };
  const auto engine = MakeEngine({.next = alphabet});
  SamplingOptions sampling{.max_tokens = 20, .temperature = 0, .stop_tokens = {'f'}};
  auto sink = Generate(*engine, {.id = "a", .prompt = ByteTokens("a"), .sampling = sampling});
  EXPECT_EQ(sink->text(), "bcde");
  EXPECT_EQ(sink->outcome().reason, FinishReason::kStopToken);

  sampling.stop_tokens.clear();
  sampling.stop = {"zz", "fgh"};
  sink = Generate(*engine, {.id = "b", .prompt = ByteTokens("a"), .sampling = sampling});
  EXPECT_EQ(sink->text(), "bcde");
  EXPECT_EQ(sink->outcome().reason, FinishReason::kStopString);
  EXPECT_EQ(sink->outcome().matched_stop, "fgh");

  sampling.include_stop = true;
  sink = Generate(*engine, {.id = "c", .prompt = ByteTokens("a"), .sampling = sampling});
  EXPECT_EQ(sink->text(), "bcdefgh");
}

TEST(EngineTest, HeldBackTextIsReleasedAtTheEnd) {
  const auto alphabet = [](std::span<const int32_t> history) { return history.back() + 1; };
  const auto engine = MakeEngine({.next = alphabet});
  const auto sink =
      Generate(*engine, {.id = "a",
                         .prompt = ByteTokens("a"),
                         .sampling = {.max_tokens = 4, .temperature = 0, .stop = {"defgh"}}});
  EXPECT_EQ(sink->text(), "bcde");  // "de" could have become the stop string
  EXPECT_EQ(sink->outcome().reason, FinishReason::kLength);
}

TEST(EngineTest, LogprobsComeWithEveryToken) {
  const auto engine = MakeEngine();
  const auto sink = Generate(
      *engine,
      {.id = "a",
       .prompt = ByteTokens("a"),
       .sampling = {.max_tokens = 5, .temperature = 0, .logprobs = true, .top_logprobs = 3}});
  ASSERT_EQ(sink->logprobs().size(), 5u);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(sink->logprobs()[i].token, sink->tokens()[i]);
    ASSERT_EQ(sink->logprobs()[i].top.size(), 3u);
    EXPECT_EQ(sink->logprobs()[i].top[0].first, sink->tokens()[i]);
    EXPECT_EQ(sink->logprobs()[i].top[0].second, sink->logprobs()[i].logprob);
  }
}

TEST(EngineTest, ABrokenDeviceIsToldAndEndsItsRequestsAsTheServiceWants) {
  Options options = SmallOptions();
  absl::Status told;
  options.on_device_broken = [&](const absl::Status& cause) {
    told = cause;
    return absl::UnavailableError("come again elsewhere");
  };
  const auto engine = MakeEngine({.before_forward =
                                      [](const LoadedModel::Batch&) {
                                        return MarkDeviceBroken(absl::InternalError("a fault"));
                                      }},
                                 options);
  const auto sink = Generate(*engine, {.id = "a", .prompt = ByteTokens("a")});
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("elsewhere")));
  EXPECT_TRUE(IsDeviceBroken(told));
}

TEST(EngineTest, ContextEndsTheOutput) {
  const auto engine = MakeEngine({.max_position = 32});
  EXPECT_EQ(engine->context_tokens(), 32);
  const auto sink = Generate(*engine, {.id = "a",
                                       .prompt = ByteTokens(std::string(30, 'p')),
                                       .sampling = {.max_tokens = 100, .temperature = 0}});
  EXPECT_EQ(sink->outcome().reason, FinishReason::kLength);
  EXPECT_EQ(sink->outcome().completion_tokens, 2);
}

TEST(EngineTest, BadRequestsAreRefused) {
  const auto engine = MakeEngine({.max_position = 32});
  const auto refused = [&](std::vector<int32_t> prompt, int max_tokens = 1) {
    return engine->Submit(
        {.id = "r", .prompt = std::move(prompt), .sampling = {.max_tokens = max_tokens}},
        std::make_shared<RecordingSink>());
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(refused({}), StatusIs(invalid, HasSubstr("no tokens")));
  EXPECT_THAT(refused({1}, 0), StatusIs(invalid, HasSubstr("max_tokens is 0")));
  EXPECT_THAT(refused({1, -1}), StatusIs(invalid, HasSubstr("prompt token 1 is -1")));
  EXPECT_THAT(refused({258}), StatusIs(invalid, HasSubstr("ids 0 to 257")));
  EXPECT_THAT(refused(std::vector<int32_t>(32, 1)),
              StatusIs(invalid, HasSubstr("32 tokens, the model's context of 32")));
  EXPECT_EQ(engine->stats().running + engine->stats().waiting, 0);
}

TEST(EngineTest, AKvCacheSmallerThanTheContextIsNamedAsWhatBinds) {
  Options options = SmallOptions();
  options.kv_cache_tokens = 32;
  const auto engine = MakeEngine({.max_position = 256}, options);
  EXPECT_EQ(engine->context_tokens(), 32);
  EXPECT_THAT(engine->Submit({.id = "r", .prompt = std::vector<int32_t>(40, 1)},
                             std::make_shared<RecordingSink>()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("40 tokens, the KV cache of 32 leaves none")));
}

// 32 bytes for a token of the fake model.
TEST(EngineTest, KvCacheFitsTheFreeMemory) {
  const auto create = [](int64_t kv_cache_tokens, int64_t free_bytes) {
    Options options = SmallOptions();
    options.kv_cache_tokens = kv_cache_tokens;
    options.free_bytes = free_bytes;
    return Engine::Create(FakeModel::Create({.max_position = 4096}), options, Clock::Real());
  };
  // Four sequences of 2048 tokens are 256 KiB.
  auto engine = create(0, 1 << 20);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->stats().kv_tokens_total, 4 * 2048);
  EXPECT_EQ((*engine)->kv_cache_bytes(), 4 * 2048 * 32);
  engine = create(0, 100000);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->stats().kv_tokens_total, 90000 / 32 / 16 * 16);
  EXPECT_EQ((*engine)->context_tokens(), 90000 / 32 / 16 * 16);
  EXPECT_THAT(create(0, 60000).status(),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("65536 bytes"), HasSubstr("60000"))));
  // Who asks for less than a usual sequence gets that.
  EXPECT_OK(create(64, 3000));
  EXPECT_FALSE(create(64, 2000).ok());
}

// 32 bytes for a token of the fake model.
TEST(EngineTest, KvCacheKeepsToItsPartOfTheFreeMemoryAndItsLimit) {
  const auto tokens = [](double fraction, int64_t kv_cache_bytes, std::optional<int64_t> free) {
    Options options = SmallOptions();
    options.kv_cache_bytes = kv_cache_bytes;
    options.kv_memory_fraction = fraction;
    options.free_bytes = free;
    const auto engine =
        Engine::Create(FakeModel::Create({.max_position = 4096}), options, Clock::Real());
    EXPECT_OK(engine);
    return engine.ok() ? (*engine)->stats().kv_tokens_total : 0;
  };
  EXPECT_EQ(tokens(0.5, 0, 200000), 100000 / 32 / 16 * 16);
  EXPECT_EQ(tokens(1.0, 0, 200000), 200000 / 32 / 16 * 16);
  EXPECT_EQ(tokens(0.9, 10000, 200000), 10000 / 32 / 16 * 16);
  EXPECT_EQ(tokens(0.9, 10000, std::nullopt), 10000 / 32 / 16 * 16);
  EXPECT_EQ(tokens(0.9, 1 << 30, std::nullopt), 4 * 2048) << "a limit asks for nothing";
}

// However large its part: a step that finds no memory would fail in the midst of requests.
TEST(EngineTest, KvCacheLeavesTheMemoryThatStepsNeed) {
  const auto create = [](double fraction, int64_t free_bytes) {
    Options options = SmallOptions();
    options.kv_memory_fraction = fraction;
    options.free_bytes = free_bytes;
    return Engine::Create(FakeModel::Create({.max_position = 4096, .step_bytes = 50000}), options,
                          Clock::Real());
  };
  const auto tokens = [&](double fraction) {
    const auto engine = create(fraction, 200000);
    EXPECT_OK(engine);
    return engine.ok() ? (*engine)->stats().kv_tokens_total : 0;
  };
  EXPECT_EQ(tokens(1.0), 150000 / 32 / 16 * 16);
  EXPECT_EQ(tokens(0.5), 75000 / 32 / 16 * 16);
  EXPECT_THAT(create(1.0, 100000).status(),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("65536 bytes"), HasSubstr("may take 50000"),
                             HasSubstr("buffers need 50000"))));
  EXPECT_THAT(create(1.0, 40000).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("may take 0")));
}

TEST(EngineTest, BadOptionsAreRefused) {
  const auto create = [](Options options) {
    return Engine::Create(FakeModel::Create({}), options, Clock::Real()).status();
  };
  Options options = SmallOptions();
  options.max_sequences = 0;
  EXPECT_THAT(create(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at once")));
  options = SmallOptions();
  options.max_batch_tokens = 3;
  EXPECT_THAT(create(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("are 3")));
  options = SmallOptions();
  options.kv_cache_tokens = 8;
  EXPECT_THAT(create(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("8 tokens")));
  options = SmallOptions();
  options.kv_cache_bytes = 511;  // a block of the fake model has 512
  EXPECT_THAT(create(options), StatusIs(absl::StatusCode::kInvalidArgument,
                                        AllOf(HasSubstr("511 bytes"), HasSubstr("512"))));
  for (const double fraction : {0.0, 1.01, std::nan("")}) {
    options = SmallOptions();
    options.kv_memory_fraction = fraction;
    EXPECT_THAT(create(options),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("free memory")));
  }
}

TEST(EngineTest, FullQueueRefusesWhileOthersRun) {
  Gate gate;
  Options options = SmallOptions();
  options.max_sequences = 1;
  options.max_waiting = 2;
  const auto engine = MakeEngine({.before_forward = gate.Hook()}, options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 3; ++i) {
    sinks.push_back(Submit(
        *engine,
        {.id = std::to_string(i), .prompt = {1}, .sampling = {.max_tokens = 2, .temperature = 0}}));
  }
  gate.AwaitArrival(1);
  EXPECT_THAT(engine->Submit({.id = "x", .prompt = {1}}, std::make_shared<RecordingSink>()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("the queue is full")));
  EXPECT_THAT(engine->Submit({.id = "1", .prompt = {1}}, std::make_shared<RecordingSink>()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'1' is in use")));
  gate.Permit(100);
  for (const auto& sink : sinks) {
    sink->WaitForEnd();
    EXPECT_OK(sink->status());
  }
}

// Nobody waits for the step under way, however long it takes.
TEST(EngineTest, QueuedTokensBeyondTheLimitAreRefusedWithinMilliseconds) {
  Gate gate;
  Options options = SmallOptions();
  options.max_sequences = 1;
  options.max_waiting_tokens = 50;
  const auto engine = MakeEngine({.before_forward = gate.Hook()}, options);
  const auto running = Submit(*engine, {.id = "r", .prompt = {1}, .sampling = {.max_tokens = 1}});
  gate.AwaitArrival(1);
  const auto waiting = Submit(
      *engine, {.id = "w", .prompt = std::vector<int32_t>(40, 1), .sampling = {.max_tokens = 1}});
  absl::Duration fastest = absl::InfiniteDuration();
  for (int i = 0; i < 10; ++i) {
    const absl::Time start = absl::Now();
    EXPECT_THAT(
        engine->Submit({.id = "x", .prompt = std::vector<int32_t>(11, 1)},
                       std::make_shared<RecordingSink>()),
        StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("prompts of 40 tokens wait")));
    EXPECT_GT(engine->RetryDelay(), absl::ZeroDuration());
    fastest = std::min(fastest, absl::Now() - start);
  }
  EXPECT_LT(fastest, absl::Milliseconds(10));
  gate.Permit(100);
  running->WaitForEnd();
  waiting->WaitForEnd();
}

TEST_P(EngineStepTest, CancelFreesTheSequenceWithinOneStep) {
  for (int n_steps = 1; n_steps <= 20; ++n_steps) {
    Gate gate;
    const auto engine = MakeEngine({.before_forward = gate.Hook()});
    const SamplingOptions sampling{.max_tokens = 100, .temperature = 0};
    const auto sink = Submit(*engine, {.id = "a", .prompt = {1, 2, 3}, .sampling = sampling});
    for (int step = 1; step < n_steps; ++step) {
      gate.AwaitArrival(step);
      gate.Permit(1);
    }
    gate.AwaitArrival(n_steps);
    engine->Cancel("a");
    gate.Permit(1);  // the step under way; another would wait at the gate for ever
    sink->WaitForEnd();
    EXPECT_EQ(sink->outcome().reason, FinishReason::kCancelled);
    EXPECT_EQ(sink->tokens().size(), static_cast<size_t>(n_steps));
    EXPECT_EQ(engine->stats().running, 0);
    EXPECT_EQ(engine->stats().kv_tokens_used, 0);
    gate.Permit(1);  // a step that was started ahead
  }
}

TEST_P(EngineStepTest, StepErrorFailsItsRequestsAndNotTheEngine) {
  std::atomic<bool> is_broken = true;
  const auto engine = MakeEngine({.before_forward = [&](const LoadedModel::Batch&) {
    return is_broken ? absl::DataLossError("bad weights") : absl::OkStatus();
  }});
  auto sink = Generate(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 3}});
  EXPECT_THAT(sink->status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("bad weights")));
  is_broken = false;
  sink = Generate(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 3}});
  EXPECT_OK(sink->status());
  EXPECT_EQ(engine->stats().kv_tokens_used, 0);
}

TEST(EngineTest, NanConcernsItsSequenceAlone) {
  const auto engine =
      MakeEngine({.edit = [](std::span<const int32_t> history, std::span<float> logits) {
        if (history.front() == 'n' && history.size() == 5) {
          logits[7] = std::numeric_limits<float>::quiet_NaN();
        }
      }});
  const SamplingOptions sampling{.max_tokens = 10, .temperature = 0};
  const auto bad = Submit(*engine, {.id = "a", .prompt = ByteTokens("nan"), .sampling = sampling});
  const auto good = Submit(*engine, {.id = "b", .prompt = ByteTokens("abc"), .sampling = sampling});
  bad->WaitForEnd();
  good->WaitForEnd();
  EXPECT_THAT(bad->status(), StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
  EXPECT_EQ(bad->tokens().size(), 2u);
  EXPECT_OK(good->status());
}

// Beside a prompt that is computed in chunks, nobody knows when the next token comes.
TEST(EngineTest, DeltasTellWhenTheNextIsLikely) {
  constexpr absl::Duration kStep = absl::Milliseconds(5);
  constexpr absl::Duration kUnknown = absl::InfiniteDuration();
  Gate gate;
  ManualClock clock;
  const auto hook = gate.Hook();
  const auto engine = MakeEngine({.before_forward =
                                      [&](const LoadedModel::Batch& batch) {
                                        const absl::Status status = hook(batch);
                                        clock.Advance(kStep);
                                        return status;
                                      }},
                                 SmallOptions(), &clock);
  const SamplingOptions sampling{.max_tokens = 5, .ignore_eos = true};
  const auto first = Submit(*engine, {.id = "a", .prompt = {1}, .sampling = sampling});
  gate.AwaitArrival(1);
  // Takes three of the steps of 16 tokens that it shares with the first.
  const auto second = Submit(
      *engine, {.id = "b", .prompt = std::vector<int32_t>(40, 1), .sampling = {.max_tokens = 1}});
  gate.Permit(20);
  first->WaitForEnd();
  second->WaitForEnd();
  EXPECT_THAT(first->next_in(), ElementsAre(kStep, kUnknown, kUnknown, kStep, kUnknown));
  EXPECT_THAT(second->next_in(), ElementsAre(kUnknown));
}

TEST_P(EngineStepTest, DeadlineEndsWaitingAndRunning) {
  Gate gate;
  ManualClock clock;
  Options options = SmallOptions();
  options.max_sequences = 1;
  const auto engine = MakeEngine({.before_forward = gate.Hook()}, options, &clock);
  Request request{.id = "running", .prompt = {1}, .sampling = {.max_tokens = 100}};
  request.deadline = clock.Now() + absl::Seconds(5);
  const auto running = Submit(*engine, request);
  request.id = "waiting";
  const auto waiting = Submit(*engine, request);
  gate.AwaitArrival(1);
  clock.Advance(absl::Seconds(6));
  gate.Permit(1);  // one step that began before the deadline; none after
  running->WaitForEnd();
  waiting->WaitForEnd();
  EXPECT_EQ(running->outcome().reason, FinishReason::kDeadline);
  EXPECT_EQ(running->outcome().completion_tokens, 1);
  EXPECT_EQ(waiting->outcome().reason, FinishReason::kDeadline);
  EXPECT_EQ(waiting->outcome().completion_tokens, 0);
  EXPECT_EQ(static_cast<const FakeModel&>(engine->model()).n_forwards(), 1);
}

TEST_P(EngineStepTest, DrainFinishesWhatWasAccepted) {
  const auto engine = MakeEngine();
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 8; ++i) {
    sinks.push_back(Submit(
        *engine, {.id = std::to_string(i), .prompt = {1, 2}, .sampling = {.max_tokens = 30}}));
  }
  const absl::Status why = absl::UnavailableError("going away");
  engine->Drain(absl::Seconds(60), why);
  for (const auto& sink : sinks) {
    EXPECT_TRUE(sink->is_over());
    EXPECT_OK(sink->status());
  }
  EXPECT_EQ(engine->Submit({.id = "x", .prompt = {1}}, std::make_shared<RecordingSink>()), why);
}

TEST(EngineTest, DrainFailsWhatDoesNotFinishInTime) {
  Gate gate;
  const auto engine = MakeEngine({.before_forward = gate.Hook()});
  const auto sink = Submit(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 250}});
  gate.AwaitArrival(1);
  absl::Status why = absl::UnavailableError("going away");
  why.SetPayload("reason", absl::Cord("GOING"));
  std::thread drain([&] { engine->Drain(absl::Milliseconds(1), why); });
  const auto is_draining = [&] {
    return engine->Submit({.id = "late", .prompt = {1}}, std::make_shared<RecordingSink>()) == why;
  };
  EXPECT_TRUE(walsh::testing::WaitUntil(is_draining));
  // At least a millisecond for each step: the drain's time is over long before the request's end.
  while (!sink->is_over()) {
    walsh::testing::Pause(absl::Milliseconds(1));
    gate.Permit(1);
  }
  drain.join();
  EXPECT_EQ(sink->status(), why) << "with what tells a client why";
  EXPECT_EQ(engine->stats().running, 0);
}

TEST_P(EngineStepTest, DestructionAnswersEveryRequest) {
  Gate gate;
  auto engine = MakeEngine({.before_forward = gate.Hook()});
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 8; ++i) {
    sinks.push_back(Submit(
        *engine, {.id = std::to_string(i), .prompt = {1, 2}, .sampling = {.max_tokens = 30}}));
  }
  gate.AwaitArrival(1);
  gate.Permit(1);
  std::thread destroy([&] { engine.reset(); });
  gate.Permit(1000);
  destroy.join();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->is_over());
}

// Sequences that end by length, by their end token, and when they are cancelled, all while the
// step after has been started.
TEST(EngineTest, StepsThatAreStartedAheadBringTheSameTokens) {
  const auto next = [](std::span<const int32_t> history) {
    const auto n = static_cast<int32_t>(history.size());
    if (n == 40 + history[0] % 7) return kFakeEos;
    return 'a' + (history.back() * 31 + n) % 26;
  };
  Options options = SmallOptions();
  options.max_sequences = 8;
  options.kv_cache_tokens = 8 * 128;
  const auto engine = MakeEngine({.next = next, .runs_ahead = true}, options);
  const auto& model = static_cast<const FakeModel&>(engine->model());
  std::vector<std::vector<int32_t>> prompts;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 8; ++i) {
    prompts.push_back(std::vector<int32_t>(static_cast<size_t>(1 + 3 * i), 'p' + i));
    sinks.push_back(Submit(*engine, {.id = std::to_string(i),
                                     .prompt = prompts.back(),
                                     .sampling = {.max_tokens = 12 + 9 * i, .temperature = 0}}));
  }
  sinks[3]->WaitForTokens(5);
  engine->Cancel("3");
  for (size_t i = 0; i < sinks.size(); ++i) {
    sinks[i]->WaitForEnd();
    ASSERT_OK(sinks[i]->status());
    const auto expected = model.Greedy(prompts[i], 12 + 9 * static_cast<int>(i));
    const std::vector<int32_t>& tokens = sinks[i]->tokens();
    if (i == 3) {
      ASSERT_LE(tokens.size(), expected.size());
      EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), expected.begin()));
    } else {
      EXPECT_EQ(tokens, expected) << "request " << i;
    }
  }
  EXPECT_GT(model.n_ahead(), 20);
  const Stats stats = engine->stats();
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.kv_tokens_used, 0);
}

// What a sequence samples from its logits is chosen by the host: nothing can be started before.
TEST(EngineTest, SampledTokensAreNotRunAhead) {
  const auto engine = MakeEngine({.runs_ahead = true});
  Generate(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 20, .temperature = 1}});
  EXPECT_EQ(static_cast<const FakeModel&>(engine->model()).n_ahead(), 0);
}

// Several threads submit and cancel at random: every request is answered exactly once, with the
// output that it would have alone, and nothing stays behind. Meant for ThreadSanitizer.
TEST_P(EngineStepTest, ConcurrentSubmittersAndCancellers) {
  Options options = SmallOptions();
  options.max_waiting = 1000;
  const auto engine = MakeEngine({}, options);
  const auto& model = static_cast<const FakeModel&>(engine->model());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 rng(static_cast<unsigned>(t));
      for (int i = 0; i < 40; ++i) {
        const std::string id = std::to_string(t) + "/" + std::to_string(i);
        std::vector<int32_t> prompt;
        for (int n = std::uniform_int_distribution<int>(1, 40)(rng); n > 0; --n) {
          prompt.push_back(std::uniform_int_distribution<int>(0, 255)(rng));
        }
        const int n_tokens = std::uniform_int_distribution<int>(1, 30)(rng);
        Request request{
            .id = id, .prompt = prompt, .sampling = {.max_tokens = n_tokens, .temperature = 0}};
        if (i % 7 == 0) request.deadline = absl::Now() + absl::Microseconds(300);
        const auto sink = Submit(*engine, request);
        if (i % 3 == 0) {
          sink->WaitForTokens(static_cast<size_t>(n_tokens / 2));
          engine->Cancel(id);
          engine->Cancel("unknown");
        }
        engine->stats();
        sink->WaitForEnd();
        ASSERT_OK(sink->status());
        const std::vector<int32_t> expected = model.Greedy(prompt, n_tokens);
        const size_t n_seen = sink->tokens().size();
        ASSERT_LE(n_seen, expected.size());
        ASSERT_TRUE(std::equal(sink->tokens().begin(), sink->tokens().end(), expected.begin()));
        if (sink->outcome().reason == FinishReason::kLength) {
          ASSERT_EQ(n_seen, expected.size());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Stats stats = engine->stats();
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.kv_tokens_used, 0);
}

#ifdef __SANITIZE_THREAD__
constexpr int kManyRequests = 800;
#else
constexpr int kManyRequests = 10000;
#endif

// Random arrivals, cancellations, deadlines and refusals in a KV cache that is too short for what
// runs: each request is answered exactly once and with what it would have alone, and no block stays
// behind. There are always more at hand than are taken.
TEST_P(EngineStepTest, ManyRandomRequestsInAShortKvCache) {
  constexpr int kThreads = 4;
  constexpr size_t kInFlight = 40;
  const auto engine = MakeEngine({}, {.model_name = "many",
                                      .max_sequences = 8,
                                      .max_waiting = 32,
                                      .max_waiting_tokens = 1500,
                                      .max_batch_tokens = 64,
                                      .kv_cache_tokens = 16 * 16,
                                      .n_threads = 2});
  const auto& model = static_cast<const FakeModel&>(engine->model());
  std::atomic<int> n_refused = 0;
  std::atomic<int> n_ended = 0;
  const auto submitter = [&](int thread) {
    struct Accepted {
      Request request;
      std::shared_ptr<RecordingSink> sink;
    };
    std::vector<Accepted> accepted;
    size_t n_over = 0;  // the first of them
    std::mt19937_64 rng(static_cast<uint64_t>(thread));
    const auto uniform = [&](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(rng);
    };
    for (Request& request :
         MixedRequests(kManyRequests / kThreads, static_cast<uint64_t>(100 + thread))) {
      request.id = std::to_string(thread) + "/" + request.id;
      request.sampling = {.max_tokens = request.sampling.max_tokens, .temperature = 0};
      if (uniform(0, 15) == 0) {
        request.deadline = absl::Now() + absl::Microseconds(uniform(0, 3000));
      }
      Accepted next{.request = request, .sink = std::make_shared<RecordingSink>()};
      while (true) {
        const absl::Status status = engine->Submit(request, next.sink);
        if (status.ok()) break;
        ASSERT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("is full")));
        ++n_refused;
        if (n_over < accepted.size()) {
          accepted[n_over++].sink->WaitForEnd();
        } else {
          walsh::testing::Pause(absl::Microseconds(100));  // others have all places
        }
      }
      accepted.push_back(std::move(next));
      const size_t n_open = accepted.size() - n_over;
      if (uniform(0, 9) == 0) {
        const auto chosen = static_cast<size_t>(uniform(0, static_cast<int>(n_open) - 1));
        engine->Cancel(accepted[n_over + chosen].request.id);
      }
      if (n_open > kInFlight) accepted[n_over++].sink->WaitForEnd();
    }
    for (const Accepted& item : accepted) {
      item.sink->WaitForEnd();
      ASSERT_OK(item.sink->status());
      const std::vector<int32_t> expected =
          model.Greedy(item.request.prompt, item.request.sampling.max_tokens);
      const std::vector<int32_t>& tokens = item.sink->tokens();
      ASSERT_LE(tokens.size(), expected.size());
      ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), expected.begin()));
      if (item.sink->outcome().reason == FinishReason::kLength) {
        ASSERT_EQ(tokens.size(), expected.size());
      }
      ++n_ended;
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(submitter, t);
  for (std::thread& thread : threads) thread.join();

  EXPECT_EQ(n_ended, kManyRequests);
  const Stats stats = engine->stats();
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.kv_tokens_used, 0);
  const auto counted = [](const char* metric) {
    return static_cast<int>(MetricValue(metric, {"model_name=\"many\""}));
  };
  EXPECT_GT(counted("walsh_num_preemptions_total"), kManyRequests / 50);
  EXPECT_GT(counted("walsh_prefix_cache_hit_tokens_total"), kManyRequests / 10);
  EXPECT_GT(counted("walsh_request_cancelled_total"), 0);
  EXPECT_GT(n_refused, 0);
}

// -- What is counted

Options CountedAs(const std::string& model_name) {
  Options options = SmallOptions();
  options.model_name = model_name;
  return options;
}
double Rejections(const std::string& model, const std::string& reason) {
  return MetricValue("walsh_admission_rejections_total",
                     {"model_name=\"" + model + "\"", "reason=\"" + reason + "\""});
}
double Failures(const std::string& model, const std::string& code) {
  return MetricValue("walsh_request_failure_total",
                     {"model_name=\"" + model + "\"", "code=\"" + code + "\""});
}
double Cancellations(const std::string& model) {
  return MetricValue("walsh_request_cancelled_total", {"model_name=\"" + model + "\""});
}

TEST(EngineMetricsTest, EveryRefusalIsCountedByItsReason) {
  Gate gate;
  const auto engine =
      MakeEngine({.max_position = 32, .before_forward = gate.Hook()}, CountedAs("refusals"));
  const auto refused = [&](Request request) {
    EXPECT_FALSE(engine->Submit(std::move(request), std::make_shared<RecordingSink>()).ok());
  };
  refused({.id = "empty"});
  EXPECT_EQ(Rejections("refusals", "invalid"), 1);
  refused({.id = "long", .prompt = std::vector<int32_t>(32, 1)});
  EXPECT_EQ(Rejections("refusals", "context_length"), 1);
  const auto running = Submit(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 1}});
  refused({.id = "a", .prompt = {1}});
  EXPECT_EQ(Rejections("refusals", "invalid"), 2);
  gate.Permit(1);
  running->WaitForEnd();
  EXPECT_EQ(Rejections("refusals", "context_length"), 1);
}

// increase() of a counter that appears with its first event is 0.
TEST(EngineMetricsTest, SeriesAreThereBeforeTheirFirstEvent) {
  const auto engine = MakeEngine({}, CountedAs("quiet"));
  for (const char* series :
       {"walsh_admission_rejections_total{model_name=\"quiet\",reason=\"queue_full\"} 0",
        "walsh_admission_rejections_total{model_name=\"quiet\",reason=\"draining\"} 0",
        "walsh_request_success_total{finished_reason=\"stop_sequence\",model_name=\"quiet\"} 0",
        "walsh_request_cancelled_total{model_name=\"quiet\"} 0"}) {
    EXPECT_THAT(metrics::Render(), HasSubstr(series));
  }
}

TEST(EngineMetricsTest, TheKvCacheIsDescribedWhileItIsThere) {
  Options options = CountedAs("cached");
  options.kv_cache_tokens = 160;
  auto engine = MakeEngine({}, options);
  EXPECT_THAT(metrics::Render(),
              HasSubstr("walsh_kv_cache_config_info{block_size=\"16\",model_name=\"cached\","
                        "num_blocks=\"10\",prefix_cache=\"true\"} 1"));
  engine.reset();
  EXPECT_THAT(metrics::Render(), Not(HasSubstr("num_blocks=\"10\"")));
}

// As where a call still holds the engine of a model that is loaded again.
TEST(EngineMetricsTest, GaugesGoWithTheLastEngineOfTheirModel) {
  const auto has_gauges = [] {
    return metrics::Render().find("walsh_num_requests_running{model_name=\"twice\"}") !=
           std::string::npos;
  };
  EXPECT_FALSE(has_gauges());
  auto first = MakeEngine({}, CountedAs("twice"));
  auto second = MakeEngine({}, CountedAs("twice"));
  first.reset();
  EXPECT_TRUE(has_gauges());
  EXPECT_OK(Generate(*second, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 2}})->status());
  second->stats();
  second.reset();
  EXPECT_FALSE(has_gauges());
}

TEST(EngineMetricsTest, ADeadlineBeforeTheFirstTokenIsAFailure) {
  const auto engine = MakeEngine({}, CountedAs("late"));
  const auto sink =
      Generate(*engine, {.id = "a", .prompt = {1}, .deadline = absl::Now() - absl::Seconds(1)});
  EXPECT_EQ(sink->outcome().reason, FinishReason::kDeadline);
  EXPECT_EQ(Failures("late", "DEADLINE_EXCEEDED"), 1);
  EXPECT_EQ(MetricValue("walsh_request_success_total", {"model_name=\"late\""}), 0);
}

TEST(EngineMetricsTest, WhatFailsIsNotCancelled) {
  Gate gate;
  const auto engine = MakeEngine({.before_forward = gate.Hook()}, CountedAs("unread"));
  const auto unread = Submit(*engine, {.id = "unread", .prompt = {1}});
  const auto left = Submit(*engine, {.id = "left", .prompt = {1}});
  gate.AwaitArrival(1);
  const absl::Status why = absl::ResourceExhaustedError("nobody reads");
  engine->Fail("unread", why);
  engine->Cancel("unread");  // as its call's end brings about
  engine->Cancel("left");
  engine->Fail("left", why);
  engine->Fail("unknown", why);
  gate.Permit(1000);
  unread->WaitForEnd();
  left->WaitForEnd();
  EXPECT_EQ(unread->status(), why);
  EXPECT_OK(left->status());
  EXPECT_EQ(left->outcome().reason, FinishReason::kCancelled);
  EXPECT_EQ(Failures("unread", "RESOURCE_EXHAUSTED"), 1);
  EXPECT_EQ(Cancellations("unread"), 1);
}

// A step of a large model may take longer than a hung engine is given.
TEST(EngineTest, HeartBeatsWithEveryLayerOfAStep) {
  ManualClock clock;
  std::vector<double> ages;
  Engine* engine_in_step = nullptr;
  std::mutex mu;  // of the pointer above
  std::unique_lock lock(mu);
  const auto engine =
      MakeEngine({.before_forward =
                      [&](const LoadedModel::Batch& batch) {
                        const std::lock_guard step(mu);
                        for (int layer = 0; layer < 3; ++layer) {
                          batch.on_layer();
                          clock.Advance(absl::Seconds(50));
                          ages.push_back(engine_in_step->stats().heartbeat_age_seconds);
                        }
                        return absl::OkStatus();
                      }},
                 SmallOptions(), &clock);
  engine_in_step = engine.get();
  lock.unlock();
  const auto sink = Generate(*engine, {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 1}});
  EXPECT_OK(sink->status());
  EXPECT_EQ(ages, std::vector<double>({50, 50, 50}));
}

// Tokens of requests that run together are handed over side by side: each sink waits here for the
// other's call.
TEST(EngineTest, SinksOfSeveralRequestsAreCalledSideBySide) {
  class MeetingSink final : public Sink {
   public:
    explicit MeetingSink(std::atomic<int>* n_inside) : n_inside_(n_inside) {}
    void OnStarted(double) override {}
    void OnDelta(Delta) override {
      ++*n_inside_;
      EXPECT_TRUE(walsh::testing::WaitUntil([this] { return *n_inside_ >= 2; }));
    }
    void OnFinished(const Outcome&) override { end_.set_value(); }
    void OnFailed(const absl::Status& status) override {
      EXPECT_OK(status);
      end_.set_value();
    }
    void WaitForEnd() { end_.get_future().wait(); }

   private:
    std::atomic<int>* const n_inside_;
    std::promise<void> end_;
  };
  Gate gate;
  const auto engine = MakeEngine({.before_forward = gate.Hook()});
  // Holds the first step until both others wait for the second.
  const auto opener = Submit(*engine, {.id = "o", .prompt = {1}, .sampling = {.max_tokens = 1}});
  gate.AwaitArrival(1);
  std::atomic<int> n_inside = 0;
  const auto a = std::make_shared<MeetingSink>(&n_inside);
  const auto b = std::make_shared<MeetingSink>(&n_inside);
  EXPECT_OK(engine->Submit({.id = "a", .prompt = {1}, .sampling = {.max_tokens = 1}}, a));
  EXPECT_OK(engine->Submit({.id = "b", .prompt = {1}, .sampling = {.max_tokens = 1}}, b));
  gate.Permit(100);
  a->WaitForEnd();
  b->WaitForEnd();
  opener->WaitForEnd();
}

// The age of a dead loop's heartbeat only grows.
TEST(EngineTest, IdleEngineKeepsItsHeart) {
  const auto engine = MakeEngine();
  double age = engine->stats().heartbeat_age_seconds;
  for (int beat = 0; beat < 3; ++beat) {
    EXPECT_TRUE(walsh::testing::WaitUntil([&] {
      const double before = std::exchange(age, engine->stats().heartbeat_age_seconds);
      return age < before;
    }));
  }
}

}  // namespace
}  // namespace walsh::engine
