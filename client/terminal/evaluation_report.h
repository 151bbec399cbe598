// An evaluation's result for people.
#pragma once

#include <string>

#include "walsh/v1/evaluation.pb.h"

namespace walsh::client {

std::string EvaluationReport(const v1::EvaluateModelResponse::Result& result);

}  // namespace walsh::client
