// Which sequences run in the next step, and on how many of their tokens each.
//
// Pure bookkeeping: no threads, no model, no clock of its own. The rules:
//
//   Order      First come, first served. A request at the head of the queue that does not fit yet
//              holds back those behind it, so that a large one is never starved by small ones.
//   Admission  A request is admitted when a sequence is free and KV room for its prompt and all
//              its new tokens can be reserved at once. A running sequence therefore always ends by
//              itself: nothing is ever preempted or recomputed.
//   Step       Every sequence that decodes gets its one token. What is left of the step's budget
//              goes to prompts in the order of admission, in chunks, so that a long prompt delays
//              those that decode by one step and no more. Because the budget is at least the
//              number of sequences, every admitted sequence advances in every step.
//   Leaving    Cancelled requests and those past their deadline leave before the next step,
//              whether they wait or run; each leaves exactly once.
//
// Threads: none; the caller locks.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace walsh::engine {

using SequenceId = uint64_t;

// Tokens of KV memory that a sequence of at most `n_tokens` reserves: a multiple of 16.
int64_t KvReservation(int64_t n_tokens);

class Scheduler {
 public:
  struct Limits {
    int max_sequences = 16;
    int max_waiting = 64;
    int64_t max_batch_tokens = 512;  // at least max_sequences
    int64_t kv_tokens = 32768;
  };
  struct Need {
    int64_t n_prompt = 0;                                // at least 1
    int64_t n_new_max = 0;                               // at least 1
    absl::Duration deadline = absl::InfiniteDuration();  // on the monotonic clock
  };
  enum class Reason { kCancelled, kDeadline };
  struct Departure {
    SequenceId id = 0;
    Reason reason = Reason::kCancelled;
    bool was_running = false;
  };
  // Tokens [first, first + n_tokens) of a sequence; after the last one of its prompt, and after
  // every one that follows, a new token is sampled.
  struct Chunk {
    SequenceId id = 0;
    int64_t first = 0;
    int64_t n_tokens = 0;
    bool samples = false;
  };
  struct Step {
    std::vector<Departure> departures;
    std::vector<SequenceId> admitted;  // their first chunks are among `chunks`
    std::vector<Chunk> chunks;
  };

  explicit Scheduler(const Limits& limits);

  // Queues a request. RESOURCE_EXHAUSTED when max_sequences + max_waiting are already here;
  // INVALID_ARGUMENT when it could never be admitted.
  absl::Status Add(SequenceId id, const Need& need);
  // Makes a request leave with the next step; unknown ids are ignored.
  void Cancel(SequenceId id);
  // Decides the next step. The caller runs the chunks and calls Finish for each sequence that
  // ended with its sampled token; departures need no Finish.
  Step Next(absl::Duration now);
  // Frees a request's place, whether it runs or waits; unknown ids are ignored.
  void Finish(SequenceId id);

  bool empty() const { return waiting_.empty() && running_.empty(); }
  int n_waiting() const { return static_cast<int>(waiting_.size()); }
  int n_running() const { return static_cast<int>(running_.size()); }
  int64_t kv_tokens_used() const { return kv_tokens_used_; }
  const Limits& limits() const { return limits_; }

 private:
  struct Entry {
    SequenceId id = 0;
    Need need;
    int64_t n_computed = 0;  // tokens whose keys and values are in the cache after this step
    bool is_cancelled = false;
  };

  void CollectDepartures(absl::Duration now, Step& step);
  void Admit(Step& step);
  void PlanChunks(Step& step);

  Limits limits_;
  std::deque<Entry> waiting_;   // in order of arrival
  std::vector<Entry> running_;  // in order of admission
  int64_t kv_tokens_used_ = 0;
};

}  // namespace walsh::engine
