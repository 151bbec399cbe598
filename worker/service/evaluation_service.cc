#include "worker/service/evaluation_service.h"

#include <grpcpp/server_context.h>
#include <sys/resource.h>

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/evaluation_limits.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "worker/kernels/thread_pool.h"
#include "worker/service/memory_check.h"
#include "worker/service/request_id.h"

namespace walsh::service {
namespace {

constexpr int kEvaluationNice = 10;  // a job's
constexpr absl::Duration kProgressInterval = absl::Seconds(1);
constexpr absl::Duration kBusyRetryDelay = absl::Seconds(10);

// One of the evaluations that may run; frees its place.
class Place {
 public:
  explicit Place(std::atomic<int>* n_running) : n_running_(n_running), is_taken_(Take(n_running)) {}
  ~Place() {
    if (is_taken_) --*n_running_;
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
  bool is_taken() const { return is_taken_; }

 private:
  // Counts nothing that has no place, which could make another seem to have none.
  static bool Take(std::atomic<int>* n_running) {
    int n = *n_running;
    while (n < limits::kEvaluationsMax) {
      if (n_running->compare_exchange_weak(n, n + 1)) return true;
    }
    return false;
  }

  std::atomic<int>* const n_running_;
  const bool is_taken_;
};

absl::Status Busy() {
  absl::Status status = absl::ResourceExhaustedError(absl::StrCat(
      "this worker runs as many evaluations as it takes (", limits::kEvaluationsMax, ")"));
  SetErrorInfo(status, "EVALUATION_RUNNING");
  SetRetryDelay(status, kBusyRetryDelay);
  return status;
}

absl::Status Stopping() {
  absl::Status status = absl::UnavailableError("the worker is stopping");
  SetErrorInfo(status, "WORKER_STOPPING");
  return status;
}

v1::TextResult ToProto(const evaluate::TextReport& report) {
  v1::TextResult result;
  result.set_perplexity(report.perplexity.mean);
  result.set_perplexity_stderr(report.perplexity.standard_error);
  result.set_loss(report.loss);
  result.set_windows(report.windows);
  result.set_tokens(report.tokens);
  result.set_window(static_cast<int32_t>(report.window));
  result.set_stride(static_cast<int32_t>(report.stride));
  result.set_fingerprint(report.fingerprint);
  if (report.reference_format.empty()) return result;
  result.set_reference_format(report.reference_format);
  result.set_reference_perplexity(report.reference_perplexity);
  result.set_kl_divergence(report.kl_divergence.mean);
  result.set_kl_divergence_stderr(report.kl_divergence.standard_error);
  result.set_top1_agreement(report.top1_agreement);
  return result;
}

}  // namespace

EvaluationService::EvaluationService(Options options, const ModelStore* models, const Clock* clock)
    : options_(std::move(options)), models_(models), clock_(clock) {}

absl::StatusOr<evaluate::EvaluationSpec> EvaluationService::ToSpec(
    const v1::EvaluateModelRequest& request, const PathResolvers& resolve) const {
  WALSH_RETURN_IF_ERROR(ValidateEvaluation(request));
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("model", request.model()));
  WALSH_RETURN_IF_ERROR(models_->Get(id).status());
  evaluate::EvaluationSpec spec;
  spec.artifact_directory = models_->Directory(id);
  spec.skip_bos = request.skip_bos();
  spec.check_memory = [this](int64_t bytes_needed) { return CheckMemory(bytes_needed); };
  if (request.has_text()) {
    const v1::TextEvaluation& asked = request.text();
    evaluate::TextSpec& text = spec.text.emplace();
    WALSH_ASSIGN_OR_RETURN(text.path, ResolveField(resolve.text, "text.uri", asked.uri()));
    text.name = asked.uri();
    text.joins_rows = asked.format() == v1::TextEvaluation::WIKITEXT;
    text.window = asked.window();
    text.stride = asked.stride();
    text.max_windows = asked.max_windows();
    if (!asked.reference().empty()) {
      WALSH_ASSIGN_OR_RETURN(text.reference_path,
                             ResolveField(resolve.model, "text.reference", asked.reference()));
    }
  }
  WALSH_ASSIGN_OR_RETURN(spec.tasks, ToTaskSpecs("tasks", request.tasks(), resolve.text));
  return spec;
}

absl::Status EvaluationService::CheckMemory(int64_t bytes_needed) const {
  const HostMemory memory = options_.memory();
  WALSH_RETURN_IF_ERROR(CheckEvaluationMemory(bytes_needed, memory));
  if (bytes_needed > memory.free_bytes) {
    WALSH_LOG(Warning, "memory is short for an evaluation", {"needed", bytes_needed},
              {"free", memory.free_bytes});
  }
  return absl::OkStatus();
}

absl::StatusOr<evaluate::EvaluationReport> EvaluationService::RunNicely(
    const evaluate::EvaluationSpec& spec, const evaluate::StepProgress& progress) {
  absl::StatusOr<evaluate::EvaluationReport> report;
  std::thread evaluating([&] {
    // Of this thread alone, and of those that it starts; a process without privileges cannot take
    // it back.
    setpriority(PRIO_PROCESS, 0, kEvaluationNice);
    try {
      ThreadPool pool(options_.n_threads > 0 ? options_.n_threads : ThreadPool::HardwareThreads());
      report = options_.evaluate(spec, pool, progress);
    } catch (const std::bad_alloc&) {
      report = absl::ResourceExhaustedError("no memory left for the evaluation");
    } catch (const std::system_error& e) {
      report =
          absl::ResourceExhaustedError(absl::StrCat("no thread for the evaluation: ", e.what()));
    }
  });
  evaluating.join();
  return report;
}

absl::Status EvaluationService::Run(grpc::ServerContext& context,
                                    const v1::EvaluateModelRequest& request,
                                    grpc::ServerWriter<v1::EvaluateModelResponse>& writer) {
  if (is_stopping_) return Stopping();
  const Place place(&n_running_);
  if (!place.is_taken()) return Busy();
  const absl::Duration start = clock_->Monotonic();
  absl::Duration written = -absl::InfiniteDuration();
  std::string step_written;
  const auto show = [&](const std::string& step, double fraction) -> absl::Status {
    if (is_stopping_) return Stopping();
    if (std::chrono::system_clock::now() >= context.deadline()) {
      return absl::DeadlineExceededError("the evaluation took longer than the call's deadline");
    }
    const absl::Duration now = clock_->Monotonic();
    if (now - start >= absl::Seconds(limits::kEvaluateSecondsMax)) {
      return absl::DeadlineExceededError(absl::StrCat(
          "the evaluation took longer than ", limits::kEvaluateSecondsMax, " s, the most it may"));
    }
    if (context.IsCancelled()) return absl::CancelledError("the call was cancelled");
    if (step == step_written && now - written < kProgressInterval) return absl::OkStatus();
    step_written = step;
    written = now;
    v1::EvaluateModelResponse response;
    response.mutable_progress()->set_step(step);
    response.mutable_progress()->set_fraction(fraction);
    return writer.Write(response) ? absl::OkStatus() : absl::CancelledError("the client has gone");
  };
  References references(
      options_.sources, options_.resolve, FetchExtent::kWhole, [&](int64_t done, int64_t total) {
        return show("fetching",
                    static_cast<double>(done) / static_cast<double>(std::max<int64_t>(total, 1)));
      });
  WALSH_ASSIGN_OR_RETURN(const evaluate::EvaluationSpec spec,
                         ToSpec(request, references.resolvers()));
  WALSH_ASSIGN_OR_RETURN(const evaluate::EvaluationReport report, RunNicely(spec, show));

  v1::EvaluateModelResponse response;
  v1::EvaluateModelResponse::Result& result = *response.mutable_result();
  result.set_model(ModelName(ParseModelName("model", request.model()).value()));
  if (report.text.has_value()) *result.mutable_text() = ToProto(*report.text);
  for (const evaluate::TaskReport& task : report.tasks) *result.add_tasks() = ToProto(task);
  result.set_seconds(absl::ToDoubleSeconds(clock_->Monotonic() - start));
  for (const std::string& warning : report.warnings) result.add_warnings(warning);
  return writer.Write(response) ? absl::OkStatus() : absl::CancelledError("the client has gone");
}

grpc::Status EvaluationService::EvaluateModel(
    grpc::ServerContext* context, const v1::EvaluateModelRequest* request,
    grpc::ServerWriter<v1::EvaluateModelResponse>* writer) {
  const absl::Duration start = clock_->Monotonic();
  const std::string request_id = RequestId(*context, request->request_id());
  const absl::Status status = Run(*context, *request, *writer);
  WALSH_LOG(Info, "evaluation ended", {"request_id", request_id}, {"model", request->model()},
            {"status", status}, {"seconds", absl::ToDoubleSeconds(clock_->Monotonic() - start)});
  return ToGrpcStatus(status);
}

}  // namespace walsh::service
