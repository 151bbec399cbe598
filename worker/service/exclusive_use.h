// Jobs or models, never both at a time: --serve-while-quantizing=exclusive.
//
// The agent asks before it asks the coordinator for a job, and the model store before it loads a
// model. A load that comes while the coordinator is being asked waits for its answer: to break the
// call off could leave a job leased to a worker that does not know of it. So that this takes no
// longer than a moment the agent asks with kLeaseWait. A load that waits comes before the next such
// question.
//
// Errors:  UNAVAILABLE (ErrorInfo JOB_RUNNING, RetryInfo): the model must wait for the job
// Threads: safe
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace walsh::service {

class ExclusiveUse {
 public:
  // For how long the coordinator is asked for a job in one call.
  static constexpr absl::Duration kLeaseWait = absl::Milliseconds(500);

  // Waits until no model is loaded, being loaded or waiting to be; returns whether that is so
  // within `at_most`. Then no load begins until EndJob().
  bool BeginAsking(absl::Duration at_most);
  // There is a job.
  void BeginJob(std::string job_name);
  // The job needs the device no more, or there was none. May be called twice.
  void EndJob();

  // Of a model that is to be loaded. OK: no job is asked for until EndModel().
  absl::Status BeginModel();
  // It has been unloaded, or was not loaded after all.
  void EndModel();

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  bool is_asking_ = false;
  std::string job_name_;  // empty: none runs
  int n_models_ = 0;      // that are loaded, being loaded or waiting to be
};

}  // namespace walsh::service
