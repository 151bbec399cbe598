// walsh eval: how good a published model is.
#pragma once

#include <string>
#include <vector>

#include "client/commands/command.h"

namespace walsh::client {

// The flags as they were given; empty and unset ones are left to the service's defaults.
struct EvalFlags {
  std::string model;
  std::string text;
  std::string text_format = "auto";
  int window = 0;
  int stride = 0;
  int max_windows = 0;
  std::string reference;
  std::vector<std::string> tasks;
  int limit = 0;
  bool no_bos = false;
  double deadline_seconds = 0;
};

// INVALID_ARGUMENT without a text and a task, for options of a text without one, and for what is
// not UTF-8.
absl::StatusOr<v1::EvaluateModelRequest> MakeEvalRequest(const EvalFlags& flags);

void AddEvalCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen);

}  // namespace walsh::client
