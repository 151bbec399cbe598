// Jobs as text for people: the report after a finished one, the page of any, the row of a list, the
// answer to --validate-only.
#pragma once

#include <string>
#include <vector>

#include "walsh/v1/quantization.pb.h"

namespace walsh::client {

// Everything worth knowing about a job in any state; of a finished one: bits, sizes, perplexities,
// seconds per stage and per kind of work on a device, the worst linears, warnings.
std::string JobReport(const v1::QuantizationJob& job);
std::string JobTable(const std::vector<v1::QuantizationJob>& jobs);
// "4 bits, group 64, GPTQ, GSR rotation" with what the job resolved, where it did.
std::string RecipeText(const v1::QuantizationJob& job);
// What a job that was only validated needs, beside what the worker that looked at it has, and its
// warnings. Empty when the service tells nothing of it.
std::string PreflightText(const v1::QuantizationJob& job);

}  // namespace walsh::client
