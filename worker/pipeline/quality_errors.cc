#include "worker/pipeline/quality_errors.h"

#include <cstddef>
#include <vector>

#include "worker/evaluate/tasks/score_task.h"

namespace walsh::pipeline {

std::optional<QualityErrors> StandardErrors(const JobReport& report) {
  const std::vector<double>& before = report.window_losses_before;
  const std::vector<double>& after = report.window_losses_after;
  if (before.size() < 2 || before.size() != after.size()) return std::nullopt;
  std::vector<double> differences;
  for (size_t i = 0; i < before.size(); ++i) differences.push_back(after[i] - before[i]);
  QualityErrors errors;
  errors.perplexity_before = report.perplexity_before * evaluate::MeanOf(before).standard_error;
  errors.perplexity_after = report.perplexity_after * evaluate::MeanOf(after).standard_error;
  errors.perplexity_ratio = report.perplexity_after / report.perplexity_before *
                            evaluate::MeanOf(differences).standard_error;
  if (report.window_divergences.size() == before.size()) {
    errors.kl_divergence = evaluate::MeanOf(report.window_divergences).standard_error;
  }
  return errors;
}

}  // namespace walsh::pipeline
