#include "worker/pipeline/job_texts.h"

#include <algorithm>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/calibrate/samples.h"
#include "worker/engine/loaded_model.h"
#include "worker/evaluate/evaluation_text.h"
#include "worker/io/named_file.h"

namespace walsh::pipeline {
namespace {

using calibrate::CutWindows;
using calibrate::TokenStream;

// Evaluation windows that are cut from the calibration text, in tokens.
int64_t HeldOutTokens(const JobSpec& spec, const ResolvedJob& job) {
  if (!spec.evaluate || !spec.evaluation_path.empty()) return 0;
  return EvaluationTextTokens(job);
}

int64_t CalibrationTokens(const JobSpec& spec, const ResolvedJob& job) {
  return spec.n_calibration_windows * job.sequence_length;
}

struct TextFile {
  std::string_view kind;  // begins the messages about it
  NamedFile file;
  bool joins_rows = false;
  bool skip_bos = false;
};

absl::StatusOr<TokenStream> ReadText(const TextFile& text, const Checkpoint& checkpoint,
                                     const Tokenizer& tokenizer, int64_t window_length,
                                     int64_t tokens_wanted, const KeepGoing& keep_going) {
  const absl::StatusOr<calibrate::SampleSet> samples = evaluate::ReadEvaluationText(
      text.file, text.joins_rows, tokenizer, checkpoint.tokenizer().chat_template);
  if (!samples.ok()) {
    return absl::Status(
        samples.status().code(),
        absl::StrCat(std::string(text.kind), " text: ", samples.status().message()));
  }
  return calibrate::EncodeSamples(*samples, tokenizer, checkpoint.config().vocab, window_length,
                                  tokens_wanted, keep_going, {.skip_bos = text.skip_bos});
}

absl::StatusOr<std::vector<int32_t>> WriteOwnText(const JobSpec& spec, const ResolvedJob& job,
                                                  const Checkpoint& checkpoint, ThreadPool& pool,
                                                  const calibrate::TokenProgress& progress) {
  WALSH_ASSIGN_OR_RETURN(const std::shared_ptr<engine::LoadedModel> model,
                         engine::LoadedModel::Load8Bit(checkpoint));
  return calibrate::GenerateText(*model, SelfTextTokens(spec, job), spec.seed, pool, progress);
}

void CutEvaluation(const JobSpec& spec, const ResolvedJob& job, std::vector<int32_t> ids,
                   JobTexts& texts) {
  // A text shorter than a window is still worth one shorter window.
  const int64_t length = std::min(job.evaluation_length, static_cast<int64_t>(ids.size()));
  if (length < limits::kSequenceLengthMin) {
    texts.warnings.push_back(absl::StrCat("not evaluated: ", ids.size(),
                                          " tokens are left for evaluation, at least ",
                                          limits::kSequenceLengthMin, " are needed"));
    return;
  }
  const evaluate::StridedWindows windows(std::move(ids), length, job.evaluation_stride,
                                         job.n_evaluation_windows);
  texts.evaluation = windows.Cut(0, windows.count());
  texts.first_scored = windows.FirstScored(0, windows.count());
  if (texts.evaluation.count() < spec.n_evaluation_windows || length < job.evaluation_length) {
    texts.warnings.push_back(absl::StrCat(
        "evaluated on ", texts.evaluation.count(), " windows of ", length, " tokens instead of ",
        spec.n_evaluation_windows, " of ", job.evaluation_length, ": the text is too short"));
  }
}

}  // namespace

int64_t SelfTextTokens(const JobSpec& spec, const ResolvedJob& job) {
  const int64_t calibration = CalibrationTokens(spec, job);
  // Generating costs as much as calibrating: an eighth more has to do for evaluation.
  return calibration +
         std::min(HeldOutTokens(spec, job), std::max(calibration / 8, job.sequence_length));
}

absl::StatusOr<JobTexts> PrepareTexts(const JobSpec& spec, const ResolvedJob& job,
                                      const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                                      ThreadPool& pool,
                                      const calibrate::TokenProgress& self_progress,
                                      const KeepGoing& keep_going, std::vector<int32_t>& own_text) {
  JobTexts texts;
  // First what may be refused, then what takes long.
  TokenStream evaluation;
  if (spec.evaluate && !spec.evaluation_path.empty()) {
    WALSH_ASSIGN_OR_RETURN(evaluation,
                           ReadText({.kind = "evaluation",
                                     .file = {spec.evaluation_path, spec.evaluation_name},
                                     .joins_rows = spec.evaluation_joins_rows,
                                     .skip_bos = spec.evaluation_skips_bos},
                                    checkpoint, tokenizer, job.evaluation_length,
                                    EvaluationTextTokens(job), keep_going));
  }
  TokenStream stream;
  if (spec.calibration_path.empty()) {
    if (own_text.empty()) {
      WALSH_ASSIGN_OR_RETURN(own_text, WriteOwnText(spec, job, checkpoint, pool, self_progress));
    }
    stream.ids = own_text;
  } else {
    WALSH_ASSIGN_OR_RETURN(
        stream,
        ReadText({.kind = "calibration", .file = {spec.calibration_path, spec.calibration_name}},
                 checkpoint, tokenizer, job.sequence_length,
                 CalibrationTokens(spec, job) + HeldOutTokens(spec, job), keep_going));
  }
  texts.kept = stream.kept;
  texts.dropped = stream.dropped;
  texts.n_short = stream.n_short;

  const auto n_tokens = static_cast<int64_t>(stream.ids.size());
  const int64_t wanted = CalibrationTokens(spec, job);
  // Own text is written to measure.
  const int64_t spare_min = spec.calibration_path.empty() ? 0 : n_tokens / 5;
  const int64_t held_out =
      std::min(HeldOutTokens(spec, job), std::max(n_tokens - wanted, spare_min));
  const std::span<const int32_t> ids(stream.ids);
  texts.calibration = CutWindows(ids.first(static_cast<size_t>(n_tokens - held_out)),
                                 job.sequence_length, spec.n_calibration_windows);
  if (texts.calibration.count() == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the calibration text has ", n_tokens, " tokens (", held_out,
                     " held out for evaluation), fewer than one window of ", job.sequence_length));
  }
  if (texts.calibration.count() < spec.n_calibration_windows) {
    texts.warnings.push_back(absl::StrCat(
        "calibrated on ", texts.calibration.count(), " windows of ", job.sequence_length,
        " tokens instead of ", spec.n_calibration_windows, ": the text has ", n_tokens, " tokens"));
  }
  if (!spec.evaluate) return texts;
  if (spec.evaluation_path.empty()) {
    const std::span<const int32_t> rest = ids.last(static_cast<size_t>(held_out));
    CutEvaluation(spec, job, {rest.begin(), rest.end()}, texts);
  } else {
    CutEvaluation(spec, job, std::move(evaluation.ids), texts);
  }
  return texts;
}

}  // namespace walsh::pipeline
