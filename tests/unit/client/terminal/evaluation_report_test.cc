#include "client/terminal/evaluation_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace walsh::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

v1::EvaluateModelResponse::Result Result() {
  v1::EvaluateModelResponse::Result result;
  result.set_model("models/demo");
  result.set_seconds(12.3);
  v1::TextResult& text = *result.mutable_text();
  text.set_perplexity(26.1234);
  text.set_perplexity_stderr(0.456);
  text.set_windows(141);
  text.set_tokens(288627);
  text.set_window(2048);
  text.set_stride(2048);
  return result;
}

TEST(EvaluationReportTest, Text) {
  v1::EvaluateModelResponse::Result result = Result();
  EXPECT_THAT(EvaluationReport(result),
              AllOf(HasSubstr("model 'demo', evaluated in 12.3 s\n"),
                    HasSubstr("26.123 ± 0.46, on 288,627 tokens"),
                    HasSubstr("141 of 2,048, without overlap"), Not(HasSubstr("original"))));
  result.mutable_text()->set_stride(512);
  result.mutable_text()->set_reference_perplexity(20.0);
  result.mutable_text()->set_reference_format("GGUF Q4_1");
  result.mutable_text()->set_kl_divergence(0.1234);
  result.mutable_text()->set_kl_divergence_stderr(0.0021);
  result.mutable_text()->set_top1_agreement(0.8123);
  EXPECT_THAT(EvaluationReport(result),
              AllOf(HasSubstr("141 of 2,048, 512 apart"), HasSubstr("perplexity 20.000 (x1.306)"),
                    HasSubstr("0.123 ± 0.0021 nats a token"), HasSubstr("the same at 81.2 %")));
}

TEST(EvaluationReportTest, Tasks) {
  v1::EvaluateModelResponse::Result result = Result();
  result.clear_text();
  v1::TaskResult& piqa = *result.add_tasks();
  piqa.set_name("piqa");
  piqa.set_items(1838);
  piqa.set_accuracy(0.7523);
  piqa.set_accuracy_stderr(0.0101);
  piqa.set_accuracy_norm(0.76);
  piqa.set_accuracy_norm_stderr(0.01);
  v1::TaskResult& lambada = *result.add_tasks();
  lambada.set_name("evil\x1b[31m");
  lambada.set_items(5153);
  lambada.set_perplexity(12.345);
  lambada.set_perplexity_stderr(0.3);
  result.add_warnings("cut");
  EXPECT_THAT(EvaluationReport(result),
              AllOf(HasSubstr("75.23 ± 1.01"), HasSubstr("76.00 ± 1.00"), HasSubstr("12.35 ± 0.3"),
                    HasSubstr("  - cut\n"), Not(HasSubstr("\x1b")), Not(HasSubstr("windows"))));
}

}  // namespace
}  // namespace walsh::client
