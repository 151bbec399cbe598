#include "common/evaluation_limits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "common/limits.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;
using Request = v1::EvaluateModelRequest;

Request Valid() {
  Request request;
  request.set_model("models/m");
  request.mutable_text()->set_uri("/text.txt");
  request.add_tasks()->set_uri("/piqa.jsonl");
  return request;
}

absl::Status With(const std::function<void(Request&)>& change) {
  Request request = Valid();
  change(request);
  return ValidateEvaluation(request);
}

TEST(ValidateEvaluationTest, TakesATextATaskOrBoth) {
  EXPECT_OK(With([](Request&) {}));
  EXPECT_OK(With([](Request& r) { r.clear_text(); }));
  EXPECT_OK(With([](Request& r) { r.clear_tasks(); }));
  EXPECT_OK(With([](Request& r) {
    r.mutable_text()->set_window(limits::kSequenceLengthMin);
    r.mutable_text()->set_stride(limits::kSequenceLengthMin);
    r.mutable_text()->set_max_windows(limits::kEvaluationWindowsMax);
    r.mutable_text()->set_reference("/original");
    r.mutable_tasks(0)->set_limit(limits::kTaskItemsMax);
  }));
}

TEST(ValidateEvaluationTest, NamesWhatIsWrong) {
  const struct {
    std::string message;
    std::function<void(Request&)> change;
  } kCases[] = {
      {"model", [](Request& r) { r.set_model(""); }},
      {"model", [](Request& r) { r.set_model("models/../x"); }},
      {"request_id", [](Request& r) { r.set_request_id(std::string(65, 'x')); }},
      {"nothing to evaluate", [](Request& r) { r.clear_text(), r.clear_tasks(); }},
      {"text.uri", [](Request& r) { r.mutable_text()->clear_uri(); }},
      {"text.uri", [](Request& r) { r.mutable_text()->set_uri("a\nb"); }},
      {"text.uri",
       [](Request& r) { r.mutable_text()->set_uri(std::string(limits::kPathBytesMax + 1, 'x')); }},
      {"text.format",
       [](Request& r) {
         r.mutable_text()->set_format(static_cast<v1::TextEvaluation::Format>(7));
       }},
      {"text.window", [](Request& r) { r.mutable_text()->set_window(31); }},
      {"text.window", [](Request& r) { r.mutable_text()->set_window(-1); }},
      {"text.window",
       [](Request& r) { r.mutable_text()->set_window(limits::kSequenceLengthMax + 1); }},
      {"text.stride: must be 0 or from 1 to 64, is 65",
       [](Request& r) { r.mutable_text()->set_window(64), r.mutable_text()->set_stride(65); }},
      {"text.stride", [](Request& r) { r.mutable_text()->set_stride(-1); }},
      {"text.max_windows",
       [](Request& r) { r.mutable_text()->set_max_windows(limits::kEvaluationWindowsMax + 1); }},
      {"text.reference", [](Request& r) { r.mutable_text()->set_reference("\x01"); }},
      {"tasks[0].uri", [](Request& r) { r.mutable_tasks(0)->clear_uri(); }},
      {"tasks[0].limit", [](Request& r) { r.mutable_tasks(0)->set_limit(-1); }},
      {"tasks[0].limit",
       [](Request& r) { r.mutable_tasks(0)->set_limit(limits::kTaskItemsMax + 1); }},
      {"at most 16",
       [](Request& r) {
         for (int i = 0; i < limits::kEvaluationTasksMax; ++i) r.add_tasks()->set_uri("/t");
       }},
  };
  for (const auto& [message, change] : kCases) {
    EXPECT_THAT(With(change), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)))
        << message;
  }
}

}  // namespace
}  // namespace walsh
