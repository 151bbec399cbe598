#include "worker/service/model_metrics.h"

#include "common/metrics.h"

namespace walsh::service {
namespace {

auto& MemoryFamily() {
  static auto& family =
      metrics::Gauge("walsh_model_memory_bytes", "Memory of a loaded model's weights.");
  return family;
}

}  // namespace

void ObserveModelLoad(const std::string& model_id, absl::Duration elapsed, int64_t memory_bytes) {
  static auto& seconds =
      metrics::Histogram("walsh_model_load_seconds", "From the request to load until it serves.");
  seconds.Add({{"model_name", model_id}}, metrics::RequestLatencyBuckets())
      .Observe(absl::ToDoubleSeconds(elapsed));
  MemoryFamily().Add({{"model_name", model_id}}).Set(static_cast<double>(memory_bytes));
}

void CountModelLoadFailure(const std::string& model_id, absl::StatusCode code) {
  static auto& failures = metrics::Counter("walsh_model_load_failures_total", "Failed loads.");
  failures.Add({{"model_name", model_id}, {"code", absl::StatusCodeToString(code)}}).Increment();
}

void ForgetModelMemory(const std::string& model_id) {
  MemoryFamily().Remove(&MemoryFamily().Add({{"model_name", model_id}}));
}

}  // namespace walsh::service
