#include "worker/engine/cuda/cuda_model.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/engine/cuda/device_runner.h"
#include "worker/engine/cuda/device_weights.h"
#include "worker/engine/cuda/kv_storage.h"
#include "worker/engine/kv_cache_transforms.h"
#include "worker/engine/model_text.h"
#include "worker/io/artifact.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::engine {
namespace {

constexpr int kComputeMin = 9;  // clusters, bulk copies, programmatic dependent launch

class CudaModel final : public ServedModel {
 public:
  CudaModel(std::unique_ptr<cuda::Context> context, ModelConfig config, ArtifactInfo info,
            ModelText text, cuda::DeviceWeights weights, const cuda::KvStorage& kv,
            const CudaModelOptions& options)
      : context_(std::move(context)),
        config_(std::move(config)),
        info_(std::move(info)),
        text_(std::move(text)),
        weights_(std::move(weights)),
        kv_(kv),
        options_(options) {}
  ~CudaModel() override {
    if (!context_->MakeCurrent().ok()) return;
    weights_ = {};
    context_->ReleaseUnusedMemory().IgnoreError();
  }

  const ModelConfig& config() const override { return config_; }
  const ArtifactInfo& info() const override { return info_; }
  const Tokenizer& tokenizer() const override { return *text_.tokenizer; }
  const ChatTemplate* chat_template() const override { return text_.chat_template.get(); }
  int64_t memory_bytes() const override { return weights_.size_bytes(); }
  int64_t packed_bytes_per_token() const override { return weights_.packed_bytes(); }
  absl::StatusOr<std::unique_ptr<ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const override {
    return cuda::MakeDeviceRunner(context_.get(), &config_, &weights_, limits, RunnerOptions());
  }
  int64_t kv_token_bytes() const override { return kv_.token_bytes(config_); }
  int64_t step_bytes(const RunnerLimits& limits) const override {
    // What buffers a step has depends on the current device. Without it the load fails anyway.
    context_->MakeCurrent().IgnoreError();
    return cuda::DeviceRunnerStepBytes(config_, weights_, limits, RunnerOptions());
  }
  std::optional<int64_t> free_device_bytes() const override {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    if (!context_->MakeCurrent().ok() || cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
      return 0;
    }
    return static_cast<int64_t>(free_bytes);
  }

 private:
  cuda::DeviceRunnerOptions RunnerOptions() const {
    return {
        .use_graphs = options_.use_graphs, .batch_invariant = options_.batch_invariant, .kv = kv_};
  }

  const std::unique_ptr<cuda::Context> context_;
  const ModelConfig config_;
  const ArtifactInfo info_;
  const ModelText text_;
  cuda::DeviceWeights weights_;
  const cuda::KvStorage kv_;
  const CudaModelOptions options_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<ServedModel>> LoadCudaModel(const std::string& directory,
                                                           const CudaModelOptions& options) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactReader> reader,
                         ArtifactReader::Open(directory, options.verify, options.n_threads));
  WALSH_RETURN_IF_ERROR(cuda::CheckServable(*reader));
  const OnlineTransforms online =
      WithKvCache(reader->online(), options.kv_cache_dtype, reader->config());
  WALSH_ASSIGN_OR_RETURN(const cuda::KvStorage kv, cuda::KvStorageOf(online, reader->config()));
  WALSH_ASSIGN_OR_RETURN(ModelText text, LoadText(reader->tokenizer()));
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<cuda::Context> context,
                         cuda::Context::Create(options.device, kernels::cuda::Priority::kServing));
  if (context->properties().major < kComputeMin) {
    return absl::UnimplementedError(
        absl::StrCat("no CUDA kernels for a device of compute ", context->properties().major, ".",
                     context->properties().minor, ", they need ", kComputeMin, ".0"));
  }
  WALSH_ASSIGN_OR_RETURN(cuda::DeviceWeights weights, cuda::LoadWeights(*context, *reader));
  WALSH_RETURN_IF_ERROR(context->ReleaseUnusedMemory());  // what was stored, once it is laid out
  return std::make_shared<CudaModel>(std::move(context), reader->config(), reader->info(),
                                     std::move(text), std::move(weights), kv, options);
}

}  // namespace walsh::engine
