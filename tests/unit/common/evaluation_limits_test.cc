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

v1::Evaluation ValidOfAJob() {
  v1::Evaluation evaluation;
  evaluation.set_uri("/text.txt");
  evaluation.set_sequence_length(64);
  evaluation.set_format(v1::TextEvaluation::WIKITEXT);
  evaluation.set_stride(64);
  evaluation.add_tasks()->set_uri("/piqa.jsonl");
  evaluation.mutable_tasks(0)->set_limit(limits::kTaskItemsMax);
  evaluation.set_skip_bos(true);
  return evaluation;
}

TEST(ValidateEvaluationTest, OfAJob) {
  EXPECT_OK(ValidateEvaluation(v1::Evaluation()));
  v1::Evaluation evaluation = ValidOfAJob();
  EXPECT_OK(ValidateEvaluation(evaluation));
  evaluation.clear_format();
  evaluation.clear_uri();
  EXPECT_OK(ValidateEvaluation(evaluation)) << "contexts of tasks have a BOS";
  evaluation = {};
  evaluation.set_disable(true);
  evaluation.set_uri("/text.txt");
  EXPECT_OK(ValidateEvaluation(evaluation));
}

TEST(ValidateEvaluationTest, NamesWhatIsWrongOfAJob) {
  using Evaluation = v1::Evaluation;
  const struct {
    std::string message;
    std::function<void(Evaluation&)> change;
  } kCases[] = {
      {"config.evaluation.format: 7 is not a format",
       [](Evaluation& e) { e.set_format(static_cast<v1::TextEvaluation::Format>(7)); }},
      {"config.evaluation.format: is WIKITEXT, but there is no uri",
       [](Evaluation& e) { e.clear_uri(); }},
      {"config.evaluation.stride: must be 0 or from 1 to 64, is 65",
       [](Evaluation& e) { e.set_stride(65); }},
      {"config.evaluation.tasks[0].uri", [](Evaluation& e) { e.mutable_tasks(0)->clear_uri(); }},
      {"config.evaluation.tasks[0].limit",
       [](Evaluation& e) { e.mutable_tasks(0)->set_limit(-1); }},
      {"config.evaluation.tasks: has 17 entries, at most 16",
       [](Evaluation& e) {
         for (int i = 0; i < limits::kEvaluationTasksMax; ++i) e.add_tasks()->set_uri("/t");
       }},
      {"config.evaluation.skip_bos: is set, but there are neither",
       [](Evaluation& e) { e.clear_uri(), e.clear_format(), e.clear_tasks(); }},
      {"config.evaluation.format: is set, but the evaluation is disabled",
       [](Evaluation& e) { e.set_disable(true); }},
      {"config.evaluation.stride: is set, but the evaluation is disabled",
       [](Evaluation& e) { e.set_disable(true), e.clear_format(); }},
      {"config.evaluation.tasks: is set, but the evaluation is disabled",
       [](Evaluation& e) { e.set_disable(true), e.clear_format(), e.clear_stride(); }},
      {"config.evaluation.skip_bos: is set, but the evaluation is disabled",
       [](Evaluation& e) {
         e.set_disable(true), e.clear_format(), e.clear_stride(), e.clear_tasks();
       }},
  };
  for (const auto& [message, change] : kCases) {
    Evaluation evaluation = ValidOfAJob();
    change(evaluation);
    EXPECT_THAT(ValidateEvaluation(evaluation),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  }
}

}  // namespace
}  // namespace walsh
