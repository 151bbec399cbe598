#include "worker/pipeline/progress.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh::pipeline {
namespace {

using ::walsh::testing::HasCode;
using Shown = std::vector<std::pair<Stage, int64_t>>;

TEST(ProgressTest, PassShowsAStageOnceAtOnce) {
  Shown shown;
  const Observer observer = [&](const JobProgress& progress) {
    shown.emplace_back(progress.stage, progress.layer);
    return absl::OkStatus();
  };
  Progress progress(observer);
  ASSERT_OK(progress.Pass(Stage::kCalibrating, 0));
  ASSERT_OK(progress.Pass(Stage::kQuantizing, 0));
  ASSERT_OK(progress.Pass(Stage::kCalibrating, 1));
  ASSERT_OK(progress.Pass(Stage::kQuantizing, 1));
  EXPECT_EQ(shown, (Shown{{Stage::kCalibrating, 0}, {Stage::kQuantizing, 0}}));
  // What was passed since is what the next report shows.
  ASSERT_OK(progress.Enter(Stage::kPacking, 1));
  EXPECT_EQ(shown.back(), (std::pair{Stage::kPacking, int64_t{1}}));
  double seconds[kStages];
  progress.FinishTimes(seconds);
  EXPECT_GT(seconds[static_cast<int>(Stage::kCalibrating)], 0);
  EXPECT_GT(seconds[static_cast<int>(Stage::kQuantizing)], 0);
  EXPECT_EQ(seconds[static_cast<int>(Stage::kEvaluating)], 0);
}

TEST(ProgressTest, TheObserversStatusEndsAPass) {
  const Observer observer = [](const JobProgress&) { return absl::CancelledError("stop"); };
  Progress progress(observer);
  EXPECT_THAT(progress.Pass(Stage::kCalibrating, 0), HasCode(absl::StatusCode::kCancelled));
}

}  // namespace
}  // namespace walsh::pipeline
