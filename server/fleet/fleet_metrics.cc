#include "server/fleet/fleet_metrics.h"

#include "common/metrics.h"

namespace walsh::fleet {
namespace {

// Every state has its series from the start, so that a query for it never finds nothing.
void Set(prometheus::Family<prometheus::Gauge>& family,
         const google::protobuf::EnumDescriptor* states, const std::map<int, int>& counts) {
  for (int i = 1; i < states->value_count(); ++i) {  // 0 is UNSPECIFIED
    const auto it = counts.find(states->value(i)->number());
    family.Add({{"state", states->value(i)->name()}}).Set(it == counts.end() ? 0 : it->second);
  }
}

}  // namespace

void SetFleetMetrics(const std::vector<v1::Worker>& workers,
                     const std::map<std::string, v1::Model::State>& models) {
  static auto& worker_family = metrics::Gauge("walsh_workers", "Known workers by state.");
  static auto& model_family = metrics::Gauge("walsh_models", "Published models by state.");
  std::map<int, int> worker_counts;
  for (const v1::Worker& worker : workers) ++worker_counts[worker.state()];
  Set(worker_family, v1::Worker::State_descriptor(), worker_counts);
  std::map<int, int> model_counts;
  for (const auto& [id, state] : models) ++model_counts[state];
  Set(model_family, v1::Model::State_descriptor(), model_counts);
}

}  // namespace walsh::fleet
