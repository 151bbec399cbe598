#include "client/terminal/html_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace walsh::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using Job = v1::QuantizationJob;

Job FinishedJob() {
  Job job;
  job.set_name("quantizationJobs/abc");
  job.set_model_name("demo-2bit");
  job.set_source_model("/models/demo.gguf");
  job.set_state(Job::SUCCEEDED);
  job.mutable_config()->set_bits(2);
  Job::Result& result = *job.mutable_result();
  result.set_group_size(64);
  result.set_perplexity_before(20.3126);
  result.set_perplexity_after(41.5);
  result.set_evaluation_tokens(8190);
  result.set_kl_divergence(0.25);
  result.set_top1_agreement(0.75);
  result.set_linear_bytes_before(212'000'000);
  result.set_linear_bytes_after(28'700'000);
  for (int layer = 0; layer < 3; ++layer) {
    for (const char* kind : {"self_attn.q_proj", "mlp.down_proj"}) {
      Job::LinearResult& linear = *result.add_per_layer();
      linear.set_name(absl::StrCat("layers.", layer, ".", kind));
      linear.set_layer(layer);
      linear.set_relative_error(0.001 * (layer + 1));
    }
  }
  Job::StageTime& time = *result.add_stage_times();
  time.set_stage(Job::QUANTIZING);
  time.set_seconds(12.5);
  return job;
}

int Count(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// Every element that is opened is closed, in its order; what has no end tag is known.
void ExpectWellFormed(const std::string& html) {
  std::vector<std::string> open;
  for (size_t at = html.find('<'); at != std::string::npos; at = html.find('<', at + 1)) {
    const size_t end = html.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = html.substr(at + 1, end - at - 1);
    if (tag[0] == '!' || tag.back() == '/') continue;
    const std::string name = tag.substr(0, tag.find_first_of(" \n"));
    if (name == "meta" || name == "br") continue;
    if (name[0] != '/') {
      open.push_back(name);
    } else {
      ASSERT_FALSE(open.empty()) << tag;
      ASSERT_EQ("/" + open.back(), name);
      open.pop_back();
    }
  }
  EXPECT_TRUE(open.empty());
}

// From a coordinator that says anything.
TEST(HtmlReportTest, LayersThatNoModelHasAreNotPlotted) {
  Job job = FinishedJob();
  const std::string html = HtmlReport(job);
  for (const int layer : {-1, 1024, std::numeric_limits<int>::max()}) {
    Job::LinearResult& linear = *job.mutable_result()->add_per_layer();
    linear.set_name("mlp.up_proj");
    linear.set_layer(layer);
    linear.set_relative_error(0.5);
  }
  EXPECT_EQ(Count(HtmlReport(job), "<circle"), Count(html, "<circle"));
}

TEST(HtmlReportTest, ShowsStandardErrorsWhereThereAre) {
  Job job = FinishedJob();
  EXPECT_THAT(HtmlReport(job), Not(HasSubstr("±")));
  job.mutable_result()->set_perplexity_after_stderr(1.25);
  job.mutable_result()->set_perplexity_ratio_stderr(0.0312);
  job.mutable_result()->set_kl_divergence_stderr(0.0123);
  EXPECT_THAT(HtmlReport(job), AllOf(HasSubstr("41.500 ± 1.2"), HasSubstr("x2.0431 ± 0.031 on "),
                                     HasSubstr("0.2500 ± 0.012 nats a token")));
}

TEST(HtmlReportTest, ShowsFiguresAndPlots) {
  const std::string html = HtmlReport(FinishedJob());
  ExpectWellFormed(html);
  EXPECT_THAT(html, AllOf(HasSubstr("walsh: demo-2bit (job abc)"), HasSubstr("20.313"),
                          HasSubstr("x2.0431 on 8,190 tokens"), HasSubstr("0.2500 nats"),
                          HasSubstr("75.00 %"), HasSubstr("QUANTIZING"), HasSubstr("12.5 s"),
                          HasSubstr("212 MB"), HasSubstr("layers.2.mlp.down_proj")));
  EXPECT_EQ(Count(html, "<polyline"), 2) << "a line for each kind";
  EXPECT_EQ(Count(html, "<circle"), 6) << "a dot for each linear";
  EXPECT_EQ(html, HtmlReport(FinishedJob()));
}

// It works without a network, and must not ask for one.
TEST(HtmlReportTest, NeedsNothingElse) {
  const std::string html = HtmlReport(FinishedJob());
  for (const char* part : {"http://", "https://", "<script", "<link", "<img", "url(", "@import"}) {
    EXPECT_THAT(html, Not(HasSubstr(part)));
  }
  EXPECT_THAT(html, HasSubstr("default-src 'none'"));
}

TEST(HtmlReportTest, TextIsEscapedWhereverItComesFrom) {
  const std::string evil = "</td><script>alert(\"1\" & '2')</script>\x1b[31m";
  Job job = FinishedJob();
  job.set_model_name(evil);
  job.set_source_model(evil);
  job.set_display_name(evil);
  job.set_worker("workers/" + evil);
  job.set_error_reason(evil);
  job.mutable_error()->set_code(9);
  job.mutable_error()->set_message(evil);
  Job::Result& result = *job.mutable_result();
  result.set_device(evil);
  result.set_source_format(evil);
  result.mutable_per_layer(0)->set_name(evil);
  result.mutable_per_layer(1)->set_fallback(evil);
  result.add_warnings(evil);
  result.add_tasks()->mutable_after()->set_name(evil);
  result.add_step_times()->set_name(evil);
  const std::string html = HtmlReport(job);
  ExpectWellFormed(html);
  EXPECT_THAT(html, AllOf(Not(HasSubstr("<script")), Not(HasSubstr("\x1b")),
                          HasSubstr("&lt;script&gt;alert(&quot;1&quot; &amp; &#39;2&#39;)")));
}

TEST(HtmlReportTest, TasksBeforeAndAfter) {
  Job job = FinishedJob();
  EXPECT_THAT(HtmlReport(job), Not(HasSubstr("Zero-shot tasks")));
  Job::TaskQuality& task = *job.mutable_result()->add_tasks();
  task.mutable_before()->set_accuracy(0.75);
  task.mutable_before()->set_accuracy_stderr(0.01);
  task.mutable_after()->set_name("piqa");
  task.mutable_after()->set_items(1838);
  task.mutable_after()->set_accuracy(0.5);
  task.mutable_after()->set_perplexity(12.5);
  const std::string html = HtmlReport(job);
  ExpectWellFormed(html);
  EXPECT_THAT(html, AllOf(HasSubstr("Zero-shot tasks"),
                          HasSubstr("<td>piqa</td><td class=\"n\">1,838</td><td>original</td>"
                                    "<td class=\"n\">75.00 ± 1.00</td>"),
                          HasSubstr("<td>quantized</td><td class=\"n\">50.00 ± 0.00</td>"
                                    "<td class=\"n\"></td><td class=\"n\">12.50</td>")));
}

TEST(HtmlReportTest, AGateAndItsVerdict) {
  Job job = FinishedJob();
  job.set_state(Job::FAILED);
  job.mutable_error()->set_code(9);
  job.mutable_error()->set_message("the model failed the quality gate");
  job.set_error_reason("QUALITY_GATE");
  job.mutable_config()->mutable_quality_gate()->set_max_perplexity_ratio(1.05);
  job.mutable_config()->mutable_quality_gate()->set_max_kl_divergence(0.1);
  EXPECT_THAT(HtmlReport(job),
              AllOf(HasSubstr("FAILED_PRECONDITION"), HasSubstr("QUALITY_GATE"),
                    HasSubstr("the gate allows x1.05"), HasSubstr("the gate allows 0.1")));
}

TEST(HtmlReportTest, JobsOfEveryKind) {
  ExpectWellFormed(HtmlReport(Job()));
  Job queued;
  queued.set_state(Job::QUEUED);
  EXPECT_THAT(HtmlReport(queued), HasSubstr("QUEUED"));
  Job odd = FinishedJob();
  odd.mutable_result()->clear_perplexity_before();
  for (Job::LinearResult& linear : *odd.mutable_result()->mutable_per_layer()) {
    linear.set_relative_error(0);
    linear.set_layer(0);
  }
  odd.mutable_result()->mutable_per_layer(0)->set_relative_error(
      std::numeric_limits<double>::infinity());
  const std::string html = HtmlReport(odd);
  ExpectWellFormed(html);
  EXPECT_THAT(html, AllOf(HasSubstr("No perplexity was measured"), Not(HasSubstr("nan"))));
}

}  // namespace
}  // namespace walsh::client
