// Which sequences run in the next step, on how many of their tokens each, and in which blocks of
// the KV cache.
//
// Pure bookkeeping: no threads, no model, no clock of its own. The rules:
//
//   Order      First come, first served. Whoever runs came before whoever waits; a request at the
//              head of the queue that does not fit yet holds back those behind it, so that a large
//              one is never starved by small ones.
//   Admission  A request is admitted when a sequence is free and the blocks of its prompt are
//              there, with one to spare for each sequence that runs (the watermark), so that an
//              admission does not at once lead to a preemption. Blocks at the prompt's beginning
//              that the prefix cache holds for their salt are shared and not computed again; the
//              block of the prompt's last token never is, so that there is always a token to sample
//              after.
//   Growth     A sequence that decodes takes a block whenever its last one is full. Only as many
//              tokens are held as there are: what a request may still generate reserves nothing.
//   Preemption Where no block is left, the running sequence that came last gives its own back and
//              becomes the head of the queue. Once admitted again it computes prompt and output so
//              far as one prompt, and goes on where it was. The first of all is never preempted,
//              and a request that would not fit alone is refused: everyone ends.
//   Step       Every sequence that decodes gets its one token. What is left of the step's budget
//              goes to prompts in the order of arrival, in chunks, so that a long prompt delays
//              those that decode by one step and no more. Because the budget is at least the
//              number of sequences, every admitted sequence advances in every step.
//   Ahead      While a step runs in which all sequences decode, the next one can be decided before
//              the new tokens are known: each sequence gets one more, but those that certainly end.
//   Leaving    Cancelled requests and those past their deadline leave before the next step,
//              whether they wait or run, and their blocks with them; each leaves exactly once.
//
// Threads: none; the caller locks. Add, Cancel and what reads figures may be called while a step
//          runs.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/engine/block_manager.h"

namespace walsh::engine {

using SequenceId = uint64_t;

class Scheduler {
 public:
  struct Limits {
    int max_sequences = 16;
    int max_waiting = 64;                // requests
    int64_t max_waiting_tokens = 65536;  // of their prompts
    int64_t max_batch_tokens = 512;      // at least max_sequences
    int64_t kv_blocks = 2048;
    bool has_prefix_cache = true;
  };
  struct Need {
    std::vector<int32_t> prompt;                         // at least one token
    int64_t n_new_max = 0;                               // at least 1
    absl::Duration deadline = absl::InfiniteDuration();  // on the monotonic clock
    std::string cache_salt = {};
  };
  enum class Reason { kCancelled, kDeadline };
  struct Departure {
    SequenceId id = 0;
    Reason reason = Reason::kCancelled;
    bool was_running = false;
  };
  struct Admission {
    SequenceId id = 0;
    int64_t n_cached = 0;     // tokens at its beginning that the prefix cache held
    bool is_resumed = false;  // after a preemption
  };
  // Tokens [first, first + n_tokens) of prompt and output; when they are the last that are known, a
  // new one is sampled.
  struct Chunk {
    SequenceId id = 0;
    int64_t first = 0;
    int64_t n_tokens = 0;
    bool samples = false;
    std::span<const BlockId> blocks;  // of all tokens; valid until Complete, Finish or Next
  };
  struct Step {
    std::vector<Departure> departures;
    std::vector<SequenceId> preempted;
    std::vector<Admission> admitted;  // their first chunks are among `chunks`
    std::vector<Chunk> chunks;
  };
  struct Sampled {
    SequenceId id = 0;
    int32_t token = 0;
  };

  explicit Scheduler(const Limits& limits);

  // Queues a request; ids rise from call to call. RESOURCE_EXHAUSTED when max_sequences +
  // max_waiting are already here, or when no sequence is free, others wait and their prompts with
  // this one exceed max_waiting_tokens; INVALID_ARGUMENT when it could never be admitted.
  absl::Status Add(SequenceId id, Need need);
  // When a request that was refused for a full queue may come again: until the sequence with the
  // least left to do is through, at the recent rate of tokens. 0.1 s to a minute.
  absl::Duration RetryDelay() const;
  // Makes a request leave with the next step; unknown ids are ignored.
  void Cancel(SequenceId id);
  // Decides the next step. The caller runs the chunks, then calls Complete, and Finish for each
  // sequence that ended; departures need no Finish. Of a step that failed it calls Finish for all.
  Step Next(absl::Duration now);
  // Those that leave now, as Next has them leave; also between NextAhead and the step's Complete.
  std::vector<Departure> Depart(absl::Duration now);
  // The step after the one that was decided last and has not completed, whose tokens it does not
  // need to know: a chunk of one token that each sequence is about to have. Complete is called for
  // both in turn; sequences that ended meanwhile were finished, and their chunks bring nothing.
  // None when anything but decoding is to be decided, or no block is left.
  std::optional<std::vector<Chunk>> NextAhead(absl::Duration now);
  // The step has run: keys and values of its chunks are in their blocks. `sampled`: the new tokens.
  void Complete(absl::Duration now, std::span<const Sampled> sampled);
  // Frees a request's place and blocks, whether it runs or waits; unknown ids are ignored.
  void Finish(SequenceId id);
  // As BlockManager's.
  std::vector<BlockId> TakeUnusedBlocks() { return blocks_.TakeUnused(); }

  bool empty() const { return waiting_.empty() && running_.empty(); }
  int n_waiting() const { return static_cast<int>(waiting_.size()); }
  int n_running() const { return static_cast<int>(running_.size()); }
  int64_t n_waiting_tokens() const { return n_waiting_tokens_; }
  const BlockManager& blocks() const { return blocks_; }
  const Limits& limits() const { return limits_; }

 private:
  struct Entry {
    std::vector<int32_t> tokens;  // prompt and output
    int64_t n_end = 0;            // tokens, when all that it may generate are there
    absl::Duration deadline = absl::InfiniteDuration();
    BlockManager::Content start = BlockManager::kStart;
    std::vector<BlockId> table;  // while it runs, of all `tokens`
    int64_t n_computed = 0;      // tokens whose keys and values are in the table
    int64_t n_planned = 0;       // of the step under way
    int64_t n_ahead = 0;         // of the one after it
    bool is_cancelled = false;
    bool was_preempted = false;

    int64_t n_tokens() const { return static_cast<int64_t>(tokens.size()); }
    int64_t n_left() const { return n_tokens() - n_computed; }
    BlockManager::Tokens BlockTokens(int64_t index) const {
      return BlockManager::Tokens(tokens.data() + index * kKvBlockTokens, kKvBlockTokens);
    }
  };
  // By arrival.
  using Entries = std::map<SequenceId, Entry>;
  // Tokens and time of the steps of about the last kRateMemory.
  struct Rate {
    double n_tokens = 0;
    double seconds = 0;
  };

  void Grow(Step& step);
  void PreemptLast(Step& step);
  void Admit(Step& step);
  // The blocks of a waiting entry's tokens, those of the prefix cache first; false leaves it as it
  // was.
  bool TakeBlocks(Entry& entry);
  void PlanChunks(Step& step);
  Chunk Plan(SequenceId id, Entry& entry, int64_t n_tokens);
  // Makes the entry's full blocks findable, from the first that was not full before the step.
  void PublishBlocks(Entry& entry, int64_t n_computed_before);

  const Limits limits_;
  BlockManager blocks_;
  // Every id here is lower than every one that waits: the first waiting is admitted, the last
  // running preempted.
  Entries running_;
  Entries waiting_;
  int64_t n_waiting_tokens_ = 0;
  SequenceId last_id_ = 0;
  absl::Duration step_start_ = absl::ZeroDuration();
  Rate rate_;
};

}  // namespace walsh::engine
