#include "worker/engine/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <iterator>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/out_of_memory.h"
#include "common/status_macros.h"
#include "worker/engine/engine_metrics.h"
#include "worker/engine/scheduler.h"
#include "worker/engine/sequence.h"
#include "worker/engine/served_model.h"
#include "worker/kernels/device_failure.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::engine {
namespace {

// How often an idle loop turns, so that its heartbeat tells a waiting engine from a stuck one.
constexpr auto kIdleTurn = std::chrono::milliseconds(500);
constexpr int64_t kDefaultKvTokensPerSequence = 2048;

// As many tokens of KV memory as can be used.
int64_t WholeBlocks(int64_t n_tokens) { return n_tokens - n_tokens % kKvBlockTokens; }

// std::mutex throughout: ThreadSanitizer sees it, unlike the distribution's absl::Mutex.
class BatchingEngine final : public Engine {
 public:
  BatchingEngine(std::shared_ptr<ServedModel> model, const Options& options,
                 const Scheduler::Limits& limits, int64_t context_tokens,
                 std::unique_ptr<ThreadPool> pool, std::unique_ptr<ModelRunner> runner,
                 Clock* clock)
      : model_(std::move(model)),
        clock_(clock),
        context_tokens_(context_tokens),
        pool_(std::move(pool)),
        metrics_(options.model_name, {.block_tokens = kKvBlockTokens,
                                      .n_blocks = limits.kv_blocks,
                                      .has_prefix_cache = limits.has_prefix_cache}),
        on_device_broken_(options.on_device_broken),
        requests_(options.requests),
        heartbeat_ns_(absl::ToInt64Nanoseconds(clock->Monotonic())),
        runner_(std::move(runner)),
        scheduler_(limits),
        thread_([this] { Loop(); }) {}

  ~BatchingEngine() override {
    {
      const std::lock_guard lock(mu_);
      is_draining_ = true;
      is_stopping_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  absl::Status Submit(Request request, std::shared_ptr<Sink> sink) override;
  absl::Duration RetryDelay() const override;
  void Cancel(const std::string& id) override;
  void Fail(const std::string& id, const absl::Status& why) override;
  void Drain(absl::Duration timeout, const absl::Status& why) override;
  Stats stats() const override;
  int64_t context_tokens() const override { return context_tokens_; }
  int64_t kv_cache_bytes() const override { return runner_->kv_cache_bytes(); }
  const ServedModel& model() const override { return *model_; }

 private:
  // A sequence's share of a step.
  struct Active {
    Sequence* sequence = nullptr;  // null: it ended after the step was started
    Scheduler::Chunk chunk;
  };
  // A step from its start on.
  struct Flight {
    std::vector<Active> active;
    bool is_started = false;
    absl::Duration start;
    bool is_steady = false;    // nobody waits, and every sequence samples in this step and the next
    absl::Status status = {};  // of its start
  };
  // A sequence that begins in a step.
  struct Start {
    Sequence* sequence = nullptr;
    int64_t n_cached = 0;
  };
  // A sequence that is over, and how: a reason, or a status that is not OK.
  struct Ending {
    SequenceId id = 0;
    FinishReason reason = FinishReason::kLength;
    absl::Status status = {};
  };

  // What bounds context_tokens_.
  const char* ContextName() const {
    return context_tokens_ < model_->config().max_position ? "the KV cache" : "the model's context";
  }
  // Names the reason of a refusal for the metrics.
  absl::Status CheckRequest(const Request& request, std::string_view* reason) const;
  void Stop(const std::string& id, const absl::Status& status);
  void Beat() { heartbeat_ns_ = absl::ToInt64Nanoseconds(clock_->Monotonic()); }
  void Loop();
  // One step: who leaves, who runs. The lock is free while the model runs and sinks are called, so
  // that Submit never waits for either.
  void Turn(std::unique_lock<std::mutex>& lock);
  void StartAll(const std::vector<Start>& starts);
  // What a step brought about; `has_run`: keys and values are there.
  struct StepResult {
    bool has_run = false;
    std::vector<Scheduler::Sampled> sampled;
    std::vector<Ending> endings;
  };
  // Decides the next step, or takes the one that was started ahead.
  std::optional<Flight> NextFlight(std::unique_lock<std::mutex>& lock, std::vector<Start>& starts);
  std::vector<Ending> EndingsOf(const std::vector<Scheduler::Departure>& departures) const;
  // The step behind `flight`, where its tokens need not be known for it.
  std::optional<Flight> FlightAhead(const Flight& flight);
  // `before`: the step that makes its tokens, null where they are known.
  void StartModel(Flight& flight, const Flight* before);
  StepResult FinishStep(const Flight& flight);
  absl::Status ModelFailure(const absl::Status& status) const;
  // `next_in`: as in Delta.
  void SampleAll(const std::vector<Active>& active, absl::Duration next_in, StepResult& result);
  // On a thread of the pool.
  void DeliverToken(Sequence& sequence, Delta delta);
  // Takes the sequences out, then tells their sinks.
  void EndAll(std::unique_lock<std::mutex>& lock, const std::vector<Ending>& endings);
  void FailAll(std::unique_lock<std::mutex>& lock, const absl::Status& status);
  Stats StatsLocked() const;

  const std::shared_ptr<ServedModel> model_;
  Clock* const clock_;
  const int64_t context_tokens_;
  const std::unique_ptr<ThreadPool> pool_;
  mutable EngineMetrics metrics_;
  const std::function<absl::Status(const absl::Status& cause)> on_device_broken_;
  const std::shared_ptr<RequestCount> requests_;  // may be null
  // Monotonic; outside mu_, since a step beats while it runs.
  std::atomic<int64_t> heartbeat_ns_ = 0;

  // The engine's thread only, but for what is constant.
  const std::unique_ptr<ModelRunner> runner_;
  std::optional<Flight> ahead_;  // started while the step before it ran
  absl::Duration last_step_end_ = absl::ZeroDuration();

  mutable std::mutex mu_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  // Guarded by mu_. Other threads add sequences; only the engine's thread removes them and uses
  // those that the scheduler admitted, so pointers to these stay valid without the lock.
  Scheduler scheduler_;
  std::unordered_map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  std::unordered_map<std::string, SequenceId> ids_;
  // Those that Cancel (OK) or Fail stopped, until they leave; the first of the two counts.
  std::unordered_map<SequenceId, absl::Status> stopped_;
  SequenceId next_id_ = 1;
  uint64_t n_steps_ = 0;
  bool is_turning_ = false;
  bool is_draining_ = false;
  // What requests are refused or end with while it drains.
  absl::Status away_ = absl::UnavailableError("the worker is stopping");
  bool is_failing_ = false;  // the drain's time is over
  bool is_stopping_ = false;

  std::thread thread_;
};

absl::Status BatchingEngine::CheckRequest(const Request& request, std::string_view* reason) const {
  *reason = "invalid";
  if (request.prompt.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
  if (request.sampling.max_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens is ", request.sampling.max_tokens, ", at least 1"));
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    if (request.prompt[i] < 0 || request.prompt[i] >= model_->config().vocab) {
      return absl::InvalidArgumentError(absl::StrCat("prompt token ", i, " is ", request.prompt[i],
                                                     ", the vocabulary has ids 0 to ",
                                                     model_->config().vocab - 1));
    }
  }
  const auto n_prompt = static_cast<int64_t>(request.prompt.size());
  if (n_prompt >= context_tokens_) {
    *reason = "context_length";
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", n_prompt, " tokens, ",
                                                   ContextName(), " of ", context_tokens_,
                                                   " leaves none to generate"));
  }
  return absl::OkStatus();
}

absl::Status BatchingEngine::Submit(Request request, std::shared_ptr<Sink> sink) {
  const absl::Duration now = clock_->Monotonic();
  std::string_view reason;
  if (absl::Status status = CheckRequest(request, &reason); !status.ok()) {
    metrics_.CountRejection(reason);
    return status;
  }
  const auto n_prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t n_new_max =
      std::min<int64_t>(request.sampling.max_tokens, context_tokens_ - n_prompt);
  // A deadline is wall time outside and must not move with the wall clock inside.
  Scheduler::Need need{.prompt = request.prompt,
                       .n_new_max = n_new_max,
                       .deadline = now + (request.deadline - clock_->Now()),
                       .cache_salt = request.cache_salt};
  const absl::Duration arrival = request.arrival.value_or(now);
  auto sequence =
      std::make_unique<Sequence>(std::move(request), std::move(sink), *model_, n_new_max, arrival);

  const std::lock_guard lock(mu_);
  if (is_draining_) {
    metrics_.CountRejection("draining");
    return away_;
  }
  const std::string& name = sequence->request().id;
  if (ids_.contains(name)) {
    metrics_.CountRejection("invalid");
    return absl::InvalidArgumentError(absl::StrCat("request id '", name, "' is in use"));
  }
  const SequenceId id = next_id_++;
  const absl::Status added = scheduler_.Add(id, std::move(need));
  if (!added.ok()) {
    metrics_.CountRejection("queue_full");
    return added;
  }
  ids_.emplace(name, id);
  sequences_.emplace(id, std::move(sequence));
  if (requests_ != nullptr) requests_->Add();
  wake_.notify_one();
  return absl::OkStatus();
}

absl::Duration BatchingEngine::RetryDelay() const {
  const std::lock_guard lock(mu_);
  return scheduler_.RetryDelay();
}

void BatchingEngine::Cancel(const std::string& id) { Stop(id, absl::OkStatus()); }

void BatchingEngine::Fail(const std::string& id, const absl::Status& why) { Stop(id, why); }

void BatchingEngine::Stop(const std::string& id, const absl::Status& status) {
  const std::lock_guard lock(mu_);
  const auto it = ids_.find(id);
  if (it == ids_.end()) return;
  stopped_.try_emplace(it->second, status);
  scheduler_.Cancel(it->second);
  wake_.notify_one();
}

void BatchingEngine::Drain(absl::Duration timeout, const absl::Status& why) {
  const auto is_empty = [this] { return sequences_.empty() && !is_turning_; };
  std::unique_lock lock(mu_);
  is_draining_ = true;
  away_ = why;
  if (timeout == absl::InfiniteDuration()) {
    idle_.wait(lock, is_empty);
    return;
  }
  if (idle_.wait_for(lock, absl::ToChronoMicroseconds(timeout), is_empty)) return;
  is_failing_ = true;
  wake_.notify_one();
  idle_.wait(lock, is_empty);
}

Stats BatchingEngine::stats() const {
  const std::lock_guard lock(mu_);
  const Stats stats = StatsLocked();
  metrics_.SetLoad(stats);
  return stats;
}

Stats BatchingEngine::StatsLocked() const {
  return {.running = scheduler_.n_running(),
          .waiting = scheduler_.n_waiting(),
          .kv_tokens_used = scheduler_.blocks().n_used() * kKvBlockTokens,
          .kv_tokens_cached = scheduler_.blocks().n_cached() * kKvBlockTokens,
          .kv_tokens_total = scheduler_.blocks().n_blocks() * kKvBlockTokens,
          .steps = n_steps_,
          .heartbeat_age_seconds =
              absl::ToDoubleSeconds(clock_->Monotonic() - absl::Nanoseconds(heartbeat_ns_.load()))};
}

void BatchingEngine::Loop() {
  std::unique_lock lock(mu_);
  while (!is_stopping_) {
    Beat();
    if (is_failing_) {
      FailAll(lock, away_);
      is_failing_ = false;
    }
    if (ahead_ || !scheduler_.empty()) {
      Turn(lock);
    } else {
      wake_.wait_for(lock, kIdleTurn);
    }
  }
  FailAll(lock, away_);
}

void BatchingEngine::Turn(std::unique_lock<std::mutex>& lock) {
  is_turning_ = true;
  std::vector<Start> starts;
  if (std::optional<Flight> flight = NextFlight(lock, starts)) {
    std::optional<Flight> ahead = FlightAhead(*flight);
    lock.unlock();
    StartAll(starts);
    if (!flight->is_started) StartModel(*flight, nullptr);
    if (ahead && flight->status.ok()) {
      StartModel(*ahead, &*flight);
    } else {
      ahead.reset();
    }
    const StepResult result = FinishStep(*flight);
    lock.lock();
    ++n_steps_;
    ahead_ = std::move(ahead);
    if (result.has_run) scheduler_.Complete(clock_->Monotonic(), result.sampled);
    EndAll(lock, result.endings);
  }
  metrics_.SetLoad(StatsLocked());
  is_turning_ = false;
  if (sequences_.empty()) idle_.notify_all();
}

std::vector<BatchingEngine::Ending> BatchingEngine::EndingsOf(
    const std::vector<Scheduler::Departure>& departures) const {
  std::vector<Ending> endings;
  for (const Scheduler::Departure& departure : departures) {
    const auto stopped = stopped_.find(departure.id);
    endings.push_back({.id = departure.id,
                       .reason = departure.reason == Scheduler::Reason::kCancelled
                                     ? FinishReason::kCancelled
                                     : FinishReason::kDeadline,
                       .status = stopped == stopped_.end() ? absl::OkStatus() : stopped->second});
  }
  return endings;
}

std::optional<BatchingEngine::Flight> BatchingEngine::NextFlight(std::unique_lock<std::mutex>& lock,
                                                                 std::vector<Start>& starts) {
  if (ahead_) {
    // Nobody waits for a step that brings them nothing.
    EndAll(lock, EndingsOf(scheduler_.Depart(clock_->Monotonic())));
    return std::exchange(ahead_, std::nullopt);
  }
  const Scheduler::Step step = scheduler_.Next(clock_->Monotonic());
  const std::vector<Ending> departed = EndingsOf(step.departures);
  metrics_.CountPreemptions(static_cast<int64_t>(step.preempted.size()));
  for (const Scheduler::Admission& admission : step.admitted) {
    if (admission.is_resumed) continue;  // its client has not noticed
    starts.push_back({sequences_.at(admission.id).get(), admission.n_cached});
  }
  Flight flight;
  for (const Scheduler::Chunk& chunk : step.chunks) {
    flight.active.push_back({.sequence = sequences_.at(chunk.id).get(), .chunk = chunk});
  }
  flight.is_steady = scheduler_.n_waiting() == 0 &&
                     std::all_of(flight.active.begin(), flight.active.end(),
                                 [](const Active& item) { return item.chunk.samples; });
  EndAll(lock, departed);
  if (flight.active.empty()) return std::nullopt;
  return flight;
}

std::optional<BatchingEngine::Flight> BatchingEngine::FlightAhead(const Flight& flight) {
  if (!runner_->can_run_ahead() || !flight.is_steady || !flight.status.ok() || is_failing_ ||
      is_stopping_) {
    return std::nullopt;
  }
  for (const Active& item : flight.active) {
    // The token of a sequence that needs its logits is chosen on the host.
    const bool is_of_device =
        item.sequence != nullptr && item.sequence->WantedOf(*runner_) != Wanted::kLogits;
    if (!is_of_device) return std::nullopt;
  }
  const auto chunks = scheduler_.NextAhead(clock_->Monotonic());
  if (!chunks) return std::nullopt;
  Flight ahead;
  ahead.is_steady = true;
  for (const Scheduler::Chunk& chunk : *chunks) {
    ahead.active.push_back({.sequence = sequences_.at(chunk.id).get(), .chunk = chunk});
  }
  return ahead;
}

void BatchingEngine::StartAll(const std::vector<Start>& starts) {
  const absl::Duration now = clock_->Monotonic();
  for (const Start& start : starts) {
    Sequence& sequence = *start.sequence;
    const absl::Duration queue = now - sequence.arrival();
    sequence.MarkAdmitted(now, start.n_cached);
    metrics_.ObserveAdmission(queue);
    metrics_.CountPromptTokens(sequence.n_prompt());
    metrics_.CountPrefixHits(start.n_cached);
    sequence.sink().OnStarted(absl::ToDoubleSeconds(queue));
  }
}

void BatchingEngine::StartModel(Flight& flight, const Flight* before) {
  std::unordered_map<SequenceId, size_t> index_before;
  if (before != nullptr) {
    index_before.reserve(before->active.size());
    for (size_t i = 0; i < before->active.size(); ++i) {
      index_before.emplace(before->active[i].chunk.id, i);
    }
  }
  const uint64_t n_ahead = before == nullptr ? 0 : 1;
  StepBatch batch;
  for (const Active& item : flight.active) {
    const Wanted wanted =
        item.chunk.samples ? item.sequence->WantedOf(*runner_, n_ahead) : Wanted::kNothing;
    batch.sequences.push_back(
        {.first_row = static_cast<int64_t>(batch.tokens.size()),
         .n_rows = item.chunk.n_tokens,
         .n_past = item.chunk.first,
         .blocks = item.chunk.blocks,
         .wanted = wanted,
         .choice = wanted == Wanted::kChosen ? item.sequence->ChoiceOf(n_ahead) : Choice{},
         .id = item.chunk.id});
    if (before != nullptr) {
      batch.tokens.push_back(StepBatch::FromStepBefore(index_before.at(item.chunk.id)));
      continue;
    }
    for (int64_t i = 0; i < item.chunk.n_tokens; ++i) {
      batch.tokens.push_back(item.sequence->TokenAt(item.chunk.first + i));
    }
  }
  batch.on_layer = [this] { Beat(); };
  metrics_.ObserveStep(static_cast<int64_t>(batch.tokens.size()));
  flight.is_started = true;
  flight.start = clock_->Monotonic();
  flight.status = runner_->Start(batch);
}

BatchingEngine::StepResult BatchingEngine::FinishStep(const Flight& flight) {
  StepResult result;
  absl::Status status = flight.status;
  if (status.ok()) status = runner_->Wait();
  if (!status.ok()) {
    status = ModelFailure(status);
    for (const Active& item : flight.active) {
      if (item.sequence == nullptr) continue;
      result.endings.push_back({.id = item.chunk.id, .status = status});
    }
    return result;
  }
  result.has_run = true;
  // The next step has one token for each sequence: it takes no longer than this one, of which a
  // part was over when this one was started ahead.
  const absl::Duration took = clock_->Monotonic() - std::max(flight.start, last_step_end_);
  last_step_end_ = clock_->Monotonic();
  SampleAll(flight.active, flight.is_steady ? took : absl::InfiniteDuration(), result);
  return result;
}

absl::Status BatchingEngine::ModelFailure(const absl::Status& status) const {
  if (IsDeviceBroken(status) && on_device_broken_) return on_device_broken_(status);
  if (absl::IsResourceExhausted(status)) return status;
  return absl::InternalError(absl::StrCat("a step of the model failed: ", status.message()));
}

void BatchingEngine::SampleAll(const std::vector<Active>& active, absl::Duration next_in,
                               StepResult& result) {
  std::vector<size_t> sampling;  // of `active`
  for (size_t i = 0; i < active.size(); ++i) {
    if (active[i].chunk.samples && active[i].sequence != nullptr) sampling.push_back(i);
  }
  const auto n_sampling = static_cast<int64_t>(sampling.size());
  std::vector<std::optional<int32_t>> tokens(sampling.size());
  std::vector<std::optional<Ending>> ended(sampling.size());
  // Delivered here too: what a sink does with a token costs as much as sampling it.
  pool_->ParallelFor(n_sampling, [&](int64_t i) {
    Sequence& sequence = *active[sampling[i]].sequence;
    const SequenceId id = active[sampling[i]].chunk.id;
    absl::StatusOr<Sequence::Emission> emission = sequence.Sample(*runner_, sampling[i]);
    if (!emission.ok()) {
      ended[i] = Ending{.id = id, .status = emission.status()};
      return;
    }
    tokens[i] = emission->delta.tokens.back();
    if (!emission->finish) emission->delta.next_in = next_in;
    DeliverToken(sequence, std::move(emission->delta));
    if (emission->finish) ended[i] = Ending{.id = id, .reason = *emission->finish};
  });
  for (size_t i = 0; i < sampling.size(); ++i) {
    if (tokens[i])
      result.sampled.push_back({.id = active[sampling[i]].chunk.id, .token = *tokens[i]});
    if (ended[i]) result.endings.push_back(*std::move(ended[i]));
  }
}

void BatchingEngine::DeliverToken(Sequence& sequence, Delta delta) {
  const absl::Duration now = clock_->Monotonic();
  if (const auto interval = sequence.MarkToken(now)) {
    metrics_.ObserveNextToken(*interval);
  } else {
    metrics_.ObserveFirstToken(now - sequence.arrival());
  }
  sequence.sink().OnDelta(std::move(delta));
}

void BatchingEngine::EndAll(std::unique_lock<std::mutex>& lock,
                            const std::vector<Ending>& endings) {
  if (endings.empty()) return;
  std::vector<std::unique_ptr<Sequence>> ended;
  for (const Ending& ending : endings) {
    scheduler_.Finish(ending.id);
    stopped_.erase(ending.id);
    auto node = sequences_.extract(ending.id);
    ids_.erase(node.mapped()->request().id);
    ended.push_back(std::move(node.mapped()));
  }
  if (ahead_) {
    for (Active& item : ahead_->active) {
      if (!sequences_.contains(item.chunk.id)) item.sequence = nullptr;
    }
  }
  const std::vector<BlockId> unused = scheduler_.TakeUnusedBlocks();
  lock.unlock();
  // Only this thread has blocks allocated: these stay unused meanwhile.
  for (const BlockId block : unused) runner_->Discard(block);
  const absl::Duration now = clock_->Monotonic();
  for (size_t i = 0; i < ended.size(); ++i) {
    Sequence& sequence = *ended[i];
    if (!endings[i].status.ok()) {
      metrics_.CountFailure(endings[i].status.code());
      sequence.sink().OnFailed(endings[i].status);
      continue;
    }
    // Of a sequence that was stopped from outside, text may still be held back.
    if (std::string text = sequence.FinishText(); !text.empty()) {
      sequence.sink().OnDelta({.text = std::move(text)});
    }
    const Outcome outcome = sequence.MakeOutcome(endings[i].reason, now);
    metrics_.ObserveOutcome(outcome, now - sequence.arrival());
    sequence.sink().OnFinished(outcome);
  }
  if (requests_ != nullptr) requests_->Remove(static_cast<int>(ended.size()));
  ended.clear();
  lock.lock();
}

void BatchingEngine::FailAll(std::unique_lock<std::mutex>& lock, const absl::Status& status) {
  std::vector<Ending> endings;
  for (const auto& [id, sequence] : sequences_) endings.push_back({.id = id, .status = status});
  is_turning_ = true;
  EndAll(lock, endings);
  is_turning_ = false;
  idle_.notify_all();
}

// Of KV memory for one sequence, unless the options say otherwise.
int64_t UsualTokens(const ModelConfig& config) {
  return KvBlocks(std::min(config.max_position, kDefaultKvTokensPerSequence)) * kKvBlockTokens;
}

// Memory is only promised until it is used: a cache that does not fit would be noticed by the
// system's killer, in the middle of requests. `step_bytes` are those of a step's buffers, of which
// the cache has no part.
absl::StatusOr<int64_t> FitToMemory(const ServedModel& model, const Options& options,
                                    int64_t step_bytes, int64_t n_wanted) {
  const std::optional<int64_t> device_bytes = model.free_device_bytes();
  const std::optional<int64_t> free_bytes = device_bytes ? device_bytes : options.free_bytes;
  if (!free_bytes) return n_wanted;
  const int64_t left_bytes = std::max<int64_t>(0, *free_bytes - step_bytes);
  const auto usable_bytes =
      static_cast<int64_t>(static_cast<double>(left_bytes) * options.kv_memory_fraction);
  const int64_t token_bytes = model.kv_token_bytes();
  const int64_t n_tokens = std::min(n_wanted, WholeBlocks(usable_bytes / token_bytes));
  const int64_t n_least = std::min(n_wanted, UsualTokens(model.config()));
  if (n_tokens < n_least) {
    return OutOfMemoryError(absl::StrCat(
        "the KV cache of one sequence of ", n_least, " tokens needs ", n_least * token_bytes,
        " bytes of memory, of the ", *free_bytes, " that are free it may take ", usable_bytes,
        ": a step's buffers need ", step_bytes));
  }
  if (n_tokens < n_wanted) {
    WALSH_LOG(Warning, "the KV cache is made smaller to fit the free memory",
              {"model", options.model_name}, {"tokens_wanted", n_wanted}, {"tokens", n_tokens},
              {"bytes", n_tokens * token_bytes}, {"bytes_free", *free_bytes},
              {"step_bytes", step_bytes});
  }
  return n_tokens;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::shared_ptr<ServedModel> model,
                                                       const Options& options, Clock* clock) {
  Scheduler::Limits limits{.max_sequences = options.max_sequences,
                           .max_waiting = options.max_waiting,
                           .max_waiting_tokens = options.max_waiting_tokens,
                           .max_batch_tokens = options.max_batch_tokens,
                           .has_prefix_cache = options.prefix_cache};
  if (limits.max_sequences < 1 || limits.max_waiting < 0 || limits.max_waiting_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "sequences at once are ", limits.max_sequences, " (at least 1), requests that wait ",
        limits.max_waiting, " and their tokens ", limits.max_waiting_tokens, " (at least 0)"));
  }
  if (limits.max_batch_tokens < limits.max_sequences) {
    return absl::InvalidArgumentError(absl::StrCat("tokens of a step are ", limits.max_batch_tokens,
                                                   ", at least the ", limits.max_sequences,
                                                   " sequences at once, so that each advances"));
  }
  if (!(options.kv_memory_fraction > 0 && options.kv_memory_fraction <= 1) ||
      options.kv_cache_bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the KV cache's part of the free memory is ", options.kv_memory_fraction,
        " (above 0, at most 1), its bytes at most ", options.kv_cache_bytes, " (at least 0)"));
  }
  int64_t n_wanted = options.kv_cache_tokens != 0
                         ? options.kv_cache_tokens
                         : limits.max_sequences * UsualTokens(model->config());
  if (options.kv_cache_bytes > 0) {
    const int64_t n_fitting = WholeBlocks(options.kv_cache_bytes / model->kv_token_bytes());
    if (n_fitting < kKvBlockTokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a KV cache of ", options.kv_cache_bytes, " bytes holds no block of ", kKvBlockTokens,
          " tokens, which needs ", kKvBlockTokens * model->kv_token_bytes()));
    }
    n_wanted = std::min(n_wanted, n_fitting);
  }
  if (n_wanted < kKvBlockTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("the KV cache has ", n_wanted, " tokens, at least ", kKvBlockTokens));
  }
  ServedModel::RunnerLimits runner_limits{
      .n_rows = limits.max_batch_tokens,
      .n_sequences = limits.max_sequences,
      .n_context = std::min(model->config().max_position, WholeBlocks(n_wanted))};
  WALSH_ASSIGN_OR_RETURN(const int64_t n_tokens,
                         FitToMemory(*model, options, model->step_bytes(runner_limits), n_wanted));
  limits.kv_blocks = n_tokens / kKvBlockTokens;
  const int64_t n_context =
      std::min(model->config().max_position, limits.kv_blocks * kKvBlockTokens);
  auto pool = std::make_unique<ThreadPool>(options.n_threads > 0 ? options.n_threads
                                                                 : ThreadPool::HardwareThreads());
  runner_limits.n_blocks = limits.kv_blocks;
  runner_limits.n_context = n_context;
  runner_limits.pool = pool.get();
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<ModelRunner> runner, model->MakeRunner(runner_limits));
  return std::make_unique<BatchingEngine>(std::move(model), options, limits, n_context,
                                          std::move(pool), std::move(runner), clock);
}

}  // namespace walsh::engine
