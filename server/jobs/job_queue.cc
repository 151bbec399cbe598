#include "server/jobs/job_queue.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/tenant_limit.h"

namespace walsh::jobs {
namespace {

constexpr int kEventsPerBatch = 256;
constexpr absl::Duration kQueueFullRetry = absl::Seconds(10);

absl::Status Aborted(std::string_view what) {
  absl::Status status = absl::AbortedError(std::string(what));
  SetErrorInfo(status, "STALE_FENCING_TOKEN");
  return status;
}

// Whether a report says nothing that a reader of the log would miss.
bool IsProgressOnly(const QuantizationJobEvent& reported, const JobRecord& record) {
  return reported.linears().empty() && reported.message().empty() &&
         reported.stage() == record.job.stage() && reported.has_progress() &&
         reported.progress().layers_done() <= record.job.progress().layers_done();
}

void LogChange(const Transition& transition) {
  const QuantizationJob& job = transition.next.job;
  WALSH_LOG(Info, "job changed", {"job", job.name()}, {"request_id", job.request_id()},
            {"state", StateName(job.state())}, {"worker", job.worker()}, {"attempt", job.attempt()},
            {"token", transition.next.fencing_token}, {"what", transition.event->message()});
}

}  // namespace

JobQueue::JobQueue(JobStore* store, const Clock* clock, const Options& options, JobMetrics* metrics)
    : store_(store),
      clock_(clock),
      options_(options),
      metrics_(metrics),
      leases_(options.lease_duration) {}

absl::StatusOr<std::unique_ptr<JobQueue>> JobQueue::Open(JobStore* store, const Clock* clock,
                                                         const Options& options,
                                                         JobMetrics* metrics) {
  std::unique_ptr<JobQueue> queue(new JobQueue(store, clock, options, metrics));
  WALSH_ASSIGN_OR_RETURN(const std::vector<JobRecord> live, store->Live());
  for (const JobRecord& record : live) {
    std::string id;
    WALSH_ASSIGN_OR_RETURN(id, ParseJobName("name", record.job.name()));
    if (IsLeased(record.job.state())) {
      WALSH_LOG(Info, "job found running", {"job", record.job.name()},
                {"worker", record.job.worker()}, {"token", record.fencing_token});
      if (metrics != nullptr) metrics->OnFoundLeased(record);
    }
    queue->Adopt(id, record);
  }
  if (metrics != nullptr) WALSH_RETURN_IF_ERROR(metrics->CountStored(*store));
  return queue;
}

absl::StatusOr<JobRecord> JobQueue::Find(const std::string& id, const TenantView& view) const {
  std::optional<JobRecord> record;
  {
    const absl::MutexLock lock(&mu_);
    const auto it = live_.find(id);
    if (it != live_.end()) record = it->second.record;
  }
  if (!record.has_value()) {
    WALSH_ASSIGN_OR_RETURN(record, store_->Get(id));
  }
  if (view.has_value() && record->tenant != *view) return NotFound("job", JobName(id));
  return *std::move(record);
}

std::string JobQueue::NewId() {
  return absl::StrCat("job-", absl::Hex(absl::Uniform<uint64_t>(random_), absl::kZeroPad16));
}

absl::StatusOr<std::optional<QuantizationJob>> JobQueue::FindSubmitted(
    const RequestKey& key) const {
  if (key.request_id.empty()) return std::nullopt;
  WALSH_ASSIGN_OR_RETURN(const std::optional<StoredRequest> stored,
                         store_->FindRequest(key.stored_id()));
  if (!stored.has_value()) return std::nullopt;
  const std::string job = JobName(stored->job_id);
  if (stored->body_sha256 != key.body_sha256) {
    absl::Status status =
        absl::AlreadyExistsError(absl::StrCat("request_id '", key.request_id, "' was used for ",
                                              job, " with another body; use a new request_id"));
    SetErrorInfo(status, "REQUEST_ID_REUSED", {{"job", job}});
    SetResourceInfo(status, "job", job, "made with this request_id from another body");
    return status;
  }
  absl::StatusOr<JobRecord> record = Find(stored->job_id);
  if (!record.ok() && !absl::IsNotFound(record.status())) return record.status();
  // The id may have been given to another job after the first was deleted.
  if (!record.ok() || record->job.request_id() != key.request_id || record->tenant != key.tenant) {
    absl::Status status = absl::AlreadyExistsError(absl::StrCat(
        "request_id '", key.request_id, "' created ", job, ", which was deleted since"));
    SetErrorInfo(status, "REQUEST_ID_REUSED", {{"job", job}});
    SetResourceInfo(status, "job", job, "deleted since");
    return status;
  }
  return std::move(record->job);
}

absl::Status JobQueue::CheckRoom(const JobOwner& owner) const {
  const absl::MutexLock lock(&mu_);
  if (static_cast<int>(queued_.size()) >= options_.queued_jobs_max) {
    absl::Status full = absl::ResourceExhaustedError(absl::StrCat(
        queued_.size(), " jobs are queued, at most ", options_.queued_jobs_max, " are taken"));
    SetErrorInfo(full, "QUEUE_FULL");
    SetQuotaFailure(full, "queued jobs", absl::StrCat("at most ", options_.queued_jobs_max));
    SetRetryDelay(full, kQueueFullRetry);
    return full;
  }
  if (!owner.live_jobs_max.has_value()) return absl::OkStatus();
  const auto n_live = std::count_if(live_.begin(), live_.end(), [&](const auto& live) {
    return live.second.record.tenant == owner.tenant;
  });
  if (n_live < *owner.live_jobs_max) return absl::OkStatus();
  absl::Status full =
      TenantLimitReached(absl::StrCat(n_live, " jobs that have not ended"), *owner.live_jobs_max);
  SetRetryDelay(full, kQueueFullRetry);
  return full;
}

absl::StatusOr<QuantizationJob> JobQueue::Submit(QuantizationJob job, std::string id,
                                                 const RequestKey& key, const JobOwner& owner) {
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(std::optional<QuantizationJob> before, FindSubmitted(key));
  if (before.has_value()) return *std::move(before);
  WALSH_RETURN_IF_ERROR(CheckRoom(owner));
  if (id.empty()) id = NewId();
  job.set_name(JobName(id));
  job.set_request_id(key.request_id);
  Transition created = NewJob(std::move(job), clock_->Now());
  created.next.tenant = owner.tenant;
  created.next.last_sequence = 1;
  created.event->set_sequence(1);
  created.next.job.set_etag("1");
  if (const absl::Status stored = store_->Insert(created.next, *created.event, key); !stored.ok()) {
    Doubt(id, stored);
    return stored;
  }
  LogChange(created);
  if (metrics_ != nullptr) metrics_->OnCreate(created.next);
  Adopt(id, created.next);
  work_subscriptions_.NotifyAll();
  return created.next.job;
}

absl::StatusOr<QuantizationJob> JobQueue::Get(const std::string& id, const TenantView& view) const {
  WALSH_ASSIGN_OR_RETURN(JobRecord record, Find(id, view));
  return std::move(record.job);
}

absl::StatusOr<JobPage> JobQueue::List(const JobQuery& query) const {
  WALSH_ASSIGN_OR_RETURN(JobPage page, store_->List(query));
  const absl::MutexLock lock(&mu_);
  for (JobRecord& record : page.jobs) {
    const auto it = live_.find(record.job.name().substr(kJobCollection.size()));
    // Memory has the newer progress; a state that changed since the page was read may not match
    // its filter any more.
    if (it != live_.end() && it->second.record.job.state() == record.job.state()) {
      record = it->second.record;
    }
  }
  return page;
}

int64_t JobQueue::n_live() const {
  const absl::MutexLock lock(&mu_);
  return static_cast<int64_t>(live_.size());
}

absl::StatusOr<QuantizationJob> JobQueue::Cancel(const std::string& id, const TenantView& view) {
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_RETURN_IF_ERROR(Find(id, view).status());
  WALSH_ASSIGN_OR_RETURN(Transition transition, Transit(id, RequestCancel{}));
  return std::move(transition.next.job);
}

absl::Status JobQueue::Delete(const std::string& id, const TenantView& view) {
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(const JobRecord record, Find(id, view));
  WALSH_RETURN_IF_ERROR(Apply(record, jobs::Delete{}, clock_->Now()).status());
  WALSH_RETURN_IF_ERROR(store_->Delete(id));
  if (metrics_ != nullptr) metrics_->OnDelete(record);
  return absl::OkStatus();
}

absl::StatusOr<JobQueue::EventBatch> JobQueue::ReadEvents(const std::string& id, int64_t after,
                                                          const TenantView& view) const {
  WALSH_ASSIGN_OR_RETURN(const JobRecord record, Find(id, view));
  if (after < 0 || after > record.last_sequence) {
    return InvalidField("after_sequence", absl::StrCat("must be from 0 to ", record.last_sequence,
                                                       ", the last event's, is ", after));
  }
  EventBatch batch;
  WALSH_ASSIGN_OR_RETURN(batch.events, store_->Events(id, after, kEventsPerBatch));
  // The store has an event a moment before the queue: whoever were given it already could not ask
  // for what comes after it. Its subscribers are notified when the queue has it, too.
  while (!batch.events.empty() && batch.events.back().sequence() > record.last_sequence) {
    batch.events.pop_back();
  }
  const int64_t reached = batch.events.empty() ? after : batch.events.back().sequence();
  batch.is_final = IsTerminal(record.job.state()) && reached == record.last_sequence;
  return batch;
}

absl::StatusOr<std::optional<JobQueue::GrantedLease>> JobQueue::Acquire(const std::string& worker) {
  const absl::MutexLock write_lock(&write_mu_);
  const std::optional<Lease> held = LeaseOf(worker);
  // Unconfirmed: the answer that granted it was lost on its way, and nothing has crashed.
  if (held.has_value()) WALSH_RETURN_IF_ERROR(EndLeaseOf(worker, held->is_confirmed));
  std::optional<std::string> id = NextDue(worker);
  while (id.has_value() && in_doubt_.contains(*id)) {  // it may be another's by now
    WALSH_RETURN_IF_ERROR(Settle(*id));
    id = NextDue(worker);
  }
  if (!id.has_value()) return std::nullopt;
  WALSH_ASSIGN_OR_RETURN(Transition granted, Transit(*id, Grant{worker}));
  return GrantedLease{.token = granted.next.fencing_token, .job = std::move(granted.next.job)};
}

std::optional<std::string> JobQueue::NextDue(const std::string& worker) const {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  for (const auto& [order, id] : queued_) {
    const LiveJob& live = live_.at(id);
    if (live.due <= now && !live.record.refusals.contains(worker)) return id;
  }
  return std::nullopt;
}

// Not whether any is due: one that waits for a worker which is busy must not wake all others at
// every tick.
bool JobQueue::HasNewlyDue() {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  const absl::Duration before = std::exchange(looked_for_due_, now);
  return std::any_of(live_.begin(), live_.end(), [&](const auto& entry) {
    const LiveJob& live = entry.second;
    return live.record.job.state() == QuantizationJob::QUEUED && live.due > before &&
           live.due <= now;
  });
}

absl::Duration JobQueue::OldestQueuedAge() const {
  // Wall time, which a restart keeps.
  const absl::Time now = clock_->Now();
  absl::Time since = now;
  const absl::MutexLock lock(&mu_);
  for (const auto& [order, id] : queued_) {
    since = std::min(since, ToTime(live_.at(id).record.job.update_time()));
  }
  return now - since;
}

JobQueue::LeaseState JobQueue::Renew(const std::string& worker, const std::string& id,
                                     int64_t token) {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  if (!leases_.Renew(id, worker, token, now)) return {};
  return {.is_held = true,
          .is_cancelled = live_.at(id).record.job.state() == QuantizationJob::CANCELLING};
}

absl::Status JobQueue::CheckHeld(const std::string& worker, const std::string& id,
                                 int64_t token) const {
  const absl::MutexLock lock(&mu_);
  if (leases_.Holds(id, worker, token, clock_->Monotonic())) return absl::OkStatus();
  return Aborted(absl::StrCat("the lease of ", JobName(id), " with token ", token, " is not held"));
}

absl::Status JobQueue::Report(const std::string& worker, const std::string& id,
                              const jobs::Report& report) {
  WALSH_ASSIGN_OR_RETURN(const bool was_taken, TakeProgressOnly(worker, id, report));
  if (was_taken) return absl::OkStatus();
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_RETURN_IF_ERROR(CheckHeld(worker, id, report.token));
  return Transit(id, report).status();
}

absl::StatusOr<bool> JobQueue::TakeProgressOnly(const std::string& worker, const std::string& id,
                                                const jobs::Report& report) {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock lock(&mu_);
  if (!leases_.Renew(id, worker, report.token, now)) {
    return Aborted(
        absl::StrCat("the lease of ", JobName(id), " with token ", report.token, " is not held"));
  }
  LiveJob& live = live_.at(id);
  if (!IsProgressOnly(report.event, live.record)) return false;
  if (now - live.stored >= options_.progress_interval) return false;
  WALSH_ASSIGN_OR_RETURN(Transition transition, Apply(live.record, report, clock_->Now()));
  live.record = std::move(transition.next);
  live.unstored = std::move(transition.event);
  return true;
}

absl::Status JobQueue::Complete(const std::string& worker, const std::string& id, int64_t token,
                                const JobEvent& outcome, const v1::Model* model,
                                const std::function<void()>& on_stored) {
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_RETURN_IF_ERROR(Settle(id));
  const absl::StatusOr<JobRecord> record = Find(id);
  // Not NOT_FOUND, which would tell the worker to register again.
  if (absl::IsNotFound(record.status())) return Aborted(std::string(record.status().message()));
  WALSH_RETURN_IF_ERROR(record.status());
  const bool is_repeat = token == record->completed_token;
  if (!is_repeat) WALSH_RETURN_IF_ERROR(CheckHeld(worker, id, token));
  return Transit(id, outcome, model, on_stored).status();
}

absl::Status JobQueue::ReturnLease(const std::string& worker) {
  const absl::MutexLock write_lock(&write_mu_);
  return EndLeaseOf(worker, /*is_crash=*/false);
}

absl::Status JobQueue::LoseLease(const std::string& worker) {
  const absl::MutexLock write_lock(&write_mu_);
  return EndLeaseOf(worker, /*is_crash=*/true);
}

std::optional<Lease> JobQueue::LeaseOf(const std::string& worker) const {
  const absl::MutexLock lock(&mu_);
  return leases_.OfWorker(worker);
}

absl::Status JobQueue::EndLeaseOf(const std::string& worker, bool is_crash) {
  std::optional<Lease> lease = LeaseOf(worker);
  if (lease.has_value() && in_doubt_.contains(lease->job_id)) {
    WALSH_RETURN_IF_ERROR(Settle(lease->job_id));
    lease = LeaseOf(worker);
  }
  if (!lease.has_value()) return absl::OkStatus();
  if (is_crash) return Transit(lease->job_id, jobs::LoseLease{}).status();
  return Transit(lease->job_id, GiveBack{lease->token}).status();
}

absl::Status JobQueue::Tick() {
  const absl::MutexLock write_lock(&write_mu_);
  WALSH_RETURN_IF_ERROR(SettleAll());
  WALSH_RETURN_IF_ERROR(LoseExpiredLeases());
  WALSH_RETURN_IF_ERROR(StoreHeldBackProgress());
  if (HasNewlyDue()) work_subscriptions_.NotifyAll();
  if (metrics_ != nullptr) metrics_->SetOldestQueued(OldestQueuedAge());
  return absl::OkStatus();
}

absl::Status JobQueue::FailRefusedByAll(const std::set<std::string>& workers) {
  const absl::Duration now = clock_->Monotonic();
  const absl::MutexLock write_lock(&write_mu_);
  std::vector<std::string> refused;
  {
    const absl::MutexLock lock(&mu_);
    for (auto& [id, live] : live_) {
      Refusals& refusals = live.record.refusals;
      std::erase_if(refusals,
                    [&](const auto& refusal) { return !workers.contains(refusal.first); });
      const bool is_left_to_nobody = !refusals.empty() && refusals.size() == workers.size();
      // One that is to be tried again later waits for who is there then.
      const bool is_due = live.record.job.state() == QuantizationJob::QUEUED && live.due <= now;
      if (is_left_to_nobody && is_due) {
        refused.push_back(id);
      }
    }
  }
  // What the disk does not take now is found again by the next call.
  absl::Status first_failure;
  for (const std::string& id : refused) {
    first_failure.Update(Transit(id, RunOutOfWorkers{}).status());
  }
  return first_failure;
}

void JobQueue::Doubt(const std::string& id, const absl::Status& status) {
  // A disk that is full has stored nothing, and a name that is taken is another job's.
  if (!absl::IsResourceExhausted(status) && !absl::IsAlreadyExists(status)) in_doubt_.insert(id);
}

absl::Status JobQueue::Settle(const std::string& id) {
  if (!in_doubt_.contains(id)) return absl::OkStatus();
  absl::StatusOr<JobRecord> stored = store_->Get(id);
  if (!stored.ok() && !absl::IsNotFound(stored.status())) return stored.status();
  in_doubt_.erase(id);
  if (!stored.ok()) return absl::OkStatus();
  std::optional<JobRecord> known;
  {
    const absl::MutexLock lock(&mu_);
    const auto it = live_.find(id);
    if (it != live_.end()) known = it->second.record;
  }
  if (known.has_value() && known->last_sequence == stored->last_sequence) return absl::OkStatus();
  WALSH_LOG(Warning, "job was stored although the disk had failed", {"job", stored->job.name()},
            {"state", StateName(stored->job.state())}, {"token", stored->fencing_token});
  if (known.has_value()) stored->refusals = std::move(known->refusals);
  if (metrics_ != nullptr) {
    known.has_value() ? metrics_->OnTransition(*known, *stored) : metrics_->OnCreate(*stored);
  }
  if (!IsLeased(stored->job.state())) lost_.erase(id);  // that was what had been stored
  Adopt(id, *stored);
  event_subscriptions_.Notify(id);
  if (stored->job.state() == QuantizationJob::QUEUED) work_subscriptions_.NotifyAll();
  return absl::OkStatus();
}

absl::Status JobQueue::SettleAll() {
  absl::Status first_failure;
  for (const std::string& id : std::set<std::string>(in_doubt_)) first_failure.Update(Settle(id));
  return first_failure;
}

absl::Status JobQueue::LoseExpiredLeases() {
  std::vector<Lease> expired;
  {
    const absl::MutexLock lock(&mu_);
    expired = leases_.TakeExpired(clock_->Monotonic());
  }
  for (const Lease& lease : expired) {
    WALSH_LOG(Warning, "lease expired", {"job", JobName(lease.job_id)}, {"worker", lease.worker},
              {"token", lease.token});
    if (metrics_ != nullptr) metrics_->OnLeaseExpired();
    lost_.insert(lease.job_id);
  }
  // A loss that the disk does not take stays for the next call.
  absl::Status first_failure;
  for (auto it = lost_.begin(); it != lost_.end();) {
    const absl::Status stored = Transit(*it, jobs::LoseLease{}).status();
    first_failure.Update(stored);
    it = stored.ok() ? lost_.erase(it) : std::next(it);
  }
  return first_failure;
}

absl::Status JobQueue::StoreHeldBackProgress() {
  const absl::Duration now = clock_->Monotonic();
  std::vector<std::pair<JobRecord, QuantizationJobEvent>> unstored;
  {
    const absl::MutexLock lock(&mu_);
    for (auto& [id, live] : live_) {
      if (!live.unstored.has_value() || now - live.stored < options_.progress_interval) continue;
      if (in_doubt_.contains(id)) continue;
      unstored.emplace_back(live.record, *live.unstored);
    }
  }
  for (auto& [record, event] : unstored) {
    WALSH_RETURN_IF_ERROR(StoreEvent(&record, &event, nullptr));
  }
  return absl::OkStatus();
}

absl::StatusOr<Transition> JobQueue::Transit(const std::string& id, const JobEvent& event,
                                             const v1::Model* model,
                                             const std::function<void()>& on_stored) {
  WALSH_RETURN_IF_ERROR(Settle(id));
  WALSH_ASSIGN_OR_RETURN(const JobRecord before, Find(id));
  WALSH_ASSIGN_OR_RETURN(Transition transition, Apply(before, event, clock_->Now()));
  if (!transition.event.has_value()) return transition;
  WALSH_RETURN_IF_ERROR(StoreEvent(&transition.next, &*transition.event, model, on_stored));
  if (metrics_ != nullptr) metrics_->OnTransition(before, transition.next);
  if (transition.next.job.state() != before.job.state()) LogChange(transition);
  if (transition.next.job.state() == QuantizationJob::QUEUED) work_subscriptions_.NotifyAll();
  return transition;
}

absl::Status JobQueue::StoreEvent(JobRecord* record, QuantizationJobEvent* event,
                                  const v1::Model* model, const std::function<void()>& on_stored) {
  event->set_sequence(++record->last_sequence);
  record->job.set_etag(absl::StrCat(record->last_sequence));
  const std::string id = record->job.name().substr(kJobCollection.size());
  if (const absl::Status stored = store_->Update(*record, *event, model); !stored.ok()) {
    Doubt(id, stored);
    return stored;
  }
  if (on_stored) on_stored();
  Adopt(id, *record);
  event_subscriptions_.Notify(id);
  return absl::OkStatus();
}

void JobQueue::Adopt(const std::string& id, const JobRecord& record) {
  const absl::Duration now = clock_->Monotonic();
  const QuantizationJob::State state = record.job.state();
  const absl::MutexLock lock(&mu_);
  if (IsTerminal(state)) {
    const auto it = live_.find(id);
    if (it != live_.end()) queued_.erase({it->second.order, id});
    live_.erase(id);
    leases_.Release(id);
    return;
  }
  const auto [it, is_new] = live_.try_emplace(id);
  LiveJob& live = it->second;
  if (is_new) live.order = next_order_++;
  const int64_t token_before = live.record.fencing_token;
  live.record = record;
  live.stored = now;
  // Progress that came while the disk was busy with older progress of the same attempt is kept.
  const bool has_newer = live.unstored.has_value() && record.fencing_token == token_before &&
                         IsLeased(state) &&
                         live.unstored->progress().fraction() > record.job.progress().fraction();
  if (has_newer) {
    *live.record.job.mutable_progress() = live.unstored->progress();
    // The record may have gone on meanwhile, from RUNNING to CANCELLING: nobody sees it go back.
    live.unstored->set_state(state);
  } else {
    live.unstored.reset();
  }
  if (state == QuantizationJob::QUEUED) {
    // Wall time may have jumped since the pause was stored; no pause is longer than the longest.
    const absl::Duration pause =
        std::clamp(record.not_before - clock_->Now(), absl::ZeroDuration(), Backoff(1000, 1));
    live.due = now + pause;
    queued_.insert({live.order, id});
    leases_.Release(id);
    return;
  }
  queued_.erase({live.order, id});
  if (is_new || record.fencing_token != token_before) {
    // Unconfirmed also after a restart: a worker that still has the job confirms it as soon as it
    // has registered again; one that asks for another job has dropped this one for want of a
    // coordinator, or never got the answer that granted it, and has not crashed.
    leases_.Grant(id, record.job.worker(), record.fencing_token, now);
  }
}

}  // namespace walsh::jobs
