#include "common/metrics.h"

#include <prometheus/text_serializer.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "common/version.h"
#include "common/vllm_metrics.h"

namespace walsh::metrics {

std::shared_ptr<prometheus::Registry> Registry() {
  // Never destroyed: counters are used by threads that may outlive main.
  static auto* const registry =
      new std::shared_ptr<prometheus::Registry>(std::make_shared<prometheus::Registry>());
  return *registry;
}

std::string Render(const RenderOptions& options) {
  std::vector<prometheus::MetricFamily> families = Registry()->Collect();
  if (options.vllm_names) {
    std::vector<prometheus::MetricFamily> aliases = VllmAliases(families);
    std::move(aliases.begin(), aliases.end(), std::back_inserter(families));
  }
  return prometheus::TextSerializer().Serialize(families);
}

void RegisterBuildInfo() {
  Gauge("walsh_build_info", "What this process was built from; always 1.")
      .Add({{"version", std::string(Version())},
            {"revision", std::string(Revision())},
            {"cuda", HasCuda() ? "true" : "false"}})
      .Set(1);
}

prometheus::Family<prometheus::Counter>& Counter(const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*Registry());
}

prometheus::Family<prometheus::Gauge>& Gauge(const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*Registry());
}

prometheus::Family<prometheus::Histogram>& Histogram(const std::string& name,
                                                     const std::string& help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(*Registry());
}

// The lists are vLLM's, so that dashboards made for it read ours; the finest steps are added for
// models that are smaller than those it was made for.
const Buckets& TimeToFirstTokenBuckets() {
  static const auto* const buckets =
      new Buckets{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
                  1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
  return *buckets;
}

const Buckets& InterTokenLatencyBuckets() {
  static const auto* const buckets =
      new Buckets{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1,  0.15, 0.2,  0.3,
                  0.4,   0.5,    0.75,  1.0,  2.5,   5.0,  7.5,   10.0, 20.0, 40.0, 80.0};
  return *buckets;
}

const Buckets& RequestLatencyBuckets() {
  static const auto* const buckets =
      new Buckets{0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
                  30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};
  return *buckets;
}

const Buckets& TokenCountBuckets() {
  static const auto* const buckets =
      new Buckets{1,    2,    5,     10,    20,    50,     100,    200,    500,    1000,
                  2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000};
  return *buckets;
}

const Buckets& JobDurationBuckets() {
  static const auto* const buckets =
      new Buckets{1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400};
  return *buckets;
}

}  // namespace walsh::metrics
