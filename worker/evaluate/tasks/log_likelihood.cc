#include "worker/evaluate/tasks/log_likelihood.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/keep_going.h"
#include "common/status_macros.h"
#include "worker/kernels/kernels.h"

namespace walsh::evaluate {
namespace {

// The last token of a continuation is only predicted.
int64_t ContinuationRows(const std::vector<int32_t>& continuation) {
  return static_cast<int64_t>(continuation.size()) - 1;
}

absl::Status Check(const ContextTokens& tokens, const ModelConfig& config) {
  const auto is_id = [&](int32_t id) { return id >= 0 && id < config.vocab; };
  if (tokens.context.empty()) return absl::InvalidArgumentError("a context has no tokens");
  bool are_ids = std::all_of(tokens.context.begin(), tokens.context.end(), is_id);
  for (const std::vector<int32_t>& continuation : tokens.continuations) {
    if (continuation.empty()) return absl::InvalidArgumentError("a continuation has no tokens");
    const auto n = static_cast<int64_t>(tokens.context.size() + continuation.size());
    if (n > config.max_position + 1) {
      return absl::InvalidArgumentError(absl::StrCat("a context and its continuation have ", n,
                                                     " tokens, the model takes ",
                                                     config.max_position + 1));
    }
    are_ids = are_ids && std::all_of(continuation.begin(), continuation.end(), is_id);
  }
  if (are_ids) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a token's id is outside the model's vocabulary of ", config.vocab));
}

// A row of hidden states before the head, and what it must predict.
struct Prediction {
  const float* hidden = nullptr;
  int32_t target = 0;
  Likelihood* sum = nullptr;  // of its continuation
};

// Some contexts on their way through the model.
class Block {
 public:
  Block(const ForwardContext& context, std::span<const ContextTokens> contexts,
        const Matrix& embedding)
      : context_(context), contexts_(contexts) {
    std::vector<int32_t> context_ids, continuation_ids;
    for (const ContextTokens& tokens : contexts) {
      context_ids.insert(context_ids.end(), tokens.context.begin(), tokens.context.end());
      for (const std::vector<int32_t>& continuation : tokens.continuations) {
        continuation_ids.insert(continuation_ids.end(), continuation.begin(),
                                continuation.end() - 1);
      }
    }
    of_contexts_ = Embed(*context.config, embedding, context_ids);
    of_continuations_ = Embed(*context.config, embedding, continuation_ids);
  }

  // `progress` is called with the share of the block that is through the layer.
  absl::Status Forward(const DecoderLayer& layer, const Progress& progress) {
    int64_t first_context_row = 0, first_continuation_row = 0;
    for (size_t first = 0; first < contexts_.size();) {
      const size_t n = BatchSize(first);
      const Batch batch(contexts_.subspan(first, n), context_.config->kv_width());
      const auto keep_going = [&] {
        return progress(static_cast<double>(first) / static_cast<double>(contexts_.size()));
      };
      WALSH_RETURN_IF_ERROR(
          ForwardBatch(layer, batch, first_context_row, first_continuation_row, keep_going));
      first_context_row += batch.n_context_rows;
      first_continuation_row += batch.n_continuation_rows;
      first += n;
      WALSH_RETURN_IF_ERROR(
          progress(static_cast<double>(first) / static_cast<double>(contexts_.size())));
    }
    return absl::OkStatus();
  }

  // What is predicted from the rows that came out of the last layer.
  std::vector<Prediction> Predictions(std::vector<std::vector<Likelihood>>& sums) const {
    std::vector<Prediction> predictions;
    int64_t context_row = 0, row = 0;
    for (size_t i = 0; i < contexts_.size(); ++i) {
      const ContextTokens& tokens = contexts_[i];
      context_row += static_cast<int64_t>(tokens.context.size());
      for (size_t k = 0; k < tokens.continuations.size(); ++k) {
        const std::vector<int32_t>& continuation = tokens.continuations[k];
        for (size_t t = 0; t < continuation.size(); ++t) {
          const float* hidden =
              t == 0 ? of_contexts_.row(context_row - 1) : of_continuations_.row(row++);
          predictions.push_back({hidden, continuation[t], &sums[i][k]});
        }
      }
    }
    return predictions;
  }

 private:
  // Contexts that go through a layer together, with their keys and values.
  struct Batch {
    Batch(std::span<const ContextTokens> contexts, int64_t kv_width) : items(contexts) {
      for (const ContextTokens& tokens : contexts) {
        n_context_rows += static_cast<int64_t>(tokens.context.size());
        n_continuation_rows += ForwardedTokens(tokens);
      }
      n_continuation_rows -= n_context_rows;
      keys = Matrix(n_context_rows, kv_width);
      values = Matrix(n_context_rows, kv_width);
    }
    std::span<const ContextTokens> items;
    int64_t n_context_rows = 0, n_continuation_rows = 0;
    mutable Matrix keys, values;
  };

  size_t BatchSize(size_t first) const {
    int64_t n_tokens = 0;
    size_t n = 0;
    while (first + n < contexts_.size()) {
      n_tokens += ForwardedTokens(contexts_[first + n]);
      if (n > 0 && n_tokens > kTaskBatchTokens) break;
      ++n;
    }
    return n;
  }

  // The contexts first, since what follows them attends to their keys and values.
  absl::Status ForwardBatch(const DecoderLayer& layer, const Batch& batch, int64_t context_row,
                            int64_t continuation_row, const KeepGoing& keep_going) {
    std::vector<SequenceSlice> contexts;
    std::vector<int32_t> positions;
    for (const ContextTokens& tokens : batch.items) {
      const auto row = static_cast<int64_t>(positions.size());
      const auto n = static_cast<int64_t>(tokens.context.size());
      contexts.push_back({row, n, 0, batch.keys.row(row), batch.values.row(row)});
      for (int64_t i = 0; i < n; ++i) positions.push_back(static_cast<int32_t>(i));
    }
    WALSH_RETURN_IF_ERROR(ForwardLayer(context_, layer, positions, contexts, batch.n_context_rows,
                                       of_contexts_.row(context_row), scratch_));
    return ForwardContinuations(layer, batch, contexts, continuation_row, keep_going);
  }

  // A continuation's keys and values follow a copy of its context's. So many go through the layer
  // at once as have room in kTaskCachedRows together, or one that needs more.
  absl::Status ForwardContinuations(const DecoderLayer& layer, const Batch& batch,
                                    std::span<const SequenceSlice> contexts, int64_t first_row,
                                    const KeepGoing& keep_going) {
    std::vector<Following> waiting;
    int64_t n_cached = 0;
    for (size_t i = 0; i < batch.items.size(); ++i) {
      for (const std::vector<int32_t>& continuation : batch.items[i].continuations) {
        const int64_t n_rows = ContinuationRows(continuation);
        if (n_rows == 0) continue;
        const int64_t n = contexts[i].n_rows + n_rows;
        if (!waiting.empty() && n_cached + n > kTaskCachedRows) {
          WALSH_RETURN_IF_ERROR(keep_going());
          WALSH_RETURN_IF_ERROR(ForwardFollowing(layer, waiting, n_cached, &first_row));
          waiting.clear();
          n_cached = 0;
        }
        waiting.push_back({&contexts[i], n_rows});
        n_cached += n;
      }
    }
    return waiting.empty() ? absl::OkStatus()
                           : ForwardFollowing(layer, waiting, n_cached, &first_row);
  }

  // A continuation's rows, and the context that is before them.
  struct Following {
    const SequenceSlice* context = nullptr;
    int64_t n_rows = 0;
  };

  // *first_row, of of_continuations_, goes on by the rows that were forwarded.
  absl::Status ForwardFollowing(const DecoderLayer& layer, std::span<const Following> followings,
                                int64_t n_cached, int64_t* first_row) {
    const int64_t width = context_.config->kv_width();
    if (keys_.rows() < n_cached) {
      keys_ = Matrix();  // not beside the larger ones
      values_ = Matrix();
      keys_ = Matrix(n_cached, width);
      values_ = Matrix(n_cached, width);
    }
    std::vector<SequenceSlice> slices;
    std::vector<int32_t> positions;
    int64_t cached = 0;
    for (const Following& following : followings) {
      const int64_t n_past = following.context->n_rows;
      std::copy_n(following.context->keys, n_past * width, keys_.row(cached));
      std::copy_n(following.context->values, n_past * width, values_.row(cached));
      slices.push_back({static_cast<int64_t>(positions.size()), following.n_rows, n_past,
                        keys_.row(cached), values_.row(cached)});
      for (int64_t i = 0; i < following.n_rows; ++i) {
        positions.push_back(static_cast<int32_t>(n_past + i));
      }
      cached += n_past + following.n_rows;
    }
    const auto n_rows = static_cast<int64_t>(positions.size());
    WALSH_RETURN_IF_ERROR(ForwardLayer(context_, layer, positions, slices, n_rows,
                                       of_continuations_.row(*first_row), scratch_));
    *first_row += n_rows;
    return absl::OkStatus();
  }

  const ForwardContext& context_;
  const std::span<const ContextTokens> contexts_;
  Matrix of_contexts_, of_continuations_;  // hidden states, [tokens, hidden]
  Matrix keys_, values_;                   // of continuations and what is before them
  ForwardScratch scratch_;
};

absl::Status Predict(const ForwardContext& context, std::span<const float> final_norm,
                     const Matrix& head, std::span<const Prediction> predictions,
                     const KeepGoing& keep_going) {
  const int64_t dim = context.config->hidden;
  Matrix hidden(kLogitRows, dim), logits;
  std::vector<int32_t> targets(static_cast<size_t>(kLogitRows));
  std::vector<double> losses(static_cast<size_t>(kLogitRows));
  for (size_t first = 0; first < predictions.size(); first += static_cast<size_t>(kLogitRows)) {
    WALSH_RETURN_IF_ERROR(keep_going());
    const auto rows = predictions.subspan(
        first, std::min(static_cast<size_t>(kLogitRows), predictions.size() - first));
    for (size_t i = 0; i < rows.size(); ++i) {
      std::copy_n(rows[i].hidden, dim, hidden.row(static_cast<int64_t>(i)));
      targets[i] = rows[i].target;
    }
    const auto n = static_cast<int64_t>(rows.size());
    WALSH_RETURN_IF_ERROR(Logits(context, final_norm, head, hidden.data(), n, logits));
    WALSH_RETURN_IF_ERROR(kernels::CrossEntropy({.n_tokens = n,
                                                 .vocab = head.rows(),
                                                 .logits = logits.data(),
                                                 .targets = targets.data(),
                                                 .loss = losses.data()},
                                                context.stream));
    for (size_t i = 0; i < rows.size(); ++i) {
      const float* row = logits.row(static_cast<int64_t>(i));
      const bool is_likeliest = std::max_element(row, row + head.rows()) - row == targets[i];
      rows[i].sum->log_likelihood -= losses[i];
      rows[i].sum->is_greedy = rows[i].sum->is_greedy && is_likeliest;
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t ForwardedTokens(const ContextTokens& context) {
  auto n = static_cast<int64_t>(context.context.size());
  for (const std::vector<int32_t>& continuation : context.continuations) {
    n += ContinuationRows(continuation);
  }
  return n;
}

absl::StatusOr<std::vector<std::vector<Likelihood>>> LogLikelihoods(
    LayerSource& source, std::span<const ContextTokens> contexts, ThreadPool& pool,
    const Progress& progress) {
  const ModelConfig& config = source.config();
  std::vector<std::vector<Likelihood>> sums;
  int64_t n_tokens = 0;
  for (const ContextTokens& tokens : contexts) {
    WALSH_RETURN_IF_ERROR(Check(tokens, config));
    sums.emplace_back(tokens.continuations.size(), Likelihood{.is_greedy = true});
    n_tokens += ForwardedTokens(tokens);
  }
  if (contexts.empty()) return sums;
  const ForwardContext context = ForwardContext::Create(config, {kernels::Backend::kCpu, &pool});
  WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source.Embedding());
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> final_norm, source.FinalNorm());
  WALSH_ASSIGN_OR_RETURN(const Matrix head, source.Head());
  // A block's head counts as one layer.
  const auto steps = static_cast<double>(config.n_layers + 1);
  int64_t n_done = 0;
  for (size_t first = 0; first < contexts.size();) {
    int64_t n_block = 0;
    size_t n = 0;
    while (first + n < contexts.size() && (n == 0 || n_block < kTaskBlockTokens)) {
      n_block += ForwardedTokens(contexts[first + n++]);
    }
    const auto show = [&](double n_steps) {
      return progress(
          (static_cast<double>(n_done) + static_cast<double>(n_block) * n_steps / steps) /
          static_cast<double>(n_tokens));
    };
    Block block(context, contexts.subspan(first, n), embedding);
    for (int64_t l = 0; l < config.n_layers; ++l) {
      WALSH_ASSIGN_OR_RETURN(const DecoderLayer layer, source.Layer(l));
      WALSH_RETURN_IF_ERROR(block.Forward(
          layer, [&](double fraction) { return show(static_cast<double>(l) + fraction); }));
    }
    std::vector<std::vector<Likelihood>> of_block(sums.begin() + static_cast<int64_t>(first),
                                                  sums.begin() + static_cast<int64_t>(first + n));
    WALSH_RETURN_IF_ERROR(Predict(context, final_norm, head, block.Predictions(of_block),
                                  [&] { return show(static_cast<double>(config.n_layers)); }));
    std::move(of_block.begin(), of_block.end(), sums.begin() + static_cast<int64_t>(first));
    n_done += n_block;
    first += n;
    WALSH_RETURN_IF_ERROR(progress(static_cast<double>(n_done) / static_cast<double>(n_tokens)));
  }
  for (const std::vector<Likelihood>& of_context : sums) {
    for (const Likelihood& likelihood : of_context) {
      if (!std::isfinite(likelihood.log_likelihood)) {
        return absl::DataLossError(
            absl::StrCat("a continuation's log-likelihood is ", likelihood.log_likelihood));
      }
    }
  }
  return sums;
}

}  // namespace walsh::evaluate
