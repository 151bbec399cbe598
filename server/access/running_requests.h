// How many requests each tenant has running, and that they are not too many.
//
// Threads: safe; the limit holds exactly, however many begin at once.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "server/access/access_control.h"

namespace walsh::access {

class RunningRequests {
 public:
  // RESOURCE_EXHAUSTED (ErrorInfo TENANT_LIMIT, QuotaFailure, RetryInfo) beyond the caller's limit.
  // Each one that began must end.
  absl::Status Begin(const Caller& caller);
  void End(const Caller& caller);

 private:
  absl::Mutex mu_;
  std::map<std::string, int> n_running_ ABSL_GUARDED_BY(mu_);  // by tenant; none is 0
};

}  // namespace walsh::access
