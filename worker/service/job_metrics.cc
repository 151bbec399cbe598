#include "worker/service/job_metrics.h"

#include <mutex>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/metrics.h"

namespace walsh::service {
namespace {

using metrics::Counter;
using metrics::Histogram;

// Relative errors of a linear's output: from what 8 bits leave to total loss.
const metrics::Buckets& ErrorBuckets() {
  static const auto* const buckets =
      new metrics::Buckets{1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0};
  return *buckets;
}

// An architecture has a dozen kinds of linears at most; what is beyond them shares one label, so
// that no model makes more series than these.
constexpr size_t kLinearKindsMax = 16;

// "mlp.down_proj" of "layers.3.mlp.down_proj".
std::string LinearKind(const pipeline::LinearReport& linear) {
  static std::mutex mutex;
  static auto* const known = new std::set<std::string>;
  const std::string prefix = absl::StrCat("layers.", linear.layer, ".");
  if (!linear.name.starts_with(prefix)) return "other";
  std::string kind = linear.name.substr(prefix.size());
  const std::lock_guard lock(mutex);
  if (known->size() < kLinearKindsMax) known->insert(kind);
  return known->count(kind) > 0 ? kind : "other";
}

struct Families {
  prometheus::Histogram& layer_seconds =
      Histogram("walsh_quantization_layer_seconds", "From one finished layer to the next.")
          .Add({}, metrics::JobDurationBuckets());
  prometheus::Family<prometheus::Histogram>& layer_error = Histogram(
      "walsh_quantization_layer_error",
      "tr(dW H dWt) / tr(W H Wt) of each quantized linear over the calibration inputs, by "
      "kind of linear.");
  // The only reason there is; the report tells the details of each.
  prometheus::Counter& fallbacks =
      Counter("walsh_quantization_fallbacks_total",
              "Linears that were rounded to nearest instead, by reason.")
          .Add({{"reason", "factorization"}});
  prometheus::Counter& damp_retries =
      Counter("walsh_quantization_damp_retries_total",
              "Linears whose Hessian needed more than the damping asked for.")
          .Add({});
  prometheus::Counter& calibration_tokens =
      Counter("walsh_quantization_calibration_tokens_total", "Tokens that calibration ran on.")
          .Add({});
  prometheus::Counter& yield_seconds =
      Counter("walsh_quantization_yield_seconds_total",
              "Time that jobs stood still for the requests of models.")
          .Add({});
  prometheus::Counter& artifact_bytes =
      Counter("walsh_artifact_bytes_total", "Bytes of artifacts, by operation.")
          .Add({{"op", "write"}});
  prometheus::Counter& artifact_errors =
      Counter("walsh_artifact_errors_total", "Operations on artifacts that failed.")
          .Add({{"op", "write"}});
};

Families& GetFamilies() {
  static auto* const families = new Families;
  return *families;
}

void ObserveLinear(const pipeline::LinearReport& linear) {
  GetFamilies()
      .layer_error.Add({{"linear", LinearKind(linear)}}, ErrorBuckets())
      .Observe(linear.relative_error);
  if (!linear.fallback.empty()) GetFamilies().fallbacks.Increment();
}

}  // namespace

void RegisterJobMetrics() { GetFamilies(); }

void JobProgressMetrics::Observe(const pipeline::JobProgress& progress, absl::Duration now) {
  for (const pipeline::LinearReport& linear : progress.linears) ObserveLinear(linear);
  if (layer_start_ == absl::InfiniteDuration()) {
    // Before the first layer; those of an earlier run are done.
    layers_done_ = progress.layers_done;
    if (progress.layer >= 0) layer_start_ = now;
  } else if (progress.layers_done > layers_done_) {
    // Fast layers are reported several at a time.
    const int64_t n_layers = progress.layers_done - layers_done_;
    const double seconds = absl::ToDoubleSeconds(now - layer_start_);
    for (int64_t i = 0; i < n_layers; ++i) {
      GetFamilies().layer_seconds.Observe(seconds / static_cast<double>(n_layers));
    }
    layers_done_ = progress.layers_done;
    layer_start_ = now;
  }
}

void ObserveJobReport(const pipeline::JobReport& report, double damp_asked) {
  GetFamilies().calibration_tokens.Increment(static_cast<double>(report.calibration_tokens));
  for (const pipeline::LinearReport& linear : report.linears) {
    if (linear.damp > damp_asked) GetFamilies().damp_retries.Increment();
  }
}

void CountYield(absl::Duration waited) {
  GetFamilies().yield_seconds.Increment(absl::ToDoubleSeconds(waited));
}

void CountArtifactWritten(int64_t bytes) {
  GetFamilies().artifact_bytes.Increment(static_cast<double>(bytes));
}

void CountArtifactError() { GetFamilies().artifact_errors.Increment(); }

}  // namespace walsh::service
