#include "worker/evaluate/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::evaluate {
namespace {

constexpr int64_t kBatchRows = 2048;

// Logits and losses of a model, some rows at a time.
class Predictor {
 public:
  Predictor(const ModelConfig& config, const FinalStates& states, const kernels::Stream& stream)
      : context_(ForwardContext::Create(config, stream)),
        states_(states),
        losses_(static_cast<size_t>(kLogitRows)) {}

  int64_t vocab() const { return states_.head.rows(); }
  // Of the last Predict, [n_rows, vocab].
  const float* logits() const { return logits_.data(); }

  // At most kLogitRows hidden rows from `first`, each of which predicts its target; adds their
  // losses to *sum.
  absl::Status Predict(int64_t first, std::span<const int32_t> targets, double* sum) {
    const auto n = static_cast<int64_t>(targets.size());
    WALSH_RETURN_IF_ERROR(
        Logits(context_, states_.final_norm, states_.head, states_.hidden.row(first), n, logits_));
    kernels::CrossEntropyParams p;
    p.n_tokens = n;
    p.vocab = vocab();
    p.logits = logits_.data();
    p.targets = targets.data();
    p.loss = losses_.data();
    WALSH_RETURN_IF_ERROR(kernels::CrossEntropy(p, context_.stream));
    *sum = std::accumulate(losses_.begin(), losses_.begin() + n, *sum);
    return absl::OkStatus();
  }

 private:
  const ForwardContext context_;
  const FinalStates& states_;
  Matrix logits_;
  std::vector<double> losses_;
};

absl::Status AddLoss(double sum, int64_t n_scored, int64_t window, WindowLosses& result) {
  if (!std::isfinite(sum)) {
    return absl::DataLossError(absl::StrCat("the loss of evaluation window ", window, " is ", sum));
  }
  result.losses.push_back(sum / static_cast<double>(n_scored));
  result.n_scored.push_back(static_cast<double>(n_scored));
  result.n_tokens += n_scored;
  return absl::OkStatus();
}

double Share(int64_t done, int64_t total) {
  return static_cast<double>(done) / static_cast<double>(total);
}

// Calls `rows(first hidden row, targets)` for the scored positions of a window, kLogitRows at most
// at a time, and `progress` after each.
template <typename Rows>
absl::Status ForEachLogitRows(const calibrate::TokenWindows& windows, int64_t window,
                              int64_t first_scored, const Progress& progress, const Rows& rows) {
  const std::span<const int32_t> ids = windows.window(window);
  for (int64_t target = first_scored; target < windows.length; target += kLogitRows) {
    const int64_t n = std::min(kLogitRows, windows.length - target);
    WALSH_RETURN_IF_ERROR(rows(window * windows.length + target - 1,
                               ids.subspan(static_cast<size_t>(target), static_cast<size_t>(n))));
    WALSH_RETURN_IF_ERROR(
        progress((static_cast<double>(window) +
                  Share(target + n - first_scored, windows.length - first_scored)) /
                 static_cast<double>(windows.count())));
  }
  return absl::OkStatus();
}

// A model's layers count as one each, its head as as many as it has parameters of one.
double HeadLayers(const ModelConfig& config) {
  const double layer_size =
      static_cast<double>(2 * config.hidden * (config.q_width() + config.kv_width()) +
                          3 * config.hidden * config.intermediate);
  return static_cast<double>(config.vocab * config.hidden) / layer_size;
}

}  // namespace

int64_t FirstScored(const ScoredFrom& scored_from, int64_t window) {
  return scored_from.positions.empty() ? 1 : scored_from.positions[static_cast<size_t>(window)];
}

void WindowLosses::Append(const WindowLosses& more) {
  losses.insert(losses.end(), more.losses.begin(), more.losses.end());
  n_scored.insert(n_scored.end(), more.n_scored.begin(), more.n_scored.end());
  n_tokens += more.n_tokens;
}

double WindowLosses::TokenMean(std::span<const double> window_means) const {
  if (window_means.empty()) return 0;
  return std::inner_product(window_means.begin(), window_means.end(), n_scored.begin(), 0.0) /
         static_cast<double>(n_tokens);
}

double WindowLosses::Perplexity() const { return losses.empty() ? 0 : std::exp(TokenMean(losses)); }

double Comparison::KlDivergence() const { return model.TokenMean(divergences); }

double Comparison::Top1Agreement() const {
  return model.n_tokens == 0 ? 0 : Share(n_agreeing, model.n_tokens);
}

int64_t WindowsPerBatch(int64_t length) { return std::max<int64_t>(1, kBatchRows / length); }

Matrix Embed(const ModelConfig& config, const Matrix& embedding, std::span<const int32_t> ids) {
  Matrix hidden(static_cast<int64_t>(ids.size()), embedding.cols());
  for (size_t i = 0; i < ids.size(); ++i) {
    std::copy_n(embedding.row(ids[i]), embedding.cols(), hidden.row(static_cast<int64_t>(i)));
  }
  ScaleEmbedding(config, hidden.span());
  return hidden;
}

absl::Status ForwardWindows(const ForwardContext& context, const DecoderLayer& layer,
                            int64_t length, Matrix& hidden, ForwardScratch& scratch,
                            const RowProgress& progress) {
  const int64_t n_windows = hidden.rows() / length;
  const int64_t per_batch = std::min(WindowsPerBatch(length), n_windows);
  const int64_t kv_width = context.config->kv_width();
  Matrix keys(per_batch * length, kv_width), values(per_batch * length, kv_width);
  std::vector<int32_t> positions(static_cast<size_t>(per_batch * length));
  for (size_t i = 0; i < positions.size(); ++i) {
    positions[i] = static_cast<int32_t>(static_cast<int64_t>(i) % length);
  }
  for (int64_t first = 0; first < n_windows; first += per_batch) {
    const int64_t n = std::min(per_batch, n_windows - first);
    std::vector<SequenceSlice> sequences;
    for (int64_t i = 0; i < n; ++i) {
      sequences.push_back({i * length, length, 0, keys.row(i * length), values.row(i * length)});
    }
    WALSH_RETURN_IF_ERROR(ForwardLayer(context, layer,
                                       std::span(positions).first(static_cast<size_t>(n * length)),
                                       sequences, n * length, hidden.row(first * length), scratch));
    WALSH_RETURN_IF_ERROR(progress((first + n) * length));
  }
  return absl::OkStatus();
}

absl::Status Logits(const ForwardContext& context, std::span<const float> final_norm,
                    const Matrix& head, const float* hidden, int64_t n_rows, Matrix& logits) {
  const int64_t dim = context.config->hidden;
  Matrix normed(n_rows, dim);
  kernels::RmsNormParams norm;
  norm.n_tokens = n_rows;
  norm.dim = dim;
  norm.x = hidden;
  norm.weight = final_norm.empty() ? nullptr : final_norm.data();
  norm.eps = static_cast<float>(context.config->rms_norm_eps);
  norm.y = normed.data();
  WALSH_RETURN_IF_ERROR(kernels::RmsNorm(norm, context.stream));
  if (logits.rows() < n_rows || logits.cols() != head.rows()) logits = Matrix(n_rows, head.rows());
  kernels::MatmulParams product;
  product.n_tokens = n_rows;
  product.in = dim;
  product.out = head.rows();
  product.x = normed.data();
  product.x_stride = dim;
  product.weights = head.data();
  product.y = logits.data();
  product.y_stride = logits.cols();
  return kernels::Matmul(product, context.stream);
}

absl::StatusOr<FinalStates> ForwardToHead(LayerSource& source,
                                          const calibrate::TokenWindows& windows, ThreadPool& pool,
                                          const Progress& progress) {
  const ModelConfig& config = source.config();
  const kernels::Stream stream{kernels::Backend::kCpu, &pool};
  const ForwardContext context = ForwardContext::Create(config, stream);
  FinalStates states;
  {
    WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source.Embedding());
    states.hidden = Embed(config, embedding, windows.ids);
  }
  ForwardScratch scratch;
  for (int64_t l = 0; l < config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(const DecoderLayer layer, source.Layer(l));
    WALSH_RETURN_IF_ERROR(
        ForwardWindows(context, layer, windows.length, states.hidden, scratch, [&](int64_t n_rows) {
          return progress((static_cast<double>(l) + Share(n_rows, states.hidden.rows())) /
                          static_cast<double>(config.n_layers));
        }));
  }
  WALSH_ASSIGN_OR_RETURN(states.final_norm, source.FinalNorm());
  WALSH_ASSIGN_OR_RETURN(states.head, source.Head());
  return states;
}

absl::StatusOr<WindowLosses> Losses(const ModelConfig& config, const FinalStates& states,
                                    const calibrate::TokenWindows& windows,
                                    const ScoredFrom& scored_from, ThreadPool& pool,
                                    const Progress& progress) {
  Predictor model(config, states, {kernels::Backend::kCpu, &pool});
  WindowLosses result;
  for (int64_t i = 0; i < windows.count(); ++i) {
    const int64_t first = FirstScored(scored_from, i);
    double sum = 0;
    WALSH_RETURN_IF_ERROR(ForEachLogitRows(windows, i, first, progress,
                                           [&](int64_t row, std::span<const int32_t> targets) {
                                             return model.Predict(row, targets, &sum);
                                           }));
    WALSH_RETURN_IF_ERROR(
        AddLoss(sum, windows.length - first, scored_from.first_window + i, result));
  }
  return result;
}

absl::StatusOr<Comparison> Compare(const ModelConfig& reference_config,
                                   const FinalStates& reference, const ModelConfig& config,
                                   const FinalStates& states,
                                   const calibrate::TokenWindows& windows,
                                   const ScoredFrom& scored_from, ThreadPool& pool,
                                   const Progress& progress) {
  const kernels::Stream stream{kernels::Backend::kCpu, &pool};
  Predictor before(reference_config, reference, stream);
  Predictor after(config, states, stream);
  if (before.vocab() != after.vocab()) {
    return absl::InvalidArgumentError(absl::StrCat("the reference has a vocabulary of ",
                                                   before.vocab(), " tokens, the model one of ",
                                                   after.vocab(), ": they cannot be compared"));
  }
  std::vector<double> divergences(static_cast<size_t>(kLogitRows));
  std::vector<int32_t> agrees(static_cast<size_t>(kLogitRows));
  Comparison result;
  for (int64_t i = 0; i < windows.count(); ++i) {
    const int64_t first = FirstScored(scored_from, i);
    double sum_before = 0, sum_after = 0, divergence = 0;
    const auto compare = [&](int64_t row, std::span<const int32_t> targets) -> absl::Status {
      WALSH_RETURN_IF_ERROR(before.Predict(row, targets, &sum_before));
      WALSH_RETURN_IF_ERROR(after.Predict(row, targets, &sum_after));
      const auto n = static_cast<int64_t>(targets.size());
      WALSH_RETURN_IF_ERROR(kernels::KlDivergence({.n_tokens = n,
                                                   .vocab = after.vocab(),
                                                   .reference = before.logits(),
                                                   .logits = after.logits(),
                                                   .divergence = divergences.data(),
                                                   .agrees = agrees.data()},
                                                  stream));
      divergence = std::accumulate(divergences.begin(), divergences.begin() + n, divergence);
      result.n_agreeing = std::accumulate(agrees.begin(), agrees.begin() + n, result.n_agreeing);
      return absl::OkStatus();
    };
    WALSH_RETURN_IF_ERROR(ForEachLogitRows(windows, i, first, progress, compare));
    const int64_t n_scored = windows.length - first;
    const int64_t window = scored_from.first_window + i;
    WALSH_RETURN_IF_ERROR(AddLoss(sum_before, n_scored, window, result.reference));
    WALSH_RETURN_IF_ERROR(AddLoss(sum_after, n_scored, window, result.model));
    if (!std::isfinite(divergence)) {
      return absl::DataLossError(
          absl::StrCat("the divergence of evaluation window ", window, " is ", divergence));
    }
    // Rounding can leave a tiny negative sum where the models agree.
    result.divergences.push_back(std::max(0.0, divergence / static_cast<double>(n_scored)));
  }
  return result;
}

absl::StatusOr<WindowLosses> EvaluateWindows(LayerSource& source,
                                             const calibrate::TokenWindows& windows,
                                             ThreadPool& pool, const Progress& progress) {
  if (windows.count() == 0) return WindowLosses();
  const ModelConfig& config = source.config();
  const auto layers = static_cast<double>(config.n_layers);
  const double head = HeadLayers(config);
  const double total = layers + head;
  WALSH_ASSIGN_OR_RETURN(const FinalStates states,
                         ForwardToHead(source, windows, pool, [&](double fraction) {
                           return progress(fraction * layers / total);
                         }));
  return Losses(config, states, windows, {}, pool,
                [&](double fraction) { return progress((layers + fraction * head) / total); });
}

}  // namespace walsh::evaluate
