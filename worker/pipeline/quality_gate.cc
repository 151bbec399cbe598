#include "worker/pipeline/quality_gate.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace walsh::pipeline {

absl::Status CheckQuality(const QualityGate& gate, const JobReport& report) {
  if (!gate.is_set()) return absl::OkStatus();
  if (report.evaluation_tokens == 0) {
    return absl::FailedPreconditionError(
        "the model was not evaluated, as its text is too short, and cannot pass the quality gate");
  }
  std::vector<std::string> failures;
  if (gate.max_perplexity_ratio.has_value()) {
    const double ratio = report.perplexity_after / report.perplexity_before;
    if (!(ratio <= *gate.max_perplexity_ratio)) {
      failures.push_back(absl::StrFormat(
          "perplexity %.5g is %.4g times the original's %.5g, at most %.4g times is allowed",
          report.perplexity_after, ratio, report.perplexity_before, *gate.max_perplexity_ratio));
    }
  }
  if (gate.max_kl_divergence.has_value()) {
    if (report.kl_divergence < 0) {
      failures.push_back("the KL divergence from the original was not measured");
    } else if (!(report.kl_divergence <= *gate.max_kl_divergence)) {
      failures.push_back(absl::StrFormat(
          "the KL divergence from the original is %.4g nats a token, at most %.4g is allowed",
          report.kl_divergence, *gate.max_kl_divergence));
    }
  }
  if (failures.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the model failed the quality gate: ", absl::StrJoin(failures, "; ")));
}

std::string GateWarning(const QualityGate& gate, const JobReport& report) {
  if (!gate.is_set() || report.evaluation_tokens >= kGateTokensMin) return "";
  return absl::StrCat("the quality gate judged the model on ", report.evaluation_tokens,
                      " tokens, fewer than ", kGateTokensMin, ": chance may have decided");
}

}  // namespace walsh::pipeline
