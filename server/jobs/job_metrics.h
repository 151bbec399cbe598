// What Prometheus sees of jobs: walsh_quantization_* of docs/metrics.md that the coordinator
// counts.
//
// Threads: safe.
#pragma once

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/jobs/job.h"
#include "server/jobs/job_store.h"

namespace walsh::jobs {

class JobMetrics {
 public:
  JobMetrics();
  JobMetrics(const JobMetrics&) = delete;
  JobMetrics& operator=(const JobMetrics&) = delete;

  // Sets walsh_quantization_jobs{state} to what is stored.
  absl::Status CountStored(const JobStore& store);
  // A job that is found with its worker when the coordinator starts.
  void OnFoundLeased(const JobRecord& record);
  void OnCreate(const JobRecord& record);
  void OnTransition(const JobRecord& before, const JobRecord& after);
  void OnDelete(const JobRecord& record);
  void OnLeaseExpired();
  // How long the job that has waited longest in the queue has waited; zero where none waits.
  void SetOldestQueued(absl::Duration age);

 private:
  struct Families;
  void OnFinish(const JobRecord& record);
  Families& families_;
};

}  // namespace walsh::jobs
