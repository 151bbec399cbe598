#include "worker/engine/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "tests/testing/status_matchers.h"

namespace walsh::engine {
namespace {

using ::testing::HasSubstr;
using walsh::testing::HasCode;
using walsh::testing::StatusIs;

Scheduler::Limits SmallLimits() {
  return {.max_sequences = 2, .max_waiting = 2, .max_batch_tokens = 8, .kv_tokens = 64};
}

std::vector<std::pair<SequenceId, int64_t>> Tokens(const Scheduler::Step& step) {
  std::vector<std::pair<SequenceId, int64_t>> tokens;
  for (const auto& chunk : step.chunks) tokens.emplace_back(chunk.id, chunk.n_tokens);
  return tokens;
}

using Shares = std::vector<std::pair<SequenceId, int64_t>>;

TEST(SchedulerTest, PromptIsCutIntoChunksAndSamplesAtItsEnd) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(scheduler.Add(1, {.n_prompt = 18, .n_new_max = 4}));
  Scheduler::Step step = scheduler.Next(absl::ZeroDuration());
  EXPECT_EQ(step.admitted, std::vector<SequenceId>{1});
  EXPECT_EQ(Tokens(step), (Shares{{1, 8}}));
  EXPECT_FALSE(step.chunks[0].samples);
  step = scheduler.Next(absl::ZeroDuration());
  EXPECT_TRUE(step.admitted.empty());
  EXPECT_EQ(step.chunks[0].first, 8);
  step = scheduler.Next(absl::ZeroDuration());
  EXPECT_EQ(Tokens(step), (Shares{{1, 2}}));
  EXPECT_TRUE(step.chunks[0].samples);
  step = scheduler.Next(absl::ZeroDuration());
  EXPECT_EQ(step.chunks[0].first, 18);
  EXPECT_EQ(step.chunks[0].n_tokens, 1);
  EXPECT_TRUE(step.chunks[0].samples);
}

TEST(SchedulerTest, DecodingComesBeforePrompts) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(scheduler.Add(1, {.n_prompt = 2, .n_new_max = 10}));
  scheduler.Next(absl::ZeroDuration());
  ASSERT_OK(scheduler.Add(2, {.n_prompt = 20, .n_new_max = 4}));
  EXPECT_EQ(Tokens(scheduler.Next(absl::ZeroDuration())), (Shares{{1, 1}, {2, 7}}));
}

TEST(SchedulerTest, EveryAdmittedPromptAdvancesInEveryStep) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(scheduler.Add(1, {.n_prompt = 20, .n_new_max = 1}));
  ASSERT_OK(scheduler.Add(2, {.n_prompt = 20, .n_new_max = 1}));
  EXPECT_EQ(Tokens(scheduler.Next(absl::ZeroDuration())), (Shares{{1, 7}, {2, 1}}));
}

TEST(SchedulerTest, HeadThatDoesNotFitHoldsBackThoseBehindIt) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(scheduler.Add(1, {.n_prompt = 20, .n_new_max = 12}));  // 32 of 64
  ASSERT_OK(scheduler.Add(2, {.n_prompt = 30, .n_new_max = 10}));  // 48: must wait
  ASSERT_OK(scheduler.Add(3, {.n_prompt = 1, .n_new_max = 1}));    // would fit
  EXPECT_EQ(scheduler.Next(absl::ZeroDuration()).admitted, std::vector<SequenceId>{1});
  EXPECT_EQ(scheduler.kv_tokens_used(), 32);
  scheduler.Finish(1);
  EXPECT_EQ(scheduler.Next(absl::ZeroDuration()).admitted, (std::vector<SequenceId>{2, 3}));
  EXPECT_EQ(scheduler.kv_tokens_used(), 64);
}

TEST(SchedulerTest, FullQueueIsRefusedAtOnce) {
  Scheduler scheduler(SmallLimits());
  for (SequenceId id = 1; id <= 4; ++id) {
    ASSERT_OK(scheduler.Add(id, {.n_prompt = 1, .n_new_max = 1}));
  }
  EXPECT_THAT(scheduler.Add(5, {.n_prompt = 1, .n_new_max = 1}),
              HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(scheduler.Next(absl::ZeroDuration()).admitted.size(), 2u);
  EXPECT_THAT(
      scheduler.Add(5, {.n_prompt = 1, .n_new_max = 1}),
      StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2 requests run and 2 wait")));
}

TEST(SchedulerTest, RequestThatCouldNeverRunIsRefused) {
  Scheduler scheduler(SmallLimits());
  EXPECT_THAT(scheduler.Add(1, {.n_prompt = 60, .n_new_max = 5}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("80 tokens")));
  EXPECT_OK(scheduler.Add(1, {.n_prompt = 60, .n_new_max = 4}));
}

TEST(SchedulerTest, CancelledAndExpiredLeaveBeforeTheNextStep) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(scheduler.Add(1, {.n_prompt = 2, .n_new_max = 10}));
  ASSERT_OK(scheduler.Add(2, {.n_prompt = 2, .n_new_max = 10, .deadline = absl::Seconds(5)}));
  ASSERT_OK(scheduler.Add(3, {.n_prompt = 2, .n_new_max = 10}));
  ASSERT_OK(scheduler.Add(4, {.n_prompt = 2, .n_new_max = 10, .deadline = absl::Seconds(5)}));
  scheduler.Next(absl::ZeroDuration());
  scheduler.Cancel(1);
  scheduler.Cancel(3);
  scheduler.Cancel(99);
  const Scheduler::Step step = scheduler.Next(absl::Seconds(5));
  ASSERT_EQ(step.departures.size(), 4u);
  EXPECT_TRUE(step.chunks.empty());
  EXPECT_TRUE(step.admitted.empty());
  EXPECT_TRUE(scheduler.empty());
  EXPECT_EQ(scheduler.kv_tokens_used(), 0);
}

// Thousands of random schedules against a plain record of what each request is entitled to.
// Invariants: budgets hold in every step; admission follows arrival; every token is computed once
// and in order; each request ends exactly once; nothing is left at the end.
class RandomSchedule {
 public:
  explicit RandomSchedule(uint64_t seed) : rng_(seed) {
    limits_.max_sequences = Uniform(1, 6);
    limits_.max_waiting = Uniform(0, 6);
    limits_.max_batch_tokens = limits_.max_sequences + Uniform(0, 20);
    limits_.kv_tokens = 16 * Uniform(1, 12);
    scheduler_.emplace(limits_);
  }

  void Run() {
    for (int turn = 0; turn < 60; ++turn) {
      const int arrivals = Uniform(0, 2);
      for (int i = 0; i < arrivals; ++i) Arrive();
      if (Uniform(0, 4) == 0 && !live_.empty()) {
        scheduler_->Cancel(std::next(live_.begin(), Uniform(0, Size() - 1))->first);
      }
      StepOnce();
      if (::testing::Test::HasFatalFailure()) return;
    }
    for (int turn = 0; !scheduler_->empty(); ++turn) {
      ASSERT_LT(turn, 10000) << "the queue never empties";
      StepOnce();
      if (::testing::Test::HasFatalFailure()) return;
    }
    EXPECT_TRUE(live_.empty());
    EXPECT_EQ(scheduler_->kv_tokens_used(), 0);
    EXPECT_EQ(scheduler_->n_running(), 0);
  }

 private:
  struct Record {
    Scheduler::Need need;
    int64_t n_computed = 0;
    int64_t n_generated = 0;
    bool is_running = false;
  };

  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  int Size() const { return static_cast<int>(live_.size()); }

  void Arrive() {
    const SequenceId id = next_id_++;
    Scheduler::Need need{.n_prompt = Uniform(1, 60), .n_new_max = Uniform(1, 20)};
    if (Uniform(0, 3) == 0) need.deadline = now_ + absl::Seconds(Uniform(0, 20));
    const absl::Status status = scheduler_->Add(id, need);
    const int64_t kv_tokens = KvReservation(need.n_prompt + need.n_new_max);
    if (kv_tokens > limits_.kv_tokens) {
      ASSERT_THAT(status, HasCode(absl::StatusCode::kInvalidArgument));
    } else if (Size() >= limits_.max_sequences + limits_.max_waiting) {
      ASSERT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
    } else {
      ASSERT_OK(status);
      live_[id] = {.need = need};
    }
  }

  void StepOnce() {
    now_ += absl::Seconds(1);
    const bool had_work = !scheduler_->empty();
    const Scheduler::Step step = scheduler_->Next(now_);
    for (const auto& departure : step.departures) {
      ASSERT_EQ(live_.count(departure.id), 1u) << "left twice";
      ASSERT_EQ(live_[departure.id].is_running, departure.was_running);
      live_.erase(departure.id);
    }
    for (const SequenceId id : step.admitted) {
      ASSERT_EQ(live_.count(id), 1u);
      ASSERT_FALSE(live_[id].is_running);
      ASSERT_GT(id, last_admitted_) << "overtaken";
      last_admitted_ = id;
      live_[id].is_running = true;
    }
    int64_t n_tokens = 0;
    int64_t kv_tokens = 0;
    int n_running = 0;
    std::set<SequenceId> seen;
    for (const auto& chunk : step.chunks) {
      ASSERT_EQ(live_.count(chunk.id), 1u);
      Record& record = live_[chunk.id];
      ASSERT_TRUE(record.is_running);
      ASSERT_TRUE(seen.insert(chunk.id).second);
      ASSERT_LT(now_, record.need.deadline) << "ran after its deadline";
      ASSERT_GE(chunk.n_tokens, 1);
      ASSERT_EQ(chunk.first, record.n_computed);
      record.n_computed += chunk.n_tokens;
      ASSERT_EQ(chunk.samples, record.n_computed >= record.need.n_prompt);
      n_tokens += chunk.n_tokens;
    }
    for (const auto& [id, record] : live_) {
      if (!record.is_running) continue;
      ++n_running;
      kv_tokens += KvReservation(record.need.n_prompt + record.need.n_new_max);
      ASSERT_EQ(seen.count(id), 1u) << "a running sequence stood still";
    }
    ASSERT_LE(n_tokens, limits_.max_batch_tokens);
    ASSERT_LE(n_running, limits_.max_sequences);
    ASSERT_LE(kv_tokens, limits_.kv_tokens);
    ASSERT_EQ(kv_tokens, scheduler_->kv_tokens_used());
    ASSERT_EQ(n_running, scheduler_->n_running());
    if (had_work && !live_.empty()) {
      ASSERT_GT(n_tokens, 0) << "no progress";
    }
    for (const auto& chunk : step.chunks) {
      if (!chunk.samples) continue;
      Record& record = live_[chunk.id];
      if (++record.n_generated == record.need.n_new_max || Uniform(0, 15) == 0) {
        scheduler_->Finish(chunk.id);
        live_.erase(chunk.id);
      }
    }
  }

  std::mt19937_64 rng_;
  Scheduler::Limits limits_;
  std::optional<Scheduler> scheduler_;
  std::map<SequenceId, Record> live_;
  SequenceId next_id_ = 1;
  SequenceId last_admitted_ = 0;
  absl::Duration now_ = absl::ZeroDuration();
};

TEST(SchedulerTest, RandomSchedulesKeepTheInvariants) {
  for (uint64_t seed = 0; seed < 5000; ++seed) {
    SCOPED_TRACE(seed);
    RandomSchedule(seed).Run();
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace walsh::engine
