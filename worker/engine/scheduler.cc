#include "worker/engine/scheduler.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace walsh::engine {
namespace {

constexpr int64_t kKvBlockTokens = 16;

}  // namespace

int64_t KvReservation(int64_t n_tokens) {
  return (n_tokens + kKvBlockTokens - 1) / kKvBlockTokens * kKvBlockTokens;
}

Scheduler::Scheduler(const Limits& limits) : limits_(limits) {
  WALSH_CHECK_GE(limits.max_sequences, 1);
  WALSH_CHECK_GE(limits.max_waiting, 0);
  WALSH_CHECK_GE(limits.max_batch_tokens, limits.max_sequences);
}

absl::Status Scheduler::Add(SequenceId id, const Need& need) {
  WALSH_CHECK_GE(need.n_prompt, 1);
  WALSH_CHECK_GE(need.n_new_max, 1);
  const int64_t kv_tokens = KvReservation(need.n_prompt + need.n_new_max);
  if (kv_tokens > limits_.kv_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the request needs a KV cache of ", kv_tokens, " tokens (prompt of ", need.n_prompt,
        " and up to ", need.n_new_max, " new), the model's has ", limits_.kv_tokens));
  }
  if (n_running() + n_waiting() >= limits_.max_sequences + limits_.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", n_running(),
                                                     " requests run and ", n_waiting(),
                                                     " wait, at most ", limits_.max_waiting));
  }
  waiting_.push_back({.id = id, .need = need});
  return absl::OkStatus();
}

void Scheduler::Cancel(SequenceId id) {
  const auto mark = [id](auto& entries) {
    for (Entry& entry : entries) {
      if (entry.id == id) entry.is_cancelled = true;
    }
  };
  mark(waiting_);
  mark(running_);
}

Scheduler::Step Scheduler::Next(absl::Duration now) {
  Step step;
  CollectDepartures(now, step);
  Admit(step);
  PlanChunks(step);
  return step;
}

void Scheduler::Finish(SequenceId id) {
  const auto is_it = [id](const Entry& entry) { return entry.id == id; };
  const auto it = std::find_if(running_.begin(), running_.end(), is_it);
  if (it == running_.end()) {
    std::erase_if(waiting_, is_it);
    return;
  }
  kv_tokens_used_ -= KvReservation(it->need.n_prompt + it->need.n_new_max);
  running_.erase(it);
}

void Scheduler::CollectDepartures(absl::Duration now, Step& step) {
  const auto leaving = [now](const Entry& entry) -> std::optional<Reason> {
    if (entry.is_cancelled) return Reason::kCancelled;
    if (now >= entry.need.deadline) return Reason::kDeadline;
    return std::nullopt;
  };
  for (const Entry& entry : running_) {
    if (const auto reason = leaving(entry)) {
      step.departures.push_back({.id = entry.id, .reason = *reason, .was_running = true});
    }
  }
  for (const Departure& departure : step.departures) Finish(departure.id);
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const auto reason = leaving(*it);
    if (!reason) {
      ++it;
      continue;
    }
    step.departures.push_back({.id = it->id, .reason = *reason, .was_running = false});
    it = waiting_.erase(it);
  }
}

void Scheduler::Admit(Step& step) {
  while (!waiting_.empty() && n_running() < limits_.max_sequences) {
    const Entry& head = waiting_.front();
    const int64_t kv_tokens = KvReservation(head.need.n_prompt + head.need.n_new_max);
    if (kv_tokens_used_ + kv_tokens > limits_.kv_tokens) return;
    kv_tokens_used_ += kv_tokens;
    step.admitted.push_back(head.id);
    running_.push_back(head);
    waiting_.pop_front();
  }
}

void Scheduler::PlanChunks(Step& step) {
  int64_t budget = limits_.max_batch_tokens;
  int64_t n_prefilling = 0;
  for (Entry& entry : running_) {
    if (entry.n_computed < entry.need.n_prompt) {
      ++n_prefilling;
      continue;
    }
    step.chunks.push_back(
        {.id = entry.id, .first = entry.n_computed, .n_tokens = 1, .samples = true});
    ++entry.n_computed;
    --budget;
  }
  for (Entry& entry : running_) {
    const int64_t n_left = entry.need.n_prompt - entry.n_computed;
    if (n_left <= 0) continue;
    // One token stays for each prompt behind this one.
    --n_prefilling;
    const int64_t n_tokens = std::min(n_left, budget - n_prefilling);
    step.chunks.push_back({.id = entry.id,
                           .first = entry.n_computed,
                           .n_tokens = n_tokens,
                           .samples = n_tokens == n_left});
    entry.n_computed += n_tokens;
    budget -= n_tokens;
  }
}

}  // namespace walsh::engine
