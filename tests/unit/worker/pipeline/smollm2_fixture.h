// A short job on SmolLM2-135M, calibrated on Wikipedia; skips where the model or the text is
// missing.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <utility>

#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/pipeline/plan.h"

namespace walsh::pipeline {

class SmolLm2Test : public testing::JobTest {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_SMOLLM2(model);
    WALSH_REQUIRE_DATA(corpus, "corpora/wikitext-train-1000.json");
    spec_.job_name = "jobs/1";
    spec_.model_name = "smollm2";
    spec_.source_path = model;
    spec_.calibration_path = corpus;
    spec_.quantizer.group_size = 0;
    spec_.n_calibration_windows = 16;
    spec_.sequence_length = 256;
    spec_.evaluate = false;
    spec_.output_directory = directory_ / "out";
  }

  JobReport RunOnce() {
    auto report = Run(spec_, ThreadPool::HardwareThreads());
    EXPECT_OK(report);
    std::filesystem::remove_all(spec_.output_directory);
    return *std::move(report);
  }

  // What the job held, against what it was said to hold.
  static void ExpectPlanned(const JobPlan& plan, const JobReport& report) {
    EXPECT_LT(report.peak_memory_bytes, plan.memory_bytes_needed * 5 / 4);
    EXPECT_GT(report.peak_memory_bytes, plan.memory_bytes_needed / 2);
    RecordProperty("peak_mib", static_cast<int>(report.peak_memory_bytes >> 20));
    RecordProperty("planned_mib", static_cast<int>(plan.memory_bytes_needed >> 20));
  }

  JobSpec spec_;
};

}  // namespace walsh::pipeline
