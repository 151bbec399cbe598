#include "server/jobs/job_metrics.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "absl/time/time.h"
#include "common/metrics.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

// The error_reason that workers give, as docs/job-states.md has it.
constexpr std::string_view kQualityGate = "QUALITY_GATE";

constexpr QuantizationJob::State kStates[] = {
    QuantizationJob::QUEUED,    QuantizationJob::RUNNING, QuantizationJob::CANCELLING,
    QuantizationJob::SUCCEEDED, QuantizationJob::FAILED,  QuantizationJob::CANCELLED};

constexpr QuantizationJob::Stage kStages[] = {
    QuantizationJob::FETCHING, QuantizationJob::VALIDATING,  QuantizationJob::LOADING,
    QuantizationJob::ROTATING, QuantizationJob::CALIBRATING, QuantizationJob::QUANTIZING,
    QuantizationJob::PACKING,  QuantizationJob::EVALUATING,  QuantizationJob::PUBLISHING};

// Wall time, which may have jumped: never negative.
double Seconds(absl::Duration duration) { return std::max(0.0, absl::ToDoubleSeconds(duration)); }

double Seconds(const google::protobuf::Timestamp& from, const google::protobuf::Timestamp& to) {
  return Seconds(ToTime(to) - ToTime(from));
}

const metrics::Buckets& RatioBuckets() {
  static const auto* const buckets =
      new metrics::Buckets{1.0, 1.01, 1.02, 1.04, 1.08, 1.15, 1.25, 1.5, 2, 4, 10, 100};
  return *buckets;
}

}  // namespace

struct JobMetrics::Families {
  prometheus::Family<prometheus::Gauge>& jobs =
      metrics::Gauge("walsh_quantization_jobs", "Stored jobs by state.");
  prometheus::Family<prometheus::Counter>& finished = metrics::Counter(
      "walsh_quantization_jobs_finished_total", "Jobs that ended, by state and method.");
  prometheus::Histogram& queue_seconds =
      metrics::Histogram("walsh_quantization_job_queue_seconds",
                         "Time from creation, or from the return to the queue, to a worker.")
          .Add({}, metrics::JobDurationBuckets());
  prometheus::Histogram& duration_seconds =
      metrics::Histogram("walsh_quantization_job_duration_seconds",
                         "Time from the first start of a job to its end.")
          .Add({}, metrics::JobDurationBuckets());
  prometheus::Family<prometheus::Histogram>& stage_seconds = metrics::Histogram(
      "walsh_quantization_stage_seconds", "Time that succeeded jobs spent in each stage.");
  prometheus::Gauge& oldest_queued =
      metrics::Gauge("walsh_quantization_oldest_queued_job_age_seconds",
                     "Time that the job that has waited longest in the queue has waited.")
          .Add({});
  // The next three are there while a worker has the job.
  prometheus::Family<prometheus::Gauge>& layers = metrics::Gauge(
      "walsh_quantization_layers", "Layers of a running job's model; gone when it ends.");
  prometheus::Family<prometheus::Gauge>& layers_done = metrics::Gauge(
      "walsh_quantization_layers_done", "Finished layers of a running job; gone when it ends.");
  prometheus::Family<prometheus::Gauge>& progress_time =
      metrics::Gauge("walsh_quantization_job_progress_timestamp_seconds",
                     "When a running job last came forward, in Unix time; gone when it ends.");
  prometheus::Histogram& perplexity_ratio =
      metrics::Histogram("walsh_quantization_perplexity_ratio",
                         "Perplexity after quantization over perplexity before.")
          .Add({}, RatioBuckets());
  prometheus::Counter& gate_failures =
      metrics::Counter("walsh_quantization_quality_gate_failures_total",
                       "Jobs whose model failed its quality gate.")
          .Add({});
  prometheus::Counter& lease_expirations =
      metrics::Counter("walsh_worker_lease_expirations_total",
                       "Leases whose worker stopped its heartbeats.")
          .Add({});
  prometheus::Counter& refusals =
      metrics::Counter("walsh_quantization_job_refusals_total",
                       "Jobs that a worker could not run and left to the others.")
          .Add({});

  Families();
  prometheus::Gauge& State(QuantizationJob::State state) {
    return jobs.Add({{"state", std::string(StateName(state))}});
  }
  prometheus::Counter& Finished(QuantizationJob::State state,
                                v1::QuantizationConfig::Method method) {
    return finished.Add({{"state", std::string(StateName(state))},
                         {"method", v1::QuantizationConfig::Method_Name(method)}});
  }
  prometheus::Histogram& Stage(QuantizationJob::Stage stage) {
    return stage_seconds.Add({{"stage", QuantizationJob::Stage_Name(stage)}},
                             metrics::JobDurationBuckets());
  }
  void SetProgress(const QuantizationJob& job);
  void RemoveProgress(const QuantizationJob& job);
};

// A counter that appears with its first event looks to rate() and increase() as if it had always
// had that value, so what can be named beforehand is there from the start.
JobMetrics::Families::Families() {
  const google::protobuf::EnumDescriptor* methods = v1::QuantizationConfig::Method_descriptor();
  for (const QuantizationJob::State state : kStates) {
    if (!IsTerminal(state)) continue;
    for (int i = 1; i < methods->value_count(); ++i) {  // 0 is UNSPECIFIED
      Finished(state, static_cast<v1::QuantizationConfig::Method>(methods->value(i)->number()));
    }
  }
  for (const QuantizationJob::Stage stage : kStages) Stage(stage);
}

void JobMetrics::Families::SetProgress(const QuantizationJob& job) {
  const prometheus::Labels labels{{"job", job.name()}};
  progress_time.Add(labels).Set(
      absl::ToDoubleSeconds(ToTime(job.update_time()) - absl::UnixEpoch()));
  if (job.progress().layers_total() == 0) return;  // not known yet
  layers.Add(labels).Set(job.progress().layers_total());
  layers_done.Add(labels).Set(job.progress().layers_done());
}

void JobMetrics::Families::RemoveProgress(const QuantizationJob& job) {
  for (auto* family : {&progress_time, &layers, &layers_done}) {
    family->Remove(&family->Add({{"job", job.name()}}));
  }
}

JobMetrics::JobMetrics()
    : families_([]() -> Families& {
        static auto* const families = new Families;
        return *families;
      }()) {}

absl::Status JobMetrics::CountStored(const JobStore& store) {
  for (const QuantizationJob::State state : kStates) {
    WALSH_ASSIGN_OR_RETURN(const JobPage page, store.List({.state = state, .page_size = 1}));
    families_.State(state).Set(static_cast<double>(page.total_size));
  }
  return absl::OkStatus();
}

void JobMetrics::OnFoundLeased(const JobRecord& record) { families_.SetProgress(record.job); }

void JobMetrics::OnCreate(const JobRecord& record) {
  families_.State(record.job.state()).Increment();
}

void JobMetrics::OnTransition(const JobRecord& before, const JobRecord& after) {
  if (IsLeased(after.job.state())) families_.SetProgress(after.job);
  if (before.job.state() == after.job.state()) return;
  families_.State(before.job.state()).Decrement();
  families_.State(after.job.state()).Increment();
  if (!IsLeased(after.job.state())) families_.RemoveProgress(after.job);
  if (after.refusals.size() > before.refusals.size()) families_.refusals.Increment();
  if (after.job.state() == QuantizationJob::RUNNING) {
    families_.queue_seconds.Observe(Seconds(before.job.update_time(), after.job.update_time()));
  }
  if (IsTerminal(after.job.state())) OnFinish(after);
}

void JobMetrics::OnFinish(const JobRecord& record) {
  const QuantizationJob& job = record.job;
  families_.Finished(job.state(), job.config().method()).Increment();
  if (job.error_reason() == kQualityGate) families_.gate_failures.Increment();
  if (job.has_start_time()) {
    families_.duration_seconds.Observe(Seconds(job.start_time(), job.end_time()));
  }
  // Of what a quality gate refused, too.
  const double before = job.result().perplexity_before();
  const double after = job.result().perplexity_after();
  if (before > 0 && after > 0) families_.perplexity_ratio.Observe(after / before);
  if (job.state() != QuantizationJob::SUCCEEDED) return;
  for (const QuantizationJob::StageTime& time : job.result().stage_times()) {
    if (!QuantizationJob::Stage_IsValid(time.stage())) continue;
    families_.Stage(time.stage()).Observe(time.seconds());
  }
}

void JobMetrics::OnDelete(const JobRecord& record) {
  families_.State(record.job.state()).Decrement();
}

void JobMetrics::OnLeaseExpired() { families_.lease_expirations.Increment(); }

void JobMetrics::SetOldestQueued(absl::Duration age) { families_.oldest_queued.Set(Seconds(age)); }

}  // namespace walsh::jobs
