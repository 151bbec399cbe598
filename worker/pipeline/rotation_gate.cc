#include "worker/pipeline/rotation_gate.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/evaluate/perplexity.h"

namespace walsh::pipeline {
namespace {

constexpr int64_t kWindows = 4;
constexpr int64_t kWindowTokens = kGateTokensMax / kWindows;
// Text, not ids from all over the vocabulary: on such ids SmolLM2 grows activations of 24,000 from
// differences so small that the unrotated model in floats and in double differ by 1e-4 themselves.
constexpr std::string_view kText =
    "The rows of a Walsh matrix are square waves. The first is constant, and each next one changes "
    "its sign once more along the row. Multiplying a vector by the matrix spreads every entry over "
    "all of them, so that no single one stands out, and multiplying once more brings the vector "
    "back. A model whose weights were turned this way computes what it did before.";

}  // namespace

absl::StatusOr<calibrate::TokenWindows> GateWindows(const ModelConfig& config,
                                                    const Tokenizer& tokenizer) {
  calibrate::TokenWindows windows;
  windows.length = std::min(kWindowTokens, config.max_position);
  WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> text,
                         tokenizer.Encode(kText, Tokenizer::EncodeOptions()));
  if (text.empty()) return absl::InvalidArgumentError("the tokenizer gives no token for any text");
  for (int64_t i = 0; i < kWindows * windows.length; ++i) {
    windows.ids.push_back(text[static_cast<size_t>(i) % text.size()]);
  }
  for (int32_t& id : windows.ids) {
    if (id < 0 || id >= config.vocab) id = 0;
  }
  return windows;
}

absl::StatusOr<double> JudgeDifference(double largest, double difference) {
  const double relative = largest == 0 ? 0 : difference / largest;
  if (relative > kRotationGateMax) {
    return absl::FailedPreconditionError(
        absl::StrCat("the rotated model is not equivalent: its logits differ by ", relative,
                     " of the largest, the limit is ", kRotationGateMax));
  }
  return relative;
}

absl::Status NotFiniteLogit(int64_t token, int64_t id, double before, double after) {
  return absl::DataLossError(absl::StrCat("rotation gate: logit ", id, " of token ", token, " is ",
                                          before, " before and ", after, " after the rotation"));
}

absl::StatusOr<double> CompareLogits(const Matrix& logits, const Matrix& rotated_logits) {
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < logits.size(); ++i) {
    const double a = logits.data()[i], b = rotated_logits.data()[i];
    if (!std::isfinite(a) || !std::isfinite(b)) {
      return NotFiniteLogit(i / logits.cols(), i % logits.cols(), a, b);
    }
    largest = std::max(largest, std::abs(a));
    difference = std::max(difference, std::abs(a - b));
  }
  return JudgeDifference(largest, difference);
}

absl::StatusOr<double> CheckRotation(const Checkpoint& checkpoint, RotatedSource& rotated,
                                     const calibrate::TokenWindows& windows, ThreadPool& pool,
                                     const std::function<absl::Status()>& progress) {
  evaluate::CheckpointSource original(checkpoint);
  const ForwardContext context =
      ForwardContext::Create(checkpoint.config(), {kernels::Backend::kCpu, &pool});
  ForwardScratch scratch;
  const auto ignore_rows = [](int64_t) { return absl::OkStatus(); };

  Matrix hidden, rotated_hidden;
  {
    WALSH_ASSIGN_OR_RETURN(const Matrix embedding, original.Embedding());
    hidden = evaluate::Embed(checkpoint.config(), embedding, windows.ids);
  }
  {
    WALSH_ASSIGN_OR_RETURN(const Matrix embedding, rotated.Embedding());
    rotated_hidden = evaluate::Embed(checkpoint.config(), embedding, windows.ids);
  }
  for (int64_t l = 0; l < checkpoint.config().n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, original.Layer(l));
    WALSH_RETURN_IF_ERROR(
        evaluate::ForwardWindows(context, layer, windows.length, hidden, scratch, ignore_rows));
    rotated.RotateLayer(layer);
    WALSH_RETURN_IF_ERROR(evaluate::ForwardWindows(context, layer, windows.length, rotated_hidden,
                                                   scratch, ignore_rows));
    WALSH_RETURN_IF_ERROR(progress());
  }
  Matrix logits, rotated_logits;
  {
    WALSH_ASSIGN_OR_RETURN(const std::vector<float> norm, original.FinalNorm());
    WALSH_ASSIGN_OR_RETURN(const Matrix head, original.Head());
    WALSH_RETURN_IF_ERROR(
        evaluate::Logits(context, norm, head, hidden.data(), hidden.rows(), logits));
  }
  {
    WALSH_ASSIGN_OR_RETURN(const std::vector<float> norm, rotated.FinalNorm());
    WALSH_ASSIGN_OR_RETURN(const Matrix head, rotated.Head());
    WALSH_RETURN_IF_ERROR(evaluate::Logits(context, norm, head, rotated_hidden.data(),
                                           rotated_hidden.rows(), rotated_logits));
  }
  return CompareLogits(logits, rotated_logits);
}

}  // namespace walsh::pipeline
