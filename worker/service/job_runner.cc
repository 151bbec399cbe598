#include "worker/service/job_runner.h"

#include <grpcpp/client_context.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <filesystem>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "worker/kernels/device_failure.h"
#include "worker/kernels/thread_pool.h"
#include "worker/pipeline/object_checkpoint_store.h"
#include "worker/pipeline/quality_gate.h"
#include "worker/service/job_device.h"
#include "worker/service/job_metrics.h"

namespace walsh::service {
namespace {

constexpr absl::Duration kCallTimeout = absl::Seconds(5);
constexpr absl::Duration kRetryDelay = absl::Milliseconds(500);
// Reports between changes of stage and layer are thinned to this.
constexpr absl::Duration kReportInterval = absl::Seconds(1);
// How often a hand-back is tried: the coordinator would learn it from the lease's end anyway.
constexpr int kHandBackTries = 3;
constexpr int kJobNice = 10;
constexpr int64_t kResultBytesMax = 4 << 20;
constexpr int64_t kMebibyte = 1 << 20;
// Of a digest, in a folder's name: enough to tell the families of one fleet apart.
constexpr size_t kFamilyChars = 16;
// Reason of a job whose model was not good enough.
constexpr char kQualityGate[] = "QUALITY_GATE";

std::string JobId(const std::string& job_name) {
  return job_name.starts_with(kJobCollection) ? job_name.substr(kJobCollection.size()) : job_name;
}

void SetTimeout(grpc::ClientContext& context, absl::Duration timeout) {
  context.set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(timeout));
}

// Whether another worker might run what this one cannot: one with more memory, or whose device or
// version takes the model. Of an error from before the work only: what is UNIMPLEMENTED later, a
// tokenizer or a chat template, is so for every worker.
bool IsRefusal(const absl::Status& error) {
  return absl::IsUnimplemented(error) || ErrorReason(error) == kInsufficientMemory;
}

// Whether no worker will run the job again, as docs/job-states.md says; but for the last of the
// retries, which only the coordinator counts.
bool EndsJob(const internal::v1::CompleteJobRequest& outcome) {
  if (outcome.has_returned() || outcome.refused()) return false;
  if (!outcome.has_error()) return true;
  const auto code = static_cast<absl::StatusCode>(outcome.error().code());
  return code != absl::StatusCode::kUnavailable && code != absl::StatusCode::kResourceExhausted;
}

// Whether the coordinator may take later what it did not take now. Everything else is its last
// word: a store that is damaged or a request that it does not understand stays so.
bool MayPass(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:  // its queue or its disk is full
    case absl::StatusCode::kCancelled:          // it stops
    case absl::StatusCode::kUnknown:            // gRPC, of some broken connections
      return true;
    case absl::StatusCode::kNotFound:  // it has restarted; the next heartbeat registers again
      return ErrorReason(status) == "WORKER_UNKNOWN";
    default:
      return false;
  }
}

// A store that keeps this worker out, or whose copy is damaged, says nothing about the job: it is
// tried again, maybe on another worker.
absl::Status OfStore(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      return status;
    default:
      return absl::UnavailableError(absl::StrCat("the artifact store: ", status.message()));
  }
}

}  // namespace

// Passes the pipeline's progress on, and the coordinator's and the lease's verdict back.
//
// Reports go out on a thread of their own: the coordinator stores each on its disk before it
// answers, and a device would have nothing to do meanwhile. While one is on its way those behind it
// wait, at most one for each stage of each layer. Once one is not taken or has waited too long they
// become one, so that neither watchers nor the job's end lag far behind.
class JobRunner::ProgressReporter {
 public:
  ProgressReporter(JobRunner* runner, HeldLease* held)
      : runner_(runner), held_(held), sending_([this] { Send(); }) {}
  // What is queued goes out before, unless the job must stop.
  ~ProgressReporter() {
    {
      const std::lock_guard lock(mutex_);
      is_done_ = true;
    }
    changed_.notify_all();
    sending_.join();
  }
  ProgressReporter(const ProgressReporter&) = delete;
  ProgressReporter& operator=(const ProgressReporter&) = delete;

  absl::Status operator()(const pipeline::JobProgress& progress) {
    WALSH_RETURN_IF_ERROR(Check(progress));
    const absl::Duration now = runner_->clock_->Monotonic();
    metrics_.Observe(progress, now);
    unqueued_.insert(unqueued_.end(), progress.linears.begin(), progress.linears.end());
    const bool is_change = progress.stage != stage_ || progress.layer != layer_;
    if (!is_change && now - reported_ < kReportInterval) return absl::OkStatus();
    stage_ = progress.stage;
    layer_ = progress.layer;
    reported_ = now;
    pipeline::JobProgress report = progress;
    report.linears = std::exchange(unqueued_, {});
    Queue(std::move(report));
    return Check(progress);
  }

 private:
  // Why the job must stop now. Where its layer will be kept, a worker that stops lets it finish
  // that, and stops it when the next begins.
  absl::Status Check(const pipeline::JobProgress& progress) {
    absl::Status stop = held_->Check();
    if (!held_->may_finish() || !progress.keeps_layers || progress.layer < 0) return stop;
    if (!last_layer_.has_value()) last_layer_ = progress.layers_done;
    return progress.layers_done > *last_layer_ ? stop : absl::OkStatus();
  }
  bool must_stop() const { return !held_->Check().ok() && !held_->may_finish(); }

  static void Prepend(std::vector<pipeline::LinearReport> linears, pipeline::JobProgress& report) {
    linears.insert(linears.end(), std::make_move_iterator(report.linears.begin()),
                   std::make_move_iterator(report.linears.end()));
    report.linears = std::move(linears);
  }

  struct Queued {
    pipeline::JobProgress report;
    absl::Duration since;
  };

  // The next two with `mutex_` held. `report` stands for the last of the queue as well, which is
  // not empty.
  void MergeLastInto(pipeline::JobProgress& report) {
    Prepend(std::move(queue_.back().report.linears), report);
    queue_.pop_back();
  }
  void MergeQueue() {
    if (queue_.empty()) return;
    Queued last = std::move(queue_.back());
    queue_.pop_back();
    while (!queue_.empty()) MergeLastInto(last.report);
    queue_.push_back(std::move(last));
  }

  void Queue(pipeline::JobProgress report) {
    {
      const std::lock_guard lock(mutex_);
      if (!queue_.empty() && queue_.back().report.stage == report.stage &&
          queue_.back().report.layer == report.layer) {
        MergeLastInto(report);
      }
      queue_.push_back({.report = std::move(report), .since = runner_->clock_->Monotonic()});
    }
    changed_.notify_all();
  }

  void Send() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return is_done_ || !queue_.empty(); });
      // The job that must stop ends now, and does not wait for a coordinator that may hang.
      if (queue_.empty() || must_stop()) {
        queue_.clear();
        if (is_done_) return;
        continue;
      }
      const absl::Duration waited = runner_->clock_->Monotonic() - queue_.front().since;
      if (waited > runner_->options_.report_lag_max) MergeQueue();
      pipeline::JobProgress report = std::move(queue_.front().report);
      queue_.pop_front();
      lock.unlock();
      // Nothing may leave the thread: a report is not worth the process.
      try {
        SendOne(std::move(report));
      } catch (const std::exception& e) {
        WALSH_LOG(Error, "a report of progress was dropped", {"error", e.what()});
      }
      lock.lock();
    }
  }

  void SendOne(pipeline::JobProgress report) {
    Prepend(std::exchange(unsent_, {}), report);
    if (const absl::Status status = runner_->Report(ToEvent(report), *held_); !status.ok()) {
      // Without the coordinator the job goes on for as long as the lease lasts; what it finished
      // meanwhile goes out with a later report.
      WALSH_LOG(Warning, "progress was not stored", {"job", held_->job_name()}, {"error", status});
      unsent_ = std::move(report.linears);
      const std::lock_guard lock(mutex_);
      MergeQueue();
    }
  }

  JobRunner* const runner_;
  HeldLease* const held_;
  // Of the job's thread.
  JobProgressMetrics metrics_;
  pipeline::Stage stage_ = pipeline::Stage::kValidating;
  int64_t layer_ = -2;
  absl::Duration reported_ = -absl::InfiniteDuration();
  std::optional<int64_t> last_layer_;  // that a worker that stops finishes
  std::vector<pipeline::LinearReport> unqueued_;
  // Of the sending thread.
  std::vector<pipeline::LinearReport> unsent_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Queued> queue_;
  bool is_done_ = false;
  std::thread sending_;  // last: it uses the others
};

JobRunner::JobRunner(Options options, CoordinatorLink* coordinator, ModelStore* models,
                     Clock* clock)
    : options_(std::move(options)), coordinator_(*coordinator), models_(models), clock_(clock) {}

void JobRunner::Run(const internal::v1::Lease& lease, HeldLease& held) {
  Failure failure;
  absl::StatusOr<Outcome> outcome = FindEarlier(lease, held);
  if (absl::IsNotFound(outcome.status())) outcome = RunToPublished(lease, held, failure);
  if (outcome.ok()) {
    if (const absl::Status kept = KeepArtifact(lease, held); !kept.ok()) outcome = kept;
  }
  if (IsDeviceBroken(outcome.status())) {
    options_.on_device_broken(outcome.status());
    outcome = DeviceBrokenError(options_.device, outcome.status());
  }
  if (options_.exclusive != nullptr) options_.exclusive->EndJob();
  if (outcome.ok()) LoadIfWanted(lease, held, *outcome);
  Complete(outcome, failure, held);
}

absl::StatusOr<JobRunner::Outcome> JobRunner::FindEarlier(const internal::v1::Lease& lease,
                                                          const HeldLease& held) {
  const std::string& id = lease.job().model_name();
  absl::StatusOr<v1::Model> found = models_->Get(id);
  if (absl::IsNotFound(found.status())) {
    // Of a worker that died between keeping and completing it.
    found = models_->Fetch(
        id,
        [&](const ArtifactStore::Origin& origin) { return origin.job_name == lease.job_name(); },
        [&held] { return held.Check(); });
    if (!found.ok() && !absl::IsNotFound(found.status())) return OfStore(found.status());
  }
  if (absl::IsNotFound(found.status())) {
    // Told before the work, not after it.
    WALSH_RETURN_IF_ERROR(models_->CheckNameIsFree(id));
  }
  WALSH_RETURN_IF_ERROR(found.status());
  v1::Model& model = *found;
  if (model.quantization_job() != lease.job_name()) {
    absl::Status status = absl::AlreadyExistsError(
        absl::StrCat(ModelName(id), " exists already, made by ",
                     model.quantization_job().empty() ? "no job" : model.quantization_job()));
    SetErrorInfo(status, "MODEL_EXISTS");
    SetResourceInfo(status, "model", ModelName(id), "exists already");
    return status;
  }
  WALSH_LOG(Info, "the job was published before; completing it", {"job", lease.job_name()});
  Outcome outcome;
  const absl::StatusOr<std::string> kept = ReadFile(ResultPath(lease.job_name()), kResultBytesMax);
  if (!kept.ok() || !outcome.result.ParseFromString(*kept)) {
    outcome.result.set_artifact_uri(model.name());
    outcome.result.set_sha256(model.sha256());
    outcome.result.set_size_bytes(model.size_bytes());
    outcome.result.set_perplexity_before(model.perplexity_before());
    outcome.result.set_perplexity_after(model.perplexity_after());
    outcome.result.set_group_size(model.group_size());
    outcome.result.add_warnings(
        "the report was lost in a crash; figures are those of the artifact");
  }
  outcome.model = std::move(model);
  return outcome;
}

absl::StatusOr<JobRunner::Outcome> JobRunner::RunToPublished(const internal::v1::Lease& lease,
                                                             HeldLease& held, Failure& failure) {
  WALSH_RETURN_IF_ERROR(
      held.Check());  // a worker that stops, or whose device broke, begins nothing
  const std::string directory =
      models_->TemporaryDirectory(JobId(held.job_name()), held.fencing_token());
  const auto remove_directory = [](const std::string* path) {
    RemoveTree(*path).IgnoreError();  // what stays is removed at the next start
  };
  const std::unique_ptr<const std::string, decltype(remove_directory)> removed_at_end(
      &directory, remove_directory);

  WALSH_ASSIGN_OR_RETURN(const pipeline::JobReport report,
                         QuantizeInto(directory, lease.job(), held, failure));
  Outcome outcome{.result = ToResult(report, lease.job().model_name()), .model = {}};
  outcome.result.set_device(options_.device);
  // What the gate refuses is kept, but not of a job that was cancelled or is another worker's now.
  WALSH_RETURN_IF_ERROR(held.Check());
  WALSH_RETURN_IF_ERROR(CheckGate(directory, lease, report, outcome, failure));
  WALSH_RETURN_IF_ERROR(MakeDirectories(options_.results_directory));
  WALSH_RETURN_IF_ERROR(
      PublishFile(ResultPath(held.job_name()), outcome.result.SerializeAsString()));
  WALSH_RETURN_IF_ERROR(ReportPublishing(held));
  WALSH_RETURN_IF_ERROR(held.Check());
  WALSH_RETURN_IF_ERROR(Publish(directory, lease, outcome));
  return outcome;
}

absl::Status JobRunner::KeepArtifact(const internal::v1::Lease& lease, HeldLease& held) {
  const absl::Status kept =
      models_->Keep(lease.job().model_name(),
                    {.job_name = lease.job_name(), .fencing_token = lease.fencing_token()},
                    [&held] { return held.Check(); });
  if (!kept.ok() && held.Check().ok()) CountArtifactError();
  return OfStore(kept);
}

absl::Status JobRunner::CheckGate(const std::string& directory, const internal::v1::Lease& lease,
                                  const pipeline::JobReport& report, Outcome& outcome,
                                  Failure& failure) {
  // The conversion has passed once, before the job.
  WALSH_ASSIGN_OR_RETURN(const pipeline::QualityGate gate, ToQualityGate(lease.job().config()));
  if (const std::string warning = pipeline::GateWarning(gate, report); !warning.empty()) {
    outcome.result.add_warnings(warning);
  }
  absl::Status status = pipeline::CheckQuality(gate, report);
  if (status.ok()) return status;
  SetErrorInfo(status, kQualityGate);
  const std::string id = JobId(lease.job_name());
  if (const absl::Status kept = options_.rejected->Keep(directory, id); kept.ok()) {
    WALSH_LOG(Warning, "a model failed its quality gate; its artifact is kept apart",
              {"job", lease.job_name()}, {"directory", options_.rejected->Directory(id)});
  } else {
    WALSH_LOG(Error, "a model failed its quality gate; its artifact could not be kept",
              {"job", lease.job_name()}, {"error", kept});
  }
  failure.rejected_result = outcome.result;
  failure.rejected_result->clear_artifact_uri();
  return status;
}

absl::Status JobRunner::Publish(const std::string& directory, const internal::v1::Lease& lease,
                                Outcome& outcome) {
  const absl::Duration start = clock_->Monotonic();
  absl::StatusOr<v1::Model> model =
      models_->Publish(directory, lease.job().model_name(), lease.job_name());
  if (!model.ok()) {
    CountArtifactError();
    return model.status();
  }
  v1::QuantizationJob::StageTime& time = *outcome.result.add_stage_times();
  time.set_stage(v1::QuantizationJob::PUBLISHING);
  time.set_seconds(absl::ToDoubleSeconds(clock_->Monotonic() - start));
  outcome.model = *std::move(model);
  CountArtifactWritten(outcome.result.size_bytes());
  WALSH_LOG(Info, "model published", {"job", lease.job_name()}, {"model", outcome.model.name()},
            {"bytes", outcome.result.size_bytes()}, {"seconds", time.seconds()});
  return absl::OkStatus();
}

absl::StatusOr<pipeline::JobReport> JobRunner::QuantizeInto(const std::string& directory,
                                                            const v1::QuantizationJob& job,
                                                            HeldLease& held, Failure& failure) {
  absl::StatusOr<pipeline::JobReport> report;
  const auto no_thread = [](const std::system_error& e) {
    return absl::ResourceExhaustedError(absl::StrCat("no thread for the job: ", e.what()));
  };
  const auto quantize = [&] {
    // Of this thread alone, and of those that it starts. There is no way back for a process without
    // privileges, hence a thread for each job.
    setpriority(PRIO_PROCESS, 0, kJobNice);
    try {
      report = FetchAndQuantize(directory, job, held, failure);
    } catch (const std::bad_alloc&) {
      report = absl::ResourceExhaustedError("no memory left for the job");
    } catch (const std::system_error& e) {
      report = no_thread(e);
    }
  };
  try {
    std::thread(quantize).join();
  } catch (const std::system_error& e) {
    report = no_thread(e);
  }
  // Whoever has the checkpoint now has the lease.
  if (absl::IsAborted(report.status())) held.Lose(std::string(report.status().message()));
  return report;
}

absl::StatusOr<pipeline::JobReport> JobRunner::FetchAndQuantize(const std::string& directory,
                                                                const v1::QuantizationJob& job,
                                                                HeldLease& held, Failure& failure) {
  ProgressReporter reporter(this, &held);
  const CopyProgress fetching = [&](int64_t done, int64_t total) {
    return reporter(
        {.stage = pipeline::Stage::kFetching,
         .message = absl::StrCat(done / kMebibyte, " of ", total / kMebibyte, " MiB fetched")});
  };
  {
    References headers(options_.sources, options_.resolve, FetchExtent::kHeaders, fetching);
    WALSH_ASSIGN_OR_RETURN(pipeline::JobSpec spec, ToJobSpec(job, headers.resolvers()));
    spec.job_name = held.job_name();
    if (absl::Status fits = CheckFits(spec); !fits.ok()) {
      failure.is_refused = IsRefusal(fits);
      return fits;
    }
  }
  const absl::Duration start = clock_->Monotonic();
  References references(options_.sources, options_.resolve, FetchExtent::kWhole, fetching);
  WALSH_ASSIGN_OR_RETURN(pipeline::JobSpec spec, ToJobSpec(job, references.resolvers()));
  const double seconds_fetching = absl::ToDoubleSeconds(clock_->Monotonic() - start);
  spec.output_directory = directory;
  spec.job_name = held.job_name();
  const std::unique_ptr<pipeline::CheckpointStore> checkpoints = OpenCheckpoints(held);
  spec.checkpoints = checkpoints.get();
  ThreadPool pool(options_.n_threads > 0 ? options_.n_threads : ThreadPool::HardwareThreads());
  WALSH_ASSIGN_OR_RETURN(pipeline::JobReport report,
                         options_.quantize(spec, pool, std::ref(reporter)));
  if (references.has_fetched()) {
    report.stage_seconds[static_cast<int>(pipeline::Stage::kFetching)] = seconds_fetching;
  }
  ObserveJobReport(report, spec.quantizer.damp);
  return report;
}

absl::Status JobRunner::CheckFits(const pipeline::JobSpec& spec) const {
  WALSH_ASSIGN_OR_RETURN(const pipeline::JobPlan plan, options_.plan(spec));
  WALSH_ASSIGN_OR_RETURN(const WorkerMemory memory, options_.memory());
  WALSH_RETURN_IF_ERROR(CheckMemory(plan, memory));
  for (const std::string& warning : MemoryWarnings(plan, memory)) {
    WALSH_LOG(Warning, "memory is short", {"job", spec.job_name}, {"reason", warning});
  }
  return absl::OkStatus();
}

absl::Status JobRunner::ReportPublishing(HeldLease& held) {
  v1::QuantizationJobEvent event;
  event.set_state(v1::QuantizationJob::RUNNING);
  event.set_stage(v1::QuantizationJob::PUBLISHING);
  event.set_layer(-1);
  event.mutable_progress()->set_fraction(1.0);
  while (true) {
    WALSH_RETURN_IF_ERROR(held.Check());
    const absl::Status status = Report(event, held);
    if (status.ok()) return status;
    // So the coordinator answers when the job is being cancelled.
    if (absl::IsFailedPrecondition(status)) held.Cancel();
    WALSH_RETURN_IF_ERROR(held.Check());
    if (!MayPass(status)) return status;
    WALSH_LOG(Warning, "publishing waits for the coordinator", {"job", held.job_name()},
              {"error", status});
    held.Pause(kRetryDelay);
  }
}

void JobRunner::LoadIfWanted(const internal::v1::Lease& lease, const HeldLease& held,
                             Outcome& outcome) {
  if (!lease.job().config().has_auto_load()) return;
  // Loading takes its time: a worker that must stop has none.
  const absl::Status stop = held.Check();
  absl::StatusOr<v1::Model> loaded =
      stop.ok() ? models_->Load(lease.job().model_name()) : absl::StatusOr<v1::Model>(stop);
  if (loaded.ok()) {
    outcome.model = *std::move(loaded);
  } else {
    outcome.result.add_warnings(
        absl::StrCat("the model was published but not loaded: ", loaded.status().message()));
  }
}

void JobRunner::Complete(const absl::StatusOr<Outcome>& outcome, const Failure& failure,
                         HeldLease& held) {
  internal::v1::CompleteJobRequest request;
  request.set_worker_id(options_.worker_id);
  request.set_job_name(held.job_name());
  request.set_fencing_token(held.fencing_token());
  const absl::Status stop = held.Check();
  if (outcome.ok()) {
    *request.mutable_result() = outcome->result;
    *request.mutable_model() = outcome->model;
  } else if (absl::IsAborted(stop)) {
    WALSH_LOG(Warning, "job stopped without an outcome", {"job", held.job_name()}, {"error", stop});
    return;
  } else if (absl::IsCancelled(stop)) {
    request.mutable_cancelled();
  } else if (absl::IsUnavailable(stop) && ErrorReason(outcome.status()) != kDeviceBroken) {
    // The worker stops because of a broken device, too, but then the failure counts: a job that
    // breaks every device must not go round for ever.
    request.mutable_returned();
  } else {
    *request.mutable_error() = ToProtoStatus(outcome.status());
    request.set_error_reason(ErrorReason(outcome.status()));
    request.set_refused(failure.is_refused);
    if (failure.rejected_result.has_value()) {
      *request.mutable_rejected_result() = *failure.rejected_result;
    }
    if (request.refused()) {
      WALSH_LOG(Warning, "this worker cannot run the job; left to others", {"job", held.job_name()},
                {"error", outcome.status()});
    } else {
      WALSH_LOG(Error, "job failed", {"job", held.job_name()}, {"error", outcome.status()});
    }
  }

  absl::Status taken = Deliver(request, held);
  if (request.has_result() && !taken.ok() && !absl::IsAborted(taken)) {
    *request.mutable_error() = ToProtoStatus(absl::Status(
        taken.code(), absl::StrCat("the model was published, but the coordinator did not take the "
                                   "result: ",
                                   taken.message())));
    request.set_error_reason("OUTCOME_REFUSED");
    taken = Deliver(request, held);
  }
  if (taken.ok()) {
    if (EndsJob(request)) RemoveCheckpoints(held.job_name());
    RemoveTree(ResultPath(held.job_name())).IgnoreError();
    WALSH_LOG(Info, "job completed", {"job", held.job_name()});
  } else {
    WALSH_LOG(Error, "the coordinator has no outcome of the job", {"job", held.job_name()},
              {"error", taken});
  }
}

absl::Status JobRunner::Deliver(const internal::v1::CompleteJobRequest& request, HeldLease& held) {
  // A heartbeat finds no lease of a job that has ended by an attempt whose answer was lost: the one
  // attempt more tells, which changes nothing of a job that is another worker's.
  bool may_have_been_taken = false;
  for (int attempt = 1; !held.is_lost() || may_have_been_taken; ++attempt) {
    const bool is_last = held.is_lost();
    grpc::ClientContext context;
    SetTimeout(context, kCallTimeout);
    google::protobuf::Empty response;
    const absl::Status status =
        FromGrpcStatus(coordinator_->CompleteJob(&context, request, &response));
    if (status.ok()) return status;
    WALSH_LOG(Warning, "the outcome was not taken", {"job", held.job_name()}, {"error", status});
    if (!MayPass(status)) return status;
    if (request.has_returned() && attempt >= kHandBackTries) return status;
    if (is_last) break;
    may_have_been_taken = true;
    held.Pause(kRetryDelay);
  }
  return absl::AbortedError(absl::StrCat("the lease of ", held.job_name(), " is lost"));
}

absl::Status JobRunner::Report(const v1::QuantizationJobEvent& event, HeldLease& held) {
  internal::v1::ReportProgressRequest request;
  request.set_worker_id(options_.worker_id);
  request.set_job_name(held.job_name());
  request.set_fencing_token(held.fencing_token());
  *request.mutable_event() = event;
  grpc::ClientContext context;
  SetTimeout(context, kCallTimeout);
  google::protobuf::Empty response;
  const absl::Status status =
      FromGrpcStatus(coordinator_->ReportProgress(&context, request, &response));
  if (absl::IsAborted(status)) held.Lose(std::string(status.message()));
  return status;
}

std::unique_ptr<pipeline::CheckpointStore> JobRunner::OpenCheckpoints(const HeldLease& held) const {
  if (options_.kernel_family.empty()) return nullptr;
  const std::string job = JobId(held.job_name());
  // Workers of several families and builds may share the place: each goes on with its own.
  const std::string family =
      Sha256Hex(absl::StrCat(options_.kernel_family, "\n", std::string(Version()), "\n",
                             std::string(Revision())))
          .substr(0, kFamilyChars);
  if (options_.checkpoint_objects != nullptr) {
    return pipeline::MakeObjectCheckpointStore(options_.checkpoint_objects, job, family,
                                               held.fencing_token());
  }
  if (options_.checkpoints_directory.empty()) return nullptr;
  return pipeline::MakeDirectoryCheckpointStore(
      absl::StrCat(options_.checkpoints_directory, "/", job, "/", family), held.fencing_token());
}

void JobRunner::RemoveCheckpoints(const std::string& job_name) const {
  const std::string job = JobId(job_name);
  absl::Status removed;
  if (options_.checkpoint_objects != nullptr) {
    removed = pipeline::RemoveObjectCheckpoints(*options_.checkpoint_objects, job);
  } else if (!options_.checkpoints_directory.empty()) {
    removed = RemoveTree(absl::StrCat(options_.checkpoints_directory, "/", job));
  }
  if (removed.ok()) return;
  WALSH_LOG(Warning, "a checkpoint stays", {"job", job_name}, {"error", removed});
}

std::string JobRunner::ResultPath(const std::string& job_name) const {
  return absl::StrCat(options_.results_directory, "/", JobId(job_name), ".result");
}

absl::Status RemoveStaleResults(const std::string& directory, absl::Duration age) {
  const auto stale_before =
      std::filesystem::file_time_type::clock::now() - absl::ToChronoSeconds(age);
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error)) {
    std::error_code unknown;
    const auto written = it->last_write_time(unknown);
    if (!unknown && written < stale_before) WALSH_RETURN_IF_ERROR(RemoveTree(it->path().string()));
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return ErrnoStatus(error.value(), "listing the results");
  }
  return absl::OkStatus();
}

}  // namespace walsh::service
