#include "worker/pipeline/quantize_job.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/publish.h"
#include "tests/unit/worker/pipeline/counting_yield.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/io/artifact.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/plan.h"

namespace walsh::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

class RunJobTest : public testing::JobTest {
 protected:
  std::string Write(const std::string& name, const std::string& contents) {
    EXPECT_OK(PublishFile(directory_ / name, contents));
    return directory_ / name;
  }
};

TEST_F(RunJobTest, MakesAnArtifactAndSaysWhatItIs) {
  const JobSpec spec = TinyJob({.is_tied = true});
  double fraction = 0;
  std::set<Stage> stages;
  std::vector<std::string> names;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec, 2, [&](const JobProgress& progress) {
                         EXPECT_GE(progress.fraction, fraction);
                         EXPECT_LE(progress.fraction, 1.0);
                         fraction = progress.fraction;
                         stages.insert(progress.stage);
                         if (progress.stage == Stage::kQuantizing) {
                           EXPECT_GE(progress.layer, 0);
                           EXPECT_EQ(progress.layers_total, 2);
                         }
                         for (const LinearReport& linear : progress.linears) {
                           names.push_back(linear.name);
                         }
                         return absl::OkStatus();
                       }));
  EXPECT_GT(fraction, 0.5);
  EXPECT_EQ(stages.size(), 7);  // PUBLISHING is the caller's

  ASSERT_EQ(report.linears.size(), 14);
  EXPECT_EQ(names.size(), 14);
  EXPECT_EQ(report.linears[6].name, "layers.0.mlp.down_proj");
  for (const LinearReport& linear : report.linears) {
    EXPECT_GT(linear.relative_error, 0) << linear.name;
    EXPECT_LT(linear.relative_error, 0.02) << linear.name;
    EXPECT_EQ(linear.damp, 0.01);
    EXPECT_EQ(linear.fallback, "");
  }
  EXPECT_EQ(report.group_size, 64);
  EXPECT_EQ(report.rotation_block, 64);
  EXPECT_GT(report.rotation_gate, 0);
  EXPECT_LE(report.rotation_gate, 1e-4);
  EXPECT_NEAR(report.bits_per_weight, 4 + 20.0 / 64, 1e-9);
  EXPECT_EQ(report.calibration_windows, 16);
  EXPECT_EQ(report.calibration_tokens, 16 * 64);
  EXPECT_EQ(report.samples_kept, 1);
  EXPECT_EQ(report.calibration_fingerprint.size(), 64);
  EXPECT_EQ(report.window_losses_before.size(), 4);
  EXPECT_EQ(report.window_losses_after.size(), 4);
  ASSERT_EQ(report.window_divergences.size(), 4);
  EXPECT_NEAR(
      std::accumulate(report.window_divergences.begin(), report.window_divergences.end(), 0.0) / 4,
      report.kl_divergence, 1e-12);
  EXPECT_EQ(report.evaluation_tokens, 4 * 127);
  EXPECT_NEAR(std::log(report.perplexity_after / report.perplexity_before), 0, 0.2);
  EXPECT_NE(report.perplexity_after, report.perplexity_before);
  EXPECT_GT(report.kl_divergence, 0);
  EXPECT_LT(report.kl_divergence, 0.2);
  EXPECT_GT(report.top1_agreement, 0.5);
  EXPECT_LE(report.top1_agreement, 1);
  EXPECT_GT(report.stage_seconds[static_cast<int>(Stage::kQuantizing)], 0);
  EXPECT_GT(report.forward_seconds, 0);
  EXPECT_GT(report.original_forward_seconds, 0);
  EXPECT_GT(report.peak_memory_bytes, 0);
  EXPECT_THAT(report.warnings, IsEmpty());

  ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(spec.output_directory, true, 2));
  EXPECT_FALSE(artifact->config().tied_embeddings);
  EXPECT_TRUE(artifact->IsQuantized("model.layers.1.self_attn.v_proj"));
  ASSERT_OK_AND_ASSIGN(const ArtifactInfo info, ArtifactReader::ReadInfo(spec.output_directory));
  EXPECT_EQ(info.bits, 4);
  EXPECT_EQ(info.group_size, 64);
  EXPECT_EQ(info.method, "gptq");
  EXPECT_EQ(info.rotation, "gsr");
  EXPECT_EQ(info.rotation_block, 64);
  // Two jobs with one seed give the same bytes, so the artifact does not name its job.
  EXPECT_EQ(info.job, "");
  EXPECT_EQ(report.artifact.job, "jobs/1");
  EXPECT_EQ(info.perplexity_before, report.perplexity_before);
  EXPECT_EQ(info.perplexity_after, report.perplexity_after);
  EXPECT_EQ(info.sha256, report.artifact.sha256);
}

// Waits for others do not change what a job makes, and are told apart from its work.
TEST_F(RunJobTest, YieldingChangesNothing) {
  JobSpec spec = TinyJob();
  ASSERT_OK_AND_ASSIGN(const JobReport alone, Run(spec));
  EXPECT_THAT(alone.steps, IsEmpty());
  const auto digests = Digests(spec.output_directory);
  spec.output_directory = directory_ / "yielding";
  testing::CountingYield yield(std::chrono::microseconds(200));
  ThreadPool pool(2);
  ASSERT_OK_AND_ASSIGN(const JobReport report,
                       RunJob(spec, *MakeCpuBackend(), pool, testing::IgnoreProgress, &yield));
  EXPECT_GT(yield.n_waits(), 2 * 20) << "some in every layer";
  EXPECT_EQ(Digests(spec.output_directory), digests);
  ASSERT_EQ(report.steps.size(), 1);
  EXPECT_EQ(report.steps[0].name, "yielded");
  EXPECT_GE(report.steps[0].seconds, yield.seconds());
}

struct Variant {
  const char* name;
  testing::TinyModelOptions model;
  rotate::Kind rotation;
  bool signs;
  int bits;
  int64_t group;
  bool symmetric;
};

class VariantTest : public testing::JobTest, public ::testing::WithParamInterface<Variant> {};

// Every combination goes through, passes the gate and costs at 8 bits next to nothing.
TEST_P(VariantTest, PassesTheGate) {
  const Variant& v = GetParam();
  JobSpec spec = TinyJob(v.model);
  spec.rotation = v.rotation;
  spec.rotation_signs = v.signs;
  spec.quantizer.bits = v.bits;
  spec.quantizer.group_size = v.group;
  spec.quantizer.symmetric = v.symmetric;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_LE(report.rotation_gate, 1e-5);
  EXPECT_EQ(report.rotation_gate == 0, v.rotation == rotate::Kind::kNone);
  const double loss = std::log(report.perplexity_after / report.perplexity_before);
  EXPECT_LT(std::abs(loss), v.bits == 8 ? 0.01 : 1.0);
}

INSTANTIATE_TEST_SUITE_P(
    Models, VariantTest,
    ::testing::Values(
        Variant{"None", {}, rotate::Kind::kNone, false, 8, 0, false},
        Variant{"Hadamard", {}, rotate::Kind::kHadamard, false, 8, 32, false},
        Variant{"WalshSigns", {}, rotate::Kind::kWalsh, true, 8, 0, true},
        Variant{"LocalHadamard", {}, rotate::Kind::kLocalHadamard, true, 3, 32, false},
        Variant{"Gsr2Bits", {}, rotate::Kind::kGsr, false, 2, 32, false},
        Variant{"PerChannel", {}, rotate::Kind::kGsr, false, 8, -1, false},
        Variant{"Tied", {.is_tied = true}, rotate::Kind::kGsr, true, 8, 0, false},
        Variant{"Biases",
                {.has_attention_bias = true, .has_mlp_bias = true},
                rotate::Kind::kGsr,
                false,
                8,
                0,
                false},
        Variant{"Bf16Paley",
                {.hidden = 288, .n_heads = 3, .n_kv_heads = 3, .head_dim = 96, .dtype = "BF16"},
                rotate::Kind::kWalsh,
                false,
                8,
                32,
                false}),
    [](const auto& variant) { return std::string(variant.param.name); });

TEST_F(RunJobTest, BytesDependOnSeedAndOptionsOnly) {
  for (const bool is_self : {false, true}) {
    JobSpec spec = TinyJob();
    spec.rotation_signs = true;
    spec.seed = 5;
    spec.n_calibration_windows = 8;
    if (is_self) spec.calibration_path.clear();
    std::map<std::string, std::string> first;
    for (const int threads : {1, 2, 3}) {
      spec.output_directory = directory_ / ("out" + std::to_string(threads));
      ASSERT_OK(Run(spec, threads));
      const auto digests = Digests(spec.output_directory);
      ASSERT_GE(digests.size(), 4);
      if (threads == 1) {
        first = digests;
      } else {
        EXPECT_EQ(digests, first) << threads << " threads, self " << is_self;
      }
      std::filesystem::remove_all(spec.output_directory);
    }
    spec.seed = 6;
    spec.output_directory = directory_ / "other";
    ASSERT_OK(Run(spec));
    EXPECT_NE(Digests(spec.output_directory), first);
    std::filesystem::remove_all(spec.output_directory);
  }
}

TEST_F(RunJobTest, SelfCalibrationNeedsNoText) {
  JobSpec spec = TinyJob();
  spec.calibration_path.clear();
  std::vector<std::pair<Stage, int64_t>> steps;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec, 2, [&](const JobProgress& progress) {
                         if (steps.empty() || steps.back().first != progress.stage) {
                           steps.emplace_back(progress.stage, progress.layer);
                         }
                         return absl::OkStatus();
                       }));
  // Writing the text ends before anything is written of the model.
  const std::pair<Stage, int64_t> own_text = {Stage::kCalibrating, -1};
  const auto found = std::ranges::find(steps, own_text);
  ASSERT_LT(found - steps.begin(), static_cast<int64_t>(steps.size()) - 2);
  EXPECT_EQ(found[1], std::pair(Stage::kRotating, int64_t{-1}));
  EXPECT_EQ(found[2], std::pair(Stage::kCalibrating, int64_t{0}));
  EXPECT_EQ(report.calibration_windows, 16);
  EXPECT_EQ(report.samples_kept, 0);
  EXPECT_GT(report.perplexity_before, 1);
  EXPECT_EQ(report.linears.size(), 14);
}

// With block = group, GSR's groups hold what local Hadamard's do, in another order:
// round-to-nearest cannot tell them apart. Only the inputs of later linears differ, by rounding.
TEST_F(RunJobTest, LocalHadamardEqualsGsrUnderRoundToNearest) {
  JobSpec spec = TinyJob();
  spec.quantizer.method = gptq::Method::kRtn;
  spec.quantizer.bits = 3;
  spec.quantizer.group_size = 32;
  spec.evaluate = false;
  ASSERT_OK_AND_ASSIGN(const JobReport gsr, Run(spec));
  spec.rotation = rotate::Kind::kLocalHadamard;
  spec.output_directory = directory_ / "local";
  ASSERT_OK_AND_ASSIGN(const JobReport local, Run(spec));
  for (size_t i = 0; i < gsr.linears.size(); ++i) {
    // o and down read rotated heads and activations alike; ties may fall either way.
    EXPECT_NEAR(gsr.linears[i].relative_error / local.linears[i].relative_error, 1.0, 0.02)
        << gsr.linears[i].name;
  }
  EXPECT_NEAR(gsr.linears[0].relative_error / local.linears[0].relative_error, 1.0, 1e-3);
  EXPECT_EQ(gsr.perplexity_before, 0);
  EXPECT_THAT(gsr.window_losses_before, IsEmpty());
}

TEST_F(RunJobTest, GptqBeatsRoundToNearestOnCalibrationInputs) {
  JobSpec spec = TinyJob();
  spec.quantizer.bits = 3;
  spec.evaluate = false;
  ASSERT_OK_AND_ASSIGN(const JobReport gptq, Run(spec));
  spec.quantizer.method = gptq::Method::kRtn;
  spec.output_directory = directory_ / "rtn";
  ASSERT_OK_AND_ASSIGN(const JobReport rtn, Run(spec));
  double log_ratio = 0;
  for (size_t i = 0; i < gptq.linears.size(); ++i) {
    const double ratio = gptq.linears[i].relative_error / rtn.linears[i].relative_error;
    EXPECT_LE(ratio, 0.95) << gptq.linears[i].name;
    log_ratio += std::log(ratio) / static_cast<double>(gptq.linears.size());
  }
  EXPECT_LE(std::exp(log_ratio), 0.80);
}

TEST_F(RunJobTest, CancelledInAnyStageLeavesNothing) {
  JobSpec spec = TinyJob();
  for (const bool is_self : {false, true}) {
    if (is_self) spec.calibration_path.clear();
    for (int stage = static_cast<int>(Stage::kValidating);
         stage < static_cast<int>(Stage::kPublishing); ++stage) {
      int64_t n_calls = 0;
      EXPECT_THAT(Run(spec, 2,
                      [&](const JobProgress& progress) {
                        ++n_calls;
                        return static_cast<int>(progress.stage) == stage
                                   ? absl::CancelledError("by the test")
                                   : absl::OkStatus();
                      }),
                  StatusIs(absl::StatusCode::kCancelled, HasSubstr("by the test")));
      EXPECT_GT(n_calls, 0) << StageName(static_cast<Stage>(stage));
      EXPECT_FALSE(Exists(spec.output_directory)) << StageName(static_cast<Stage>(stage));
    }
  }
  // A lost lease travels as it is.
  EXPECT_THAT(Run(spec, 1, [](const JobProgress&) { return absl::AbortedError("lease"); }),
              HasCode(absl::StatusCode::kAborted));
}

TEST_F(RunJobTest, NanInTheWeightsNamesTheTensor) {
  const JobSpec spec = TinyJob({}, testing::Damage::kNan);
  EXPECT_THAT(Run(spec), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("layers.1.mlp.up_proj")));
  EXPECT_FALSE(Exists(spec.output_directory));
}

// It is made while the source is hashed.
TEST_F(RunJobTest, ATokenizerThatIsNotTakenEndsTheJobInLoading) {
  const JobSpec spec = TinyJob();
  const std::string path = spec.source_path + "/tokenizer.json";
  const auto run = [&](const std::string& tokenizer_json, Stage* last) {
    std::ofstream(path) << tokenizer_json;
    return Run(spec, 2,
               [&](const JobProgress& progress) {
                 *last = progress.stage;
                 return absl::OkStatus();
               })
        .status();
  };
  Stage last = Stage::kValidating;
  EXPECT_THAT(run(R"({"model": {"type": "WordPiece"}})", &last),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("tokenizer.json")));
  EXPECT_EQ(last, Stage::kLoading);
  last = Stage::kValidating;
  EXPECT_THAT(run("{", &last),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tokenizer.json")));
  EXPECT_EQ(last, Stage::kLoading);
  EXPECT_FALSE(Exists(spec.output_directory));
}

TEST_F(RunJobTest, ExistingOutputIsNotTouched) {
  const JobSpec spec = TinyJob();
  std::filesystem::create_directory(spec.output_directory);
  std::ofstream(spec.output_directory + "/precious") << "keep";
  EXPECT_THAT(Run(spec), HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_TRUE(Exists(spec.output_directory + "/precious"));
}

// Made by somebody else between the job's look at it and its first write.
TEST_F(RunJobTest, OutputThatAppearsMeanwhileIsNotTouched) {
  const JobSpec spec = TinyJob();
  EXPECT_THAT(Run(spec, 2,
                  [&](const JobProgress& progress) {
                    if (progress.stage == Stage::kRotating && !Exists(spec.output_directory)) {
                      std::filesystem::create_directory(spec.output_directory);
                      std::ofstream(spec.output_directory + "/precious") << "keep";
                    }
                    return absl::OkStatus();
                  }),
              HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_TRUE(Exists(spec.output_directory + "/precious"));
}

TEST_F(RunJobTest, TextsThatDoNotDo) {
  JobSpec spec = TinyJob();
  spec.calibration_path = directory_ / "none.txt";
  EXPECT_THAT(Run(spec), HasCode(absl::StatusCode::kNotFound));
  spec.calibration_path = WriteText("empty.txt", 0);
  EXPECT_THAT(Run(spec), HasCode(absl::StatusCode::kInvalidArgument));
  spec.calibration_path = WriteText("one.txt", 1);
  EXPECT_THAT(Run(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                  AllOf(HasSubstr("fewer than one window"), HasSubstr("64"))));
  spec.calibration_path = directory_ / "text.txt";
  spec.evaluation_path = directory_ / "none.txt";
  EXPECT_THAT(Run(spec), HasCode(absl::StatusCode::kNotFound));
  EXPECT_FALSE(Exists(spec.output_directory));
}

TEST_F(RunJobTest, ShortTextsAreUsedAsFarAsTheyGoAndSaidSo) {
  JobSpec spec = TinyJob();
  spec.calibration_path = WriteText("short.txt", 8);
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_LT(report.calibration_windows, 16);
  EXPECT_GT(report.evaluation_tokens, 0);
  EXPECT_THAT(report.warnings, Contains(HasSubstr("calibrated on")));
  EXPECT_THAT(report.warnings, Contains(HasSubstr("evaluated on")));
}

TEST_F(RunJobTest, EvaluationTextOfItsOwn) {
  JobSpec spec = TinyJob();
  ASSERT_OK_AND_ASSIGN(const JobReport held_out, Run(spec));
  spec.evaluation_path = WriteText("other.txt", 300);
  spec.output_directory = directory_ / "second";
  ASSERT_OK_AND_ASSIGN(const JobReport own, Run(spec));
  EXPECT_EQ(own.calibration_fingerprint, held_out.calibration_fingerprint);
  EXPECT_NE(own.window_losses_before, held_out.window_losses_before);
}

// What EvaluateArtifact measures of it: tests/unit/worker/evaluate/evaluate_artifact_test.cc.
TEST_F(RunJobTest, OverlappingWindowsPredictEachTokenOnce) {
  JobSpec spec = TinyJob();
  spec.evaluation_stride = 32;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_EQ(report.evaluation_tokens, 127 + 3 * 32);
  ASSERT_EQ(report.window_losses_after.size(), 4u);
  const double loss = (127 * report.window_losses_after[0] + 32 * report.window_losses_after[1] +
                       32 * report.window_losses_after[2] + 32 * report.window_losses_after[3]) /
                      (127 + 3 * 32);
  EXPECT_NEAR(std::log(report.perplexity_after), loss, 1e-9);
}

TEST_F(RunJobTest, TasksAreScoredWithoutATextToo) {
  JobSpec spec = TinyJob();
  spec.evaluation_path = Write("short.txt", "too short");
  spec.tasks = {{.path = Write("last.jsonl", R"({"context": "The waves", "continuation": "of"})")}};
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_EQ(report.perplexity_after, 0);
  ASSERT_EQ(report.tasks.size(), 1u);
  EXPECT_EQ(report.tasks[0].before.name, "last");
  EXPECT_GT(report.tasks[0].before.score.perplexity->mean, 1);
  EXPECT_GT(report.tasks[0].after.score.perplexity->mean, 1);
  EXPECT_NE(report.tasks[0].before.score.perplexity->mean,
            report.tasks[0].after.score.perplexity->mean);
  // Their figures are in walsh.json.
  const auto digests = Digests(spec.output_directory);
  spec.output_directory = directory_ / "again";
  ASSERT_OK(Run(spec, 3));
  EXPECT_EQ(Digests(spec.output_directory), digests);
}

// In VALIDATING what the file shows, in LOADING what the tokenizer does: before any work.
TEST_F(RunJobTest, BadTasksEndTheJobBeforeItsWork) {
  JobSpec spec = TinyJob();
  const auto refused = [&](const std::string& lines, Stage last, const char* message) {
    spec.tasks = {{.path = Write("task.jsonl", lines), .name = "/asked/for.jsonl"}};
    const auto in_time = [&](const JobProgress& progress) {
      EXPECT_LE(progress.stage, last) << message;
      return absl::OkStatus();
    };
    EXPECT_THAT(Run(spec, 2, in_time),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    EXPECT_FALSE(Exists(spec.output_directory));
  };
  refused("{}", Stage::kValidating, "task 1: line 1");
  const std::string longer(1000, 'x');
  refused(R"({"context": "a", "continuation": ")" + longer + "\"}", Stage::kLoading,
          "task 'for': item 0: a continuation has ");
}

TEST_F(RunJobTest, TasksAreNotReadWhereNothingIsEvaluated) {
  JobSpec spec = TinyJob();
  spec.evaluate = false;
  spec.tasks = {{.path = directory_ / "none.jsonl"}};
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_THAT(report.tasks, IsEmpty());
}

TEST_F(RunJobTest, MissingParentOfTheOutputIsAnError) {
  JobSpec spec = TinyJob();
  spec.output_directory = directory_ / "none/out";
  EXPECT_FALSE(Run(spec).ok());
  EXPECT_FALSE(Exists(directory_ / "none"));
}

}  // namespace
}  // namespace walsh::pipeline
