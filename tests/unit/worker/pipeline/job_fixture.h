// A tiny model, a text and a job on them, in a directory that goes with the test.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::testing {

inline absl::Status IgnoreProgress(const pipeline::JobProgress&) { return absl::OkStatus(); }

// Each linear's GPTQ error over its round-to-nearest error, and their geometric mean.
inline void ExpectErrorsBelow(const pipeline::JobReport& gptq, const pipeline::JobReport& rtn,
                              double each, double mean) {
  ASSERT_EQ(gptq.linears.size(), rtn.linears.size());
  double log_ratio = 0;
  for (size_t i = 0; i < gptq.linears.size(); ++i) {
    const double ratio = gptq.linears[i].relative_error / rtn.linears[i].relative_error;
    EXPECT_LE(ratio, each) << gptq.linears[i].name << " at " << gptq.linears[i].bits << " bits";
    log_ratio += std::log(ratio) / static_cast<double>(gptq.linears.size());
  }
  EXPECT_LE(std::exp(log_ratio), mean);
  ::testing::Test::RecordProperty("error_ratio", std::to_string(std::exp(log_ratio)));
}

class JobTest : public ::testing::Test {
 protected:
  // 2 layers, width 64, 128 between, text of a few thousand tokens.
  pipeline::JobSpec TinyJob(const TinyModelOptions& options = {}, Damage damage = Damage::kNone) {
    TinyModel(options).WriteHf(directory_ / "model", damage);
    WriteText("text.txt", 400);
    pipeline::JobSpec spec;
    spec.job_name = "jobs/1";
    spec.model_name = "tiny";
    spec.source_path = directory_ / "model";
    spec.calibration_path = directory_ / "text.txt";
    spec.quantizer.group_size = 0;
    spec.n_calibration_windows = 16;
    spec.sequence_length = 64;
    spec.n_evaluation_windows = 4;
    spec.evaluation_length = 128;
    spec.output_directory = directory_ / "out";
    return spec;
  }

  std::string WriteText(const std::string& name, int n_sentences) {
    std::ofstream file(directory_ / name);
    for (int i = 0; i < n_sentences; ++i) {
      file << "The " << i * 37 % 101 << " waves of row " << i << " change their sign " << i * i % 53
           << " times. ";
    }
    return directory_ / name;
  }

  absl::StatusOr<pipeline::JobReport> Run(const pipeline::JobSpec& spec, int threads = 2,
                                          const pipeline::Observer& observer = IgnoreProgress) {
    ThreadPool pool(threads);
    return pipeline::RunJob(spec, pool, observer);
  }

  // SHA-256 of every file, by its path inside `directory`.
  static std::map<std::string, std::string> Digests(const std::string& directory) {
    std::map<std::string, std::string> digests;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      const std::string bytes((std::istreambuf_iterator<char>(file)),
                              std::istreambuf_iterator<char>());
      digests[std::filesystem::relative(entry.path(), directory).string()] = Sha256Hex(bytes);
    }
    return digests;
  }

  static bool Exists(const std::string& path) { return std::filesystem::exists(path); }

  TempDir directory_;
};

}  // namespace walsh::testing
