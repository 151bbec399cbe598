#include "worker/evaluate/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::evaluate {
namespace {

constexpr int64_t kBatchRows = 2048;

// Sum of the losses of one window's predictions.
absl::StatusOr<double> WindowLoss(const ForwardContext& context, std::span<const float> final_norm,
                                  const Matrix& head, const float* hidden,
                                  std::span<const int32_t> ids, Matrix& logits) {
  const auto n_predicted = static_cast<int64_t>(ids.size()) - 1;
  double sum = 0;
  std::vector<double> losses(static_cast<size_t>(kLogitRows));
  for (int64_t first = 0; first < n_predicted; first += kLogitRows) {
    const int64_t n = std::min(kLogitRows, n_predicted - first);
    WALSH_RETURN_IF_ERROR(
        Logits(context, final_norm, head, hidden + first * context.config->hidden, n, logits));
    kernels::CrossEntropyParams p;
    p.n_tokens = n;
    p.vocab = head.rows();
    p.logits = logits.data();
    p.targets = ids.data() + first + 1;
    p.loss = losses.data();
    WALSH_RETURN_IF_ERROR(kernels::CrossEntropy(p, context.stream));
    sum = std::accumulate(losses.begin(), losses.begin() + n, sum);
  }
  return sum;
}

}  // namespace

double WindowLosses::Perplexity() const {
  if (losses.empty()) return 0;
  return std::exp(std::accumulate(losses.begin(), losses.end(), 0.0) /
                  static_cast<double>(losses.size()));
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

absl::StatusOr<WindowLosses> EvaluateWindows(LayerSource& source,
                                             const calibrate::TokenWindows& windows,
                                             ThreadPool& pool, const Progress& progress) {
  const ModelConfig& config = source.config();
  const kernels::Stream stream{kernels::Backend::kCpu, &pool};
  const ForwardContext context = ForwardContext::Create(config, stream);
  const int64_t count = windows.count();
  const int64_t length = windows.length;
  WindowLosses result;
  if (count == 0) return result;

  // The head counts as as many layers as it has parameters of one.
  const double layer_size =
      static_cast<double>(2 * config.hidden * (config.q_width() + config.kv_width()) +
                          3 * config.hidden * config.intermediate);
  const double head_layers = static_cast<double>(config.vocab * config.hidden) / layer_size;
  const double total = static_cast<double>(config.n_layers) + head_layers;

  Matrix hidden;
  {
    WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source.Embedding());
    hidden = Embed(config, embedding, windows.ids);
  }
  ForwardScratch scratch;
  for (int64_t l = 0; l < config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(const DecoderLayer layer, source.Layer(l));
    WALSH_RETURN_IF_ERROR(
        ForwardWindows(context, layer, length, hidden, scratch, [&](int64_t n_rows) {
          const double done = static_cast<double>(n_rows) / static_cast<double>(hidden.rows());
          return progress((static_cast<double>(l) + done) / total);
        }));
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> final_norm, source.FinalNorm());
  WALSH_ASSIGN_OR_RETURN(const Matrix head, source.Head());
  Matrix logits;
  for (int64_t i = 0; i < count; ++i) {
    WALSH_ASSIGN_OR_RETURN(
        const double loss,
        WindowLoss(context, final_norm, head, hidden.row(i * length), windows.window(i), logits));
    if (!std::isfinite(loss)) {
      return absl::DataLossError(absl::StrCat("the loss of evaluation window ", i, " is ", loss));
    }
    result.losses.push_back(loss / static_cast<double>(length - 1));
    result.n_tokens += length - 1;
    const double head_done = static_cast<double>(i + 1) / static_cast<double>(count);
    WALSH_RETURN_IF_ERROR(
        progress((static_cast<double>(config.n_layers) + head_done * head_layers) / total));
  }
  return result;
}

}  // namespace walsh::evaluate
