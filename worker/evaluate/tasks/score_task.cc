#include "worker/evaluate/tasks/score_task.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"

namespace walsh::evaluate {
namespace {

using Ids = std::vector<int32_t>;

struct EncodedPair {
  Ids context, continuation;
  bool is_truncated = false;
};

class PairEncoder {
 public:
  PairEncoder(const Tokenizer& tokenizer, int64_t context_max, const TaskOptions& options)
      : tokenizer_(tokenizer), context_max_(context_max), options_(options) {}

  absl::StatusOr<EncodedPair> Encode(const std::string& before,
                                     const std::string& continuation) const {
    const size_t end = before.find_last_not_of(" \t\r\n\v\f") + 1;
    const std::string text = before + continuation;
    WALSH_ASSIGN_OR_RETURN(Ids context, Tokens(std::string_view(text).substr(0, end)));
    WALSH_ASSIGN_OR_RETURN(const Ids whole, Tokens(text));
    if (whole.size() <= context.size()) {
      const auto parted = std::mismatch(whole.begin(), whole.end(), context.begin()).first;
      const auto at =
          std::min<int64_t>(parted - whole.begin(), static_cast<int64_t>(whole.size()) - 1);
      context.assign(whole.begin(), whole.begin() + std::max<int64_t>(at, 0));
    }
    EncodedPair pair;
    pair.continuation.assign(whole.begin() + static_cast<int64_t>(context.size()), whole.end());
    const auto n = static_cast<int64_t>(pair.continuation.size());
    if (n > context_max_) {
      return absl::InvalidArgumentError(
          absl::StrCat("a continuation has ", n, " tokens, the model's context ", context_max_));
    }
    const int64_t room = context_max_ + 1 - n;
    if (static_cast<int64_t>(context.size()) > room) {
      context.erase(context.begin(), context.end() - room);
      pair.is_truncated = true;
    }
    pair.context = std::move(context);
    return pair;
  }

 private:
  absl::StatusOr<Ids> Tokens(std::string_view text) const {
    WALSH_ASSIGN_OR_RETURN(Ids ids, tokenizer_.Encode(text, {.add_special_tokens = true,
                                                             .parse_special_tokens = false}));
    // Of the source's own rule only its BOS is wanted: no text ends here.
    if (!ids.empty() && tokenizer_.eos() >= 0 && ids.back() == tokenizer_.eos() &&
        tokenizer_.eos() != tokenizer_.bos()) {
      ids.pop_back();
    }
    if (options_.skip_bos && !ids.empty() && tokenizer_.bos() >= 0 &&
        ids.front() == tokenizer_.bos()) {
      ids.erase(ids.begin());
    }
    return ids;
  }

  const Tokenizer& tokenizer_;
  const int64_t context_max_;
  const TaskOptions options_;
};

using Place = EncodedTask::Place;

absl::Status CheckIds(const EncodedPair& pair, int64_t vocab) {
  for (const std::vector<int32_t>* ids : {&pair.context, &pair.continuation}) {
    for (const int32_t id : *ids) {
      if (id >= 0 && id < vocab) continue;
      return absl::InvalidArgumentError(absl::StrCat("the tokenizer gives id ", id,
                                                     ", but the model has ", vocab, " embeddings"));
    }
  }
  return absl::OkStatus();
}

// An item's choices after one another; equal contexts become one.
std::vector<Place> Share(std::vector<EncodedPair> pairs, std::vector<ContextTokens>& contexts) {
  const size_t first = contexts.size();
  std::vector<Place> places;
  for (EncodedPair& pair : pairs) {
    auto found =
        std::find_if(contexts.begin() + static_cast<int64_t>(first), contexts.end(),
                     [&](const ContextTokens& tokens) { return tokens.context == pair.context; });
    if (found == contexts.end()) {
      contexts.push_back({.context = std::move(pair.context), .continuations = {}});
      found = contexts.end() - 1;
    }
    places.push_back({static_cast<size_t>(found - contexts.begin()), found->continuations.size()});
    found->continuations.push_back(std::move(pair.continuation));
  }
  return places;
}

// The first of the highest.
int64_t ArgMax(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

void Summarize(const Task& task, TaskScore& score) {
  std::vector<double> right, right_norm, log_likelihoods;
  for (size_t i = 0; i < task.items.size(); ++i) {
    const TaskItem& item = task.items[i];
    std::vector<double> plain, normalized;
    for (size_t k = 0; k < item.n_choices(); ++k) {
      plain.push_back(score.likelihoods[i][k].log_likelihood);
      normalized.push_back(plain.back() / static_cast<double>(item.Characters(k)));
    }
    if (task.kind == TaskKind::kLastWord) {
      right.push_back(score.likelihoods[i][0].is_greedy);
      log_likelihoods.push_back(plain[0]);
    } else {
      right.push_back(ArgMax(plain) == item.gold);
      right_norm.push_back(ArgMax(normalized) == item.gold);
    }
  }
  score.accuracy = MeanOf(right);
  if (task.kind == TaskKind::kContinuations) score.accuracy_norm = MeanOf(right_norm);
  if (task.kind == TaskKind::kLastWord) {
    const Estimate loss = MeanOf(log_likelihoods);
    const double perplexity = std::exp(-loss.mean);
    score.perplexity = {.mean = perplexity, .standard_error = perplexity * loss.standard_error};
  }
}

}  // namespace

Estimate MeanOf(std::span<const double> values) {
  if (values.empty()) return {};
  const auto n = static_cast<double>(values.size());
  const double mean = std::accumulate(values.begin(), values.end(), 0.0) / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {.mean = mean, .standard_error = n > 1 ? std::sqrt(squares / (n - 1) / n) : 0};
}

absl::StatusOr<EncodedTask> EncodeTask(const Task& task, const Tokenizer& tokenizer,
                                       const ModelConfig& config, const TaskOptions& options,
                                       const KeepGoing& keep_going) {
  const PairEncoder encoder(tokenizer, config.max_position, options);
  EncodedTask encoded;
  for (size_t i = 0; i < task.items.size(); ++i) {
    const TaskItem& item = task.items[i];
    std::vector<EncodedPair> pairs;
    bool is_truncated = false;
    for (size_t k = 0; k < item.n_choices(); ++k) {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      absl::StatusOr<EncodedPair> pair = encoder.Encode(item.context(k), item.continuation(k));
      if (pair.ok() && pair->context.empty()) {
        pair = absl::InvalidArgumentError("a context has no tokens");
      }
      if (pair.ok()) {
        if (const absl::Status ids = CheckIds(*pair, config.vocab); !ids.ok()) pair = ids;
      }
      if (!pair.ok()) {
        return absl::Status(pair.status().code(),
                            absl::StrCat("item ", i, ": ", pair.status().message()));
      }
      is_truncated = is_truncated || pair->is_truncated;
      pairs.push_back(*std::move(pair));
    }
    encoded.truncated_items += is_truncated;
    const size_t n_before = encoded.contexts.size();
    encoded.places.push_back(Share(std::move(pairs), encoded.contexts));
    for (size_t c = n_before; c < encoded.contexts.size(); ++c) {
      encoded.tokens += ForwardedTokens(encoded.contexts[c]);
    }
    // A text of which the choices differ by a word is encoded once for each of them.
    if (encoded.tokens > limits::kTaskFileBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat("has more than ", limits::kTaskFileBytesMax,
                                                     " tokens, at most as many as a file has bytes "
                                                     "are taken"));
    }
  }
  return encoded;
}

absl::StatusOr<TaskScore> ScoreTask(const Task& task, const EncodedTask& encoded,
                                    LayerSource& source, ThreadPool& pool,
                                    const Progress& progress) {
  TaskScore score{.tokens = encoded.tokens, .truncated_items = encoded.truncated_items};
  WALSH_ASSIGN_OR_RETURN(const auto likelihoods,
                         LogLikelihoods(source, encoded.contexts, pool, progress));
  for (const std::vector<Place>& of_item : encoded.places) {
    std::vector<Likelihood>& choices = score.likelihoods.emplace_back();
    for (const Place& place : of_item) {
      choices.push_back(likelihoods[place.context][place.continuation]);
    }
  }
  Summarize(task, score);
  return score;
}

absl::StatusOr<TaskScore> ScoreTask(const Task& task, const Tokenizer& tokenizer,
                                    LayerSource& source, const TaskOptions& options,
                                    ThreadPool& pool, const Progress& progress) {
  WALSH_ASSIGN_OR_RETURN(
      const EncodedTask encoded,
      EncodeTask(task, tokenizer, source.config(), options, [&] { return progress(0); }));
  return ScoreTask(task, encoded, source, pool, progress);
}

TaskReport ReportOf(const Task& task, TaskScore score) {
  score.likelihoods.clear();
  return {.name = task.name,
          .items = static_cast<int64_t>(task.items.size()),
          .score = std::move(score)};
}

std::string TruncationWarning(const std::string& task, int64_t truncated_items,
                              int64_t context_max) {
  return absl::StrCat("task '", task, "': the contexts of ", truncated_items,
                      " items were cut from the left to the model's context of ", context_max);
}

}  // namespace walsh::evaluate
