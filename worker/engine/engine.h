// Continuous batching over one loaded model.
//
// One thread runs steps: admit waiting requests, run the model once over all prompts' next chunks
// and all running sequences' last tokens, sample, hand text to the sinks. Knows neither gRPC nor
// devices.
//
// Threads: all public methods are safe from any thread. Sinks are called from the engine's threads:
//          one call at a time for a request, in order, those of several requests side by side. They
//          must not block, and may call the engine's methods but Drain.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "worker/engine/request_count.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::engine {

struct SamplingOptions {
  int max_tokens = 256;
  int min_tokens = 0;
  double temperature = 1.0;  // 0: greedy
  double top_p = 1.0;
  int top_k = 0;  // 0: off
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  uint64_t seed = 0;
  std::vector<std::string> stop = {};
  std::vector<int32_t> stop_tokens = {};
  bool ignore_eos = false;
  bool logprobs = false;
  int top_logprobs = 0;
  bool include_stop = false;
  bool skip_special_tokens = true;
};

struct Request {
  std::string id;  // unique among the requests in the engine
  std::vector<int32_t> prompt = {};
  SamplingOptions sampling = {};
  absl::Time deadline = absl::InfiniteFuture();
  // On the monotonic clock, where the call came in before its text became tokens; unset: Submit.
  std::optional<absl::Duration> arrival = {};
  // The prefix cache shares what it holds among requests of the same salt only.
  std::string cache_salt = {};
};

enum class FinishReason { kStopToken, kLength, kEos, kStopString, kCancelled, kDeadline };

struct TokenLogprob {
  int32_t token = 0;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top;
};

struct Delta {
  std::string text = {};  // whole code points; may be empty
  std::vector<int32_t> tokens = {};
  std::vector<TokenLogprob> logprobs = {};
  // When the next one is likely to follow: a sink may keep this one until then. Infinite when that
  // cannot be told, or when none will follow.
  absl::Duration next_in = absl::InfiniteDuration();
};

// How a request ended. Cancelled and timed-out requests carry what they had until then.
struct Outcome {
  FinishReason reason = FinishReason::kLength;
  std::string matched_stop;
  int prompt_tokens = 0;
  int completion_tokens = 0;
  int cached_tokens = 0;  // of the prompt, that the prefix cache held when it was admitted
  double queue_seconds = 0;
  double ttft_seconds = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;
};

// Receives one request's events: started once it is admitted, deltas, then exactly one of finished
// and failed. A request that leaves the queue without a start finishes without one.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void OnStarted(double queue_seconds) = 0;
  virtual void OnDelta(Delta delta) = 0;
  virtual void OnFinished(const Outcome& outcome) = 0;
  virtual void OnFailed(const absl::Status& status) = 0;
};

struct Options {
  std::string model_name = {};  // label of the metrics
  int max_sequences = 16;       // that run at once
  int max_waiting = 64;         // that wait beside them; more are refused at once
  // Of the prompts that wait, where no sequence is free: about a minute's work of a small model.
  int64_t max_waiting_tokens = 65536;
  int64_t max_batch_tokens = 512;  // of one step, prompts cut into chunks; ≥ max_sequences
  int64_t kv_cache_tokens = 0;     // over all sequences; 0: max_sequences × min(context, 2048)
  int64_t kv_cache_bytes = 0;      // at most, whatever tokens are asked for; 0: no such limit
  bool prefix_cache = true;        // beginnings that prompts share are computed once
  int n_threads = 0;               // 0: the machine's
  // Called where a step broke its device (worker/kernels/device_failure.h), from the engine's
  // thread; returns what its requests fail with. Empty: they fail with the device's own status.
  std::function<absl::Status(const absl::Status& cause)> on_device_broken = {};
  // What may still be allocated, once the weights are loaded; unset: not known. A KV cache that
  // would not fit into this part of what a step's buffers leave of it is made smaller.
  std::optional<int64_t> free_bytes = {};
  double kv_memory_fraction = 0.9;  // the rest is for what nobody counts, and for other models
  // Counts this engine's requests beside those of others; may be null.
  std::shared_ptr<RequestCount> requests = nullptr;
};

struct Stats {
  int running = 0;
  int waiting = 0;
  // Of whole blocks: those that requests hold, and those that only the prefix cache does.
  int64_t kv_tokens_used = 0;
  int64_t kv_tokens_cached = 0;
  int64_t kv_tokens_total = 0;
  uint64_t steps = 0;
  // Since the loop last turned (idle turns count) or a step's pass last went on to another layer.
  double heartbeat_age_seconds = 0;
};

class ServedModel;  // worker/engine/served_model.h

class Engine {
 public:
  // INVALID_ARGUMENT for options that make no engine; RESOURCE_EXHAUSTED when `free_bytes` does not
  // hold the KV cache of one sequence.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::shared_ptr<ServedModel> model,
                                                        const Options& options, Clock* clock);
  // Requests that are still here fail with what Drain was given, else with UNAVAILABLE.
  virtual ~Engine() = default;

  // Accepts a request or refuses it at once: INVALID_ARGUMENT (empty prompt, ids outside the
  // vocabulary, id in use, prompt of context_tokens() or more), RESOURCE_EXHAUSTED (queue full),
  // what Drain was given (draining). max_tokens is cut to what the context leaves.
  virtual absl::Status Submit(Request request, std::shared_ptr<Sink> sink) = 0;
  // When a request that was refused for a full queue may come again, by the recent rate of tokens.
  virtual absl::Duration RetryDelay() const = 0;
  // The sequence leaves before the next step; its sink gets OnFinished with kCancelled. Unknown ids
  // are ignored.
  virtual void Cancel(const std::string& id) = 0;
  // The same for a request that does not end by its client's wish, such as one that is not read:
  // its sink gets OnFailed with `why`, and it is counted as failed. Of a Cancel and a Fail
  // the first counts.
  virtual void Fail(const std::string& id, const absl::Status& why) = 0;
  // Refuses new requests; returns when the accepted ones are done, which fail after the timeout.
  // `why`: the status of those that are refused or fail, from now on.
  virtual void Drain(absl::Duration timeout, const absl::Status& why) = 0;
  // Also brings the gauges up to date: a loop that is stuck cannot do so itself.
  virtual Stats stats() const = 0;
  // Tokens of prompt and output together: the model's context, or the KV cache if that is smaller.
  virtual int64_t context_tokens() const = 0;
  // Memory that the KV cache takes when all of it is in use. It comes page by page as sequences
  // need it. What the prefix cache keeps of them stays until other blocks are needed or the engine
  // goes; the rest goes when they end, so that an idle engine without a prefix cache takes none.
  virtual int64_t kv_cache_bytes() const = 0;
  virtual const ServedModel& model() const = 0;
};

}  // namespace walsh::engine
