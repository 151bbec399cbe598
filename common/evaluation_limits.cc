#include "common/evaluation_limits.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

absl::Status CheckText(std::string_view field, std::string_view text, int64_t bytes_max) {
  if (static_cast<int64_t>(text.size()) > bytes_max) {
    return InvalidField(
        field, absl::StrCat("has ", text.size(), " bytes, at most ", bytes_max, " are taken"));
  }
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; };
  if (!IsValidUtf8(text)) return InvalidField(field, "is not valid UTF-8");
  if (std::any_of(text.begin(), text.end(), is_control)) {
    return InvalidField(field, "has a control character");
  }
  return absl::OkStatus();
}

absl::Status CheckPath(const std::string& field, std::string_view path) {
  if (path.empty()) return InvalidField(field, "is missing");
  return CheckText(field, path, limits::kPathBytesMax);
}

// 0 is a default.
absl::Status CheckInt(const std::string& field, int64_t value, int64_t min, int64_t max) {
  if (value == 0 || (value >= min && value <= max)) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("must be 0 or from ", min, " to ", max, ", is ", value));
}

absl::Status Validate(const v1::TextEvaluation& text) {
  WALSH_RETURN_IF_ERROR(CheckPath("text.uri", text.uri()));
  if (!v1::TextEvaluation::Format_IsValid(text.format())) {
    return InvalidField("text.format",
                        absl::StrCat(static_cast<int>(text.format()), " is not a format"));
  }
  WALSH_RETURN_IF_ERROR(CheckInt("text.window", text.window(), limits::kSequenceLengthMin,
                                 limits::kSequenceLengthMax));
  const int window = text.window() == 0 ? limits::kSequenceLengthMax : text.window();
  WALSH_RETURN_IF_ERROR(CheckInt("text.stride", text.stride(), 1, window));
  WALSH_RETURN_IF_ERROR(
      CheckInt("text.max_windows", text.max_windows(), 1, limits::kEvaluationWindowsMax));
  if (text.reference().empty()) return absl::OkStatus();
  return CheckPath("text.reference", text.reference());
}

}  // namespace

absl::Status ValidateEvaluation(const v1::EvaluateModelRequest& request) {
  WALSH_RETURN_IF_ERROR(ParseModelName("model", request.model()).status());
  WALSH_RETURN_IF_ERROR(CheckText("request_id", request.request_id(), limits::kRequestIdBytesMax));
  if (!request.has_text() && request.tasks().empty()) {
    return InvalidField("text", "is missing, and so are tasks: there is nothing to evaluate");
  }
  if (request.has_text()) WALSH_RETURN_IF_ERROR(Validate(request.text()));
  if (request.tasks_size() > limits::kEvaluationTasksMax) {
    return InvalidField("tasks", absl::StrCat("has ", request.tasks_size(), " entries, at most ",
                                              limits::kEvaluationTasksMax, " are taken"));
  }
  for (int i = 0; i < request.tasks_size(); ++i) {
    const std::string field = absl::StrCat("tasks[", i, "]");
    WALSH_RETURN_IF_ERROR(CheckPath(field + ".uri", request.tasks(i).uri()));
    WALSH_RETURN_IF_ERROR(
        CheckInt(field + ".limit", request.tasks(i).limit(), 1, limits::kTaskItemsMax));
  }
  return absl::OkStatus();
}

}  // namespace walsh
