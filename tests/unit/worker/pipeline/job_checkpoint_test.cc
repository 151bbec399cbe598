// Jobs that are interrupted and go on: the metamorphic test of checkpoints is that the artifact's
// bytes are those of an undisturbed run, wherever it was interrupted.
#include "worker/pipeline/job_checkpoint.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/publish.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/pipeline/checkpoint_store.h"

namespace walsh::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

constexpr int64_t kLayers = 3;

// A store whose puts can fail, as on a disk that is full.
class FailingStore : public CheckpointStore {
 public:
  explicit FailingStore(std::unique_ptr<CheckpointStore> store) : store_(std::move(store)) {}
  absl::StatusOr<Found> Claim() override { return store_->Claim(); }
  absl::StatusOr<Object> Put(std::string_view contents) override {
    if (n_puts_left-- <= 0) return absl::ResourceExhaustedError("no space left");
    return store_->Put(contents);
  }
  absl::Status Get(const Object& object, std::span<std::byte> into) const override {
    return store_->Get(object, into);
  }
  absl::Status Check(const Object& object) const override { return store_->Check(object); }
  absl::Status Commit(const Generation& generation) override { return store_->Commit(generation); }
  absl::Status Discard() override { return store_->Discard(); }
  absl::StatusOr<int64_t> FreeBytes() const override {
    return free_bytes < 0 ? store_->FreeBytes() : free_bytes;
  }

  int n_puts_left = 1000;
  int64_t free_bytes = -1;  // negative: the disk's

 private:
  const std::unique_ptr<CheckpointStore> store_;
};

class JobCheckpointTest : public testing::JobTest {
 protected:
  JobSpec SmallJob() {
    JobSpec spec = TinyJob({.n_layers = kLayers});
    spec.n_calibration_windows = 2;
    spec.evaluate = false;
    return spec;
  }

  std::string CheckpointPath() const { return directory_ / "checkpoint"; }

  struct RunResult {
    absl::StatusOr<JobReport> report;
    int64_t first_layer = -1;  // that was worked on
    std::vector<std::string> messages;
    bool keeps_layers = false;
  };

  // A run of its own, as a worker's that got the job with this token.
  RunResult RunWith(JobSpec spec, CheckpointStore& store,
                    const std::function<bool(const JobProgress&)>& is_end) {
    spec.checkpoints = &store;
    RunResult result{absl::UnknownError("not run"), -1, {}, false};
    result.report = Run(spec, 2, [&](const JobProgress& progress) -> absl::Status {
      if (result.first_layer < 0) result.first_layer = progress.layer;
      if (!progress.message.empty()) result.messages.push_back(progress.message);
      result.keeps_layers = progress.keeps_layers;
      return is_end(progress) ? absl::UnavailableError("stopped") : absl::OkStatus();
    });
    return result;
  }
  RunResult RunAgain(const JobSpec& spec,
                     const std::function<bool(const JobProgress&)>& is_end = Never) {
    return RunWith(spec, *MakeDirectoryCheckpointStore(CheckpointPath(), ++token_), is_end);
  }

  static bool Never(const JobProgress&) { return false; }
  // When `n` layers are done and kept.
  static std::function<bool(const JobProgress&)> AfterLayers(int64_t n) {
    return [n](const JobProgress& progress) { return progress.layers_done == n; };
  }

  std::map<std::string, std::string> Undisturbed(const JobSpec& spec) {
    EXPECT_OK(Run(spec));
    auto digests = Digests(spec.output_directory);
    EXPECT_OK(RemoveTree(spec.output_directory));
    return digests;
  }

  void FlipByte(const std::string& path) {
    ASSERT_OK_AND_ASSIGN(std::string contents, ReadFile(path, 1 << 30));
    contents.at(contents.size() / 2) ^= 1;
    ASSERT_OK(PublishFile(path, contents));
  }

  int64_t token_ = 0;
};

struct Variant {
  const char* name;
  std::function<void(JobSpec&)> change;
};

class ResumeTest : public JobCheckpointTest, public ::testing::WithParamInterface<Variant> {};

TEST_P(ResumeTest, GoesOnAtEveryLayerToTheSameBytes) {
  JobSpec spec = SmallJob();
  GetParam().change(spec);
  const auto expected = Undisturbed(spec);
  for (int64_t n = 0; n <= kLayers; ++n) {
    SCOPED_TRACE(n);
    ASSERT_OK(RemoveTree(CheckpointPath()));
    const RunResult stopped = RunAgain(spec, [&](const JobProgress& progress) {
      return progress.layers_done == n && (n > 0 || progress.layer == 0);
    });
    ASSERT_THAT(stopped.report, HasCode(absl::StatusCode::kUnavailable));
    const RunResult resumed = RunAgain(spec);
    ASSERT_OK(resumed.report);
    EXPECT_EQ(resumed.first_layer, n < kLayers ? n : -1) << "at most one layer is done twice";
    EXPECT_EQ(Digests(spec.output_directory), expected);
    ASSERT_OK(RemoveTree(spec.output_directory));
  }
}

INSTANTIATE_TEST_SUITE_P(Options, ResumeTest,
                         ::testing::Values(
                             // Error propagation: the original's activations are kept, too.
                             Variant{"Default", [](JobSpec&) {}},
                             Variant{"OneStream",
                                     [](JobSpec& spec) {
                                       spec.rotation = rotate::Kind::kNone;
                                       spec.quantizer.error_propagation = 0;
                                       spec.quantizer.column_order = gptq::ColumnOrder::kActOrder;
                                     }},
                             Variant{"Gptaq",
                                     [](JobSpec& spec) {
                                       spec.rotation = rotate::Kind::kHadamard;
                                       spec.rotation_signs = true;
                                       spec.quantizer.method = gptq::Method::kGptaq;
                                       spec.quantizer.bits = 3;
                                       spec.overrides = {{"*.down_proj", 8}};
                                     }},
                             Variant{"RoundToNearest",
                                     [](JobSpec& spec) {
                                       spec.quantizer.method = gptq::Method::kRtn;
                                       spec.quantizer.symmetric = true;
                                     }},
                             Variant{"CodebookOnline",
                                     [](JobSpec& spec) {
                                       spec.quantizer.bits = 2;
                                       spec.quantizer.grid = gptq::Grid::kCodebook;
                                       spec.online.down_rotation = rotate::Kind::kWalsh;
                                       spec.online.activation_bits = 8;
                                     }}),
                         [](const auto& variant) { return std::string(variant.param.name); });

TEST_F(JobCheckpointTest, EvaluationIsDoneAgainAndNoLayer) {
  JobSpec spec = SmallJob();
  spec.evaluate = true;
  const auto expected = Undisturbed(spec);
  EXPECT_THAT(
      RunAgain(spec, [](const JobProgress& p) { return p.stage == Stage::kEvaluating; }).report,
      HasCode(absl::StatusCode::kUnavailable));
  const RunResult resumed = RunAgain(spec);
  ASSERT_OK(resumed.report);
  EXPECT_EQ(resumed.first_layer, -1);
  EXPECT_EQ(resumed.report->linears.size(), 7 * kLayers);
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

TEST_F(JobCheckpointTest, TheModelsOwnTextIsWrittenOnce) {
  JobSpec spec = SmallJob();
  spec.calibration_path.clear();
  const auto expected = Undisturbed(spec);
  const auto is_written = [](const JobProgress& p) { return p.layer == 0; };
  EXPECT_THAT(RunAgain(spec, is_written).report, HasCode(absl::StatusCode::kUnavailable));
  ASSERT_TRUE(Exists(CheckpointPath() + "/objects"));
  EXPECT_FALSE(std::filesystem::is_empty(CheckpointPath() + "/objects"));
  ASSERT_OK(RunAgain(spec).report);
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

TEST_F(JobCheckpointTest, InterruptedAgainAndAgain) {
  const JobSpec spec = SmallJob();
  const auto expected = Undisturbed(spec);
  for (int64_t n = 1; n <= kLayers; ++n) {
    const RunResult stopped = RunAgain(spec, AfterLayers(n));
    ASSERT_THAT(stopped.report, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_TRUE(stopped.keeps_layers);
  }
  ASSERT_OK(RunAgain(spec).report);
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

TEST_F(JobCheckpointTest, AnotherIdentityIsAnErrorThatNamesTheFields) {
  JobSpec spec = SmallJob();
  EXPECT_FALSE(RunAgain(spec, AfterLayers(2)).report.ok());
  JobSpec other = spec;
  other.quantizer.bits = 3;
  other.seed = 9;
  EXPECT_THAT(RunAgain(other).report,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("quantization/bits was 4, is 3"),
                             HasSubstr("seed was 0, is 9"), Not(HasSubstr("source")))));
  // The calibration text, whose tokens are known only later.
  std::filesystem::copy_file(directory_ / "text.txt", directory_ / "kept.txt");
  ASSERT_OK(PublishFile(directory_ / "text.txt", std::string(4000, 'x')));
  EXPECT_THAT(RunAgain(spec).report,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("fingerprint was")));
  std::filesystem::copy_file(directory_ / "kept.txt", directory_ / "text.txt",
                             std::filesystem::copy_options::overwrite_existing);
  testing::TinyModel({.seed = 2, .n_layers = kLayers}).WriteHf(directory_ / "model");
  EXPECT_THAT(RunAgain(spec).report,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("source/sha256 was")));
}

// Each file of the checkpoint is damaged in turn: what comes out is right in any case.
TEST_F(JobCheckpointTest, DamageCostsWorkAndNothingElse) {
  const JobSpec spec = SmallJob();
  const auto expected = Undisturbed(spec);
  EXPECT_FALSE(RunAgain(spec, AfterLayers(2)).report.ok());
  const std::string whole = directory_ / "whole";
  std::filesystem::copy(CheckpointPath(), whole, std::filesystem::copy_options::recursive);
  std::map<int64_t, int> n_by_first_layer;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(whole)) {
    if (!entry.is_regular_file() || entry.file_size() == 0) continue;
    const std::string name = std::filesystem::relative(entry.path(), whole);
    SCOPED_TRACE(name);
    ASSERT_OK(RemoveTree(CheckpointPath()));
    std::filesystem::copy(whole, CheckpointPath(), std::filesystem::copy_options::recursive);
    FlipByte(CheckpointPath() + "/" + name);
    const RunResult resumed = RunAgain(spec);
    ASSERT_OK(resumed.report);
    ++n_by_first_layer[resumed.first_layer];
    if (name != "PREVIOUS" && resumed.first_layer < 2) {
      EXPECT_THAT(resumed.messages, Contains(HasSubstr("was damaged")));
    }
    EXPECT_EQ(Digests(spec.output_directory), expected);
    ASSERT_OK(RemoveTree(spec.output_directory));
  }
  // The first layer's tensors are in both generations; CURRENT, the second layer and the two
  // activations behind it in the newer one; the others in the older one.
  EXPECT_THAT(n_by_first_layer, ElementsAre(std::pair(0, 1), std::pair(1, 4), std::pair(2, 3)));
}

TEST_F(JobCheckpointTest, BothGenerationsDamagedStartsOver) {
  const JobSpec spec = SmallJob();
  const auto expected = Undisturbed(spec);
  EXPECT_FALSE(RunAgain(spec, AfterLayers(2)).report.ok());
  FlipByte(CheckpointPath() + "/CURRENT");
  FlipByte(CheckpointPath() + "/PREVIOUS");
  const RunResult resumed = RunAgain(spec);
  ASSERT_OK(resumed.report);
  EXPECT_EQ(resumed.first_layer, 0);
  EXPECT_THAT(resumed.messages, Contains("starts over; its checkpoint was damaged"));
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

TEST_F(JobCheckpointTest, AFullDiskEndsTheCheckpointsAndNotTheJob) {
  const JobSpec spec = SmallJob();
  const auto expected = Undisturbed(spec);
  FailingStore store(MakeDirectoryCheckpointStore(CheckpointPath(), ++token_));
  store.n_puts_left = 5;  // a layer has three
  const RunResult first = RunWith(spec, store, Never);
  ASSERT_OK(first.report);
  EXPECT_FALSE(first.keeps_layers);
  EXPECT_THAT(first.messages, Contains("goes on without checkpoints: no space left"));
  EXPECT_THAT(first.report->warnings, IsEmpty()) << "they are part of the artifact";
  EXPECT_EQ(Digests(spec.output_directory), expected);
  ASSERT_OK(RemoveTree(spec.output_directory));
  const RunResult resumed = RunAgain(spec);
  ASSERT_OK(resumed.report);
  EXPECT_EQ(resumed.first_layer, 1) << "what was kept before is still there";
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

TEST_F(JobCheckpointTest, LeavesTheArtifactItsSpace) {
  const JobSpec spec = SmallJob();
  FailingStore store(MakeDirectoryCheckpointStore(CheckpointPath(), ++token_));
  store.free_bytes = 200'000;
  const RunResult run = RunWith(spec, store, Never);
  ASSERT_OK(run.report);
  EXPECT_THAT(run.messages, Contains(AllOf(HasSubstr("goes on without checkpoints"),
                                           HasSubstr("200000 are free"))));
  EXPECT_THAT(std::filesystem::is_empty(CheckpointPath() + "/objects"), true);
}

// A holder that died may keep the lock a little longer, on a network's disk.
TEST_F(JobCheckpointTest, ALockThatIsHeldForAMomentCostsNoLayer) {
  const JobSpec spec = SmallJob();
  const auto expected = Undisturbed(spec);
  EXPECT_THAT(RunAgain(spec, AfterLayers(1)).report, HasCode(absl::StatusCode::kUnavailable));
  const int lock = open((CheckpointPath() + "/lock").c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_EQ(flock(lock, LOCK_EX), 0);
  const RunResult refused = RunAgain(spec);
  EXPECT_THAT(refused.report, HasCode(absl::StatusCode::kUnavailable)) << "tried again later";
  EXPECT_EQ(refused.first_layer, -1);
  close(lock);
  const RunResult resumed = RunAgain(spec);
  ASSERT_OK(resumed.report);
  EXPECT_EQ(resumed.first_layer, 1);
  EXPECT_EQ(Digests(spec.output_directory), expected);
}

// A worker that slept through the loss of its lease.
TEST_F(JobCheckpointTest, AJobThatIsAnothersStops) {
  const JobSpec spec = SmallJob();
  const auto store = MakeDirectoryCheckpointStore(CheckpointPath(), 1);
  const RunResult run = RunWith(spec, *store, [&](const JobProgress& progress) {
    if (progress.layers_done == 1 && progress.stage == Stage::kCalibrating) {
      EXPECT_OK(MakeDirectoryCheckpointStore(CheckpointPath(), 2)->Claim());
    }
    return false;
  });
  EXPECT_THAT(run.report, HasCode(absl::StatusCode::kAborted));
  EXPECT_FALSE(Exists(spec.output_directory));
}

}  // namespace
}  // namespace walsh::pipeline
