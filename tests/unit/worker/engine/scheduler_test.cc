#include "worker/engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <random>
#include <set>

#include "tests/testing/status_matchers.h"

namespace walsh::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using walsh::testing::HasCode;
using walsh::testing::StatusIs;

constexpr absl::Duration kNow = absl::ZeroDuration();

Scheduler::Limits SmallLimits() {
  return {.max_sequences = 2, .max_waiting = 2, .max_batch_tokens = 8, .kv_blocks = 4};
}

// A prompt that shares no block with those of other ids.
std::vector<int32_t> Prompt(SequenceId id, int64_t n_tokens) {
  return std::vector<int32_t>(static_cast<size_t>(n_tokens), static_cast<int32_t>(id));
}

absl::Status Add(Scheduler& scheduler, SequenceId id, int64_t n_prompt, int64_t n_new_max,
                 absl::Duration deadline = absl::InfiniteDuration()) {
  return scheduler.Add(
      id, {.prompt = Prompt(id, n_prompt), .n_new_max = n_new_max, .deadline = deadline});
}

// The next step, run: every chunk that samples gets the token −1.
Scheduler::Step RunStep(Scheduler& scheduler, absl::Duration now = kNow) {
  Scheduler::Step step = scheduler.Next(now);
  std::vector<Scheduler::Sampled> sampled;
  for (const auto& chunk : step.chunks) {
    if (chunk.samples) sampled.push_back({chunk.id, -1});
  }
  scheduler.Complete(now, sampled);
  return step;
}

std::vector<SequenceId> Admitted(const Scheduler::Step& step) {
  std::vector<SequenceId> ids;
  for (const auto& admission : step.admitted) ids.push_back(admission.id);
  return ids;
}

using Shares = std::vector<std::pair<SequenceId, int64_t>>;
Shares Tokens(const Scheduler::Step& step) {
  Shares tokens;
  for (const auto& chunk : step.chunks) tokens.emplace_back(chunk.id, chunk.n_tokens);
  return tokens;
}

TEST(SchedulerTest, PromptIsCutIntoChunksAndSamplesAtItsEnd) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 18, 4));
  Scheduler::Step step = RunStep(scheduler);
  EXPECT_THAT(Admitted(step), ElementsAre(1));
  EXPECT_EQ(Tokens(step), (Shares{{1, 8}}));
  EXPECT_FALSE(step.chunks[0].samples);
  step = RunStep(scheduler);
  EXPECT_TRUE(step.admitted.empty());
  EXPECT_EQ(step.chunks[0].first, 8);
  step = RunStep(scheduler);
  EXPECT_EQ(Tokens(step), (Shares{{1, 2}}));
  EXPECT_TRUE(step.chunks[0].samples);
  step = RunStep(scheduler);
  EXPECT_EQ(step.chunks[0].first, 18);
  EXPECT_EQ(step.chunks[0].n_tokens, 1);
  EXPECT_TRUE(step.chunks[0].samples);
}

TEST(SchedulerTest, DecodingComesBeforePrompts) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 2, 10));
  RunStep(scheduler);
  ASSERT_OK(Add(scheduler, 2, 20, 4));
  EXPECT_EQ(Tokens(RunStep(scheduler)), (Shares{{1, 1}, {2, 7}}));
}

TEST(SchedulerTest, EveryAdmittedPromptAdvancesInEveryStep) {
  Scheduler::Limits limits = SmallLimits();
  limits.kv_blocks = 8;
  Scheduler scheduler(limits);
  ASSERT_OK(Add(scheduler, 1, 20, 1));
  ASSERT_OK(Add(scheduler, 2, 20, 1));
  EXPECT_EQ(Tokens(RunStep(scheduler)), (Shares{{1, 7}, {2, 1}}));
}

TEST(SchedulerTest, HeadThatDoesNotFitHoldsBackThoseBehindIt) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 20, 12));  // 2 of 4 blocks
  ASSERT_OK(Add(scheduler, 2, 20, 12));  // 2, and 1 must stay for the first
  ASSERT_OK(Add(scheduler, 3, 1, 1));    // would fit
  EXPECT_THAT(Admitted(RunStep(scheduler)), ElementsAre(1));
  EXPECT_EQ(scheduler.blocks().n_used(), 2);
  scheduler.Finish(1);
  EXPECT_THAT(Admitted(RunStep(scheduler)), ElementsAre(2, 3));
  EXPECT_EQ(scheduler.blocks().n_used(), 3);
}

TEST(SchedulerTest, WhatMayBeGeneratedReservesNothing) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 15, 49));
  ASSERT_OK(Add(scheduler, 2, 15, 49));
  EXPECT_THAT(Admitted(RunStep(scheduler)), ElementsAre(1, 2));
  EXPECT_EQ(scheduler.blocks().n_used(), 2);
}

TEST(SchedulerTest, WhereBlocksRunOutTheLatestGoesBackAndLosesNothing) {
  Scheduler::Limits limits = SmallLimits();
  limits.max_batch_tokens = 64;
  Scheduler scheduler(limits);
  ASSERT_OK(Add(scheduler, 1, 30, 34));
  ASSERT_OK(Add(scheduler, 2, 10, 54));
  ASSERT_OK(Add(scheduler, 3, 1, 1));
  EXPECT_THAT(Admitted(RunStep(scheduler)), ElementsAre(1, 2));  // 2 blocks and 1, and one is free
  Scheduler::Step step;
  int n_steps = 1;
  while (step.preempted.empty()) {
    step = RunStep(scheduler);
    ++n_steps;
  }
  // 1 took its third block for token 33, and 2 has none for its own 17th.
  EXPECT_THAT(step.preempted, ElementsAre(2));
  EXPECT_EQ(n_steps, 8);
  EXPECT_EQ(Tokens(step), (Shares{{1, 1}}));
  EXPECT_TRUE(step.admitted.empty()) << "3 does not overtake it";
  EXPECT_EQ(scheduler.n_waiting(), 2);
  EXPECT_EQ(scheduler.n_waiting_tokens(), 17 + 1);
  scheduler.Finish(1);
  step = RunStep(scheduler);
  ASSERT_THAT(Admitted(step), ElementsAre(2, 3));
  EXPECT_TRUE(step.admitted[0].is_resumed);
  EXPECT_FALSE(step.admitted[1].is_resumed);
  // Its first block was full and is still there; the token that follows is computed, and one more
  // is sampled.
  EXPECT_EQ(step.admitted[0].n_cached, 16);
  EXPECT_EQ(step.chunks[0].first, 16);
  EXPECT_EQ(step.chunks[0].n_tokens, 1);
  EXPECT_TRUE(step.chunks[0].samples);
}

TEST(SchedulerTest, SharedBeginningsAreComputedOnceButForTheLastBlock) {
  Scheduler::Limits limits = SmallLimits();
  limits.kv_blocks = 16;
  limits.max_batch_tokens = 64;
  Scheduler scheduler(limits);
  const std::vector<int32_t> prompt = Prompt(7, 48);
  ASSERT_OK(scheduler.Add(1, {.prompt = prompt, .n_new_max = 4}));
  RunStep(scheduler);
  scheduler.Finish(1);
  EXPECT_EQ(scheduler.blocks().n_cached(), 3);
  // All of it is cached; the last block is computed again, so that there is a token to sample
  // after.
  ASSERT_OK(scheduler.Add(2, {.prompt = prompt, .n_new_max = 4}));
  std::vector<int32_t> longer = prompt;
  longer.push_back(1);
  ASSERT_OK(scheduler.Add(3, {.prompt = longer, .n_new_max = 4}));
  const Scheduler::Step step = RunStep(scheduler);
  ASSERT_EQ(step.admitted.size(), 2u);
  EXPECT_EQ(step.admitted[0].n_cached, 32);
  EXPECT_EQ(step.admitted[1].n_cached, 48);
  EXPECT_EQ(Tokens(step), (Shares{{3, 1}, {2, 16}}));
  EXPECT_EQ(scheduler.blocks().n_used(), 4) << "3 shared, of which 2 computed a copy, and 1 of 3";
}

TEST(SchedulerTest, AStepThatFailedLeavesNothingToBeFound) {
  Scheduler::Limits limits = SmallLimits();
  limits.max_batch_tokens = 64;
  Scheduler scheduler(limits);
  ASSERT_OK(Add(scheduler, 1, 40, 4));
  scheduler.Next(kNow);
  scheduler.Finish(1);
  EXPECT_EQ(scheduler.blocks().n_cached(), 0);
  EXPECT_EQ(scheduler.blocks().n_free(), 4);
}

TEST(SchedulerTest, AStepIsDecidedAheadForThoseThatCertainlyGoOn) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 3, 2));
  ASSERT_OK(Add(scheduler, 2, 15, 20));
  scheduler.Next(kNow);
  EXPECT_EQ(scheduler.NextAhead(kNow), std::nullopt) << "one prompt is not through";
  scheduler.Complete(kNow, std::vector<Scheduler::Sampled>{{1, 7}});
  scheduler.Finish(1);
  while (!RunStep(scheduler).chunks.front().samples) {
  }

  ASSERT_EQ(Tokens(scheduler.Next(kNow)), (Shares{{2, 1}}));
  const auto ahead = scheduler.NextAhead(kNow);
  ASSERT_TRUE(ahead.has_value());
  ASSERT_EQ(ahead->size(), 1u);
  EXPECT_EQ(ahead->front().first, 16) << "the token that is being made";
  EXPECT_EQ(ahead->front().blocks.size(), 2u) << "it begins a block";
  scheduler.Complete(kNow, std::vector<Scheduler::Sampled>{{2, 9}});
  // That step is under way now; one more fits behind it.
  ASSERT_TRUE(scheduler.NextAhead(kNow).has_value());
  scheduler.Complete(kNow, std::vector<Scheduler::Sampled>{{2, 10}});
  scheduler.Complete(kNow, std::vector<Scheduler::Sampled>{{2, 11}});
  EXPECT_EQ(scheduler.Next(kNow).chunks.front().first, 18);
}

TEST(SchedulerTest, NothingIsDecidedAheadOfAChange) {
  const auto decoding = [](Scheduler& scheduler) {
    ASSERT_OK(Add(scheduler, 1, 3, 20, absl::Seconds(5)));
    RunStep(scheduler);
    scheduler.Next(kNow);
  };
  {
    Scheduler scheduler(SmallLimits());
    decoding(scheduler);
    ASSERT_OK(Add(scheduler, 2, 3, 4));
    EXPECT_EQ(scheduler.NextAhead(kNow), std::nullopt) << "another waits";
  }
  {
    Scheduler scheduler(SmallLimits());
    decoding(scheduler);
    scheduler.Cancel(1);
    EXPECT_EQ(scheduler.NextAhead(kNow), std::nullopt) << "it is cancelled";
  }
  {
    Scheduler scheduler(SmallLimits());
    decoding(scheduler);
    EXPECT_EQ(scheduler.NextAhead(absl::Seconds(5)), std::nullopt) << "its time is over";
  }
  {
    Scheduler scheduler(SmallLimits());
    ASSERT_OK(Add(scheduler, 1, 3, 2));
    RunStep(scheduler);
    scheduler.Next(kNow);
    EXPECT_EQ(scheduler.NextAhead(kNow), std::nullopt) << "the step brings its last token";
  }
  {
    Scheduler scheduler({.max_sequences = 2, .max_batch_tokens = 32, .kv_blocks = 2});
    ASSERT_OK(Add(scheduler, 1, 15, 10));
    ASSERT_OK(Add(scheduler, 2, 14, 10));
    RunStep(scheduler);
    scheduler.Next(kNow);
    EXPECT_EQ(scheduler.NextAhead(kNow), std::nullopt) << "no block is left";
    EXPECT_EQ(Tokens(RunStep(scheduler)), (Shares{{1, 1}})) << "and the other one has gone back";
  }
}

TEST(SchedulerTest, FullQueueIsRefusedAtOnce) {
  Scheduler scheduler(SmallLimits());
  for (SequenceId id = 1; id <= 4; ++id) ASSERT_OK(Add(scheduler, id, 1, 1));
  EXPECT_THAT(Add(scheduler, 5, 1, 1), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(RunStep(scheduler).admitted.size(), 2u);
  EXPECT_THAT(Add(scheduler, 5, 1, 1), StatusIs(absl::StatusCode::kResourceExhausted,
                                                HasSubstr("2 requests run and 2 wait")));
}

TEST(SchedulerTest, SoAreTokensBeyondThoseThatMayWait) {
  Scheduler::Limits limits = SmallLimits();
  limits.max_waiting = 10;
  limits.max_waiting_tokens = 50;
  limits.kv_blocks = 100;
  Scheduler scheduler(limits);
  // Sequences are free: these do not wait for long.
  ASSERT_OK(Add(scheduler, 1, 40, 1));
  ASSERT_OK(Add(scheduler, 2, 40, 1));
  RunStep(scheduler);
  scheduler.Finish(1);
  ASSERT_OK(Add(scheduler, 3, 1, 1));
  RunStep(scheduler);
  ASSERT_EQ(scheduler.n_running(), 2);
  ASSERT_OK(Add(scheduler, 4, 60, 1)) << "one always may";
  EXPECT_THAT(Add(scheduler, 5, 1, 1),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       HasSubstr("prompts of 60 tokens wait, with this one of 1 they would exceed "
                                 "50")));
  scheduler.Finish(4);
  EXPECT_EQ(scheduler.n_waiting_tokens(), 0);
  ASSERT_OK(Add(scheduler, 5, 20, 1));
  ASSERT_OK(Add(scheduler, 6, 30, 1));
  EXPECT_FALSE(Add(scheduler, 7, 1, 1).ok());
}

TEST(SchedulerTest, RetryDelayIsTheTimeUntilASequenceIsThrough) {
  Scheduler::Limits limits = SmallLimits();
  limits.kv_blocks = 100;
  Scheduler scheduler(limits);
  EXPECT_EQ(scheduler.RetryDelay(), absl::Seconds(1)) << "nothing is known yet";
  ASSERT_OK(Add(scheduler, 1, 1, 40));
  ASSERT_OK(Add(scheduler, 2, 1, 1500));
  absl::Duration now = kNow;
  // Two tokens in each step of 100 ms.
  const auto run = [&] {
    const Scheduler::Step step = scheduler.Next(now);
    now += absl::Milliseconds(100);
    std::vector<Scheduler::Sampled> sampled;
    for (const auto& chunk : step.chunks) sampled.push_back({chunk.id, -1});
    scheduler.Complete(now, sampled);
  };
  run();
  EXPECT_NEAR(absl::ToDoubleSeconds(scheduler.RetryDelay()), 4.0, 1e-6);  // 40 steps
  for (int i = 0; i < 20; ++i) run();
  EXPECT_NEAR(absl::ToDoubleSeconds(scheduler.RetryDelay()), 2.0, 1e-6);
  scheduler.Finish(1);
  EXPECT_EQ(scheduler.RetryDelay(), absl::Minutes(1)) << "at most";
}

TEST(SchedulerTest, RequestThatCouldNeverRunIsRefused) {
  Scheduler scheduler(SmallLimits());
  EXPECT_THAT(Add(scheduler, 1, 60, 5),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("80 tokens")));
  EXPECT_OK(Add(scheduler, 1, 60, 4));
}

TEST(SchedulerTest, CancelledAndExpiredLeaveBeforeTheNextStep) {
  Scheduler scheduler(SmallLimits());
  ASSERT_OK(Add(scheduler, 1, 2, 10));
  ASSERT_OK(Add(scheduler, 2, 2, 10, absl::Seconds(5)));
  ASSERT_OK(Add(scheduler, 3, 2, 10));
  ASSERT_OK(Add(scheduler, 4, 2, 10, absl::Seconds(5)));
  RunStep(scheduler);
  scheduler.Cancel(1);
  scheduler.Cancel(3);
  scheduler.Cancel(99);
  const Scheduler::Step step = RunStep(scheduler, absl::Seconds(5));
  ASSERT_EQ(step.departures.size(), 4u);
  EXPECT_TRUE(step.chunks.empty());
  EXPECT_TRUE(step.admitted.empty());
  EXPECT_TRUE(scheduler.empty());
  EXPECT_EQ(scheduler.blocks().n_used(), 0);
  EXPECT_EQ(scheduler.n_waiting_tokens(), 0);
}

// Thousands of random schedules against a plain record of what each request is entitled to, over a
// memory that holds for each token's place the hash of its tenant and all tokens up to it.
//
// Invariants: a sequence finds what it and only what it wrote, or what another of its tenant wrote
// for the same tokens; who writes a block holds it alone; no block leaks; budgets hold in every
// step; arrival decides who runs, and the first of all advances in every step; each request ends
// exactly once, with as many tokens as it may have; nothing is left at the end.
class RandomSchedule {
 public:
  // What happened, so that a test can tell that all of it did.
  struct Counts {
    int64_t preempted = 0, resumed = 0, cached_tokens = 0, refused = 0, failed_steps = 0;
  };

  RandomSchedule(uint64_t seed, Counts* counts) : rng_(seed), counts_(counts) {
    limits_.max_sequences = Uniform(1, 6);
    limits_.max_waiting = Uniform(0, 6);
    limits_.max_waiting_tokens = Uniform(0, 200);
    limits_.max_batch_tokens = limits_.max_sequences + Uniform(0, 40);
    limits_.kv_blocks = Uniform(1, 14);
    limits_.has_prefix_cache = Uniform(0, 3) > 0;
    n_variants_ = Uniform(1, 5);
    n_tenants_ = Uniform(1, 3);
    memory_.resize(static_cast<size_t>(limits_.kv_blocks));
    scheduler_.emplace(limits_);
  }

  void Run() {
    for (int turn = 0; turn < 60; ++turn) {
      const int arrivals = Uniform(0, 2);
      for (int i = 0; i < arrivals; ++i) Arrive();
      if (Uniform(0, 6) == 0 && !live_.empty()) {
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
    EXPECT_EQ(scheduler_->n_waiting_tokens(), 0);
    EXPECT_EQ(scheduler_->blocks().n_used(), 0);
    EXPECT_EQ(scheduler_->blocks().n_available(), limits_.kv_blocks);
  }

 private:
  struct Record {
    std::vector<int32_t> tokens;
    int tenant = 0;
    size_t n_end = 0;
    absl::Duration deadline = absl::InfiniteDuration();
    int64_t n_computed = 0;
    bool is_running = false;
    bool was_preempted = false;
  };

  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  int Size() const { return static_cast<int>(live_.size()); }

  static std::string SaltOf(int tenant) { return std::string(static_cast<size_t>(tenant), 't'); }

  static uint64_t Extend(uint64_t hash, int32_t token) {
    return (hash ^ static_cast<uint64_t>(token + 1)) * 0x9E3779B97F4A7C15u + 1;
  }

  // Prompts of few beginnings, which part somewhere.
  std::vector<int32_t> MakePrompt() {
    std::vector<int32_t> prompt;
    const int variant = Uniform(1, n_variants_);
    const int n = Uniform(1, 70);
    const int n_shared = Uniform(0, n);
    for (int i = 0; i < n; ++i) prompt.push_back(i < n_shared ? variant : Uniform(0, 1));
    return prompt;
  }

  void Arrive() {
    Record record{.tokens = MakePrompt(), .tenant = Uniform(0, n_tenants_ - 1)};
    const auto n_prompt = static_cast<int64_t>(record.tokens.size());
    const int64_t n_new_max = Uniform(1, 120);
    record.n_end = record.tokens.size() + static_cast<size_t>(n_new_max);
    if (Uniform(0, 5) == 0) record.deadline = now_ + absl::Seconds(Uniform(0, 30));
    const int64_t n_tokens_before = scheduler_->n_waiting_tokens();
    const absl::Status status = scheduler_->Add(
        next_id_, {record.tokens, n_new_max, record.deadline, SaltOf(record.tenant)});
    const bool is_busy = Size() >= limits_.max_sequences && scheduler_->n_waiting() > 0;
    if (KvBlocks(n_prompt + n_new_max) > limits_.kv_blocks) {
      ASSERT_THAT(status, HasCode(absl::StatusCode::kInvalidArgument));
    } else if (Size() >= limits_.max_sequences + limits_.max_waiting ||
               (is_busy && n_tokens_before > 0 &&
                n_tokens_before + n_prompt > limits_.max_waiting_tokens)) {
      ASSERT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
      ASSERT_GT(scheduler_->RetryDelay(), absl::ZeroDuration());
      ++counts_->refused;
    } else {
      ASSERT_OK(status);
      live_[next_id_++] = std::move(record);
    }
  }

  void StepOnce() {
    now_ += absl::Seconds(1);
    const Scheduler::Step step = scheduler_->Next(now_);
    for (const auto& departure : step.departures) {
      ASSERT_EQ(live_.count(departure.id), 1u) << "left twice";
      ASSERT_EQ(live_[departure.id].is_running, departure.was_running);
      live_.erase(departure.id);
    }
    for (const SequenceId id : step.preempted) {
      ASSERT_TRUE(live_.at(id).is_running);
      live_[id].is_running = false;
      live_[id].was_preempted = true;
      live_[id].n_computed = 0;
      ++counts_->preempted;
    }
    for (const auto& admission : step.admitted) {
      Record& record = live_.at(admission.id);
      ASSERT_FALSE(record.is_running);
      ASSERT_EQ(admission.is_resumed, record.was_preempted);
      ASSERT_EQ(admission.n_cached % kKvBlockTokens, 0);
      if (!limits_.has_prefix_cache) {
        ASSERT_EQ(admission.n_cached, 0);
      }
      record.is_running = true;
      record.n_computed = admission.n_cached;
      counts_->cached_tokens += admission.n_cached;
      counts_->resumed += admission.is_resumed ? 1 : 0;
    }
    CheckOrder();
    CheckChunks(step);
    if (::testing::Test::HasFatalFailure()) return;
    if (Uniform(0, 60) == 0) {
      ++counts_->failed_steps;
      for (const auto& chunk : step.chunks) End(chunk.id);
      return;
    }
    RunChunks(step);
  }

  void CheckOrder() {
    int n_running = 0;
    bool may_run = true;
    for (const auto& [id, record] : live_) {
      ASSERT_TRUE(may_run || !record.is_running) << id << " overtook another";
      may_run = record.is_running;
      n_running += record.is_running ? 1 : 0;
      ASSERT_LT(now_, record.deadline) << "outlived its deadline";
    }
    ASSERT_LE(n_running, limits_.max_sequences);
    ASSERT_EQ(n_running, scheduler_->n_running());
    ASSERT_EQ(Size() - n_running, scheduler_->n_waiting());
    ASSERT_TRUE(live_.empty() || live_.begin()->second.is_running) << "the first of all waits";
  }

  void CheckChunks(const Scheduler::Step& step) {
    int64_t n_tokens = 0;
    std::set<SequenceId> seen;
    std::map<BlockId, int> n_holders;
    for (const auto& chunk : step.chunks) {
      ASSERT_EQ(live_.count(chunk.id), 1u);
      const Record& record = live_[chunk.id];
      ASSERT_TRUE(record.is_running);
      ASSERT_TRUE(seen.insert(chunk.id).second);
      ASSERT_GE(chunk.n_tokens, 1);
      ASSERT_EQ(chunk.first, record.n_computed);
      const auto n_known = static_cast<int64_t>(record.tokens.size());
      ASSERT_LE(chunk.first + chunk.n_tokens, n_known);
      ASSERT_EQ(chunk.samples, chunk.first + chunk.n_tokens == n_known);
      ASSERT_EQ(static_cast<int64_t>(chunk.blocks.size()), KvBlocks(n_known));
      for (const BlockId block : chunk.blocks) ++n_holders[block];
      n_tokens += chunk.n_tokens;
    }
    ASSERT_EQ(static_cast<int>(seen.size()), scheduler_->n_running()) << "one stood still";
    ASSERT_LE(n_tokens, limits_.max_batch_tokens);
    const BlockManager& blocks = scheduler_->blocks();
    for (const auto& [block, n] : n_holders) ASSERT_EQ(blocks.n_holders(block), n);
    ASSERT_EQ(blocks.n_used(), static_cast<int64_t>(n_holders.size())) << "leaked";
    ASSERT_EQ(blocks.n_used() + blocks.n_cached() + blocks.n_free(), limits_.kv_blocks);
  }

  void RunChunks(const Scheduler::Step& step) {
    // What is unused may lose what it holds.
    for (const BlockId block : scheduler_->TakeUnusedBlocks()) {
      memory_[static_cast<size_t>(block)].fill(0);
    }
    std::vector<Scheduler::Sampled> sampled;
    for (const auto& chunk : step.chunks) {
      Record& record = live_[chunk.id];
      auto hash = static_cast<uint64_t>(record.tenant);
      for (int64_t i = 0; i < chunk.first + chunk.n_tokens; ++i) {
        hash = Extend(hash, record.tokens[static_cast<size_t>(i)]);
        const BlockId block = chunk.blocks[static_cast<size_t>(i / kKvBlockTokens)];
        uint64_t& place =
            memory_[static_cast<size_t>(block)][static_cast<size_t>(i % kKvBlockTokens)];
        if (i < chunk.first) {
          ASSERT_EQ(place, hash) << "token " << i << " of " << chunk.id;
        } else {
          ASSERT_EQ(scheduler_->blocks().n_holders(block), 1) << "written by one of several";
          place = hash;
        }
      }
      record.n_computed += chunk.n_tokens;
      if (chunk.samples) sampled.push_back({chunk.id, static_cast<int32_t>(hash >> 63)});
    }
    now_ += absl::Milliseconds(1);
    scheduler_->Complete(now_, sampled);
    for (const auto& [id, token] : sampled) {
      Record& record = live_[id];
      record.tokens.push_back(token);
      ASSERT_LE(record.tokens.size(), record.n_end);
      if (record.tokens.size() == record.n_end || Uniform(0, 80) == 0) End(id);
    }
  }

  void End(SequenceId id) {
    scheduler_->Finish(id);
    live_.erase(id);
  }

  std::mt19937_64 rng_;
  Counts* const counts_;
  Scheduler::Limits limits_;
  int n_variants_ = 1;
  int n_tenants_ = 1;
  std::optional<Scheduler> scheduler_;
  std::vector<std::array<uint64_t, kKvBlockTokens>> memory_;
  std::map<SequenceId, Record> live_;
  SequenceId next_id_ = 1;
  absl::Duration now_ = absl::ZeroDuration();
};

TEST(SchedulerTest, RandomSchedulesKeepTheInvariants) {
  RandomSchedule::Counts counts;
  for (uint64_t seed = 0; seed < 5000; ++seed) {
    SCOPED_TRACE(seed);
    RandomSchedule(seed, &counts).Run();
    if (HasFailure()) return;
  }
  EXPECT_GT(counts.preempted, 2000);
  EXPECT_GT(counts.resumed, 1000);
  EXPECT_GT(counts.cached_tokens, 100000);
  EXPECT_GT(counts.refused, 1000);
  EXPECT_GT(counts.failed_steps, 1000);
}

}  // namespace
}  // namespace walsh::engine
