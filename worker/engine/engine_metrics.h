// What a model's engine counts, under the names of docs/metrics.md and the label model_name.
//
// Intervals are monotonic: queue from arrival to admission, prefill from admission to the first
// token, decode from the first to the last token, time to first token from arrival.
//
// Threads: safe.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/metrics.h"
#include "worker/engine/engine.h"

namespace walsh::engine {

class EngineMetrics {
 public:
  struct CacheConfig {
    int64_t block_tokens = 0;
    int64_t n_blocks = 0;
    bool has_prefix_cache = false;
  };
  EngineMetrics(const std::string& model_name, const CacheConfig& cache);
  // Gauges vanish with the last object of their model; counters and histograms stay, as rates need
  // them.
  EngineMetrics(const EngineMetrics&) = delete;
  EngineMetrics& operator=(const EngineMetrics&) = delete;

  // `reason`: "queue_full", "context_length", "draining" or "invalid".
  void CountRejection(std::string_view reason);
  void ObserveStep(int64_t n_tokens);
  void CountPromptTokens(int64_t n_tokens) { prompt_tokens_.Increment(ToDouble(n_tokens)); }
  void CountPrefixHits(int64_t n_tokens) { prefix_hits_.Increment(ToDouble(n_tokens)); }
  void CountPreemptions(int64_t n) { preemptions_.Increment(ToDouble(n)); }
  void ObserveAdmission(absl::Duration queue);
  void ObserveFirstToken(absl::Duration since_arrival);
  void ObserveNextToken(absl::Duration interval);
  // A deadline that came before the first token is a failure, as its client is told.
  void ObserveOutcome(const Outcome& outcome, absl::Duration since_arrival);
  void CountFailure(absl::StatusCode code);
  void SetLoad(const Stats& stats);

 private:
  // Two objects of one model share its gauges.
  class SharedGauge {
   public:
    SharedGauge(prometheus::Family<prometheus::Gauge>& family, const prometheus::Labels& labels);
    ~SharedGauge();
    SharedGauge(const SharedGauge&) = delete;
    SharedGauge& operator=(const SharedGauge&) = delete;
    void Set(double value) { gauge_.Set(value); }

   private:
    prometheus::Family<prometheus::Gauge>& family_;
    const prometheus::Labels labels_;
    prometheus::Gauge& gauge_;
  };

  static double ToDouble(int64_t n) { return static_cast<double>(n); }

  const prometheus::Labels labels_;
  SharedGauge running_;
  SharedGauge waiting_;
  SharedGauge kv_usage_;
  SharedGauge heartbeat_age_;
  SharedGauge cache_config_;
  prometheus::Counter& prompt_tokens_;
  prometheus::Counter& prefix_hits_;
  prometheus::Counter& preemptions_;
  prometheus::Counter& generation_tokens_;
  prometheus::Counter& cancelled_;
  prometheus::Histogram& time_to_first_token_;
  prometheus::Histogram& inter_token_latency_;
  prometheus::Histogram& time_per_output_token_;
  prometheus::Histogram& e2e_latency_;
  prometheus::Histogram& queue_time_;
  prometheus::Histogram& prefill_time_;
  prometheus::Histogram& decode_time_;
  prometheus::Histogram& prompt_length_;
  prometheus::Histogram& generation_length_;
  prometheus::Histogram& iteration_tokens_;
};

// A request that was refused before it reached the engine of the model: its text gave no tokens.
void CountRejection(const std::string& model_name, std::string_view reason);
// A request that its client cancelled before it reached the engine of the model.
void CountCancellation(const std::string& model_name);

// "stop", "length", "eos", "stop_sequence", "cancelled" or "deadline".
const char* FinishReasonName(FinishReason reason);

}  // namespace walsh::engine
