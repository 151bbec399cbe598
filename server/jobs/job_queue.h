// The jobs of a coordinator: what is accepted, who runs it, what becomes of it.
//
// Ties the pure state machine (job.h) to the store and the leases: every change is decided by
// Apply, written to the store, and only then visible. Jobs that are not terminal are kept in memory
// too; terminal ones are read from the store. After a write that failed, what the store has of the
// job is read before anything else is decided about it: the write may have been stored.
//
// Two locks: `write_mu_` is held across the disk and puts changes in order; `mu_` guards memory and
// is never held across the disk, so that heartbeats are answered while the disk is slow.
//
// Errors:  those of the store and of Apply; NOT_FOUND no such job; ABORTED a lease that is not
// held;
//          RESOURCE_EXHAUSTED too many queued jobs (ErrorInfo QUEUE_FULL, QuotaFailure,
//          RetryInfo).
// Threads: safe. Calls may block on the disk, except Renew.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/limits.h"
#include "server/jobs/job.h"
#include "server/jobs/job_metrics.h"
#include "server/jobs/job_store.h"
#include "server/jobs/lease_table.h"
#include "server/jobs/subscriptions.h"

namespace walsh::jobs {

// Who submits a job.
struct JobOwner {
  std::string tenant = "";
  // Of its jobs that are not terminal; more are RESOURCE_EXHAUSTED (TENANT_LIMIT).
  std::optional<int> live_jobs_max = std::nullopt;
};

class JobQueue {
 public:
  struct Options {
    absl::Duration lease_duration = absl::Seconds(30);
    int queued_jobs_max = limits::kQueuedJobsMax;
    // Reports with nothing but progress are stored at most this often for each job.
    absl::Duration progress_interval = absl::Milliseconds(500);
  };
  // `store`, `clock` and `metrics` outlive the queue; `metrics` may be null. Jobs found RUNNING or
  // CANCELLING keep their worker, with a fresh lease.
  static absl::StatusOr<std::unique_ptr<JobQueue>> Open(JobStore* store, const Clock* clock,
                                                        const Options& options,
                                                        JobMetrics* metrics);

  // -- For clients. Ids are bare. A job outside the caller's view is NOT_FOUND, as one that does
  // not exist.
  // `job` is validated (job_validation.h); `id` empty: chosen here. A repeated request returns the
  // job that its first form created.
  absl::StatusOr<QuantizationJob> Submit(QuantizationJob job, std::string id, const RequestKey& key,
                                         const JobOwner& owner = {});
  // The job that this request created before; ALREADY_EXISTS when it asked for something else, or
  // the job was deleted since.
  absl::StatusOr<std::optional<QuantizationJob>> FindSubmitted(const RequestKey& key) const;
  // ALREADY_EXISTS when Submit would refuse these names.
  absl::Status CheckNamesAreFree(const std::string& id, const std::string& model_name) const {
    return store_->CheckNamesAreFree(id, model_name);
  }
  absl::StatusOr<QuantizationJob> Get(const std::string& id, const TenantView& view = {}) const;
  absl::StatusOr<JobPage> List(const JobQuery& query) const;
  // Jobs that want a worker or have one.
  int64_t n_live() const;
  absl::StatusOr<QuantizationJob> Cancel(const std::string& id, const TenantView& view = {});
  absl::Status Delete(const std::string& id, const TenantView& view = {});

  struct EventBatch {
    std::vector<QuantizationJobEvent> events;
    bool is_final = false;  // nothing will ever follow these
  };
  // Stored events with a sequence above `after`, in order. To follow a job: subscribe, then read
  // until a batch is empty, and again at each notification.
  absl::StatusOr<EventBatch> ReadEvents(const std::string& id, int64_t after,
                                        const TenantView& view = {}) const;
  Subscriptions& event_subscriptions() { return event_subscriptions_; }

  // -- For workers ("workers/{id}").
  struct GrantedLease {
    int64_t token = 0;
    QuantizationJob job;
  };
  // The oldest job that is due and that the worker has not refused, or none. A worker that asks
  // while it holds a lease has dropped it; that is a crash only when it has used the lease's token
  // since this process granted or found it.
  absl::StatusOr<std::optional<GrantedLease>> Acquire(const std::string& worker);
  // Notified, under any key, when a job may be there to acquire.
  Subscriptions& work_subscriptions() { return work_subscriptions_; }

  struct LeaseState {
    bool is_held = false;
    bool is_cancelled = false;  // the job is CANCELLING
  };
  LeaseState Renew(const std::string& worker, const std::string& id, int64_t token);
  absl::Status Report(const std::string& worker, const std::string& id, const jobs::Report& report);
  // `outcome` is Succeed, Fail, Refuse, AcknowledgeCancel or GiveBack with `token`; `model` goes
  // with Succeed. `on_stored` is called once the outcome is stored, unless it was before, and
  // before a watcher hears of it.
  absl::Status Complete(const std::string& worker, const std::string& id, int64_t token,
                        const JobEvent& outcome, const v1::Model* model,
                        const std::function<void()>& on_stored = nullptr);
  // The worker says goodbye, or has certainly died.
  absl::Status ReturnLease(const std::string& worker);
  absl::Status LoseLease(const std::string& worker);
  // `workers` are those that take jobs now. A queued job that all of them have refused fails once
  // it is due; one that another of them might run, busy as it may be, waits for that one. Without
  // any worker jobs wait. What other workers refused is forgotten: one that comes back is asked
  // again.
  absl::Status FailRefusedByAll(const std::set<std::string>& workers);

  // To be called a few times a second: takes expired leases, stores progress that was held back,
  // wakes workers for jobs whose pause is over, tells the metrics how old the queue is.
  absl::Status Tick();

 private:
  struct LiveJob {
    JobRecord record;
    int64_t order = 0;      // of creation
    absl::Duration due;     // monotonic; not run before
    absl::Duration stored;  // monotonic time of the last stored event
    // Progress that is in `record` and not yet in the store.
    std::optional<QuantizationJobEvent> unstored;
  };

  JobQueue(JobStore* store, const Clock* clock, const Options& options, JobMetrics* metrics);

  absl::StatusOr<JobRecord> Find(const std::string& id, const TenantView& view = {}) const;
  // RESOURCE_EXHAUSTED when another job would be one too many.
  absl::Status CheckRoom(const JobOwner& owner) const ABSL_LOCKS_EXCLUDED(mu_);
  // Applies, stores, publishes. No event: stored nothing.
  absl::StatusOr<Transition> Transit(const std::string& id, const JobEvent& event,
                                     const v1::Model* model = nullptr,
                                     const std::function<void()>& on_stored = nullptr)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status StoreEvent(JobRecord* record, QuantizationJobEvent* event, const v1::Model* model,
                          const std::function<void()>& on_stored = nullptr)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  // Makes a stored record visible: live jobs, queue order, leases.
  void Adopt(const std::string& id, const JobRecord& record) ABSL_LOCKS_EXCLUDED(mu_);
  // ABORTED unless the lease is held.
  absl::Status CheckHeld(const std::string& worker, const std::string& id, int64_t token) const
      ABSL_LOCKS_EXCLUDED(mu_);
  // True when the report was taken into memory and needs no event of its own now.
  absl::StatusOr<bool> TakeProgressOnly(const std::string& worker, const std::string& id,
                                        const jobs::Report& report) ABSL_LOCKS_EXCLUDED(mu_);
  std::optional<Lease> LeaseOf(const std::string& worker) const ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status EndLeaseOf(const std::string& worker, bool is_crash)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  // A write of the job failed, and may have been stored nonetheless.
  void Doubt(const std::string& id, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  // Reads what the store has of a job that is in doubt, and goes on from there. Before anything
  // else is decided about it.
  absl::Status Settle(const std::string& id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status SettleAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status LoseExpiredLeases() ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  absl::Status StoreHeldBackProgress() ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);
  std::optional<std::string> NextDue(const std::string& worker) const ABSL_LOCKS_EXCLUDED(mu_);
  // Whether a queued job has become due since this was last asked.
  bool HasNewlyDue() ABSL_LOCKS_EXCLUDED(mu_);
  // Since the job that has waited longest was created or came back.
  absl::Duration OldestQueuedAge() const ABSL_LOCKS_EXCLUDED(mu_);
  std::string NewId() ABSL_EXCLUSIVE_LOCKS_REQUIRED(write_mu_);

  JobStore* const store_;
  const Clock* const clock_;
  const Options options_;
  JobMetrics* const metrics_;
  Subscriptions event_subscriptions_;
  Subscriptions work_subscriptions_;

  absl::Mutex write_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  absl::BitGen random_ ABSL_GUARDED_BY(write_mu_);
  // Leases that have expired and whose loss could not be stored yet.
  std::set<std::string> lost_ ABSL_GUARDED_BY(write_mu_);
  std::set<std::string> in_doubt_ ABSL_GUARDED_BY(write_mu_);  // ids

  mutable absl::Mutex mu_;
  std::map<std::string, LiveJob> live_ ABSL_GUARDED_BY(mu_);
  std::set<std::pair<int64_t, std::string>> queued_ ABSL_GUARDED_BY(mu_);  // (order, id)
  int64_t next_order_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration looked_for_due_ ABSL_GUARDED_BY(mu_) = -absl::InfiniteDuration();  // monotonic
  LeaseTable leases_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh::jobs
