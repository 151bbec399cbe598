#include "worker/engine/engine_metrics.h"

#include <map>
#include <mutex>
#include <utility>

namespace walsh::engine {
namespace {

using metrics::Counter;
using metrics::Gauge;
using metrics::Histogram;

using GaugeFamily = prometheus::Family<prometheus::Gauge>;

constexpr const char* kRejectionReasons[] = {"queue_full", "context_length", "draining", "invalid"};
// Of outcomes that count as a success.
constexpr FinishReason kSuccesses[] = {FinishReason::kStopToken, FinishReason::kLength,
                                       FinishReason::kEos, FinishReason::kStopString,
                                       FinishReason::kDeadline};

// Prometheus has one gauge for equal labels, whoever adds it, and frees it for all at once.
std::mutex& UsersMutex() {
  static std::mutex mu;
  return mu;
}
// Guarded by UsersMutex.
int& NumUsers(const GaugeFamily& family, const prometheus::Labels& labels) {
  static auto* const users = new std::map<std::pair<const GaugeFamily*, prometheus::Labels>, int>;
  return (*users)[{&family, labels}];
}

auto& RejectionsFamily() {
  static auto& family = Counter("walsh_admission_rejections_total",
                                "Requests refused before they were queued, by reason.");
  return family;
}
auto& CancelledFamily() {
  static auto& family = Counter("walsh_request_cancelled_total",
                                "Requests that their client cancelled before the end.");
  return family;
}
prometheus::Counter& Successes(const std::string& model_name, FinishReason reason) {
  static auto& family =
      Counter("walsh_request_success_total", "Requests that ended, by finished_reason.");
  return family.Add({{"model_name", model_name}, {"finished_reason", FinishReasonName(reason)}});
}

}  // namespace

const char* FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStopToken:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kStopString:
      return "stop_sequence";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
  }
  return "unknown";
}

EngineMetrics::EngineMetrics(const std::string& model_name, const CacheConfig& cache)
    : labels_{{"model_name", model_name}},
      running_(Gauge("walsh_num_requests_running", "Requests that hold a sequence of the engine."),
               labels_),
      waiting_(Gauge("walsh_num_requests_waiting", "Accepted requests that wait."), labels_),
      kv_usage_(
          Gauge("walsh_kv_cache_usage_perc", "Share of the KV cache that requests hold, 0 to 1."),
          labels_),
      heartbeat_age_(Gauge("walsh_scheduler_heartbeat_age_seconds",
                           "Time since the engine's loop last turned; idle turns count."),
                     labels_),
      cache_config_(Gauge("walsh_kv_cache_config_info", "What the KV cache is made of; always 1."),
                    {{"model_name", model_name},
                     {"block_size", std::to_string(cache.block_tokens)},
                     {"num_blocks", std::to_string(cache.n_blocks)},
                     {"prefix_cache", cache.has_prefix_cache ? "true" : "false"}}),
      prompt_tokens_(
          Counter("walsh_prompt_tokens_total", "Prompt tokens of admitted requests.").Add(labels_)),
      prefix_hits_(Counter("walsh_prefix_cache_hit_tokens_total",
                           "Prompt tokens that the prefix cache held.")
                       .Add(labels_)),
      preemptions_(Counter("walsh_num_preemptions_total",
                           "Times that a running request gave its KV cache to an earlier one.")
                       .Add(labels_)),
      generation_tokens_(
          Counter("walsh_generation_tokens_total", "Tokens generated.").Add(labels_)),
      cancelled_(CancelledFamily().Add(labels_)),
      time_to_first_token_(Histogram("walsh_time_to_first_token_seconds",
                                     "From a request's arrival to its first token.")
                               .Add(labels_, metrics::TimeToFirstTokenBuckets())),
      inter_token_latency_(
          Histogram("walsh_inter_token_latency_seconds", "Between successive tokens of a request.")
              .Add(labels_, metrics::InterTokenLatencyBuckets())),
      time_per_output_token_(Histogram("walsh_request_time_per_output_token_seconds",
                                       "Mean time per token after the first, by request.")
                                 .Add(labels_, metrics::InterTokenLatencyBuckets())),
      e2e_latency_(
          Histogram("walsh_e2e_request_latency_seconds", "From a request's arrival to its end.")
              .Add(labels_, metrics::RequestLatencyBuckets())),
      queue_time_(Histogram("walsh_request_queue_time_seconds", "From arrival to admission.")
                      .Add(labels_, metrics::RequestLatencyBuckets())),
      prefill_time_(
          Histogram("walsh_request_prefill_time_seconds", "From admission to the first token.")
              .Add(labels_, metrics::RequestLatencyBuckets())),
      decode_time_(
          Histogram("walsh_request_decode_time_seconds", "From the first to the last token.")
              .Add(labels_, metrics::RequestLatencyBuckets())),
      prompt_length_(Histogram("walsh_request_prompt_tokens", "Prompt tokens of a request.")
                         .Add(labels_, metrics::TokenCountBuckets())),
      generation_length_(
          Histogram("walsh_request_generation_tokens", "Tokens generated for a request.")
              .Add(labels_, metrics::TokenCountBuckets())),
      iteration_tokens_(Histogram("walsh_iteration_tokens", "Tokens of one step of the engine.")
                            .Add(labels_, metrics::TokenCountBuckets())) {
  cache_config_.Set(1);
  // A counter that appears with its first event looks to rate() as if it had always had that value.
  for (const char* reason : kRejectionReasons) {
    RejectionsFamily().Add({{"model_name", model_name}, {"reason", reason}});
  }
  for (const FinishReason reason : kSuccesses) Successes(model_name, reason);
}

EngineMetrics::SharedGauge::SharedGauge(GaugeFamily& family, const prometheus::Labels& labels)
    : family_(family), labels_(labels), gauge_([&]() -> prometheus::Gauge& {
        const std::lock_guard lock(UsersMutex());
        ++NumUsers(family, labels);
        return family.Add(labels);
      }()) {}

EngineMetrics::SharedGauge::~SharedGauge() {
  const std::lock_guard lock(UsersMutex());
  if (--NumUsers(family_, labels_) == 0) family_.Remove(&gauge_);
}

void EngineMetrics::SetLoad(const Stats& stats) {
  running_.Set(stats.running);
  waiting_.Set(stats.waiting);
  kv_usage_.Set(stats.kv_tokens_total == 0
                    ? 0
                    : ToDouble(stats.kv_tokens_used) / ToDouble(stats.kv_tokens_total));
  heartbeat_age_.Set(stats.heartbeat_age_seconds);
}

void CountRejection(const std::string& model_name, std::string_view reason) {
  RejectionsFamily().Add({{"model_name", model_name}, {"reason", std::string(reason)}}).Increment();
}

void CountCancellation(const std::string& model_name) {
  CancelledFamily().Add({{"model_name", model_name}}).Increment();
}

void EngineMetrics::CountRejection(std::string_view reason) {
  engine::CountRejection(labels_.at("model_name"), reason);
}

void EngineMetrics::ObserveStep(int64_t n_tokens) { iteration_tokens_.Observe(ToDouble(n_tokens)); }

void EngineMetrics::ObserveAdmission(absl::Duration queue) {
  queue_time_.Observe(absl::ToDoubleSeconds(queue));
}

void EngineMetrics::ObserveFirstToken(absl::Duration since_arrival) {
  generation_tokens_.Increment();
  time_to_first_token_.Observe(absl::ToDoubleSeconds(since_arrival));
}

void EngineMetrics::ObserveNextToken(absl::Duration interval) {
  generation_tokens_.Increment();
  inter_token_latency_.Observe(absl::ToDoubleSeconds(interval));
}

void EngineMetrics::ObserveOutcome(const Outcome& outcome, absl::Duration since_arrival) {
  if (outcome.reason == FinishReason::kCancelled) {
    cancelled_.Increment();
    return;
  }
  if (outcome.reason == FinishReason::kDeadline && outcome.completion_tokens == 0) {
    CountFailure(absl::StatusCode::kDeadlineExceeded);
    return;
  }
  Successes(labels_.at("model_name"), outcome.reason).Increment();
  e2e_latency_.Observe(absl::ToDoubleSeconds(since_arrival));
  prompt_length_.Observe(outcome.prompt_tokens);
  generation_length_.Observe(outcome.completion_tokens);
  if (outcome.completion_tokens == 0) return;
  prefill_time_.Observe(outcome.prefill_seconds);
  decode_time_.Observe(outcome.decode_seconds);
  if (outcome.completion_tokens > 1) {
    time_per_output_token_.Observe(outcome.decode_seconds / (outcome.completion_tokens - 1));
  }
}

void EngineMetrics::CountFailure(absl::StatusCode code) {
  static auto& family = Counter("walsh_request_failure_total", "Requests that failed, by code.");
  family.Add({{"model_name", labels_.at("model_name")}, {"code", absl::StatusCodeToString(code)}})
      .Increment();
}

}  // namespace walsh::engine
