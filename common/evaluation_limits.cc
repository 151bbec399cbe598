#include "common/evaluation_limits.h"

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/field_checks.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

absl::Status CheckPath(const std::string& field, std::string_view path) {
  if (path.empty()) return InvalidField(field, "is missing");
  return CheckLine(field, path, limits::kPathBytesMax);
}

// 0 is a default.
absl::Status CheckInt(const std::string& field, int64_t value, int64_t min, int64_t max) {
  if (value == 0 || (value >= min && value <= max)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("must be 0 or from ", min, " to ", max, ", is ", value));
}

absl::Status CheckFormat(const std::string& field, v1::TextEvaluation::Format format) {
  if (v1::TextEvaluation::Format_IsValid(format)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(static_cast<int>(format), " is not a format"));
}

absl::Status CheckStride(const std::string& field, int stride, int window) {
  return CheckInt(field, stride, 1, window == 0 ? limits::kSequenceLengthMax : window);
}

using Tasks = google::protobuf::RepeatedPtrField<v1::TaskEvaluation>;

absl::Status CheckTasks(const std::string& field, const Tasks& tasks) {
  if (tasks.size() > limits::kEvaluationTasksMax) {
    return InvalidField(field, absl::StrCat("has ", tasks.size(), " entries, at most ",
                                            limits::kEvaluationTasksMax, " are taken"));
  }
  for (int i = 0; i < tasks.size(); ++i) {
    const std::string task = absl::StrCat(field, "[", i, "]");
    WALSH_RETURN_IF_ERROR(CheckPath(task + ".uri", tasks[i].uri()));
    WALSH_RETURN_IF_ERROR(CheckInt(task + ".limit", tasks[i].limit(), 1, limits::kTaskItemsMax));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::TextEvaluation& text) {
  WALSH_RETURN_IF_ERROR(CheckPath("text.uri", text.uri()));
  WALSH_RETURN_IF_ERROR(CheckFormat("text.format", text.format()));
  WALSH_RETURN_IF_ERROR(CheckInt("text.window", text.window(), limits::kSequenceLengthMin,
                                 limits::kSequenceLengthMax));
  WALSH_RETURN_IF_ERROR(CheckStride("text.stride", text.stride(), text.window()));
  WALSH_RETURN_IF_ERROR(
      CheckInt("text.max_windows", text.max_windows(), 1, limits::kEvaluationWindowsMax));
  if (text.reference().empty()) return absl::OkStatus();
  return CheckPath("text.reference", text.reference());
}

}  // namespace

absl::Status ValidateEvaluation(const v1::EvaluateModelRequest& request) {
  WALSH_RETURN_IF_ERROR(ParseModelName("model", request.model()).status());
  WALSH_RETURN_IF_ERROR(CheckLine("request_id", request.request_id(), limits::kRequestIdBytesMax));
  if (!request.has_text() && request.tasks().empty()) {
    return InvalidField("text", "is missing, and so are tasks: there is nothing to evaluate");
  }
  if (request.has_text()) WALSH_RETURN_IF_ERROR(Validate(request.text()));
  return CheckTasks("tasks", request.tasks());
}

absl::Status ValidateEvaluation(const v1::Evaluation& evaluation) {
  WALSH_RETURN_IF_ERROR(CheckFormat("config.evaluation.format", evaluation.format()));
  WALSH_RETURN_IF_ERROR(
      CheckStride("config.evaluation.stride", evaluation.stride(), evaluation.sequence_length()));
  WALSH_RETURN_IF_ERROR(CheckTasks("config.evaluation.tasks", evaluation.tasks()));
  const bool has_format = evaluation.format() != v1::TextEvaluation::FORMAT_UNSPECIFIED;
  const std::pair<const char*, bool> set[] = {{"format", has_format},
                                              {"stride", evaluation.stride() != 0},
                                              {"tasks", !evaluation.tasks().empty()},
                                              {"skip_bos", evaluation.skip_bos()}};
  for (const auto& [name, is_set] : set) {
    if (!is_set || !evaluation.disable()) continue;
    return InvalidField(absl::StrCat("config.evaluation.", name),
                        "is set, but the evaluation is disabled");
  }
  if (has_format && evaluation.uri().empty()) {
    return InvalidField("config.evaluation.format",
                        absl::StrCat("is ", v1::TextEvaluation::Format_Name(evaluation.format()),
                                     ", but there is no uri of a text"));
  }
  if (evaluation.skip_bos() && evaluation.uri().empty() && evaluation.tasks().empty()) {
    return InvalidField("config.evaluation.skip_bos",
                        "is set, but there are neither a uri of a text nor tasks");
  }
  return absl::OkStatus();
}

}  // namespace walsh
