#include "tests/sim/history.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/limits.h"
#include "common/resource_name.h"

namespace walsh::sim {
namespace {

using jobs::JobRecord;
using v1::QuantizationJob;

constexpr size_t kTraceLines = 120;

std::string IdOf(const JobRecord& record) {
  return record.job.name().substr(kJobCollection.size());
}

// The lines of docs/job-states.md as pairs of states.
bool IsStep(QuantizationJob::State from, QuantizationJob::State to) {
  switch (from) {
    case QuantizationJob::QUEUED:
      return to == QuantizationJob::RUNNING || to == QuantizationJob::FAILED ||
             to == QuantizationJob::CANCELLED;
    case QuantizationJob::RUNNING:
      return to == QuantizationJob::RUNNING || to == QuantizationJob::QUEUED ||
             to == QuantizationJob::CANCELLING || to == QuantizationJob::SUCCEEDED ||
             to == QuantizationJob::FAILED;
    case QuantizationJob::CANCELLING:
      return to == QuantizationJob::CANCELLING || to == QuantizationJob::CANCELLED ||
             to == QuantizationJob::SUCCEEDED;
    default:
      return false;
  }
}

std::string Name(QuantizationJob::State state) { return std::string(jobs::StateName(state)); }

}  // namespace

void History::Violate(std::string what) {
  Note(absl::StrCat("VIOLATED ", what));
  if (violation_.empty()) violation_ = std::move(what);
}

void History::Note(std::string_view what) {
  if (trace_.size() == kTraceLines) trace_.pop_front();
  trace_.push_back(absl::StrFormat("%9.3f ", absl::ToDoubleSeconds(clock_->Monotonic())) +
                   std::string(what));
}

std::string History::Trace() const { return absl::StrJoin(trace_, "\n"); }

History::Job* History::Find(const std::string& id) {
  const auto it = jobs_.find(id);
  return it == jobs_.end() || !it->second.is_stored ? nullptr : &it->second;
}

void History::OnInsert(const JobRecord& record, bool is_told) {
  const std::string id = IdOf(record);
  Note(absl::StrCat("stored ", id, is_told ? "" : " (untold)"));
  if (jobs_[id].is_stored) Violate(absl::StrCat("I1: ", id, " is stored a second time"));
  jobs_[id].is_stored = true;
  jobs_[id].record = record;
  SetTold(id, is_told);
  ++figures_.jobs;
  if (is_told) CheckRoom(record.tenant);
}

void History::SetTold(const std::string& id, bool is_told) {
  if (is_told) {
    untold_.erase(id);
  } else {
    untold_.insert(id);
  }
}

// I6. What the coordinator could not know of is not its fault.
void History::CheckRoom(const std::string& tenant) {
  int n_queued = 0;
  int n_of_tenant = 0;
  for (const auto& [id, job] : jobs_) {
    if (!job.is_stored || untold_.contains(id)) continue;
    const QuantizationJob::State state = job.record.job.state();
    if (state == QuantizationJob::QUEUED) ++n_queued;
    if (!jobs::IsTerminal(state) && job.record.tenant == tenant) ++n_of_tenant;
  }
  if (n_queued > limits_.queued_jobs_max) {
    Violate(absl::StrCat("I6: ", n_queued, " jobs are queued, at most ", limits_.queued_jobs_max));
  }
  if (n_of_tenant > limits_.tenant_jobs_max) {
    Violate(absl::StrCat("I6: ", tenant, " has ", n_of_tenant, " live jobs, at most ",
                         limits_.tenant_jobs_max));
  }
}

void History::OnUpdate(const JobRecord& record, const v1::QuantizationJobEvent& event,
                       const v1::Model* published, bool is_told) {
  const std::string id = IdOf(record);
  SetTold(id, is_told);
  Note(absl::StrCat("stored ", id, " ", Name(record.job.state()), " token ", record.fencing_token,
                    " #", event.sequence(), is_told ? " " : " (untold) ", event.message()));
  Job* job = Find(id);
  if (job == nullptr) return Violate(absl::StrCat("I1: ", id, " is updated and was not stored"));
  CheckTransition(id, job->record, record);
  if (event.sequence() != job->record.last_sequence + 1 ||
      record.last_sequence != event.sequence()) {
    Violate(absl::StrCat("events: ", id, " has #", event.sequence(), " behind #",
                         job->record.last_sequence));
  }
  const bool is_granted = record.fencing_token != job->record.fencing_token;
  if (is_granted) {
    ++figures_.attempts;
    job->holders[record.fencing_token] = record.job.worker();
    job->has_result_artifact = false;
  }
  if (record.job.stage() == QuantizationJob::PUBLISHING && jobs::IsLeased(record.job.state())) {
    job->publishing.insert(record.fencing_token);
  }
  if (job->record.job.state() == QuantizationJob::QUEUED &&
      record.job.state() == QuantizationJob::FAILED) {
    for (const std::string& worker : workers_) {
      if (job->refused_by.contains(worker)) continue;
      Violate(absl::StrCat("end: ", id, " fails, and ", worker, " has not refused it"));
    }
  }
  const bool has_succeeded = record.job.state() == QuantizationJob::SUCCEEDED;
  if (has_succeeded != (published != nullptr)) {
    Violate(absl::StrCat("I3: ", id, has_succeeded ? " succeeded without" : " has", " a model"));
  }
  if (has_succeeded && !job->has_result_artifact) {
    Violate(absl::StrCat("I3: ", id, " succeeded, and its worker has no artifact"));
  }
  if (job->is_cancelled && record.job.state() != QuantizationJob::CANCELLING &&
      record.job.state() != QuantizationJob::CANCELLED && !has_succeeded) {
    Violate(absl::StrCat("I4: ", id, " was cancelled and is ", Name(record.job.state())));
  }
  if (jobs::IsTerminal(record.job.state())) {
    ++figures_
          .ends[absl::StrCat(Name(record.job.state()), record.job.error_reason().empty() ? "" : " ",
                             record.job.error_reason())];
  }
  job->record = record;
}

void History::CheckTransition(const std::string& id, const JobRecord& before,
                              const JobRecord& after) {
  const QuantizationJob::State from = before.job.state();
  const QuantizationJob::State to = after.job.state();
  if (!IsStep(from, to)) {
    Violate(absl::StrCat("I4: ", id, " goes from ", Name(from), " to ", Name(to)));
  }
  const bool is_granted = from == QuantizationJob::QUEUED && to == QuantizationJob::RUNNING;
  if (after.fencing_token != before.fencing_token + (is_granted ? 1 : 0)) {
    Violate(absl::StrCat("I2: ", id, " has token ", after.fencing_token, " behind ",
                         before.fencing_token, is_granted ? ", granted" : ""));
  }
  if (after.completed_token != before.completed_token &&
      (after.completed_token != before.fencing_token || !jobs::IsLeased(from))) {
    Violate(absl::StrCat("I2: ", id, " is completed with token ", after.completed_token,
                         ", its token is ", before.fencing_token));
  }
  if (after.job.attempt() != before.job.attempt() + (is_granted ? 1 : 0)) {
    Violate(absl::StrCat("I5: ", id, " has attempt ", after.job.attempt()));
  }
  const bool is_poisoned =
      after.crashes >= limits::kJobCrashesMax ||
      (after.crash_workers.size() >= 2 && after.crashes >= limits::kJobCrashesOnTwoWorkersMax);
  if (after.retries > limits::kJobRetriesMax || (is_poisoned && !jobs::IsTerminal(to))) {
    Violate(absl::StrCat("I5: ", id, " goes on after ", after.retries, " retries and ",
                         after.crashes, " crashes"));
  }
  if (jobs::IsLeased(from) && jobs::IsLeased(to)) CheckProgress(id, before.job, after.job);
}

// Within one attempt.
void History::CheckProgress(const std::string& id, const QuantizationJob& before,
                            const QuantizationJob& after) {
  if (after.worker() != before.worker()) {
    Violate(
        absl::StrCat("I2: ", id, " changes hands from ", before.worker(), " to ", after.worker()));
  }
  const bool was_publishing = before.stage() == QuantizationJob::PUBLISHING;
  const bool is_publishing = after.stage() == QuantizationJob::PUBLISHING;
  if ((was_publishing && !is_publishing) ||
      after.progress().fraction() < before.progress().fraction() ||
      after.progress().layers_done() < before.progress().layers_done()) {
    Violate(absl::StrCat("B6: ", id, " goes back from ",
                         QuantizationJob::Stage_Name(before.stage()), " to ",
                         QuantizationJob::Stage_Name(after.stage())));
  }
  if (is_publishing && after.state() == QuantizationJob::CANCELLING) {
    Violate(absl::StrCat("I3: ", id, " is cancelled and publishes"));
  }
}

void History::OnDelete(const std::string& id) {
  Note(absl::StrCat("deleted ", id));
  Job* job = Find(id);
  if (job == nullptr) return;
  if (!job->is_delete_asked || !jobs::IsTerminal(job->record.job.state())) {
    Violate(absl::StrCat("I1: ", id, " is deleted in ", Name(job->record.job.state())));
  }
  job->is_stored = false;
}

void History::OnRead(const std::string& id, const std::optional<JobRecord>& record) {
  const Job* job = Find(id);
  if (job == nullptr) return;
  if (!record.has_value()) return Violate(absl::StrCat("I1: ", id, " is lost"));
  if (record->job.state() != job->record.job.state() ||
      record->fencing_token != job->record.fencing_token ||
      record->last_sequence != job->record.last_sequence) {
    Violate(absl::StrCat("I1: the disk has ", id, " as ", Name(record->job.state()), " #",
                         record->last_sequence, ", and took ", Name(job->record.job.state()), " #",
                         job->record.last_sequence));
  }
}

void History::OnSubmitted(const std::string& request_id, const QuantizationJob& job) {
  const std::string id = job.name().substr(kJobCollection.size());
  Note(absl::StrCat("client: ", request_id, " is ", id));
  const auto [it, is_first] = submitted_.try_emplace(request_id, id);
  if (it->second != id) {
    Violate(absl::StrCat("I1: request ", request_id, " is ", id, ", and was ", it->second));
  }
  Job* stored = Find(id);
  if (stored != nullptr) {
    stored->is_submitted = true;
    stored->request_id = request_id;
  } else if (!jobs_[id].is_delete_asked) {
    Violate(absl::StrCat("I1: ", id, " is acknowledged and not stored"));
  }
}

// Each request has names of its own, so that nothing but a deletion can stand in its way.
void History::OnSubmitRefused(const std::string& request_id, const absl::Status& status) {
  const auto it = submitted_.find(request_id);
  if (it != submitted_.end() && jobs_[it->second].is_delete_asked) return;
  Violate(absl::StrCat("I1: request ", request_id, " is refused: ", std::string(status.message())));
}

void History::OnCancelled(const std::string& id) {
  if (Job* job = Find(id)) job->is_cancelled = true;
}

void History::OnGranted(const std::string& worker, const std::string& id, int64_t token) {
  const Job* job = Find(id);
  const auto it =
      job == nullptr ? std::map<int64_t, std::string>::const_iterator() : job->holders.find(token);
  if (job == nullptr || it == job->holders.end() || it->second != worker) {
    Violate(absl::StrCat("I2: ", worker, " is given ", id, " with token ", token,
                         ", which the disk does not have"));
  }
}

void History::OnAccepted(const std::string& worker, const std::string& id, int64_t token,
                         std::string_view what) {
  const Job* job = Find(id);
  if (job == nullptr) {
    return Violate(absl::StrCat("I2: ", std::string(what), " of ", id, ", which is not there"));
  }
  const auto it = job->holders.find(token);
  if (it == job->holders.end() || it->second != worker || token != job->record.fencing_token) {
    Violate(absl::StrCat("I2: ", std::string(what), " of ", id, " by ", worker, " with token ",
                         token, " is accepted, the token is ", job->record.fencing_token));
  }
}

void History::OnCompletion(const std::string& id, int64_t token, const absl::Status& said) {
  const Job* job = Find(id);
  if (job == nullptr) return;
  const bool is_stored = job->record.completed_token == token;
  if (said.ok() && !is_stored) {
    Violate(absl::StrCat("B5: a completion of ", id, " is acknowledged and not stored"));
  }
  if (absl::IsAborted(said) && is_stored) {
    Violate(absl::StrCat("B5: a completion of ", id, " is stored and cannot be repeated"));
  }
}

void History::OnCheckpoint(const std::string& worker, const std::string& id, int64_t token,
                           int n_layers) {
  Note(absl::StrCat(worker, ": keeps ", n_layers, " layers of ", id, " with token ", token));
  Job& job = jobs_[id];
  ++figures_.checkpoints;
  const auto it = job.holders.find(token);
  if (it == job.holders.end() || it->second != worker) {
    Violate(absl::StrCat("I2: ", worker, " keeps a layer of ", id, " with the token ", token,
                         " of another"));
  }
  if (token < job.checkpoint_token) {
    Violate(absl::StrCat("I2: a layer of ", id, " is kept with token ", token, " behind ",
                         job.checkpoint_token));
  }
  job.checkpoint_token = token;
}

void History::OnRename(const std::string& folder, const std::string& worker, const std::string& id,
                       int64_t token) {
  Note(absl::StrCat(worker, ": publishes ", id, " with token ", token));
  Job& job = jobs_[id];
  if (!job.publishing.contains(token)) {
    Violate(absl::StrCat("I3: ", worker, " publishes ", id, ", and was not allowed to"));
  }
  if (!job.folders.insert(folder).second) {
    Violate(absl::StrCat("I3: ", id, " is published twice in ", folder));
  }
  ++figures_.artifacts;
  if (job.folders.size() > 1) ++figures_.second_artifacts;
  if (job.record.fencing_token != token || !jobs::IsLeased(job.record.job.state())) {
    ++figures_.late_artifacts;
  }
}

void History::OnResult(const std::string& worker, const std::string& id) {
  Job* job = Find(id);
  if (job != nullptr && job->record.job.worker() == worker) job->has_result_artifact = true;
}

Phase History::PhaseOfJob(const std::string& id) const {
  const auto it = jobs_.find(id);
  if (it == jobs_.end() || !it->second.is_stored) return Phase::kNoJob;
  return PhaseOf(it->second.record.job.state(), it->second.record.job.stage());
}

bool History::IsTerminal(const std::string& id) const {
  const auto it = jobs_.find(id);
  return it == jobs_.end() || !it->second.is_stored ||
         jobs::IsTerminal(it->second.record.job.state());
}

std::vector<std::string> History::Ids() const {
  std::vector<std::string> ids;
  for (const auto& [id, job] : jobs_) {
    if (job.is_stored) ids.push_back(id);
  }
  return ids;
}

std::vector<std::string> History::Unfinished() const {
  std::vector<std::string> ids = Ids();
  std::erase_if(ids, [&](const std::string& id) { return IsTerminal(id); });
  return ids;
}

void History::CheckEnd(const std::string& id, const std::vector<v1::QuantizationJobEvent>& events) {
  const Job* job = Find(id);
  if (job == nullptr) return;
  for (size_t i = 0; i < events.size(); ++i) {
    if (events[i].sequence() != static_cast<int64_t>(i) + 1) {
      return Violate(
          absl::StrCat("events: ", id, " has #", events[i].sequence(), " as its ", i + 1, "th"));
    }
  }
  const QuantizationJob& ended = job->record.job;
  if (events.empty() || events.back().state() != ended.state()) {
    return Violate(absl::StrCat("events: ", id, " does not end with its state"));
  }
  const JobPlan& plan = PlanOf(ended.model_name());
  const bool is_poisoned = ended.error_reason() == "POISONED";
  bool is_expected = ended.state() == QuantizationJob::CANCELLED || is_poisoned;
  switch (plan.kind) {
    case JobPlan::Kind::kSucceeds:
      is_expected |= ended.state() == QuantizationJob::SUCCEEDED;
      break;
    case JobPlan::Kind::kMayPass:
      is_expected |=
          ended.state() == QuantizationJob::SUCCEEDED ||
          (ended.error_reason() == "PLANNED" && job->record.retries == limits::kJobRetriesMax);
      break;
    case JobPlan::Kind::kFailsForEver:
      is_expected |= ended.error_reason() == "PLANNED" && job->record.retries == 0;
      break;
    case JobPlan::Kind::kKillsWorker:
      break;
    case JobPlan::Kind::kNeedsBigWorker:
      is_expected |= ended.state() == QuantizationJob::SUCCEEDED ||
                     ended.error_reason() == "INSUFFICIENT_MEMORY";
      break;
  }
  if (!is_expected) {
    Violate(absl::StrCat("end: ", id, " is ", Name(ended.state()), " ", ended.error_reason(), ": ",
                         ended.error().message()));
  }
}

void History::Figures::Add(const Figures& other) {
  jobs += other.jobs;
  attempts += other.attempts;
  checkpoints += other.checkpoints;
  artifacts += other.artifacts;
  second_artifacts += other.second_artifacts;
  late_artifacts += other.late_artifacts;
  for (const auto& [end, n] : other.ends) ends[end] += n;
}

}  // namespace walsh::sim
