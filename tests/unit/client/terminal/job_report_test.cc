#include "client/terminal/job_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace walsh::client {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using Job = v1::QuantizationJob;

Job FinishedJob() {
  Job job;
  job.set_name("quantizationJobs/abc");
  job.set_model_name("demo-2bit");
  job.set_source_model("/models/demo.gguf");
  job.set_state(Job::SUCCEEDED);
  job.set_attempt(2);
  job.set_worker("workers/w1");
  job.mutable_start_time()->set_seconds(1000);
  job.mutable_end_time()->set_seconds(1083);
  job.mutable_config()->set_bits(2);
  Job::Result& result = *job.mutable_result();
  result.set_group_size(64);
  result.set_rotation_block_size(64);
  result.set_source_size_bytes(98'362'432);
  result.set_source_format("GGUF Q4_1");
  result.set_size_bytes(151'000'000);
  result.set_linear_bytes_before(212'000'000);
  result.set_linear_bytes_after(28'700'000);
  result.set_bits_per_weight(2.281);
  result.set_perplexity_before(20.3126);
  result.set_perplexity_after(41.5);
  result.set_evaluation_tokens(8190);
  result.set_rotation_gate(3.1e-6);
  result.mutable_calibration()->set_windows(32);
  result.mutable_calibration()->set_tokens(16384);
  result.set_peak_memory_bytes(1'200'000'000);
  for (const auto& [stage, seconds] :
       {std::pair(Job::LOADING, 1.25), std::pair(Job::QUANTIZING, 60.5)}) {
    auto* time = result.add_stage_times();
    time->set_stage(stage);
    time->set_seconds(seconds);
  }
  for (int i = 0; i < 8; ++i) {
    auto* linear = result.add_per_layer();
    linear->set_name(absl::StrCat("layers.", i, ".mlp.down_proj"));
    linear->set_bits(2);
    linear->set_relative_error(0.01 * i);
    linear->set_damp_percent(0.01);
  }
  result.mutable_per_layer(7)->set_fallback("Hessian not positive definite");
  result.add_warnings("only 32 of 128 windows");
  return job;
}

TEST(JobReportTest, AFinishedJobShowsEverythingThatWasMeasured) {
  const std::string report = JobReport(FinishedJob());
  EXPECT_THAT(report, HasSubstr("job abc: SUCCEEDED, model 'demo-2bit', ran 1:23\n"));
  EXPECT_THAT(report, HasSubstr("2, group 64, GPTQ, GSR rotation in blocks of 64\n"));
  EXPECT_THAT(report, HasSubstr("2.281 bits a weight"));
  EXPECT_THAT(report, HasSubstr("linears 212 MB as 16-bit floats, 28.7 MB after (7.4 times"));
  EXPECT_THAT(report, HasSubstr("source 98.4 MB (GGUF Q4_1), artifact 151 MB\n"));
  EXPECT_THAT(report, HasSubstr("20.313 before, 41.500 after (x2.043), on 8,190 tokens\n"));
  EXPECT_THAT(report, HasSubstr("3.1e-06 of the largest logit"));
  EXPECT_THAT(report, HasSubstr("16,384 tokens in 32 windows of the model's own text\n"));
  EXPECT_THAT(report, HasSubstr("2 on w1\n"));
  EXPECT_THAT(report, HasSubstr("  LOADING        1.25\n"));
  EXPECT_THAT(report, HasSubstr("  all stages    61.75\n"));
  EXPECT_THAT(report, HasSubstr("- only 32 of 128 windows\n"));
}

TEST(JobReportTest, NamesThePreset) {
  Job job = FinishedJob();
  EXPECT_THAT(JobReport(job), Not(HasSubstr("preset")));
  job.mutable_config()->set_preset("gsr-w2a16");
  EXPECT_THAT(JobReport(job), HasSubstr("  preset         gsr-w2a16\n"));
}

TEST(JobReportTest, ShowsTheDeviceAndWhatOnlyItMeasures) {
  Job job = FinishedJob();
  EXPECT_THAT(JobReport(job), Not(HasSubstr("divergence")));
  EXPECT_THAT(JobReport(job), Not(HasSubstr("device")));
  EXPECT_THAT(JobReport(job), HasSubstr("memory         1.20 GB at most\n"));
  Job::Result& result = *job.mutable_result();
  result.set_device("cuda:0 NVIDIA H200");
  result.set_peak_device_memory_bytes(14'100'000'000);
  result.set_kl_divergence(0.01234);
  result.set_top1_agreement(0.9518);
  const std::string report = JobReport(job);
  EXPECT_THAT(report, HasSubstr("device         cuda:0 NVIDIA H200\n"));
  EXPECT_THAT(report, HasSubstr("memory         1.20 GB at most, and 14.1 GB on the device\n"));
  EXPECT_THAT(report,
              HasSubstr("divergence     0.0123 nats a token from the original; the likeliest "
                        "token is the same at 95.2 %\n"));
  result.set_kl_divergence_stderr(0.00056);
  result.set_perplexity_ratio_stderr(0.0312);
  EXPECT_THAT(JobReport(job), HasSubstr("0.0123 ± 0.00056 nats a token"));
  EXPECT_THAT(JobReport(job), HasSubstr("(x2.043 ± 0.031), on "));
  result.set_kl_divergence(0);
  EXPECT_THAT(JobReport(job), HasSubstr("divergence")) << "a measured 0 is a result";
}

TEST(JobReportTest, ShowsTasksBeforeAndAfter) {
  Job job = FinishedJob();
  EXPECT_THAT(JobReport(job), Not(HasSubstr("accuracy")));
  Job::TaskQuality& task = *job.mutable_result()->add_tasks();
  for (v1::TaskResult* result : {task.mutable_before(), task.mutable_after()}) {
    result->set_name("piqa");
    result->set_items(1838);
    result->set_accuracy(0.7523);
    result->set_accuracy_stderr(0.0101);
    result->set_accuracy_norm(0.76);
    result->set_accuracy_norm_stderr(0.01);
  }
  task.mutable_after()->set_accuracy(0.5);
  const std::string report = JobReport(job);
  EXPECT_THAT(report, HasSubstr("  task  items  model        accuracy %  accuracy norm. %  perpl"));
  EXPECT_THAT(report, HasSubstr("  piqa  1,838  original   75.23 ± 1.01      76.00 ± 1.00"));
  EXPECT_THAT(report, HasSubstr("  piqa  1,838  quantized  50.00 ± 1.01      76.00 ± 1.00"));
}

TEST(JobReportTest, ShowsWhereADeviceSpentItsTime) {
  Job job = FinishedJob();
  EXPECT_THAT(JobReport(job), Not(HasSubstr("kind of work")));
  for (const auto& [name, seconds] : {std::pair("hessian", 1.25), std::pair("columns", 12.5)}) {
    auto* time = job.mutable_result()->add_step_times();
    time->set_name(name);
    time->set_seconds(seconds);
  }
  EXPECT_THAT(JobReport(job), HasSubstr("\n  kind of work  seconds\n"
                                        "  hessian          1.25\n"
                                        "  columns         12.50\n"));
}

TEST(JobReportTest, ShowsTheFiveWorstLinearsWorstFirst) {
  const std::string report = JobReport(FinishedJob());
  const size_t worst = report.find("layers.7.mlp.down_proj");
  const size_t fifth = report.find("layers.3.mlp.down_proj");
  ASSERT_NE(worst, std::string::npos);
  ASSERT_NE(fifth, std::string::npos);
  EXPECT_LT(worst, fifth);
  EXPECT_THAT(report, Not(HasSubstr("layers.2.mlp.down_proj")));
  EXPECT_THAT(report, HasSubstr("Hessian not positive definite"));
}

TEST(JobReportTest, SaysThatNothingWasEvaluated) {
  Job job = FinishedJob();
  job.mutable_result()->set_perplexity_after(0);
  EXPECT_THAT(JobReport(job), HasSubstr("not evaluated"));
}

TEST(JobReportTest, AFailedJobShowsItsError) {
  Job job;
  job.set_name("quantizationJobs/abc");
  job.set_model_name("m");
  job.set_state(Job::FAILED);
  job.mutable_error()->set_code(15);
  job.mutable_error()->set_message("tensor 'x' holds NaN");
  job.set_error_reason("NON_FINITE_WEIGHTS");
  EXPECT_THAT(JobReport(job), HasSubstr("DATA_LOSS: tensor 'x' holds NaN (NON_FINITE_WEIGHTS)\n"));
}

TEST(JobReportTest, ARunningJobShowsItsProgress) {
  Job job;
  job.set_state(Job::RUNNING);
  job.set_stage(Job::QUANTIZING);
  job.mutable_progress()->set_fraction(0.5);
  job.mutable_progress()->set_layers_done(3);
  job.mutable_progress()->set_layers_total(6);
  EXPECT_THAT(JobReport(job), HasSubstr("QUANTIZING, 50 %, 3 of 6 layers"));
}

TEST(PreflightTextTest, ShowsWhatTheJobNeedsAndTheWorkerHas) {
  Job job;
  EXPECT_EQ(PreflightText(job), "") << "an older service";
  Job::Preflight& preflight = *job.mutable_preflight();
  preflight.set_worker("workers/w-1");
  preflight.set_device("cuda:0 NVIDIA H200");
  preflight.mutable_memory()->set_bytes_needed(1'200'000'000);
  preflight.mutable_memory()->set_bytes_total(24'700'000'000);
  preflight.mutable_memory()->set_bytes_free(20'100'000'000);
  preflight.mutable_device_memory()->set_bytes_needed(10'100'000'000);
  preflight.mutable_device_memory()->set_bytes_total(140'000'000'000);
  preflight.mutable_device_memory()->set_bytes_free(9'000'000'000);
  preflight.mutable_disk()->set_bytes_needed(98'400'000);
  preflight.mutable_disk()->set_bytes_free(50'000'000'000);
  preflight.add_warnings("the job needs 10100000000 bytes\x1b[2J");
  EXPECT_EQ(PreflightText(job),
            "  worker         w-1, jobs on cuda:0 NVIDIA H200\n"
            "  memory         1.20 GB needed, 20.1 GB of 24.7 GB free\n"
            "  device memory  10.1 GB needed, 9.00 GB of 140 GB free\n"
            "  disk           98.4 MB needed, 50.0 GB free\n"
            "\n"
            "  warnings\n"
            "  - the job needs 10100000000 bytes\xef\xbf\xbd[2J\n");
  // A worker whose system does not tell, with jobs on the CPU.
  preflight.Clear();
  preflight.set_worker("workers/w-2");
  preflight.mutable_memory()->set_bytes_needed(1'200'000'000);
  EXPECT_EQ(PreflightText(job),
            "  worker         w-2\n"
            "  memory         1.20 GB needed\n");
}

TEST(RecipeTextTest, NamesDefaultsAndChoices) {
  Job job;
  EXPECT_EQ(RecipeText(job), "4, group auto, GPTQ, GSR rotation");
  auto& config = *job.mutable_config();
  config.set_bits(3);
  config.set_group_size(-1);
  config.set_method(v1::QuantizationConfig::RTN);
  config.set_symmetric(true);
  config.mutable_rotation()->set_kind(v1::Rotation::LOCAL_HADAMARD);
  config.mutable_rotation()->set_block_size(32);
  config.mutable_rotation()->set_signs(v1::Rotation::SEEDED);
  EXPECT_EQ(RecipeText(job),
            "3, one group a channel, RTN symmetric, local-hadamard rotation in blocks of 32 with "
            "seeded signs");
  config.mutable_rotation()->set_kind(v1::Rotation::NONE);
  EXPECT_THAT(RecipeText(job), HasSubstr("no rotation"));
  config.set_symmetric(false);
  config.set_method(v1::QuantizationConfig::GPTAQ);
  config.set_grid(v1::QuantizationConfig::CODEBOOK);
  config.add_overrides()->set_pattern("layers.0.*");
  config.mutable_overrides(0)->set_bits(8);
  EXPECT_EQ(RecipeText(job),
            "3 (layers.0.*: 8), one group a channel, GPTAQ with codebooks, no rotation");
  config.add_overrides();
  config.set_grid(v1::QuantizationConfig::UNIFORM);
  config.set_zero_point(v1::QuantizationConfig::FLOAT_ZERO);
  EXPECT_EQ(RecipeText(job),
            "3 (with 2 overrides), one group a channel, GPTAQ with float zeros, no rotation");
  config.clear_overrides();
  config.set_zero_point(v1::QuantizationConfig::INTEGER_ZERO);
  config.mutable_rotation()->set_online_kind(v1::Rotation::HADAMARD);
  config.mutable_activation_quantization()->set_bits(4);
  config.mutable_kv_cache_quantization()->set_bits(2);
  EXPECT_THAT(
      RecipeText(job),
      HasSubstr("no rotation, online hadamard rotation, activations 4 bits, KV cache 2 bits"));
  config.mutable_rotation()->set_online_block_size(64);
  EXPECT_THAT(RecipeText(job), HasSubstr("online hadamard rotation in blocks of 64, activations"));
  config.mutable_rotation()->set_online_kind(v1::Rotation::NONE);
  config.mutable_activation_quantization()->set_bits(16);
  config.mutable_kv_cache_quantization()->set_bits(0);
  EXPECT_THAT(RecipeText(job), EndsWith("no rotation"));
  config.mutable_rotation()->set_head(true);
  EXPECT_THAT(RecipeText(job), EndsWith("no rotation but of values by head"));
  config.mutable_rotation()->set_kind(v1::Rotation::WALSH);
  config.mutable_rotation()->set_head(false);
  EXPECT_THAT(RecipeText(job), HasSubstr("walsh rotation"));
  EXPECT_THAT(RecipeText(job), EndsWith(", values not rotated"));
}

TEST(JobTableTest, HasARowForEachJob) {
  Job failed;
  failed.set_name("quantizationJobs/f");
  failed.set_state(Job::FAILED);
  failed.mutable_error()->set_code(3);
  failed.mutable_error()->set_message("bits");
  const std::string table = JobTable({FinishedJob(), failed});
  EXPECT_THAT(table, HasSubstr("abc  SUCCEEDED  -"));
  EXPECT_THAT(table, HasSubstr("INVALID_ARGUMENT: bits"));
}

}  // namespace
}  // namespace walsh::client
