// What `walsh eval` and the evaluation of `walsh quantize` have in common.
#pragma once

#include <string>
#include <vector>

#include "client/commands/command.h"
#include "walsh/v1/evaluation.pb.h"

namespace walsh::client {

// "auto" or a format's name, in `format`.
void AddTextFormatFlag(CLI::App& command, const std::string& flag, std::string& format);
v1::TextEvaluation::Format TextFormatOf(const std::string& name);

// A task for each file, of at most `limit` items; 0: all. INVALID_ARGUMENT for a path that is not
// UTF-8.
absl::Status AddTasks(const std::vector<std::string>& paths, int limit,
                      google::protobuf::RepeatedPtrField<v1::TaskEvaluation>* tasks);

}  // namespace walsh::client
