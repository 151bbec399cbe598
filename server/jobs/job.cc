#include "server/jobs/job.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/utf8.h"

namespace walsh::jobs {
namespace {

using StatusOrTransition = absl::StatusOr<Transition>;

constexpr double kBackoffJitter = 0.25;

void SetTime(absl::Time time, google::protobuf::Timestamp* out) {
  const int64_t nanos = absl::ToUnixNanos(time);
  out->set_seconds(nanos / 1'000'000'000);
  out->set_nanos(static_cast<int32_t>(nanos % 1'000'000'000));
}

std::string Cut(const std::string& text) {
  return std::string(Utf8Prefix(ReplaceInvalidUtf8(text), limits::kStatusMessageBytesMax));
}

// The event that a change of state appends.
QuantizationJobEvent Snapshot(const JobRecord& record, std::string message) {
  QuantizationJobEvent event;
  event.set_state(record.job.state());
  event.set_stage(record.job.stage());
  *event.mutable_progress() = record.job.progress();
  *event.mutable_time() = record.job.update_time();
  event.set_layer(-1);
  event.set_attempt(record.job.attempt());
  event.set_message(std::move(message));
  return event;
}

Transition Enter(JobRecord record, QuantizationJob::State state, absl::Time now,
                 std::string message) {
  QuantizationJob& job = record.job;
  job.set_state(state);
  SetTime(now, job.mutable_update_time());
  if (IsTerminal(state)) *job.mutable_end_time() = job.update_time();
  QuantizationJobEvent event = Snapshot(record, std::move(message));
  return {std::move(record), std::move(event)};
}

// Back to the queue: nothing of the attempt counts any more.
Transition Requeue(JobRecord record, absl::Time now, absl::Time not_before, std::string message) {
  record.not_before = not_before;
  record.job.clear_worker();
  record.job.clear_stage();
  record.job.clear_progress();
  return Enter(std::move(record), QuantizationJob::QUEUED, now, std::move(message));
}

Transition Finish(JobRecord record, absl::Time now, google::rpc::Status error, std::string reason) {
  std::string message = absl::StrCat("failed: ", error.message());
  *record.job.mutable_error() = std::move(error);
  record.job.set_error_reason(std::move(reason));
  return Enter(std::move(record), QuantizationJob::FAILED, now, std::move(message));
}

google::rpc::Status Error(absl::StatusCode code, std::string message) {
  google::rpc::Status error;
  error.set_code(static_cast<int>(code));
  error.set_message(std::move(message));
  return error;
}

// What a worker said, fit to be shown: it must have a code of an error.
google::rpc::Status Shown(google::rpc::Status error) {
  error.set_message(Cut(error.message()));
  if (error.code() <= 0 || error.code() > 16) error.set_code(13);
  return error;
}

std::string CodeName(const google::rpc::Status& error) {
  return absl::StatusCodeToString(static_cast<absl::StatusCode>(error.code()));
}

// One instance per call of Apply. Each On… answers for one kind of event in every state.
class Step {
 public:
  Step(JobRecord record, absl::Time now) : record_(std::move(record)), now_(now) {}

  StatusOrTransition operator()(const Grant& event) {
    if (state() != QuantizationJob::QUEUED) return Illegal(event);
    QuantizationJob& job = record_.job;
    ++record_.fencing_token;
    job.set_attempt(job.attempt() + 1);
    job.set_worker(event.worker);
    record_.not_before = absl::InfinitePast();
    if (!job.has_start_time()) SetTime(now_, job.mutable_start_time());
    return Enter(std::move(record_), QuantizationJob::RUNNING, now_,
                 absl::StrCat("attempt ", job.attempt(), " started"));
  }

  StatusOrTransition operator()(const Report& event) {
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    // From PUBLISHING on there would be an artifact of a job that was cancelled. For the same
    // reason such a job cannot be cancelled.
    if (state() == QuantizationJob::CANCELLING &&
        event.event.stage() == QuantizationJob::PUBLISHING) {
      absl::Status refused = absl::FailedPreconditionError("the job is being cancelled");
      SetErrorInfo(refused, "JOB_CANCELLING");
      SetPreconditionFailure(refused, "JOB_STATE", record_.job.name(), "is CANCELLING");
      return refused;
    }
    return Record(event.event);
  }

  StatusOrTransition operator()(const Succeed& event) {
    if (IsRepeat(event.token)) return Unchanged();
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    record_.completed_token = event.token;
    *record_.job.mutable_result() = event.result;
    QuantizationJob::Progress* progress = record_.job.mutable_progress();
    progress->set_fraction(1);
    progress->set_layers_done(progress->layers_total());
    progress->clear_eta();
    // Also from CANCELLING, should a worker publish nonetheless: CANCELLED would deny the artifact.
    return Enter(std::move(record_), QuantizationJob::SUCCEEDED, now_, "succeeded");
  }

  StatusOrTransition operator()(const Fail& event) {
    if (IsRepeat(event.token)) return Unchanged();
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    record_.completed_token = event.token;
    if (state() == QuantizationJob::CANCELLING) return Cancelled("cancelled");
    google::rpc::Status error = Shown(event.error);
    const auto code = static_cast<absl::StatusCode>(error.code());
    if (!IsRetried(code) || record_.retries >= limits::kJobRetriesMax) {
      if (event.rejected_result.has_value()) {
        *record_.job.mutable_result() = *event.rejected_result;
      }
      return Finish(std::move(record_), now_, std::move(error), Cut(event.reason));
    }
    const absl::Duration delay = Backoff(record_.retries++, event.jitter);
    return Requeue(std::move(record_), now_, now_ + delay,
                   absl::StrCat("retried in ", absl::ToInt64Seconds(delay), " s after ",
                                CodeName(error), ": ", error.message()));
  }

  StatusOrTransition operator()(const Refuse& event) {
    if (IsRepeat(event.token)) return Unchanged();
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    record_.completed_token = event.token;
    if (state() == QuantizationJob::CANCELLING) return Cancelled("cancelled");
    const google::rpc::Status error = Shown(event.error);
    const std::string worker = record_.job.worker();
    absl::Status& refusal = record_.refusals[worker];
    refusal = FromProtoStatus(error);
    if (ErrorReason(refusal).empty() && !event.reason.empty()) {
      SetErrorInfo(refusal, Cut(event.reason));
    }
    return Requeue(std::move(record_), now_, absl::InfinitePast(),
                   absl::StrCat("left to other workers, ", worker,
                                " cannot run it: ", CodeName(error), ": ", error.message()));
  }

  StatusOrTransition operator()(const RunOutOfWorkers& event) {
    if (state() != QuantizationJob::QUEUED || record_.refusals.empty()) return Illegal(event);
    const absl::Status refused = RefusedByAll(record_.refusals);
    return Finish(std::move(record_), now_, ToProtoStatus(refused), ErrorReason(refused));
  }

  StatusOrTransition operator()(const AcknowledgeCancel& event) {
    if (IsRepeat(event.token)) return Unchanged();
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    if (state() != QuantizationJob::CANCELLING) return Illegal(event);
    record_.completed_token = event.token;
    return Cancelled("cancelled");
  }

  StatusOrTransition operator()(const GiveBack& event) {
    if (IsRepeat(event.token)) return Unchanged();
    if (absl::Status held = CheckHeld(event.token, event); !held.ok()) return held;
    record_.completed_token = event.token;
    if (state() == QuantizationJob::CANCELLING) return Cancelled("cancelled");
    return Requeue(std::move(record_), now_, absl::InfinitePast(),
                   "returned to the queue by its worker");
  }

  StatusOrTransition operator()(const LoseLease& event) {
    if (!IsLeased(state())) return Illegal(event);
    if (state() == QuantizationJob::CANCELLING) {
      return Cancelled("cancelled; its worker had vanished");
    }
    ++record_.crashes;
    record_.crash_workers.insert(record_.job.worker());
    const int n_workers = static_cast<int>(record_.crash_workers.size());
    const bool is_poisoned =
        record_.crashes >= limits::kJobCrashesMax ||
        (record_.crashes >= limits::kJobCrashesOnTwoWorkersMax && n_workers >= 2);
    if (is_poisoned) {
      return Finish(std::move(record_), now_,
                    Error(absl::StatusCode::kAborted,
                          absl::StrCat("its worker vanished ", record_.crashes, " times, on ",
                                       n_workers, " workers; it is not run again")),
                    "POISONED");
    }
    return Requeue(std::move(record_), now_, absl::InfinitePast(),
                   absl::StrCat("back to the queue: its worker vanished (", record_.crashes, " of ",
                                limits::kJobCrashesMax, ")"));
  }

  StatusOrTransition operator()(const RequestCancel& event) {
    switch (state()) {
      case QuantizationJob::QUEUED:
        return Cancelled("cancelled before it ran");
      case QuantizationJob::RUNNING:
        if (record_.job.stage() == QuantizationJob::PUBLISHING) return TooLateToCancel();
        return Enter(std::move(record_), QuantizationJob::CANCELLING, now_, "cancelling");
      case QuantizationJob::CANCELLING:
      case QuantizationJob::CANCELLED:
        return Unchanged();
      default:
        return Illegal(event);
    }
  }

  StatusOrTransition operator()(const Delete& event) {
    if (!IsTerminal(state())) return Illegal(event);
    return Unchanged();
  }

 private:
  QuantizationJob::State state() const { return record_.job.state(); }

  Transition Unchanged() { return {std::move(record_), std::nullopt}; }

  Transition Cancelled(std::string message) {
    return Enter(std::move(record_), QuantizationJob::CANCELLED, now_, std::move(message));
  }

  bool IsRepeat(int64_t token) const { return token != 0 && token == record_.completed_token; }

  absl::Status Illegal(const JobEvent& event) const {
    const std::string state_name(StateName(state()));
    absl::Status status = absl::FailedPreconditionError(
        absl::StrCat(record_.job.name(), " is ", state_name, ": ", std::string(EventName(event)),
                     " is not possible"));
    SetPreconditionFailure(status, "JOB_STATE", record_.job.name(),
                           absl::StrCat("is ", state_name));
    return status;
  }

  absl::Status TooLateToCancel() const {
    absl::Status status = absl::FailedPreconditionError(
        absl::StrCat(record_.job.name(),
                     " is publishing its model and can no longer be cancelled; "
                     "the model can be deleted once the job has ended"));
    SetErrorInfo(status, "JOB_PUBLISHING");
    SetPreconditionFailure(status, "JOB_STATE", record_.job.name(), "is in stage PUBLISHING");
    return status;
  }

  // OK when the sender holds the current lease.
  absl::Status CheckHeld(int64_t token, const JobEvent& event) const {
    if (IsLeased(state()) && token == record_.fencing_token) return absl::OkStatus();
    absl::Status stale = absl::AbortedError(absl::StrCat(std::string(EventName(event)), " of ",
                                                         record_.job.name(), " with token ", token,
                                                         ", which is not that of a current lease"));
    SetErrorInfo(stale, "STALE_FENCING_TOKEN");
    return stale;
  }

  Transition Record(const QuantizationJobEvent& reported) {
    QuantizationJob& job = record_.job;
    // A late report must not hide that the job publishes: it could be cancelled then.
    if (QuantizationJob::Stage_IsValid(reported.stage()) &&
        reported.stage() != QuantizationJob::STAGE_UNSPECIFIED &&
        job.stage() != QuantizationJob::PUBLISHING) {
      job.set_stage(reported.stage());
    }
    if (reported.has_progress()) Advance(reported.progress(), job.mutable_progress());
    SetTime(now_, job.mutable_update_time());
    QuantizationJobEvent event = Snapshot(record_, Cut(reported.message()));
    event.set_layer(std::max(-1, reported.layer()));
    *event.mutable_linears() = reported.linears();
    return {std::move(record_), std::move(event)};
  }

  // Reports may arrive twice or out of order; what people see never goes back within an attempt.
  static void Advance(const QuantizationJob::Progress& from, QuantizationJob::Progress* to) {
    to->set_layers_total(std::clamp(from.layers_total(), to->layers_total(), limits::kLayersMax));
    to->set_layers_done(std::clamp(from.layers_done(), to->layers_done(),
                                   std::max(to->layers_done(), to->layers_total())));
    const double fraction = std::isfinite(from.fraction()) ? from.fraction() : 0;
    to->set_fraction(std::min(1.0, std::max(to->fraction(), fraction)));
    if (from.has_eta() && from.eta().seconds() >= 0) {
      *to->mutable_eta() = from.eta();
    } else {
      to->clear_eta();
    }
  }

  JobRecord record_;
  const absl::Time now_;
};

}  // namespace

absl::StatusOr<Transition> Apply(JobRecord record, const JobEvent& event, absl::Time now) {
  Step step(std::move(record), now);
  return std::visit(step, event);
}

Transition NewJob(QuantizationJob job, absl::Time now) {
  SetTime(now, job.mutable_create_time());
  JobRecord record;
  record.job = std::move(job);
  return Enter(std::move(record), QuantizationJob::QUEUED, now, "queued");
}

absl::Time ToTime(const google::protobuf::Timestamp& time) {
  return absl::FromUnixSeconds(time.seconds()) + absl::Nanoseconds(time.nanos());
}

bool IsTerminal(QuantizationJob::State state) {
  return state == QuantizationJob::SUCCEEDED || state == QuantizationJob::FAILED ||
         state == QuantizationJob::CANCELLED;
}

bool IsLeased(QuantizationJob::State state) {
  return state == QuantizationJob::RUNNING || state == QuantizationJob::CANCELLING;
}

bool IsRetried(absl::StatusCode code) {
  return code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kResourceExhausted;
}

absl::Duration Backoff(int n_retries, double jitter) {
  // 2⁶ · 10 s is above the cap, and shifting further would overflow one day.
  const absl::Duration base = absl::Seconds(10) * (1 << std::clamp(n_retries, 0, 6));
  return std::min(base, absl::Minutes(6)) * (1 + kBackoffJitter * std::clamp(jitter, -1.0, 1.0));
}

std::string_view StateName(QuantizationJob::State state) {
  return QuantizationJob::State_Name(state);
}

std::string_view EventName(const JobEvent& event) {
  struct Name {
    std::string_view operator()(const Grant&) { return "Grant"; }
    std::string_view operator()(const Report&) { return "Report"; }
    std::string_view operator()(const Succeed&) { return "Succeed"; }
    std::string_view operator()(const Fail&) { return "Fail"; }
    std::string_view operator()(const Refuse&) { return "Refuse"; }
    std::string_view operator()(const RunOutOfWorkers&) { return "RunOutOfWorkers"; }
    std::string_view operator()(const AcknowledgeCancel&) { return "AcknowledgeCancel"; }
    std::string_view operator()(const GiveBack&) { return "GiveBack"; }
    std::string_view operator()(const LoseLease&) { return "LoseLease"; }
    std::string_view operator()(const RequestCancel&) { return "Cancel"; }
    std::string_view operator()(const Delete&) { return "Delete"; }
  };
  return std::visit(Name(), event);
}

}  // namespace walsh::jobs
