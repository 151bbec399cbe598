#include "worker/service/job_conversion.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace walsh::service {
namespace {

TEST(ToResultTest, WhatWasNotMeasuredIsAbsent) {
  pipeline::JobReport report;
  v1::QuantizationJob::Result result = ToResult(report, "m");
  EXPECT_FALSE(result.has_kl_divergence());
  EXPECT_FALSE(result.has_top1_agreement());
  EXPECT_EQ(result.peak_device_memory_bytes(), 0);
  report.kl_divergence = 0;
  report.top1_agreement = 0.75;
  report.peak_device_memory_bytes = 123;
  result = ToResult(report, "m");
  EXPECT_TRUE(result.has_kl_divergence());
  EXPECT_EQ(result.kl_divergence(), 0);
  EXPECT_EQ(result.top1_agreement(), 0.75);
  EXPECT_EQ(result.peak_device_memory_bytes(), 123);
}

TEST(ToResultTest, StandardErrorsNeedTwoWindows) {
  pipeline::JobReport report;
  report.perplexity_before = 10;
  report.perplexity_after = 12;
  report.window_losses_before = {2};
  report.window_losses_after = {2.5};
  EXPECT_FALSE(ToResult(report, "m").has_perplexity_after_stderr());
  report.window_losses_before = {2, 3};
  report.window_losses_after = {2.5, 3.5};
  v1::QuantizationJob::Result result = ToResult(report, "m");
  EXPECT_DOUBLE_EQ(result.perplexity_before_stderr(), 5);
  EXPECT_DOUBLE_EQ(result.perplexity_after_stderr(), 6);
  EXPECT_TRUE(result.has_perplexity_ratio_stderr());
  EXPECT_EQ(result.perplexity_ratio_stderr(), 0) << "each window lost as much";
  EXPECT_FALSE(result.has_kl_divergence_stderr());
  report.window_divergences = {0.25, 0.75};
  EXPECT_DOUBLE_EQ(ToResult(report, "m").kl_divergence_stderr(), 0.25);
}

TEST(ToResultTest, StepsComeInTheirOrder) {
  pipeline::JobReport report;
  EXPECT_EQ(ToResult(report, "m").step_times_size(), 0);
  report.steps = {{"hessian", 1.5}, {"columns", 0.25}};
  const v1::QuantizationJob::Result result = ToResult(report, "m");
  ASSERT_EQ(result.step_times_size(), 2);
  EXPECT_EQ(result.step_times(0).name(), "hessian");
  EXPECT_EQ(result.step_times(0).seconds(), 1.5);
  EXPECT_EQ(result.step_times(1).name(), "columns");
  EXPECT_EQ(result.step_times(1).seconds(), 0.25);
}

absl::StatusOr<pipeline::JobSpec> SpecOf(const std::function<void(v1::QuantizationConfig&)>& set) {
  v1::QuantizationJob job;
  job.set_model_name("m");
  job.set_source_model("/models/m");
  set(*job.mutable_config());
  const auto resolve = [](std::string_view path) { return std::string(path); };
  return ToJobSpec(job, {resolve, resolve});
}

absl::StatusOr<pipeline::OnlineSpec> OnlineOf(
    const std::function<void(v1::QuantizationConfig&)>& set) {
  const auto spec = SpecOf(set);
  if (!spec.ok()) return spec.status();
  return spec->online;
}

TEST(ResolveFieldTest, AnErrorKeepsItsDetails) {
  const auto refuses = [](std::string_view) -> absl::StatusOr<std::string> {
    absl::Status status = absl::FailedPreconditionError("no rights");
    SetErrorInfo(status, "SOURCE_REFUSED");
    return status;
  };
  const absl::Status status = ResolveField(refuses, "text.uri", "s3://b/k").status();
  EXPECT_THAT(status,
              testing::StatusIs(absl::StatusCode::kFailedPrecondition, "text.uri: no rights"));
  EXPECT_EQ(ErrorReason(status), "SOURCE_REFUSED");
}

TEST(ToJobSpecTest, KeepsTheNameOfThePreset) {
  v1::QuantizationJob job;
  job.set_model_name("m");
  job.set_source_model("/models/m");
  job.mutable_config()->set_preset("gptq-w4");
  const auto resolve = [](std::string_view path) { return std::string(path); };
  ASSERT_OK_AND_ASSIGN(const pipeline::JobSpec spec, ToJobSpec(job, {resolve, resolve}));
  EXPECT_EQ(spec.preset, "gptq-w4");
}

TEST(ToJobSpecTest, EvaluatesPlainlyByDefault) {
  ASSERT_OK_AND_ASSIGN(const pipeline::JobSpec spec, SpecOf([](auto&) {}));
  EXPECT_EQ(spec.evaluation_stride, 0);
  EXPECT_FALSE(spec.evaluation_joins_rows);
  EXPECT_FALSE(spec.evaluation_skips_bos);
  EXPECT_TRUE(spec.tasks.empty());
}

TEST(ToJobSpecTest, CarriesTheEvaluation) {
  const auto set = [](v1::QuantizationConfig& config) {
    v1::Evaluation& evaluation = *config.mutable_evaluation();
    evaluation.set_uri("/rows");
    evaluation.set_format(v1::TextEvaluation::WIKITEXT);
    evaluation.set_sequence_length(512);
    evaluation.set_stride(128);
    evaluation.set_skip_bos(true);
    evaluation.add_tasks()->set_uri("/a.jsonl");
    evaluation.add_tasks()->set_uri("/b.jsonl");
    evaluation.mutable_tasks(1)->set_limit(7);
  };
  ASSERT_OK_AND_ASSIGN(const pipeline::JobSpec spec, SpecOf(set));
  EXPECT_EQ(spec.evaluation_path, "/rows");
  EXPECT_TRUE(spec.evaluation_joins_rows);
  EXPECT_EQ(spec.evaluation_length, 512);
  EXPECT_EQ(spec.evaluation_stride, 128);
  EXPECT_TRUE(spec.evaluation_skips_bos);
  ASSERT_EQ(spec.tasks.size(), 2u);
  EXPECT_EQ(spec.tasks[0].name, "/a.jsonl");
  EXPECT_EQ(spec.tasks[1].path, "/b.jsonl");
  EXPECT_EQ(spec.tasks[1].limit, 7);
  EXPECT_THAT(SpecOf([&](auto& config) {
                set(config);
                config.mutable_evaluation()->set_stride(513);
              }),
              testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                ::testing::HasSubstr("config.evaluation.stride")));
}

TEST(ToJobSpecTest, ATaskThatIsNotThereIsNamed) {
  v1::QuantizationJob job;
  job.set_model_name("m");
  job.mutable_config()->mutable_evaluation()->add_tasks()->set_uri("/none");
  const auto resolve = [](std::string_view path) -> absl::StatusOr<std::string> {
    if (path == "/none") return absl::NotFoundError("no such file");
    return std::string(path);
  };
  EXPECT_THAT(ToJobSpec(job, {resolve, resolve}),
              testing::StatusIs(absl::StatusCode::kNotFound,
                                "config.evaluation.tasks[0].uri: no such file"));
}

TEST(ToResultTest, HasTheTasksBeforeAndAfter) {
  pipeline::JobReport report;
  report.tasks = {{.before = {.name = "t", .items = 3, .score = {.accuracy = {0.5, 0.25}}},
                   .after = {.name = "t",
                             .items = 3,
                             .score = {.accuracy = {0.25, 0.125},
                                       .perplexity = evaluate::Estimate{9, 1},
                                       .tokens = 12}}}};
  const v1::QuantizationJob::Result result = ToResult(report, "m");
  ASSERT_EQ(result.tasks_size(), 1);
  EXPECT_EQ(result.tasks(0).before().accuracy(), 0.5);
  EXPECT_EQ(result.tasks(0).before().accuracy_stderr(), 0.25);
  EXPECT_FALSE(result.tasks(0).before().has_perplexity());
  EXPECT_EQ(result.tasks(0).after().name(), "t");
  EXPECT_EQ(result.tasks(0).after().items(), 3);
  EXPECT_EQ(result.tasks(0).after().accuracy(), 0.25);
  EXPECT_EQ(result.tasks(0).after().perplexity(), 9);
  EXPECT_EQ(result.tasks(0).after().tokens(), 12);
}

TEST(ToJobSpecTest, NothingIsDoneAtRunTimeByDefault) {
  ASSERT_OK_AND_ASSIGN(const pipeline::OnlineSpec online, OnlineOf([](auto&) {}));
  EXPECT_EQ(online.down_rotation, rotate::Kind::kNone);
  EXPECT_FALSE(online.query_key.has_value());
  EXPECT_EQ(online.activation_bits, 16);
  EXPECT_EQ(online.kv_bits, 16);
}

TEST(ToJobSpecTest, CarriesWhatIsDoneAtRunTime) {
  ASSERT_OK_AND_ASSIGN(const pipeline::OnlineSpec online,
                       OnlineOf([](v1::QuantizationConfig& config) {
                         config.mutable_rotation()->set_online_kind(v1::Rotation::LOCAL_HADAMARD);
                         config.mutable_rotation()->set_online_block_size(32);
                         config.mutable_rotation()->set_query_key(false);
                         config.mutable_activation_quantization()->set_bits(4);
                         config.mutable_activation_quantization()->set_group_size(64);
                         config.mutable_activation_quantization()->set_asymmetric(true);
                         config.mutable_activation_quantization()->set_clip_ratio(0.8);
                         config.mutable_kv_cache_quantization()->set_bits(2);
                         config.mutable_kv_cache_quantization()->set_group_size(128);
                         config.mutable_kv_cache_quantization()->set_clip_ratio(0.7);
                       }));
  EXPECT_EQ(online.down_rotation, rotate::Kind::kLocalHadamard);
  EXPECT_EQ(online.down_block, 32);
  EXPECT_EQ(online.query_key, false);
  EXPECT_EQ(online.activation_bits, 4);
  EXPECT_EQ(online.activation_group, 64);
  EXPECT_FALSE(online.activations_symmetric);
  EXPECT_EQ(online.activation_clip, 0.8);
  EXPECT_EQ(online.kv_bits, 2);
  EXPECT_EQ(online.kv_group, 128);
  EXPECT_EQ(online.kv_clip, 0.7);
}

TEST(ToJobSpecTest, HeadsAreRotatedAsAskedFor) {
  ASSERT_OK_AND_ASSIGN(pipeline::JobSpec spec, SpecOf([](auto&) {}));
  EXPECT_FALSE(spec.head_rotation.has_value());
  for (const bool is_on : {false, true}) {
    ASSERT_OK_AND_ASSIGN(spec, SpecOf([&](auto& c) { c.mutable_rotation()->set_head(is_on); }));
    EXPECT_EQ(spec.head_rotation, is_on);
  }
}

TEST(ToResponseTest, CarriesWhatAutoMeans) {
  pipeline::JobPlan plan;
  plan.group_size = 64;
  plan.rotation_block = 32;
  plan.online_block = 16;
  const internal::v1::ValidateJobResponse response = ToResponse(plan);
  EXPECT_EQ(response.group_size(), 64);
  EXPECT_EQ(response.rotation_block_size(), 32);
  EXPECT_EQ(response.online_block_size(), 16);
}

// A worker does not rely on a coordinator's checks.
TEST(ToJobSpecTest, RefusesWhatCannotBeDoneAtRunTime) {
  const auto refused = [](const std::function<void(v1::QuantizationConfig&)>& set,
                          const char* message) {
    EXPECT_THAT(OnlineOf(set), testing::StatusIs(absl::StatusCode::kInvalidArgument,
                                                 ::testing::HasSubstr(message)));
  };
  refused([](auto& c) { c.mutable_activation_quantization()->set_bits(2); },
          "config.activation_quantization.bits");
  refused([](auto& c) { c.mutable_activation_quantization()->set_group_size(-1); },
          "config.activation_quantization.group_size");
  refused([](auto& c) { c.mutable_activation_quantization()->set_clip_ratio(2); },
          "config.activation_quantization.clip_ratio");
  refused([](auto& c) { c.mutable_activation_quantization()->set_clip_ratio(1e-46); },
          "must be 0 (chosen by the bits) or from 0.01 to 1");
  refused([](auto& c) { c.mutable_kv_cache_quantization()->set_bits(3); },
          "config.kv_cache_quantization.bits");
  refused([](auto& c) { c.mutable_kv_cache_quantization()->set_group_size(16); },
          "config.kv_cache_quantization.group_size");
  refused([](auto& c) { c.mutable_kv_cache_quantization()->set_clip_ratio(-0.5); },
          "config.kv_cache_quantization.clip_ratio");
  refused(
      [](auto& c) { c.mutable_rotation()->set_online_kind(static_cast<v1::Rotation::Kind>(77)); },
      "77");
}

}  // namespace
}  // namespace walsh::service
