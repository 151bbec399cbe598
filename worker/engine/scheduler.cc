#include "worker/engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace walsh::engine {
namespace {

constexpr absl::Duration kRateMemory = absl::Seconds(10);
constexpr absl::Duration kRetryDelayMin = absl::Milliseconds(100);
constexpr absl::Duration kRetryDelayMax = absl::Minutes(1);
constexpr absl::Duration kRetryDelayUnknown = absl::Seconds(1);  // before the first step

}  // namespace

Scheduler::Scheduler(const Limits& limits)
    : limits_(limits),
      blocks_({.n_blocks = limits.kv_blocks, .has_prefix_cache = limits.has_prefix_cache}) {
  WALSH_CHECK_GE(limits.max_sequences, 1);
  WALSH_CHECK_GE(limits.max_waiting, 0);
  WALSH_CHECK_GE(limits.max_batch_tokens, limits.max_sequences);
}

absl::Status Scheduler::Add(SequenceId id, Need need) {
  const auto n_prompt = static_cast<int64_t>(need.prompt.size());
  WALSH_CHECK_GT(id, last_id_);
  WALSH_CHECK_GE(n_prompt, 1);
  WALSH_CHECK_GE(need.n_new_max, 1);
  const int64_t n_end = n_prompt + need.n_new_max;
  if (KvBlocks(n_end) > limits_.kv_blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request needs a KV cache of ", KvBlocks(n_end) * kKvBlockTokens,
                     " tokens (prompt of ", n_prompt, " and up to ", need.n_new_max,
                     " new), the model's has ", limits_.kv_blocks * kKvBlockTokens));
  }
  const int n_here = n_running() + n_waiting();
  if (n_here >= limits_.max_sequences + limits_.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", n_running(),
                                                     " requests run and ", n_waiting(),
                                                     " wait, at most ", limits_.max_waiting));
  }
  if (n_here >= limits_.max_sequences && n_waiting() > 0 &&
      n_waiting_tokens_ + n_prompt > limits_.max_waiting_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the queue is full: prompts of ", n_waiting_tokens_, " tokens wait, with this one of ",
        n_prompt, " they would exceed ", limits_.max_waiting_tokens));
  }
  last_id_ = id;
  n_waiting_tokens_ += n_prompt;
  waiting_.emplace(id, Entry{.tokens = std::move(need.prompt),
                             .n_end = n_end,
                             .deadline = need.deadline,
                             .start = blocks_.StartOf(need.cache_salt)});
  return absl::OkStatus();
}

absl::Duration Scheduler::RetryDelay() const {
  if (rate_.n_tokens <= 0 || running_.empty()) return kRetryDelayUnknown;
  int64_t n_least = std::numeric_limits<int64_t>::max();
  for (const auto& [id, entry] : running_) {
    n_least = std::min(n_least, entry.n_end - entry.n_computed);
  }
  // It gets its share of the tokens of all.
  const double n_until = static_cast<double>(n_least) * n_running();
  return std::clamp(absl::Seconds(n_until * rate_.seconds / rate_.n_tokens), kRetryDelayMin,
                    kRetryDelayMax);
}

void Scheduler::Cancel(SequenceId id) {
  for (Entries* entries : {&running_, &waiting_}) {
    if (const auto it = entries->find(id); it != entries->end()) it->second.is_cancelled = true;
  }
}

Scheduler::Step Scheduler::Next(absl::Duration now) {
  Step step;
  step_start_ = now;
  step.departures = Depart(now);
  Grow(step);
  Admit(step);
  PlanChunks(step);
  return step;
}

void Scheduler::Complete(absl::Duration now, std::span<const Sampled> sampled) {
  int64_t n_tokens = 0;
  for (auto& [id, entry] : running_) {
    if (entry.n_planned == 0) continue;
    const int64_t n_before = entry.n_computed;
    entry.n_computed += std::exchange(entry.n_planned, std::exchange(entry.n_ahead, 0));
    n_tokens += entry.n_computed - n_before;
    PublishBlocks(entry, n_before);
  }
  for (const Sampled& item : sampled) running_.at(item.id).tokens.push_back(item.token);

  const absl::Duration took = now - step_start_;
  const double kept = std::exp(-absl::FDivDuration(took, kRateMemory));
  rate_.n_tokens = kept * rate_.n_tokens + static_cast<double>(n_tokens);
  rate_.seconds = kept * rate_.seconds + absl::ToDoubleSeconds(took);
  step_start_ = now;  // of one that was decided ahead
}

std::optional<std::vector<Scheduler::Chunk>> Scheduler::NextAhead(absl::Duration now) {
  if (!waiting_.empty()) return std::nullopt;
  std::vector<Chunk> chunks;
  for (auto& [id, entry] : running_) {
    const bool decodes = entry.n_planned == 1 && entry.n_left() == 1;
    if (!decodes || entry.is_cancelled || now >= entry.deadline) return std::nullopt;
    const int64_t n_tokens = entry.n_tokens() + 1;  // once this step's is there
    if (n_tokens >= entry.n_end) continue;          // and the last
    while (static_cast<int64_t>(entry.table.size()) < KvBlocks(n_tokens)) {
      const auto block = blocks_.Allocate();
      if (!block) return std::nullopt;
      entry.table.push_back(*block);
    }
    chunks.push_back({.id = id,
                      .first = entry.n_tokens(),
                      .n_tokens = 1,
                      .samples = true,
                      .blocks = entry.table});
  }
  if (chunks.empty()) return std::nullopt;
  for (const Chunk& chunk : chunks) running_.at(chunk.id).n_ahead = 1;
  return chunks;
}

void Scheduler::Finish(SequenceId id) {
  if (const auto it = running_.find(id); it != running_.end()) {
    blocks_.Release(it->second.table);
    running_.erase(it);
  } else if (const auto queued = waiting_.find(id); queued != waiting_.end()) {
    n_waiting_tokens_ -= queued->second.n_tokens();
    waiting_.erase(queued);
  }
}

std::vector<Scheduler::Departure> Scheduler::Depart(absl::Duration now) {
  std::vector<Departure> departures;
  for (const Entries* entries : {&running_, &waiting_}) {
    for (const auto& [id, entry] : *entries) {
      if (!entry.is_cancelled && now < entry.deadline) continue;
      departures.push_back({.id = id,
                            .reason = entry.is_cancelled ? Reason::kCancelled : Reason::kDeadline,
                            .was_running = entries == &running_});
    }
  }
  for (const Departure& departure : departures) Finish(departure.id);
  return departures;
}

void Scheduler::Grow(Step& step) {
  for (auto it = running_.begin(); it != running_.end(); ++it) {
    Entry& entry = it->second;
    while (static_cast<int64_t>(entry.table.size()) < KvBlocks(entry.n_tokens())) {
      if (const auto block = blocks_.Allocate()) {
        entry.table.push_back(*block);
        continue;
      }
      const bool is_last = std::next(it) == running_.end();
      PreemptLast(step);
      if (is_last) return;
    }
  }
}

void Scheduler::PreemptLast(Step& step) {
  auto node = running_.extract(std::prev(running_.end()));
  // Alone it has room by the rule of Add.
  WALSH_CHECK(!running_.empty());
  Entry& entry = node.mapped();
  blocks_.Release(entry.table);
  entry.table.clear();
  entry.n_computed = 0;
  entry.was_preempted = true;
  n_waiting_tokens_ += entry.n_tokens();
  step.preempted.push_back(node.key());
  waiting_.insert(std::move(node));
}

void Scheduler::Admit(Step& step) {
  while (!waiting_.empty() && n_running() < limits_.max_sequences) {
    Entry& entry = waiting_.begin()->second;
    if (!TakeBlocks(entry)) return;
    n_waiting_tokens_ -= entry.n_tokens();
    step.admitted.push_back({.id = waiting_.begin()->first,
                             .n_cached = entry.n_computed,
                             .is_resumed = entry.was_preempted});
    running_.insert(waiting_.extract(waiting_.begin()));
  }
}

bool Scheduler::TakeBlocks(Entry& entry) {
  const int64_t watermark = n_running();
  // At least one is new; without it, there is no use in looking for others.
  if (blocks_.n_available() < 1 + watermark) return false;
  // Chunks point into it while it grows.
  entry.table.reserve(static_cast<size_t>(KvBlocks(entry.n_end)));
  BlockManager::Content content = entry.start;
  for (int64_t i = 0; (i + 1) * kKvBlockTokens < entry.n_tokens(); ++i) {
    const auto block = blocks_.Find(content, entry.BlockTokens(i));
    if (!block) break;
    entry.table.push_back(*block);
    content = blocks_.content(*block);
  }
  const auto n_found = static_cast<int64_t>(entry.table.size());
  const int64_t n_new = KvBlocks(entry.n_tokens()) - n_found;
  if (blocks_.n_available() < n_new + watermark) {
    blocks_.Release(entry.table);
    entry.table.clear();
    return false;
  }
  entry.n_computed = n_found * kKvBlockTokens;
  for (int64_t i = 0; i < n_new; ++i) entry.table.push_back(*blocks_.Allocate());
  return true;
}

void Scheduler::PlanChunks(Step& step) {
  int64_t budget = limits_.max_batch_tokens;
  int64_t n_prompts = 0;
  for (auto& [id, entry] : running_) {
    WALSH_CHECK_GE(entry.n_left(), 1);
    if (entry.n_left() > 1) {
      ++n_prompts;
      continue;
    }
    step.chunks.push_back(Plan(id, entry, 1));
    --budget;
  }
  for (auto& [id, entry] : running_) {
    if (entry.n_planned > 0) continue;
    // One token stays for each prompt behind this one.
    --n_prompts;
    step.chunks.push_back(Plan(id, entry, std::min(entry.n_left(), budget - n_prompts)));
    budget -= entry.n_planned;
  }
}

Scheduler::Chunk Scheduler::Plan(SequenceId id, Entry& entry, int64_t n_tokens) {
  entry.n_planned = n_tokens;
  return {.id = id,
          .first = entry.n_computed,
          .n_tokens = n_tokens,
          .samples = n_tokens == entry.n_left(),
          .blocks = entry.table};
}

void Scheduler::PublishBlocks(Entry& entry, int64_t n_computed_before) {
  const int64_t first = n_computed_before / kKvBlockTokens;
  for (int64_t i = first; (i + 1) * kKvBlockTokens <= entry.n_computed; ++i) {
    const BlockManager::Content before =
        i == 0 ? entry.start : blocks_.content(entry.table[static_cast<size_t>(i - 1)]);
    BlockId& block = entry.table[static_cast<size_t>(i)];
    block = blocks_.Publish(block, before, entry.BlockTokens(i));
  }
}

}  // namespace walsh::engine
