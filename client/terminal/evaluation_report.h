// An evaluation's result for people, and what a job's report shows of one.
#pragma once

#include <string>

#include "walsh/v1/evaluation.pb.h"

namespace walsh::client {

std::string EvaluationReport(const v1::EvaluateModelResponse::Result& result);

// The figures of a task, each with its standard error; empty where the task has none of the kind.
struct TaskTexts {
  std::string accuracy;       // percent
  std::string accuracy_norm;  // percent
  std::string perplexity;
};
TaskTexts TextsOf(const v1::TaskResult& task);

}  // namespace walsh::client
