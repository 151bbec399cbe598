#include "common/reloaded.h"

#include "common/log.h"
#include "common/metrics.h"

namespace walsh {
namespace {

prometheus::Counter& Reloads(const std::string& name, const char* result) {
  return metrics::Counter("walsh_config_reloads_total",
                          "Changed files that were taken (ok) or left aside for the last good "
                          "ones (failed).")
      .Add({{"config", name}, {"result", result}});
}

void SetSuccessful(const std::string& name, bool is_successful) {
  metrics::Gauge("walsh_config_last_reload_successful",
                 "1 while the files as they are are in use, 0 while they are bad and older ones "
                 "are.")
      .Add({{"config", name}})
      .Set(is_successful ? 1 : 0);
}

}  // namespace

ReloadReport::ReloadReport(std::string name) : name_(std::move(name)) {
  for (const char* result : {"ok", "failed"}) Reloads(name_, result);
  SetSuccessful(name_, true);
}

void ReloadReport::Loaded(bool is_change) {
  if (is_change) {
    Reloads(name_, "ok").Increment();
    WALSH_LOG(Info, "changed files are in use", {"config", name_});
  } else if (!last_.ok()) {
    WALSH_LOG(Info, "files are as they were again", {"config", name_});
  }
  SetSuccessful(name_, true);
  last_ = absl::OkStatus();
}

void ReloadReport::Failed(const absl::Status& status) {
  if (status == last_) return;
  last_ = status;
  Reloads(name_, "failed").Increment();
  SetSuccessful(name_, false);
  WALSH_LOG(Warning, "changed files are bad; the last good ones stay in use", {"config", name_},
            {"error", status});
}

}  // namespace walsh
