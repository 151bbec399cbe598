#include "worker/pipeline/progress.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/pipeline/counting_yield.h"

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

TEST(ProgressTest, AnEarlierRunsWorkIsDoneAndTellsNothingOfTheRest) {
  JobProgress shown;
  const Observer observer = [&](const JobProgress& progress) {
    shown = progress;
    return absl::OkStatus();
  };
  Progress progress(observer);
  progress.Plan(100);
  progress.Resume(60, 3);
  progress.set_keeps_layers(true);
  ASSERT_OK(progress.Enter(Stage::kCalibrating, 3));
  EXPECT_EQ(shown.fraction, 0.6);
  EXPECT_EQ(shown.layers_done, 3);
  EXPECT_TRUE(shown.keeps_layers);
  EXPECT_EQ(shown.eta_seconds, -1);
}

TEST(ProgressTest, TimeWaitedIsNoStages) {
  const Observer nobody;
  testing::CountingYield yield(std::chrono::milliseconds(30));
  int n_settled = 0;
  const auto start = std::chrono::steady_clock::now();
  Progress progress(nobody, &yield, [&] {
    ++n_settled;
    return absl::OkStatus();
  });
  ASSERT_OK(progress.Enter(Stage::kQuantizing, 0));
  ASSERT_OK(progress.Advance(1));
  ASSERT_OK(progress.Within(1));
  ASSERT_OK(progress.Pass(Stage::kPacking, 0));
  ASSERT_OK(progress.Pass(Stage::kPacking, 0));
  double stage_seconds[kStages];
  progress.FinishTimes(stage_seconds);
  const std::chrono::duration<double> all = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(yield.n_waits(), 3);
  EXPECT_EQ(n_settled, 3);
  EXPECT_GE(progress.seconds_yielded(), yield.seconds());
  double sum = progress.seconds_yielded();
  for (const double seconds : stage_seconds) sum += seconds;
  EXPECT_LE(sum, all.count());
}

// What is finished is told once, whoever asks.
TEST(ProgressTest, AWaitAsksTheObserverAndEndsWithItsStatus) {
  int n_asked = 0;
  int n_linears = 0;
  const Observer observer = [&](const JobProgress& progress) {
    n_linears += static_cast<int>(progress.linears.size());
    return ++n_asked < 5 ? absl::OkStatus() : absl::CancelledError("stop");
  };
  testing::CountingYield yield(std::chrono::minutes(5));
  Progress progress(observer, &yield);
  progress.LinearDone({.name = "layers.0.mlp.down_proj"});
  EXPECT_THAT(progress.Advance(1), HasCode(absl::StatusCode::kCancelled));
  EXPECT_EQ(n_asked, 5);
  EXPECT_EQ(n_linears, 1);
}

TEST(ProgressTest, WhatCannotSettleDoesNotWait) {
  const Observer nobody;
  testing::CountingYield yield(std::chrono::minutes(5));
  Progress progress(nobody, &yield, [] { return absl::InternalError("the device is broken"); });
  EXPECT_THAT(progress.Advance(1), HasCode(absl::StatusCode::kInternal));
  EXPECT_EQ(yield.n_waits(), 0);
}

}  // namespace
}  // namespace walsh::pipeline
