// A short job on SmolLM2-135M, calibrated on Wikipedia; skips where the model or the text is
// missing.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "common/sha256.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/pipeline/plan.h"

namespace walsh::pipeline {

// docs/quality.md: rows with their line ends, blank ones made empty, joined by a blank line.
inline std::string WikiText2Test(const std::string& raw_path) {
  std::ifstream raw(raw_path, std::ios::binary);
  std::string text, row;
  for (bool is_first = true; std::getline(raw, row); is_first = false) {
    if (!is_first) text += "\n\n";
    if (row.find_first_not_of(" \t\r") != std::string::npos) text += row + "\n";
  }
  return text;
}

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

  // On the test set of WikiText-2.
  void EvaluateOnWikiText2() {
    WALSH_REQUIRE_DATA(raw, "corpora/wiki.test.raw");
    const std::string text = WikiText2Test(raw);
    ASSERT_EQ(Sha256Hex(text), "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83");
    spec_.evaluation_path = directory_ / "wikitext-2-test.txt";
    std::ofstream(spec_.evaluation_path, std::ios::binary) << text;
    spec_.evaluate = true;
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
