// Where a job's arithmetic runs: the parts of it that touch every weight.
//
// A job (quantize_job.h) resolves options, reads texts, reports and publishes the same way
// everywhere, and scores zero-shot tasks on the CPU; a backend proves the rotation, quantizes the
// layers and evaluates what was stored on a text.
// The CPU's is always there; that of a CUDA device is made by MakeCudaBackend
// (cuda/cuda_backend.h).
//
// Errors:  those of quantize_job.h; from a device also RESOURCE_EXHAUSTED with the bytes needed and
//          free, and what worker/kernels/device_failure.h calls broken
// Threads: one job at a time uses a backend, from one thread; Needs(), CheckSupported() and
// memory()
//          are safe beside it, from any thread
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/perplexity.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/kernels/thread_pool.h"
#include "worker/pipeline/job_checkpoint.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/progress.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::pipeline {

// What a running job hands to its backend; all of it outlives the call.
struct JobInputs {
  const JobSpec& spec;
  const ResolvedJob& job;
  const Checkpoint& checkpoint;
  ThreadPool& pool;
  JobCheckpoint* saved = nullptr;  // null: no layers are kept; else it is open
};

// Losses of the original and of the stored model on the same windows. A device computes both with
// weights and activations in bf16, so that its "before" is that of the checkpoint so rounded.
struct Quality {
  evaluate::WindowLosses before, after;
  // Mean over the predicted tokens of KL(original ‖ quantized) in nats, and the share of them whose
  // likeliest next token is the same. Negative: not measured.
  double kl_divergence = -1;
  double top1_agreement = -1;
  std::vector<double> window_divergences;  // the same by window
};

struct DeviceMemory {
  // What a job can have when nothing else runs; 0: the backend has no memory of its own.
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;
};

// What a job took of its backend.
struct JobUse {
  int64_t peak_device_bytes = 0;  // the largest sum of the backend's own buffers
  std::vector<StepTime> steps;    // JobReport::steps
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // "cpu", "cuda:0"
  // Backends of one family make the same bytes, and go on with each other's layers. Empty: jobs
  // keep no layers here, and start over.
  virtual std::string kernel_family() const { return ""; }

  // At most this much memory, of the host and of the device. The job is resolved but for them.
  virtual MemoryNeeds Needs(const JobSpec& spec, const ModelConfig& config,
                            const ResolvedJob& job) const = 0;
  virtual absl::StatusOr<DeviceMemory> memory() const = 0;
  // UNIMPLEMENTED names what the backend cannot do for this model.
  virtual absl::Status CheckSupported(const ModelConfig& config, const ResolvedJob& job) const = 0;

  // worker/pipeline/rotation_gate.h: max |Δ logit| / max |logit|. Advances by ReadWork in all.
  virtual absl::StatusOr<double> CheckRotation(const JobInputs& inputs,
                                               const calibrate::TokenWindows& windows,
                                               Progress& progress) = 0;
  // Every tensor of the model to the writer; linears, warnings and seconds to the report.
  virtual absl::Status Quantize(const JobInputs& inputs, const calibrate::TokenWindows& windows,
                                ArtifactWriter& writer, Progress& progress, JobReport& report) = 0;
  // Perplexity of the checkpoint and of the artifact; enters EVALUATING for each.
  virtual absl::StatusOr<Quality> Evaluate(const JobInputs& inputs, const ArtifactReader& artifact,
                                           const calibrate::TokenWindows& windows,
                                           const evaluate::ScoredFrom& scored_from,
                                           Progress& progress) = 0;
  // Returns once nothing that these calls have begun still runs on a device. Called from within
  // them, before the job waits for others.
  virtual absl::Status Settle() { return absl::OkStatus(); }
  // Called after each job, however it ended: gives back what the backend kept from one of the calls
  // above to the next.
  virtual JobUse EndJob() = 0;
};

std::unique_ptr<Backend> MakeCpuBackend();

}  // namespace walsh::pipeline
