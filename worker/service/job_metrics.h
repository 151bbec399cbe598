// What a worker counts about quantization.
//
// Threads: safe, but one JobProgressMetrics belongs to one job's thread.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::service {

// Registers all of them, so that they are there before their first event: a counter that appears
// with it looks to rate() and increase() as if it had always had that value.
void RegisterJobMetrics();

// Follows a job's progress and observes each layer's time and errors as they come.
class JobProgressMetrics {
 public:
  void Observe(const pipeline::JobProgress& progress, absl::Duration now);

 private:
  int64_t layers_done_ = 0;
  absl::Duration layer_start_ = absl::InfiniteDuration();
};

// `damp_asked` is the job's own damping; linears that needed more are counted as retries.
void ObserveJobReport(const pipeline::JobReport& report, double damp_asked);
// Time that a job waited for requests.
void CountYield(absl::Duration waited);
void CountArtifactWritten(int64_t bytes);
void CountArtifactError();

}  // namespace walsh::service
