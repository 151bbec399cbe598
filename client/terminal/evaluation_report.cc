#include "client/terminal/evaluation_report.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/resource_name.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"

namespace walsh::client {
namespace {

void AppendFact(std::string& text, const std::string& name, const std::string& fact) {
  absl::StrAppend(&text, absl::StrFormat("  %-12s", name), SafeText(fact), "\n");
}

std::string PercentText(double share, double error) {
  return absl::StrFormat("%.2f ± %.2f", 100 * share, 100 * error);
}

std::string TextFacts(const v1::TextResult& result) {
  std::string text;
  AppendFact(text, "perplexity",
             absl::StrCat(EstimateText(result.perplexity(), result.perplexity_stderr(), 5), ", on ",
                          CountText(result.tokens()), " tokens"));
  AppendFact(text, "windows",
             absl::StrCat(CountText(result.windows()), " of ", CountText(result.window()),
                          result.stride() < result.window()
                              ? absl::StrCat(", ", CountText(result.stride()), " apart")
                              : ", without overlap"));
  if (!result.has_kl_divergence()) return text;
  AppendFact(
      text, "original",
      absl::StrCat("perplexity ", SignificantText(result.reference_perplexity(), 5),
                   absl::StrFormat(" (x%.3f)", result.perplexity() / result.reference_perplexity()),
                   ", stored as ", result.reference_format()));
  AppendFact(text, "divergence",
             absl::StrCat(EstimateText(result.kl_divergence(), result.kl_divergence_stderr(), 3),
                          " nats a token from the original; the likeliest token is the same at ",
                          absl::StrFormat("%.1f %%", 100 * result.top1_agreement())));
  return text;
}

std::string TaskTable(const v1::EvaluateModelResponse::Result& result) {
  Table table({{"task"},
               {"items", Align::kRight},
               {"accuracy %", Align::kRight},
               {"accuracy norm. %", Align::kRight},
               {"perplexity", Align::kRight}});
  for (const v1::TaskResult& task : result.tasks()) {
    const TaskTexts texts = TextsOf(task);
    table.AddRow({SafeText(task.name()), CountText(task.items()), texts.accuracy,
                  texts.accuracy_norm, texts.perplexity});
  }
  return table.Text(2);
}

}  // namespace

std::string EvaluationReport(const v1::EvaluateModelResponse::Result& result) {
  std::string text = SafeText(absl::StrCat("model '", ResourceId(result.model()),
                                           "', evaluated in ", SecondsText(result.seconds()))) +
                     "\n";
  if (result.has_text()) text += TextFacts(result.text());
  if (!result.tasks().empty()) absl::StrAppend(&text, "\n", TaskTable(result));
  if (!result.warnings().empty()) text += "\n  warnings\n";
  for (const std::string& warning : result.warnings()) {
    absl::StrAppend(&text, "  - ", SafeText(warning), "\n");
  }
  return text;
}

TaskTexts TextsOf(const v1::TaskResult& task) {
  TaskTexts texts;
  texts.accuracy = PercentText(task.accuracy(), task.accuracy_stderr());
  if (task.has_accuracy_norm()) {
    texts.accuracy_norm = PercentText(task.accuracy_norm(), task.accuracy_norm_stderr());
  }
  if (task.has_perplexity()) {
    texts.perplexity = EstimateText(task.perplexity(), task.perplexity_stderr(), 4);
  }
  return texts;
}

}  // namespace walsh::client
