#include "worker/evaluate/evaluate_artifact.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/calibrate/samples.h"
#include "worker/calibrate/token_windows.h"
#include "worker/evaluate/evaluation_memory.h"
#include "worker/evaluate/evaluation_text.h"
#include "worker/evaluate/layer_source.h"
#include "worker/evaluate/perplexity.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::evaluate {
namespace {

constexpr int64_t kDefaultWindow = 2048;
// Of hidden states that go through a model together: 128 MiB of floats, and not more tokens than
// make the reading of a layer small beside their way through it.
constexpr int64_t kBlockFloats = 32 << 20;
constexpr int64_t kBlockTokens = 32768;

absl::Status Named(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(name, ": ", status.message()));
}

struct TextInput {
  StridedWindows windows;
  int64_t per_block = 1;                  // windows that go through a model together
  std::unique_ptr<Checkpoint> reference;  // null: none

  int64_t n_models() const { return reference == nullptr ? 1 : 2; }
  int64_t block_tokens() const { return std::min(per_block, windows.count()) * windows.length(); }
};

// What an evaluation costs, in tokens through the model.
double Cost(const TextInput& text) {
  return static_cast<double>(text.n_models() * text.windows.count() * text.windows.length());
}

// Losses and divergences of all windows, gathered from blocks.
class TextSums {
 public:
  void Add(const WindowLosses& losses, const WindowLosses* reference,
           std::span<const double> divergences, int64_t n_agreeing) {
    losses_.Append(losses);
    if (reference != nullptr) reference_losses_.Append(*reference);
    divergences_.insert(divergences_.end(), divergences.begin(), divergences.end());
    n_agreeing_ += n_agreeing;
  }

  void Fill(TextReport& report) const {
    report.windows = static_cast<int64_t>(losses_.losses.size());
    report.tokens = losses_.n_tokens;
    report.loss = losses_.TokenMean(losses_.losses);
    const double perplexity = losses_.Perplexity();
    report.perplexity = {.mean = perplexity,
                         .standard_error = perplexity * MeanOf(losses_.losses).standard_error};
    if (divergences_.empty()) return;
    report.reference_perplexity = reference_losses_.Perplexity();
    report.kl_divergence = {.mean = losses_.TokenMean(divergences_),
                            .standard_error = MeanOf(divergences_).standard_error};
    report.top1_agreement =
        static_cast<double>(n_agreeing_) / static_cast<double>(losses_.n_tokens);
  }

 private:
  WindowLosses losses_, reference_losses_;
  std::vector<double> divergences_;
  int64_t n_agreeing_ = 0;
};

class Evaluation {
 public:
  Evaluation(const EvaluationSpec& spec, ThreadPool& pool, const StepProgress& progress)
      : spec_(spec), pool_(pool), progress_(progress) {}

  absl::StatusOr<EvaluationReport> Run() {
    WALSH_RETURN_IF_ERROR(Prepare());
    if (text_.has_value()) {
      TextReport& report = report_.text.emplace();
      WALSH_RETURN_IF_ERROR(EvaluateText(*text_, report));
    }
    for (const Task& task : tasks_) WALSH_RETURN_IF_ERROR(EvaluateTask(task));
    return std::move(report_);
  }

 private:
  absl::Status Prepare() {
    WALSH_RETURN_IF_ERROR(Tell("files", 0));
    WALSH_ASSIGN_OR_RETURN(
        artifact_, ArtifactReader::Open(spec_.artifact_directory, /*verify=*/true,
                                        pool_.n_threads(), [&] { return Tell("files", 0); }));
    WALSH_ASSIGN_OR_RETURN(tokenizer_, Tokenizer::Create(artifact_->tokenizer()));
    source_ = std::make_unique<ArtifactSource>(*artifact_);
    WALSH_ASSIGN_OR_RETURN(tasks_, ReadTasks(spec_.tasks, [&] { return Tell("files", 0); }));
    for (const Task& task : tasks_) total_ += ApproximateTokens(task);
    if (spec_.text.has_value()) {
      absl::StatusOr<TextInput> text = PrepareText(*spec_.text);
      if (!text.ok()) return About("text", text.status());
      text_ = *std::move(text);
      total_ += Cost(*text_);
    }
    return spec_.check_memory ? spec_.check_memory(BytesNeeded()) : absl::OkStatus();
  }

  int64_t BytesNeeded() const {
    EvaluationShape shape;
    AddTasks(tasks_, artifact_->config(), shape);
    const ModelConfig* reference = nullptr;
    if (text_.has_value()) {
      shape.window = text_->windows.length();
      shape.block_tokens = text_->block_tokens();
      shape.held_bytes += text_->windows.n_ids() * static_cast<int64_t>(sizeof(int32_t));
      if (text_->reference != nullptr) reference = &text_->reference->config();
    }
    return EvaluationBytes(artifact_->config(), reference, shape);
  }

  absl::StatusOr<TextInput> PrepareText(const TextSpec& spec) {
    const ModelConfig& config = artifact_->config();
    TextInput text;
    if (!spec.reference_path.empty()) {
      absl::StatusOr<std::unique_ptr<Checkpoint>> reference = Checkpoint::Open(spec.reference_path);
      if (!reference.ok()) return Named("the reference", reference.status());
      text.reference = *std::move(reference);
      if (text.reference->config().vocab != config.vocab) {
        return absl::InvalidArgumentError(
            absl::StrCat("the reference has a vocabulary of ", text.reference->config().vocab,
                         " tokens, the model one of ", config.vocab, ": they cannot be compared"));
      }
    }
    const int64_t asked = spec.window == 0 ? kDefaultWindow : spec.window;
    const int64_t window = std::min(asked, config.max_position);
    if (window < asked) {
      report_.warnings.push_back(
          absl::StrCat("window ", asked, " reduced to the model's context ", window));
    }
    const int64_t stride = std::min(spec.stride == 0 ? window : spec.stride, window);
    const int64_t n_max = spec.max_windows == 0 ? limits::kEvaluationWindowsMax : spec.max_windows;
    // One window more than are cut tells whether all of the text is in them.
    WALSH_ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                           ReadIds(spec, window, window + n_max * stride));
    const auto n_ids = static_cast<int64_t>(ids.size());
    if (n_ids < limits::kSequenceLengthMin) {
      return absl::InvalidArgumentError(absl::StrCat("has ", n_ids, " tokens, at least ",
                                                     limits::kSequenceLengthMin, " are needed"));
    }
    if (text.reference != nullptr) {
      WALSH_RETURN_IF_ERROR(CompareTokens(text.reference->tokenizer(), ids));
    }
    // A text shorter than a window is one shorter window.
    text.windows = StridedWindows(std::move(ids), std::min(window, n_ids), stride, n_max);
    const int64_t tokens_max = std::min(kBlockTokens, kBlockFloats / config.hidden);
    text.per_block = std::max<int64_t>(1, tokens_max / text.windows.length());
    WarnOfWindows(spec, window, text.windows);
    return text;
  }

  void WarnOfWindows(const TextSpec& spec, int64_t window, const StridedWindows& windows) {
    if (windows.length() < window) {
      report_.warnings.push_back(absl::StrCat("the text has ", windows.n_ids(),
                                              " tokens, fewer than a window of ", window,
                                              ": evaluated on one of ", windows.length()));
    }
    if (windows.count() < spec.max_windows) {
      report_.warnings.push_back(absl::StrCat("evaluated on ", windows.count(),
                                              " windows instead of ", spec.max_windows,
                                              ": the text has ", windows.n_ids(), " tokens"));
    }
    if (spec.max_windows == 0 && windows.has_more()) {
      report_.warnings.push_back(absl::StrCat("evaluated on the text's first ", windows.count(),
                                              " windows, the most that are taken"));
    }
  }

  absl::StatusOr<std::vector<int32_t>> ReadIds(const TextSpec& spec, int64_t window,
                                               int64_t n_wanted) {
    WALSH_ASSIGN_OR_RETURN(const calibrate::SampleSet samples,
                           ReadEvaluationText({spec.path, spec.name}, spec.joins_rows, *tokenizer_,
                                              artifact_->tokenizer().chat_template));
    WALSH_ASSIGN_OR_RETURN(
        calibrate::TokenStream stream,
        calibrate::EncodeSamples(samples, *tokenizer_, artifact_->config().vocab, window, n_wanted,
                                 [&] { return Tell("text", 0); }, {.skip_bos = spec_.skip_bos}));
    return std::move(stream.ids);
  }

  // The reference reads the model's ids: each must stand for the same.
  absl::Status CompareTokens(const TokenizerSource& source, std::span<const int32_t> ids) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> reference = Tokenizer::Create(source);
    if (!reference.ok()) return Named("the reference", reference.status());
    for (const int32_t id : std::set<int32_t>(ids.begin(), ids.end())) {
      const std::string own = tokenizer_->TokenBytes(id, /*skip_special=*/false);
      const std::string other = (*reference)->TokenBytes(id, /*skip_special=*/false);
      if (own == other) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("the reference has another tokenizer: its token ", id, " is \"",
                       absl::CHexEscape(other), "\", the model's \"", absl::CHexEscape(own), "\""));
    }
    return absl::OkStatus();
  }

  absl::Status Tell(const std::string& step, double fraction) {
    absl::Status status = progress_(step, fraction);
    if (!status.ok()) stopped_ = status;
    return status;
  }

  // What stopped the evaluation from outside is about no file of it.
  absl::Status About(const std::string& name, const absl::Status& status) const {
    return stopped_.ok() ? Named(name, status) : stopped_;
  }

  // The share of everything that is done when `done` tokens of the running step are.
  absl::Status Show(const std::string& step, double done) {
    return Tell(step, std::min(1.0, (done_ + done) / total_));
  }

  absl::Status EvaluateText(const TextInput& text, TextReport& report) {
    const StridedWindows& windows = text.windows;
    report.window = windows.length();
    report.stride = windows.stride();
    if (text.reference != nullptr) report.reference_format = text.reference->format();
    TextSums sums;
    calibrate::WindowHash hash(windows.length());
    for (int64_t first = 0; first < windows.count(); first += text.per_block) {
      const int64_t n = std::min(text.per_block, windows.count() - first);
      const calibrate::TokenWindows block = windows.Cut(first, n);
      hash.Add(block.ids);
      const std::vector<int64_t> positions = windows.FirstScored(first, n);
      const ScoredFrom scored_from{.positions = positions, .first_window = first};
      const absl::Status status = EvaluateBlock(text, block, scored_from, sums);
      if (!status.ok()) return About("text", status);
      done_ += static_cast<double>(text.n_models() * n * windows.length());
    }
    sums.Fill(report);
    report.fingerprint = hash.HexDigest();
    return absl::OkStatus();
  }

  absl::Status EvaluateBlock(const TextInput& text, const calibrate::TokenWindows& block,
                             const ScoredFrom& scored_from, TextSums& sums) {
    const auto n_tokens = static_cast<double>(block.ids.size());
    // The heads, at the end, count as a tenth of each model's way.
    const auto step = [&](double offset, double share) -> Progress {
      return [this, n_tokens, offset, share](double fraction) {
        return Show("text", n_tokens * (offset + share * fraction));
      };
    };
    if (text.reference == nullptr) {
      WALSH_ASSIGN_OR_RETURN(const FinalStates states,
                             ForwardToHead(*source_, block, pool_, step(0, 0.9)));
      WALSH_ASSIGN_OR_RETURN(const WindowLosses losses, Losses(source_->config(), states, block,
                                                               scored_from, pool_, step(0.9, 0.1)));
      sums.Add(losses, nullptr, {}, 0);
      return absl::OkStatus();
    }
    CheckpointSource original(*text.reference);
    WALSH_ASSIGN_OR_RETURN(const FinalStates before,
                           ForwardToHead(original, block, pool_, step(0, 0.9)));
    WALSH_ASSIGN_OR_RETURN(const FinalStates after,
                           ForwardToHead(*source_, block, pool_, step(0.9, 0.9)));
    WALSH_ASSIGN_OR_RETURN(const Comparison comparison,
                           Compare(original.config(), before, source_->config(), after, block,
                                   scored_from, pool_, step(1.8, 0.2)));
    sums.Add(comparison.model, &comparison.reference, comparison.divergences,
             comparison.n_agreeing);
    return absl::OkStatus();
  }

  absl::Status EvaluateTask(const Task& task) {
    const double cost = ApproximateTokens(task);
    absl::StatusOr<TaskScore> score =
        ScoreTask(task, *tokenizer_, *source_, {.skip_bos = spec_.skip_bos}, pool_,
                  [&](double fraction) { return Show(task.name, fraction * cost); });
    if (!score.ok()) return About(absl::StrCat("task '", task.name, "'"), score.status());
    done_ += cost;
    if (score->truncated_items > 0) {
      report_.warnings.push_back(
          TruncationWarning(task.name, score->truncated_items, artifact_->config().max_position));
    }
    report_.tasks.push_back(ReportOf(task, *std::move(score)));
    return absl::OkStatus();
  }

  const EvaluationSpec& spec_;
  ThreadPool& pool_;
  const StepProgress& progress_;
  std::unique_ptr<ArtifactReader> artifact_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ArtifactSource> source_;
  std::optional<TextInput> text_;
  std::vector<Task> tasks_;
  double total_ = 0, done_ = 0;  // as Cost counts
  absl::Status stopped_;         // by `progress_`
  EvaluationReport report_;
};

}  // namespace

absl::StatusOr<EvaluationReport> EvaluateArtifact(const EvaluationSpec& spec, ThreadPool& pool,
                                                  const StepProgress& progress) {
  return Evaluation(spec, pool, progress).Run();
}

}  // namespace walsh::evaluate
