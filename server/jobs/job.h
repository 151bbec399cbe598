// The life of a quantization job, as a pure function: (record, event, now) → (record, event to
// store).
//
// docs/job-states.md is the normative table; a test compares every pair of state and event with it.
// Nothing here reads a clock, draws a random number or touches a disk, so that every path, however
// rare, is one function call in a test.
//
// Errors: FAILED_PRECONDITION  the state does not allow the event (PreconditionFailure; ErrorInfo
//                              JOB_CANCELLING, JOB_PUBLISHING where the worker or client must know)
//         ABORTED              the event's fencing token is not that of the current lease
//                              (ErrorInfo STALE_FENCING_TOKEN)
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <variant>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "google/rpc/status.pb.h"
#include "server/jobs/refusals.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::jobs {

using v1::QuantizationJob;
using v1::QuantizationJobEvent;

// Whose jobs a caller sees and touches: those of one tenant; none: all.
using TenantView = std::optional<std::string>;

// What the store keeps of a job: the public resource and what only the coordinator knows.
struct JobRecord {
  QuantizationJob job;
  std::string tenant;           // that created it; empty: the service had no keys then
  int64_t fencing_token = 0;    // of the last lease; grows with each
  int64_t completed_token = 0;  // of the last accepted CompleteJob, so that repeating it is OK
  int64_t last_sequence = 0;    // of the job's events
  int crashes = 0;              // leases that ended because the worker vanished
  std::set<std::string> crash_workers;
  int retries = 0;  // of failures that may pass
  absl::Time not_before = absl::InfinitePast();
  // Of workers that are connected. In memory only: after a restart of the coordinator they are
  // offered the job once more, and say the same.
  Refusals refusals;
};

// -- Events

// A worker takes the job.
struct Grant {
  std::string worker;  // "workers/{id}"
};
struct Report {
  int64_t token = 0;
  QuantizationJobEvent event;
};
struct Succeed {
  int64_t token = 0;
  QuantizationJob::Result result;
};
struct Fail {
  int64_t token = 0;
  google::rpc::Status error;
  std::string reason;
  double jitter = 0;  // -1 to 1, spreads the retry
  // What the job made that its quality gate kept from being published; kept when the job ends.
  std::optional<QuantizationJob::Result> rejected_result = {};
};
// The worker cannot run the job, though another one might.
struct Refuse {
  int64_t token = 0;
  google::rpc::Status error;
  std::string reason;
};
// No worker is left that has not refused the job.
struct RunOutOfWorkers {};
// The worker stopped because it was asked to.
struct AcknowledgeCancel {
  int64_t token = 0;
};
// The worker gives the job back unfinished, without having failed.
struct GiveBack {
  int64_t token = 0;
};
// The worker vanished while it held the lease.
struct LoseLease {};
struct RequestCancel {};
struct Delete {};

using JobEvent = std::variant<Grant, Report, Succeed, Fail, Refuse, RunOutOfWorkers,
                              AcknowledgeCancel, GiveBack, LoseLease, RequestCancel, Delete>;

struct Transition {
  JobRecord next;
  // What to append to the job's log, without a sequence number. None: the event repeats one that
  // was already applied, and there is nothing to store.
  std::optional<QuantizationJobEvent> event;
};

absl::StatusOr<Transition> Apply(JobRecord record, const JobEvent& event, absl::Time now);

// A job as it is first stored, QUEUED, and its first event. `job` is validated.
Transition NewJob(QuantizationJob job, absl::Time now);

absl::Time ToTime(const google::protobuf::Timestamp& time);
bool IsTerminal(QuantizationJob::State state);
// RUNNING or CANCELLING.
bool IsLeased(QuantizationJob::State state);
// Whether a job that failed with this code is tried again: UNAVAILABLE and RESOURCE_EXHAUSTED.
bool IsRetried(absl::StatusCode code);
// 10 s · 2ⁿ, at most 6 min, ± 25 % by `jitter` from -1 to 1.
absl::Duration Backoff(int n_retries, double jitter);
std::string_view StateName(QuantizationJob::State state);
std::string_view EventName(const JobEvent& event);

}  // namespace walsh::jobs
