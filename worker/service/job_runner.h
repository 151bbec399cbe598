// Runs a leased job from its first report to its last: quantize, publish, complete.
//
// What decides between workers is the fencing token. The artifact is moved to its name only after
// the coordinator accepted the report of stage PUBLISHING with this token, and the result is kept
// on disk until the coordinator has it, so a worker that dies in between loses nothing: whoever
// gets the job next on this data folder finds the published model, made by the same job, and
// completes with its result.
//
// A job that this worker cannot run, for want of memory or because its device or version does not
// take the model, is refused before its work, and left to other workers. What fails later, whatever
// its code, is the job's error.
//
// A model that fails its job's quality gate is not published: its artifact is moved to the rejected
// ones, and the job ends FAILED with the result's figures.
//
// A job's finished layers are kept in a folder of checkpoints until it has ended, for whichever
// worker runs it next. A worker that stops finishes the layer that it is in, where that is kept.
//
// A failure that has broken the device is told to the worker before it is told to the coordinator,
// so that no other lease is taken in between.
//
// Threads: Run is called from one thread. It quantizes on threads of its own that are nicer than
//          the engine's, so that traffic keeps its latency beside a job; what it loads afterwards
//          runs as nice as the caller.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/clock.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "worker/objects/object_store.h"
#include "worker/pipeline/checkpoint_store.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/service/coordinator_link.h"
#include "worker/service/exclusive_use.h"
#include "worker/service/held_lease.h"
#include "worker/service/job_conversion.h"
#include "worker/service/memory_check.h"
#include "worker/service/model_sources.h"
#include "worker/service/model_store.h"
#include "worker/service/rejected_artifacts.h"

namespace walsh::service {

class JobRunner {
 public:
  using Quantize = std::function<absl::StatusOr<pipeline::JobReport>(
      const pipeline::JobSpec&, ThreadPool&, const pipeline::Observer&)>;
  struct Options {
    std::string worker_id;
    std::string results_directory;          // where results wait for the coordinator
    RejectedArtifacts* rejected = nullptr;  // what quality gates refuse; outlives the runner
    int n_threads = 0;                      // 0: the machine's
    PathResolver resolve;
    ModelSources* sources = nullptr;  // null: references are paths. Outlives the runner
    std::string device = "cpu";       // of results and messages
    // Where jobs keep their finished layers, shared with the workers that may go on with them.
    // Empty: nowhere.
    std::string checkpoints_directory;
    // Likewise, in the place of the directory; null: not. Outlives the runner.
    objects::ObjectStore* checkpoint_objects = nullptr;
    std::string kernel_family;  // of the device's backend (worker/pipeline/backend.h)
    // Reports of progress that have waited for longer become one.
    absl::Duration report_lag_max = absl::Seconds(5);
    std::function<absl::StatusOr<pipeline::JobPlan>(const pipeline::JobSpec&)> plan;
    std::function<absl::StatusOr<WorkerMemory>()> memory;
    Quantize quantize;  // pipeline::RunJob
    // Called with a status that IsDeviceBroken, on the thread of Run. No job can run any more.
    std::function<void(const absl::Status&)> on_device_broken;
    // Told that the job needs the device no more, before it loads its model; may be null.
    ExclusiveUse* exclusive = nullptr;
  };
  JobRunner(Options options, CoordinatorLink* coordinator, ModelStore* models, Clock* clock);

  void Run(const internal::v1::Lease& lease, HeldLease& held);

 private:
  struct Outcome {
    v1::QuantizationJob::Result result;
    v1::Model model;
  };
  class ProgressReporter;

  // What is told of a failure beside its status.
  struct Failure {
    bool is_refused = false;  // it is about this worker: another might run the job
    // What the job's quality gate refused.
    std::optional<v1::QuantizationJob::Result> rejected_result = {};
  };
  absl::StatusOr<Outcome> RunToPublished(const internal::v1::Lease& lease, HeldLease& held,
                                         Failure& failure);
  // FAILED_PRECONDITION, reason QUALITY_GATE, for a model that fails its gate, which is kept apart.
  absl::Status CheckGate(const std::string& directory, const internal::v1::Lease& lease,
                         const pipeline::JobReport& report, Outcome& outcome, Failure& failure);
  // The outcome of an earlier holder of the same job, when it published.
  absl::StatusOr<Outcome> FindEarlier(const internal::v1::Lease& lease, const HeldLease& held);
  // In the artifact store, where there is one: what is acknowledged outlives this machine.
  absl::Status KeepArtifact(const internal::v1::Lease& lease, HeldLease& held);
  absl::StatusOr<pipeline::JobReport> QuantizeInto(const std::string& directory,
                                                   const v1::QuantizationJob& job, HeldLease& held,
                                                   Failure& failure);
  // On the job's own thread, which may throw.
  absl::StatusOr<pipeline::JobReport> FetchAndQuantize(const std::string& directory,
                                                       const v1::QuantizationJob& job,
                                                       HeldLease& held, Failure& failure);
  // Refuses a job now that would not fit later: it may have been validated by another worker, or by
  // none.
  absl::Status CheckFits(const pipeline::JobSpec& spec) const;
  // Returns once the coordinator accepted, or why it never will.
  absl::Status ReportPublishing(HeldLease& held);
  absl::Status Publish(const std::string& directory, const internal::v1::Lease& lease,
                       Outcome& outcome);
  void LoadIfWanted(const internal::v1::Lease& lease, const HeldLease& held, Outcome& outcome);
  // Tells the coordinator how the job ended. An outcome that it will never take becomes an error,
  // so that the job ends.
  void Complete(const absl::StatusOr<Outcome>& outcome, const Failure& failure, HeldLease& held);
  // OK once the coordinator has it; ABORTED without the lease; else why it never will.
  absl::Status Deliver(const internal::v1::CompleteJobRequest& request, HeldLease& held);

  absl::Status Report(const v1::QuantizationJobEvent& event, HeldLease& held);
  std::string ResultPath(const std::string& job_name) const;
  // Null where nothing is kept.
  std::unique_ptr<pipeline::CheckpointStore> OpenCheckpoints(const HeldLease& held) const;
  // Of a job that no worker runs again.
  void RemoveCheckpoints(const std::string& job_name) const;

  const Options options_;
  CoordinatorLink& coordinator_;
  ModelStore* const models_;
  Clock* const clock_;
};

// Removes the results in `directory` that are older than `age`: of jobs that ended while their
// worker died. One whose job comes back after all costs that job no more than its figures.
absl::Status RemoveStaleResults(const std::string& directory, absl::Duration age);

}  // namespace walsh::service
