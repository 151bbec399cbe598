#include "worker/pipeline/quantize_job.h"

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/evaluate/layer_source.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/artifact_report.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/job_checkpoint.h"
#include "worker/pipeline/job_texts.h"
#include "worker/pipeline/layer_quantizer.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/progress.h"
#include "worker/pipeline/rotation_gate.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::pipeline {
namespace {

using nlohmann::json;

// In operations of a matrix product: hashing a byte; generating a token, which is bound by memory.
constexpr double kWorkPerByteHashed = 30;
constexpr double kGenerationPenalty = 3;

// The member of the artifact's report that is known only once the texts are.
constexpr char kCalibration[] = "calibration";

// Starts the kernel's count of the process's peak anew, where it allows that (containers may not).
void ResetPeakMemory() { std::ofstream("/proc/self/clear_refs") << 5; }

// Largest resident size of the process since then, or since its start; 0 where /proc does not tell.
int64_t PeakMemoryBytes() {
  std::ifstream status("/proc/self/status");
  std::string key;
  while (status >> key) {
    int64_t kib = 0;
    if (key == "VmHWM:" && status >> kib) return kib * 1024;
    status.ignore(4096, '\n');
  }
  return 0;
}

// Gives what a phase freed back to the system: glibc keeps it for the threads that had it, and the
// phases' peaks would add up.
void ReturnFreedMemory() { malloc_trim(0); }

// Removes the output directory unless the job succeeded.
class OutputGuard {
 public:
  explicit OutputGuard(std::string directory) : directory_(std::move(directory)) {}
  ~OutputGuard() {
    if (is_armed_) (void)RemoveTree(directory_);
  }
  OutputGuard(const OutputGuard&) = delete;
  OutputGuard& operator=(const OutputGuard&) = delete;
  void Arm() { is_armed_ = true; }
  void Keep() { is_armed_ = false; }

 private:
  const std::string directory_;
  bool is_armed_ = false;
};

template <typename T>
bool IsReady(const std::future<T>& future) {
  return future.valid() && future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

// Ends the job on its backend, however the job ends.
class BackendRun {
 public:
  explicit BackendRun(Backend& backend) : backend_(backend) {}
  ~BackendRun() {
    if (!has_ended_) backend_.EndJob();
  }
  BackendRun(const BackendRun&) = delete;
  BackendRun& operator=(const BackendRun&) = delete;
  JobUse End() {
    has_ended_ = true;
    return backend_.EndJob();
  }

 private:
  Backend& backend_;
  bool has_ended_ = false;
};

class Job {
 public:
  Job(const JobSpec& spec, Backend& backend, ThreadPool& pool, const Observer& observer,
      Yield* yield)
      : spec_(spec),
        backend_(backend),
        backend_run_(backend),
        pool_(pool),
        progress_(observer, yield, [&backend] { return backend.Settle(); }),
        output_(spec.output_directory) {}

  absl::StatusOr<JobReport> Run() {
    ResetPeakMemory();
    WALSH_RETURN_IF_ERROR(Validate());
    WALSH_RETURN_IF_ERROR(Load());
    WALSH_RETURN_IF_ERROR(OpenCheckpoint());
    WALSH_RETURN_IF_ERROR(CheckEquivalence());
    if (spec_.calibration_path.empty()) {
      WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, -1, "writing calibration text"));
      WALSH_RETURN_IF_ERROR(ReadTexts());
    }
    ReturnFreedMemory();
    WALSH_RETURN_IF_ERROR(Quantize());
    ReturnFreedMemory();
    WALSH_RETURN_IF_ERROR(Evaluate());
    progress_.FinishTimes(report_.stage_seconds);
    report_.peak_memory_bytes = PeakMemoryBytes();
    JobUse use = backend_run_.End();
    report_.peak_device_memory_bytes = use.peak_device_bytes;
    report_.steps = std::move(use.steps);
    if (progress_.seconds_yielded() > 0) {
      report_.steps.push_back({"yielded", progress_.seconds_yielded()});
    }
    output_.Keep();
    return std::move(report_);
  }

 private:
  absl::Status Validate() {
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kValidating, -1));
    std::error_code error;
    if (std::filesystem::exists(spec_.output_directory, error)) {
      return absl::AlreadyExistsError("the output directory of the job exists already");
    }
    WALSH_ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(spec_.source_path));
    WALSH_ASSIGN_OR_RETURN(job_, Resolve(spec_, *checkpoint_, keep_going_));
    // Half a second for 150,000 tokens, on one thread: the source is hashed meanwhile.
    making_tokenizer_ = std::async(std::launch::async, [this] { return MakeTokenizer(); });
    WALSH_RETURN_IF_ERROR(backend_.CheckSupported(checkpoint_->config(), job_));
    WALSH_RETURN_IF_ERROR(CheckDeviceMemory());
    WALSH_RETURN_IF_ERROR(CheckDisk());
    report_.source_size_bytes = checkpoint_->size_bytes();
    report_.source_format = checkpoint_->format();
    report_.group_size = job_.group_size;
    report_.rotation_block = job_.rotation_block;
    report_.online_block = job_.online_block;
    report_.warnings = job_.warnings;
    CountStorage();
    progress_.SetLayers(checkpoint_->config().n_layers);
    PlanWork(spec_.n_calibration_windows * job_.sequence_length,
             job_.n_evaluation_windows * job_.evaluation_length);
    return absl::OkStatus();
  }

  absl::Status CheckDeviceMemory() {
    const int64_t needed = backend_.Needs(spec_, checkpoint_->config(), job_).device_bytes;
    if (needed == 0) return absl::OkStatus();
    WALSH_ASSIGN_OR_RETURN(const DeviceMemory memory, backend_.memory());
    if (needed <= memory.free_bytes) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("the job needs ", needed, " bytes of memory on ", backend_.name(), ", ",
                     memory.free_bytes, " of ", memory.total_bytes, " are free"));
  }

  absl::Status CheckDisk() {
    const std::filesystem::path parent =
        std::filesystem::absolute(spec_.output_directory).parent_path();
    WALSH_ASSIGN_OR_RETURN(const int64_t free, FreeBytes(parent.string()));
    if (free >= job_.disk_bytes) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("the model needs ", job_.disk_bytes, " bytes of disk, ", free, " are free"));
  }

  void CountStorage() {
    const ModelConfig& config = checkpoint_->config();
    int64_t weights = 0;
    for (const LinearShape& shape : LinearShapes(config)) {
      weights += shape.in * shape.out * config.n_layers;
    }
    const int64_t bits = StoredBits(config, job_);
    report_.linear_bytes_before = 2 * weights;
    report_.linear_bytes_after = bits / 8;
    report_.bits_per_weight = static_cast<double>(bits) / static_cast<double>(weights);
  }

  // The forward passes of evaluation, once before and once after.
  double EvaluationWork(int64_t n_tokens) const {
    return static_cast<double>(n_tokens) * ModelFlopsPerToken(checkpoint_->config());
  }
  double TaskWork(const evaluate::Task& task) const {
    return evaluate::ApproximateTokens(task) * ModelFlopsPerToken(checkpoint_->config());
  }
  double ReadWork() const { return pipeline::ReadWork(checkpoint_->config()); }
  double HashWork() const {
    return kWorkPerByteHashed * static_cast<double>(checkpoint_->size_bytes());
  }
  double SelfTextWork() const {
    return kGenerationPenalty * EvaluationWork(SelfTextTokens(spec_, job_));
  }

  void PlanWork(int64_t calibration_tokens, int64_t evaluation_tokens) {
    double work = HashWork() +
                  QuantizationWork(checkpoint_->config(), job_.quantizer, calibration_tokens) +
                  2 * EvaluationWork(evaluation_tokens) + ReadWork();
    for (const evaluate::Task& task : job_.tasks) work += 2 * TaskWork(task);
    if (spec_.calibration_path.empty()) work += SelfTextWork();
    if (job_.rotates()) work += ReadWork();
    progress_.Plan(work);
  }

  absl::Status Load() {
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kLoading, -1));
    // A large source takes minutes: a tokenizer that walsh does not take is refused before.
    WALSH_ASSIGN_OR_RETURN(source_sha256_,
                           checkpoint_->Fingerprint(pool_.n_threads(), [this]() -> absl::Status {
                             if (IsReady(making_tokenizer_)) {
                               WALSH_RETURN_IF_ERROR(TakeTokenizer());
                             }
                             return progress_.Within(0);
                           }));
    if (tokenizer_ == nullptr) WALSH_RETURN_IF_ERROR(TakeTokenizer());
    WALSH_RETURN_IF_ERROR(progress_.Advance(HashWork()));
    WALSH_RETURN_IF_ERROR(EncodeTasks());
    return spec_.calibration_path.empty() ? absl::OkStatus() : ReadTexts();
  }

  // On a thread of its own. What it threw would be thrown again where the result is taken, between
  // the threads that hash.
  absl::StatusOr<std::unique_ptr<Tokenizer>> MakeTokenizer() const {
    try {
      return Tokenizer::Create(checkpoint_->tokenizer());
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError("no memory left for the tokenizer");
    }
  }

  // Waits for it.
  absl::Status TakeTokenizer() {
    WALSH_ASSIGN_OR_RETURN(tokenizer_, making_tokenizer_.get());
    return absl::OkStatus();
  }

  // What is wrong with an item is found before the work.
  absl::Status EncodeTasks() {
    const ModelConfig& config = checkpoint_->config();
    int64_t n_tokens = 0;
    for (const evaluate::Task& task : job_.tasks) {
      absl::StatusOr<evaluate::EncodedTask> encoded = evaluate::EncodeTask(
          task, *tokenizer_, config, {.skip_bos = spec_.evaluation_skips_bos}, keep_going_);
      if (!encoded.ok()) return AboutTask(task, encoded.status());
      n_tokens += encoded->tokens;
      // All are held until the job ends.
      if (n_tokens > limits::kTaskFileBytesMax) {
        return AboutTask(task, absl::InvalidArgumentError(absl::StrCat(
                                   "has, with the tasks before it, ", n_tokens, " tokens, at most ",
                                   limits::kTaskFileBytesMax, " are taken")));
      }
      if (encoded->truncated_items > 0) {
        report_.warnings.push_back(
            evaluate::TruncationWarning(task.name, encoded->truncated_items, config.max_position));
      }
      encoded_tasks_.push_back(*std::move(encoded));
    }
    return absl::OkStatus();
  }

  // What stopped the job from outside is about no task of it.
  absl::Status AboutTask(const evaluate::Task& task, const absl::Status& status) {
    WALSH_RETURN_IF_ERROR(progress_.Within(0));
    return absl::Status(status.code(), absl::StrCat("task '", task.name, "': ", status.message()));
  }

  absl::Status ReadTexts() {
    const double work_per_token = SelfTextWork() / static_cast<double>(SelfTextTokens(spec_, job_));
    std::vector<int32_t> own_text;
    if (saved_.has_value()) {
      WALSH_ASSIGN_OR_RETURN(own_text, saved_->ReadOwnText());
    }
    const bool was_written = !own_text.empty();
    WALSH_ASSIGN_OR_RETURN(
        texts_,
        PrepareTexts(
            spec_, job_, *checkpoint_, *tokenizer_, pool_,
            [&](int64_t n) { return progress_.Within(work_per_token * static_cast<double>(n)); },
            keep_going_, own_text));
    if (saved_.has_value() && !own_text.empty() && !was_written) {
      WALSH_RETURN_IF_ERROR(saved_->KeepOwnText(own_text));
    }
    const calibrate::TokenWindows& windows = texts_.calibration;
    report_.samples_kept = texts_.kept;
    report_.samples_dropped = texts_.dropped;
    report_.samples_short = texts_.n_short;
    report_.calibration_windows = windows.count();
    report_.calibration_tokens = windows.count() * windows.length;
    report_.calibration_fingerprint = calibrate::Fingerprint(windows);
    report_.warnings.insert(report_.warnings.end(), texts_.warnings.begin(), texts_.warnings.end());
    // Texts may be shorter than asked for.
    PlanWork(report_.calibration_tokens, texts_.evaluation.count() * texts_.evaluation.length);
    if (!spec_.calibration_path.empty()) return progress_.Advance(0);
    if (!was_written) return progress_.Advance(SelfTextWork());
    progress_.Resume(SelfTextWork(), 0);
    return progress_.Within(0);
  }

  JobInputs Inputs() {
    return {spec_, job_, *checkpoint_, pool_, saved_.has_value() ? &*saved_ : nullptr};
  }

  // What the artifact says of how it was made.
  json Report() const {
    return ArtifactReport({spec_, job_, *checkpoint_, texts_, source_sha256_}, report_);
  }

  absl::Status OpenCheckpoint() {
    if (spec_.checkpoints == nullptr || backend_.kernel_family().empty()) return absl::OkStatus();
    // All that its bytes depend on, without what comes of the work.
    json identity = Report();
    for (const char* outcome : {kCalibration, "linears", "quality", "warnings"}) {
      identity.erase(outcome);
    }
    identity["rotation"].erase("gate");
    identity["kernel_family"] = backend_.kernel_family();
    identity["checkpoint_version"] = kJobCheckpointVersion;
    saved_.emplace(*spec_.checkpoints, spec_.job_name);
    return saved_->Open(std::move(identity));
  }

  absl::Status CheckEquivalence() {
    if (!job_.rotates()) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kRotating, -1));
    WALSH_ASSIGN_OR_RETURN(const calibrate::TokenWindows windows,
                           GateWindows(checkpoint_->config(), *tokenizer_));
    WALSH_ASSIGN_OR_RETURN(report_.rotation_gate,
                           backend_.CheckRotation(Inputs(), windows, progress_));
    return absl::OkStatus();
  }

  absl::Status Quantize() {
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactWriter> writer,
                           ArtifactWriter::Create(spec_.output_directory, *checkpoint_));
    output_.Arm();  // not before: a directory that Create() refused is somebody else's
    if (saved_.has_value()) WALSH_RETURN_IF_ERROR(saved_->SetCalibration(Report()[kCalibration]));
    WALSH_RETURN_IF_ERROR(
        backend_.Quantize(Inputs(), texts_.calibration, *writer, progress_, report_));
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kPacking, -1));
    WALSH_RETURN_IF_ERROR(progress_.Advance(ReadWork()));
    WALSH_ASSIGN_OR_RETURN(report_.artifact,
                           writer->Finish(QuantizationConfig(spec_, checkpoint_->config(), job_),
                                          Report(), pool_.n_threads(), keep_going_));
    report_.artifact.job = spec_.job_name;
    return absl::OkStatus();
  }

  // Reads the artifact back, so that what is evaluated is what was stored.
  absl::Status Evaluate() {
    if (texts_.evaluation.count() == 0 && job_.tasks.empty()) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kEvaluating, -1, "stored files"));
    WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactReader> artifact,
                           ArtifactReader::Open(spec_.output_directory, /*verify=*/true,
                                                pool_.n_threads(), keep_going_));
    if (texts_.evaluation.count() > 0) WALSH_RETURN_IF_ERROR(EvaluateText(*artifact));
    WALSH_RETURN_IF_ERROR(EvaluateTasks(*artifact));
    WALSH_RETURN_IF_ERROR(ReplaceReportMember(spec_.output_directory, "quality",
                                              QualityReport(job_, texts_, report_)));
    WALSH_ASSIGN_OR_RETURN(report_.artifact, ArtifactReader::ReadInfo(spec_.output_directory));
    report_.artifact.job = spec_.job_name;
    return absl::OkStatus();
  }

  absl::Status EvaluateText(const ArtifactReader& artifact) {
    WALSH_ASSIGN_OR_RETURN(Quality quality,
                           backend_.Evaluate(Inputs(), artifact, texts_.evaluation,
                                             {.positions = texts_.first_scored}, progress_));
    report_.perplexity_before = quality.before.Perplexity();
    report_.perplexity_after = quality.after.Perplexity();
    report_.evaluation_tokens = quality.before.n_tokens;
    report_.kl_divergence = quality.kl_divergence;
    report_.top1_agreement = quality.top1_agreement;
    report_.window_losses_before = std::move(quality.before.losses);
    report_.window_losses_after = std::move(quality.after.losses);
    report_.window_divergences = std::move(quality.window_divergences);
    return absl::OkStatus();
  }

  // On the CPU, as EvaluateArtifact does it.
  absl::Status EvaluateTasks(const ArtifactReader& artifact) {
    evaluate::CheckpointSource original(*checkpoint_);
    evaluate::ArtifactSource quantized(artifact);
    for (size_t i = 0; i < job_.tasks.size(); ++i) {
      TaskQuality& quality = report_.tasks.emplace_back();
      WALSH_ASSIGN_OR_RETURN(quality.before, ScoreTask(i, original, "original"));
      WALSH_ASSIGN_OR_RETURN(quality.after, ScoreTask(i, quantized, "quantized"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<evaluate::TaskReport> ScoreTask(size_t index, evaluate::LayerSource& source,
                                                 const char* which) {
    const evaluate::Task& task = job_.tasks[index];
    const double work = TaskWork(task);
    WALSH_RETURN_IF_ERROR(
        progress_.Enter(Stage::kEvaluating, -1, absl::StrCat("task ", task.name, ", ", which)));
    absl::StatusOr<evaluate::TaskScore> score =
        evaluate::ScoreTask(task, encoded_tasks_[index], source, pool_,
                            [&](double fraction) { return progress_.Within(fraction * work); });
    if (!score.ok()) return AboutTask(task, score.status());
    WALSH_RETURN_IF_ERROR(progress_.Advance(work));
    return evaluate::ReportOf(task, *std::move(score));
  }

  const JobSpec& spec_;
  Backend& backend_;
  BackendRun backend_run_;
  ThreadPool& pool_;
  Progress progress_;
  const KeepGoing keep_going_ = [this] { return progress_.Within(0); };
  OutputGuard output_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::future<absl::StatusOr<std::unique_ptr<Tokenizer>>> making_tokenizer_;  // of the checkpoint's
  ResolvedJob job_;
  std::string source_sha256_;
  std::optional<JobCheckpoint> saved_;                // none: nothing is kept
  std::vector<evaluate::EncodedTask> encoded_tasks_;  // of job_.tasks
  JobTexts texts_;
  JobReport report_;
};

}  // namespace

const char* StageName(Stage stage) {
  constexpr const char* kNames[kStages] = {"FETCHING", "VALIDATING",  "LOADING",
                                           "ROTATING", "CALIBRATING", "QUANTIZING",
                                           "PACKING",  "EVALUATING",  "PUBLISHING"};
  return kNames[static_cast<int>(stage)];
}

absl::StatusOr<JobReport> RunJob(const JobSpec& spec, Backend& backend, ThreadPool& pool,
                                 const Observer& observer, Yield* yield) {
  return Job(spec, backend, pool, observer, yield).Run();
}

absl::StatusOr<JobReport> RunJob(const JobSpec& spec, ThreadPool& pool, const Observer& observer) {
  return RunJob(spec, *MakeCpuBackend(), pool, observer);
}

}  // namespace walsh::pipeline
