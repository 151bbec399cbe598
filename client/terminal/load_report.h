// The figures of `walsh bench`, for people and for scripts.
#pragma once

#include <string>

#include "client/load_summary.h"

namespace walsh::client {

// What was asked for, as the reports repeat it.
struct LoadDescription {
  std::string model;
  int concurrency = 1;
  double rate = 0;  // requests a second; 0: closed loop
  int64_t prompt_tokens = 0, max_tokens = 0, shared_tokens = 0;
};

std::string LoadReport(const LoadDescription& description, const LoadSummary& summary);
// One JSON object, ends with a newline; times in seconds.
std::string LoadJson(const LoadDescription& description, const LoadSummary& summary);

}  // namespace walsh::client
