#include "worker/pipeline/cuda/evaluator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/event.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/row_stream.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/model/decoder_layer.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::Download;
using kernels::cuda::Event;
using kernels::cuda::PieceBytes;
using kernels::cuda::Upload;
namespace {

namespace ops = kernels::cuda;

constexpr int64_t kLogitTokens = 2048;  // 2,048 × 128k vocabulary are 1 GB

int64_t ForwardTokens(int64_t n_tokens, int64_t window) {
  return std::min(std::max(int64_t{1}, kForwardTokens / window) * window, n_tokens);
}

}  // namespace

absl::StatusOr<Evaluator::Outcome> Evaluator::Forward(ModelSource& source,
                                                      const EvaluationProgress& progress) {
  const cudaStream_t stream = context_.stream();
  const int64_t n = n_tokens();
  const LayerShape shape = LayerShape::Of(config_);
  WALSH_ASSIGN_OR_RETURN(
      auto forward, LayerForward<bf16>::Create(&context_, shape, RopeInverseFrequencies(config_),
                                               windows_.length, ForwardTokens(n, windows_.length)));
  WALSH_ASSIGN_OR_RETURN(auto hidden, source.Embedded(windows_.ids));
  const auto share = [&](int64_t n_layers) {
    return static_cast<double>(n_layers) / static_cast<double>(config_.n_layers);
  };
  std::array<Event, 2> queued;  // behind a layer's work
  for (int64_t l = 0; l < config_.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(const DeviceLayer<bf16> layer, source.Layer(l));
    WALSH_RETURN_IF_ERROR(forward.Layer(layer.tensors(), n, hidden.data()));
    WALSH_RETURN_IF_ERROR(queued[static_cast<size_t>(l % 2)].Record(stream));
    // Waits for the layer before, so that the device always has one to do and what is shown is of
    // work that has been done.
    WALSH_RETURN_IF_ERROR(queued[static_cast<size_t>((l + 1) % 2)].Wait());
    WALSH_RETURN_IF_ERROR(progress(share(l)));
  }
  Outcome outcome;
  WALSH_ASSIGN_OR_RETURN(const auto final_norm, source.FinalNorm());
  WALSH_ASSIGN_OR_RETURN(outcome.normed, DeviceBuffer<bf16>::Allocate(n * shape.hidden, stream));
  WALSH_RETURN_IF_ERROR(ops::RmsNorm<bf16>(context_, n, shape.hidden, hidden.data(),
                                           final_norm.data(), shape.rms_norm_eps,
                                           outcome.normed.data()));
  WALSH_ASSIGN_OR_RETURN(outcome.head, source.Head());
  WALSH_RETURN_IF_ERROR(source.CheckFinite());
  WALSH_RETURN_IF_ERROR(context_.Synchronize());
  WALSH_RETURN_IF_ERROR(progress(1.0));
  return outcome;
}

absl::StatusOr<Quality> Evaluator::Compare(const Outcome& before, const Outcome& after,
                                           const evaluate::ScoredFrom& scored_from,
                                           const KeepGoing& keep_going) {
  const cudaStream_t stream = context_.stream();
  const int64_t n = n_tokens();
  const int64_t vocab = config_.vocab;
  const int64_t chunk = std::min(kLogitTokens, n);
  // The last token of a window predicts nothing; its target is any id, and its figures are left
  // out, as are those of targets that the window before has scored.
  std::vector<int32_t> targets(windows_.ids.begin() + 1, windows_.ids.end());
  targets.push_back(0);
  WALSH_ASSIGN_OR_RETURN(const auto device_targets, Upload<int32_t>(context_, targets));
  WALSH_ASSIGN_OR_RETURN(auto logits, DeviceBuffer<float>::Allocate(2 * chunk * vocab, stream));
  WALSH_ASSIGN_OR_RETURN(auto device_losses, DeviceBuffer<double>::Allocate(2 * n, stream));
  WALSH_ASSIGN_OR_RETURN(auto device_kl, DeviceBuffer<double>::Allocate(n, stream));
  WALSH_ASSIGN_OR_RETURN(auto device_top1, DeviceBuffer<int32_t>::Allocate(n, stream));
  for (int64_t first = 0; first < n; first += chunk) {
    // Waits, so that not more is queued than what is asked about.
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    const int64_t rows = std::min(chunk, n - first);
    for (const int which : {0, 1}) {
      const Outcome& outcome = which == 0 ? before : after;
      float* y = logits.data() + which * chunk * vocab;
      WALSH_RETURN_IF_ERROR(ops::Gemm(
          context_, ops::GemmParams<float>{.n_tokens = rows,
                                           .in = config_.hidden,
                                           .out = vocab,
                                           .x = outcome.normed.data() + first * config_.hidden,
                                           .weights = outcome.head.data(),
                                           .y = y}));
      WALSH_RETURN_IF_ERROR(ops::CrossEntropy(context_, rows, vocab, y,
                                              device_targets.data() + first,
                                              device_losses.data() + which * n + first));
    }
    WALSH_RETURN_IF_ERROR(ops::KlDivergence(context_, rows, vocab, logits.data(),
                                            logits.data() + chunk * vocab, device_kl.data() + first,
                                            device_top1.data() + first));
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<double> losses,
                         Download<double>(context_, device_losses.data(), 2 * n));
  WALSH_ASSIGN_OR_RETURN(const std::vector<double> kl,
                         Download<double>(context_, device_kl.data(), n));
  WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> top1,
                         Download<int32_t>(context_, device_top1.data(), n));

  Quality quality;
  double kl_sum = 0;
  int64_t agreeing = 0;
  for (int64_t w = 0; w < windows_.count(); ++w) {
    double sums[2] = {0, 0};
    double window_kl = 0;
    const int64_t first_scored = evaluate::FirstScored(scored_from, w);
    const int64_t n_scored = windows_.length - first_scored;
    for (int64_t i = w * windows_.length + first_scored - 1; i < (w + 1) * windows_.length - 1;
         ++i) {
      for (const int which : {0, 1}) sums[which] += losses[static_cast<size_t>(which * n + i)];
      window_kl += kl[static_cast<size_t>(i)];
      agreeing += top1[static_cast<size_t>(i)];
    }
    for (const int which : {0, 1}) {
      if (!std::isfinite(sums[which])) {
        return absl::DataLossError(
            absl::StrCat("the loss of evaluation window ", w, " is ", sums[which]));
      }
      evaluate::WindowLosses& result = which == 0 ? quality.before : quality.after;
      result.losses.push_back(sums[which] / static_cast<double>(n_scored));
      result.n_scored.push_back(static_cast<double>(n_scored));
      result.n_tokens += n_scored;
    }
    kl_sum += window_kl;
    quality.window_divergences.push_back(window_kl / static_cast<double>(n_scored));
  }
  if (!std::isfinite(kl_sum)) {
    return absl::DataLossError(absl::StrCat("the divergence of the models is ", kl_sum));
  }
  const auto n_predicted = static_cast<double>(quality.before.n_tokens);
  // Rounding can leave a tiny negative sum where the models agree.
  quality.kl_divergence = std::max(0.0, kl_sum / n_predicted);
  quality.top1_agreement = static_cast<double>(agreeing) / n_predicted;
  return quality;
}

int64_t Evaluator::EvaluationBytes(const ModelConfig& config, int64_t n_tokens, int64_t window) {
  if (n_tokens == 0) return 0;
  const LayerShape shape = LayerShape::Of(config);
  const int64_t vocabulary = config.vocab * config.hidden;
  const int64_t outcome =
      static_cast<int64_t>(sizeof(bf16)) * (n_tokens * shape.hidden + vocabulary);
  // The first model's outcome is there while the second runs; a piece of its head is in floats.
  const int64_t forward = 2 * outcome +
                          n_tokens * shape.hidden * static_cast<int64_t>(sizeof(float)) +
                          LayerForward<bf16>::ScratchBytes(shape, ForwardTokens(n_tokens, window)) +
                          2 * PieceBytes(shape.hidden * static_cast<int64_t>(sizeof(float)));
  const int64_t compare =
      2 * outcome +
      2 * std::min(kLogitTokens, n_tokens) * config.vocab * static_cast<int64_t>(sizeof(float)) +
      n_tokens * 32;
  return std::max(forward, compare);
}

}  // namespace walsh::pipeline::cuda
