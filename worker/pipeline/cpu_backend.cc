#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/evaluate/layer_source.h"
#include "worker/kernels/kernels.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/layer_quantizer.h"
#include "worker/pipeline/rotated_source.h"
#include "worker/pipeline/rotation_gate.h"

namespace walsh::pipeline {
namespace {

absl::StatusOr<std::shared_ptr<const OnlineForward>> OnlineRotations(const JobInputs& inputs) {
  return OnlineForward::Create(inputs.job.online.rotations(), inputs.checkpoint.config());
}

class CpuBackend final : public Backend {
 public:
  std::string name() const override { return "cpu"; }
  std::string kernel_family() const override {
    return absl::StrCat("cpu: ", kernels::DescribeCpuBackend());
  }

  MemoryNeeds Needs(const JobSpec& spec, const ModelConfig& config,
                    const ResolvedJob& job) const override {
    return {.host_bytes = HostMemoryNeeded(spec, config, job)};
  }
  absl::StatusOr<DeviceMemory> memory() const override { return DeviceMemory(); }
  JobUse EndJob() override { return {}; }
  absl::Status CheckSupported(const ModelConfig&, const ResolvedJob&) const override {
    return absl::OkStatus();
  }

  absl::StatusOr<double> CheckRotation(const JobInputs& inputs,
                                       const calibrate::TokenWindows& windows,
                                       Progress& progress) override {
    WALSH_ASSIGN_OR_RETURN(std::shared_ptr<const OnlineForward> online, OnlineRotations(inputs));
    RotatedSource rotated(inputs.checkpoint, inputs.job.r1, inputs.job.r2, inputs.pool,
                          std::move(online));
    const ModelConfig& config = inputs.checkpoint.config();
    const double work_per_layer = ReadWork(config) / static_cast<double>(config.n_layers);
    return pipeline::CheckRotation(inputs.checkpoint, rotated, windows, inputs.pool,
                                   [&] { return progress.Advance(work_per_layer); });
  }

  absl::Status Quantize(const JobInputs& inputs, const calibrate::TokenWindows& windows,
                        ArtifactWriter& writer, Progress& progress, JobReport& report) override {
    WALSH_ASSIGN_OR_RETURN(std::shared_ptr<const OnlineForward> online, OnlineRotations(inputs));
    RotatedSource rotated(inputs.checkpoint, inputs.job.r1, inputs.job.r2, inputs.pool,
                          std::move(online));
    return LayerQuantizer(inputs, rotated, windows, writer, progress).Run(report);
  }

  absl::StatusOr<Quality> Evaluate(const JobInputs& inputs, const ArtifactReader& artifact,
                                   const calibrate::TokenWindows& windows,
                                   const evaluate::ScoredFrom& scored_from,
                                   Progress& progress) override {
    const ModelConfig& config = inputs.checkpoint.config();
    const auto n_tokens = static_cast<double>(windows.count() * windows.length);
    const double layers =
        n_tokens * LayerFlopsPerToken(config) * static_cast<double>(config.n_layers);
    const double heads = 2 * (n_tokens * ModelFlopsPerToken(config) - layers);
    const auto show_layers = [&](double fraction) { return progress.Within(fraction * layers); };
    WALSH_RETURN_IF_ERROR(progress.Enter(Stage::kEvaluating, -1, "original"));
    evaluate::CheckpointSource original(inputs.checkpoint);
    WALSH_ASSIGN_OR_RETURN(const evaluate::FinalStates before,
                           evaluate::ForwardToHead(original, windows, inputs.pool, show_layers));
    WALSH_RETURN_IF_ERROR(progress.Advance(layers));

    WALSH_RETURN_IF_ERROR(progress.Enter(Stage::kEvaluating, -1, "quantized"));
    evaluate::ArtifactSource quantized(artifact);
    WALSH_ASSIGN_OR_RETURN(const evaluate::FinalStates after,
                           evaluate::ForwardToHead(quantized, windows, inputs.pool, show_layers));
    WALSH_RETURN_IF_ERROR(progress.Advance(layers));

    WALSH_RETURN_IF_ERROR(progress.Enter(Stage::kEvaluating, -1, "logits"));
    WALSH_ASSIGN_OR_RETURN(evaluate::Comparison comparison,
                           evaluate::Compare(config, before, quantized.config(), after, windows,
                                             scored_from, inputs.pool, [&](double fraction) {
                                               return progress.Within(fraction * heads);
                                             }));
    WALSH_RETURN_IF_ERROR(progress.Advance(heads));
    Quality quality;
    quality.kl_divergence = comparison.KlDivergence();
    quality.top1_agreement = comparison.Top1Agreement();
    quality.window_divergences = std::move(comparison.divergences);
    quality.before = std::move(comparison.reference);
    quality.after = std::move(comparison.model);
    return quality;
  }
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend() { return std::make_unique<CpuBackend>(); }

}  // namespace walsh::pipeline
