#include "client/commands/eval.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands/evaluation_flags.h"
#include "client/resource_name.h"
#include "client/terminal/evaluation_report.h"
#include "client/terminal/interrupts.h"
#include "client/terminal/json_text.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/terminal.h"
#include "common/command_line.h"
#include "common/status_macros.h"

namespace walsh::client {
namespace {

using v1::EvaluateModelResponse;
using v1::TextEvaluation;

// Stands for the source of the job that made the model.
constexpr char kJobsSource[] = "source";

// One line on standard error: drawn again on a terminal, else one a step.
class EvalProgress {
 public:
  ~EvalProgress() { Clear(); }
  void Show(const EvaluateModelResponse::Progress& progress) {
    const std::string step = SafeText(progress.step());
    if (!is_terminal_) {
      if (step == step_) return;
      step_ = step;
      std::fprintf(stderr, "evaluating %s\n", step.c_str());
      return;
    }
    const std::string line =
        absl::StrFormat("evaluating %s, %.0f %%", step, 100 * progress.fraction());
    std::fprintf(stderr, "\r\033[K%.*s", TerminalWidth(STDERR_FILENO) - 1, line.c_str());
    std::fflush(stderr);
    is_drawn_ = true;
  }

 private:
  void Clear() const {
    if (!is_drawn_) return;
    std::fputs("\r\033[K", stderr);
    std::fflush(stderr);
  }

  const bool is_terminal_ = IsTerminal(STDERR_FILENO);
  bool is_drawn_ = false;
  std::string step_;
};

// The source of the job that made the model, as long as the service knows the job.
absl::StatusOr<std::string> SourceOf(Client& client, const std::string& model) {
  WALSH_ASSIGN_OR_RETURN(const v1::Model found, client.GetModel(model));
  if (found.quantization_job().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("no job is known to have made ", found.name(), "; name its original's path"));
  }
  WALSH_ASSIGN_OR_RETURN(const v1::QuantizationJob job, client.GetJob(found.quantization_job()));
  return job.source_model();
}

int RunEval(const EvalFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  auto request = MakeEvalRequest(flags);
  if (!request.ok()) return Fail(request.status());
  if (flags.reference == kJobsSource) {
    const auto source = SourceOf(client, flags.model);
    if (!source.ok()) return Fail(source.status());
    request->mutable_text()->set_reference(*source);
  }
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  absl::StatusOr<EvaluateModelResponse::Result> result;
  {
    EvalProgress progress;
    result = client.EvaluateModel(
        *request, [&](const EvaluateModelResponse::Progress& p) { progress.Show(p); },
        &cancellation,
        flags.deadline_seconds > 0 ? absl::Seconds(flags.deadline_seconds)
                                   : absl::InfiniteDuration());
  }
  if (!result.ok()) return Fail(result.status());
  PrintOut(global.json() ? JsonText(*result) : EvaluationReport(*result));
  return kExitOk;
}

}  // namespace

absl::StatusOr<v1::EvaluateModelRequest> MakeEvalRequest(const EvalFlags& flags) {
  v1::EvaluateModelRequest request;
  request.set_model(ResourceId(flags.model));
  request.set_skip_bos(flags.no_bos);
  if (flags.text.empty() && flags.tasks.empty()) {
    return absl::InvalidArgumentError("there is nothing to evaluate: give --text or --tasks");
  }
  const bool has_text_options = flags.text_format != "auto" || flags.window != 0 ||
                                flags.stride != 0 || flags.max_windows != 0 ||
                                !flags.reference.empty();
  if (flags.text.empty() && has_text_options) {
    return absl::InvalidArgumentError(
        "--text-format, --window, --stride, --windows and --reference are about a --text");
  }
  if (!flags.text.empty()) {
    TextEvaluation& text = *request.mutable_text();
    text.set_uri(SourceReference(flags.text));
    text.set_format(TextFormatOf(flags.text_format));
    text.set_window(flags.window);
    text.set_stride(flags.stride);
    text.set_max_windows(flags.max_windows);
    if (!flags.reference.empty() && flags.reference != kJobsSource) {
      text.set_reference(SourceReference(flags.reference));
    }
    WALSH_RETURN_IF_ERROR(CheckUtf8(text.uri(), "text's path"));
    WALSH_RETURN_IF_ERROR(CheckUtf8(text.reference(), "reference's path"));
  }
  WALSH_RETURN_IF_ERROR(AddTasks(flags.tasks, flags.limit, request.mutable_tasks()));
  WALSH_RETURN_IF_ERROR(CheckUtf8(request.model(), "name"));
  return request;
}

void AddEvalCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App& command = *app.add_subcommand(
      "eval", "Perplexity, divergence from the original, zero-shot accuracy of a model");
  command.add_option("NAME", flags->model, "A published model, loaded or not")->required();
  command.add_option("--text", flags->text,
                     "Text, .jsonl or .json file for the perplexity, on the worker's machine");
  AddTextFormatFlag(command, "--text-format", flags->text_format);
  command.add_option("--window", flags->window, "Tokens of a window; 0 means 2048");
  command.add_option("--stride", flags->stride, "Tokens from window to window; 0 means no overlap");
  command.add_option("--windows", flags->max_windows, "At most so many windows; 0 means all");
  command.add_option("--reference", flags->reference,
                     "The original, to compare with: a model's path on the worker's machine, or "
                     "source: that of the job that made the model");
  command.add_option("--tasks", flags->tasks,
                     "Files of zero-shot tasks on the worker's machine: PIQA, ARC, HellaSwag, "
                     "WinoGrande, LAMBADA");
  command.add_option("--limit", flags->limit, "Items of each task; 0 means all");
  command.add_flag("--no-bos", flags->no_bos,
                   "Leave out the BOS with which the tokenizer begins texts and contexts");
  command
      .add_option("--deadline", flags->deadline_seconds,
                  "Seconds that the evaluation may take; 0 means a day")
      ->check(CLI::NonNegativeNumber);
  command.callback(
      [flags, &global, &chosen] { chosen = [flags, &global] { return RunEval(*flags, global); }; });
}

}  // namespace walsh::client
