// The thresholds of the rotation and quantization experiments on TinyStories-656K.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>

#include "tests/unit/worker/pipeline/job_fixture.h"

namespace walsh::pipeline {
namespace {

constexpr rotate::Kind kRotations[] = {rotate::Kind::kHadamard, rotate::Kind::kWalsh,
                                       rotate::Kind::kLocalHadamard, rotate::Kind::kGsr};

double Mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// As in the model's reference.json: stripped, blank lines collapsed.
std::string Clean(const std::string& story) {
  std::string text;
  for (char c : story) {
    if (c == '\n' && (text.empty() || text.back() == '\n')) continue;
    text += c;
  }
  return text.substr(0, text.find_last_not_of(" \n") + 1);
}

class TinyStoriesTest : public testing::JobTest {
 protected:
  // Calibration on 100 stories, evaluation on 100 others, of those that the vocabulary covers.
  void SetUp() override {
    WALSH_REQUIRE_DATA(model, "models/TinyStories-656K");
    WALSH_REQUIRE_DATA(corpus, "corpora/tinystories-train-1000.json");
    std::ifstream file(corpus);
    const auto stories = nlohmann::json::parse(file);
    nlohmann::json calibration = nlohmann::json::array(), evaluation = calibration,
                   second = calibration;
    for (const auto& story : stories) {
      const std::string text = Clean(story.get<std::string>());
      const bool is_ascii = std::all_of(text.begin(), text.end(), [](char c) { return c >= 0; });
      if (!is_ascii) continue;
      if (calibration.size() < 100) {
        calibration.push_back(text);
      } else if (evaluation.size() < 100) {
        evaluation.push_back(text);
      } else if (second.size() < 100) {
        second.push_back(text);
      }
    }
    std::ofstream(directory_ / "calibration.json") << calibration.dump();
    std::ofstream(directory_ / "calibration2.json") << second.dump();
    std::ofstream(directory_ / "evaluation.json") << evaluation.dump();
    spec_.job_name = "jobs/1";
    spec_.model_name = "stories";
    spec_.source_path = model;
    spec_.calibration_path = directory_ / "calibration.json";
    spec_.evaluation_path = directory_ / "evaluation.json";
    spec_.quantizer.group_size = 32;
    spec_.n_calibration_windows = 40;
    spec_.sequence_length = 256;
    spec_.n_evaluation_windows = 40;
    spec_.evaluation_length = 256;
  }

  JobReport RunBits(int bits, gptq::Method method, rotate::Kind rotation = rotate::Kind::kGsr) {
    spec_.quantizer.bits = bits;
    spec_.quantizer.method = method;
    spec_.rotation = rotation;
    spec_.output_directory = directory_ / ("out" + std::to_string(n_runs_++));
    auto report = Run(spec_);
    EXPECT_OK(report);
    return *std::move(report);
  }

  JobSpec spec_;
  int n_runs_ = 0;
};

TEST_F(TinyStoriesTest, EveryRotationLeavesTheLogitsUnchanged) {
  spec_.evaluate = false;
  for (rotate::Kind rotation : kRotations) {
    for (bool signs : {false, true}) {
      spec_.rotation_signs = signs;
      const JobReport report = RunBits(4, gptq::Method::kRtn, rotation);
      EXPECT_GT(report.rotation_gate, 0);
      EXPECT_LE(report.rotation_gate, 1e-5) << rotate::KindName(rotation);
    }
  }
}

// The experiments are of plain GPTQ.
TEST_F(TinyStoriesTest, LossesAreInTheOrderOfTheExperiments) {
  spec_.quantizer.error_propagation = 0;
  const double gptq_margin[] = {0.9, 0.2, 0.05}, rtn_margin[] = {0.4, 0.05, 0};
  double last_error = 1;
  for (int bits : {2, 3, 4}) {
    const JobReport gptq = RunBits(bits, gptq::Method::kGptq);
    const JobReport rtn = RunBits(bits, gptq::Method::kRtn);
    testing::ExpectErrorsBelow(gptq, rtn, 0.95, 0.80);
    const double before = Mean(gptq.window_losses_before);
    EXPECT_EQ(before, Mean(rtn.window_losses_before));
    const double loss = Mean(gptq.window_losses_after) - before;
    EXPECT_GT(loss, -0.01);
    EXPECT_LE(loss, gptq_margin[bits - 2]) << bits;
    EXPECT_GE(Mean(rtn.window_losses_after) - Mean(gptq.window_losses_after), rtn_margin[bits - 2])
        << bits;
    double error = 0;
    for (const LinearReport& linear : gptq.linears) {
      error += std::log(linear.relative_error) / static_cast<double>(gptq.linears.size());
    }
    // E falls 3 to 6 times a bit.
    EXPECT_LT(std::exp(error), last_error / 2.5);
    last_error = std::exp(error);
  }
}

// On this model the gain at 2 bits is 0.14 nat for half of the step and for all of it.
TEST_F(TinyStoriesTest, PropagatedErrorsGainAtTwoBits) {
  const auto loss = [&](double beta) {
    spec_.quantizer.error_propagation = beta;
    return Mean(RunBits(2, gptq::Method::kGptq).window_losses_after);
  };
  const double plain = loss(0);
  EXPECT_LT(loss(0.5), plain - 0.05);
  EXPECT_LT(loss(1), plain - 0.05);
}

// The experiments' gains at groups of 32, where they cost storage: 0.29 nat for a codebook, 0.18
// for float zero points.
TEST_F(TinyStoriesTest, CodebooksAndFloatZerosGainAtTwoBits) {
  spec_.quantizer.error_propagation = 0;
  const auto run = [&](gptq::Grid grid, gptq::ZeroPoint zero_point) {
    spec_.quantizer.grid = grid;
    spec_.quantizer.zero_point = zero_point;
    return RunBits(2, gptq::Method::kGptq);
  };
  const JobReport uniform = run(gptq::Grid::kUniform, gptq::ZeroPoint::kInteger);
  const JobReport codebook = run(gptq::Grid::kCodebook, gptq::ZeroPoint::kInteger);
  const JobReport float_zero = run(gptq::Grid::kUniform, gptq::ZeroPoint::kFloat);
  EXPECT_LT(Mean(codebook.window_losses_after), Mean(uniform.window_losses_after) - 0.1);
  EXPECT_LT(Mean(float_zero.window_losses_after), Mean(uniform.window_losses_after) - 0.05);
  testing::ExpectErrorsBelow(codebook, uniform, 1.0, 0.85);
}

// On the mean of two calibration folds, as a fold alone can hide the gain in its noise.
TEST_F(TinyStoriesTest, GptaqGainsOverGptqAtTwoBits) {
  spec_.quantizer.error_propagation = 0;
  const auto loss = [&](gptq::Method method) {
    double sum = 0;
    for (const char* fold : {"calibration.json", "calibration2.json"}) {
      spec_.calibration_path = directory_ / fold;
      sum += Mean(RunBits(2, method).window_losses_after) / 2;
    }
    return sum;
  };
  const double gptq = loss(gptq::Method::kGptq), gptaq = loss(gptq::Method::kGptaq);
  RecordProperty("gptq", std::to_string(gptq));
  RecordProperty("gptaq", std::to_string(gptaq));
  EXPECT_LT(gptaq, gptq - 0.02);
}

// Everything that QuaRot rotates against nothing, at its W4A4KV4 and at W2A4KV4, which the papers'
// tables have too; the FFN's 384 = 12 · 32 has a global R4.
TEST_F(TinyStoriesTest, FourBitActivationsAndCachesGainByRotations) {
  spec_.online.activation_bits = 4;
  spec_.online.kv_bits = 4;
  const auto loss = [&](int bits, rotate::Kind r1, rotate::Kind r4) {
    spec_.online.down_rotation = r4;
    const JobReport report = RunBits(bits, gptq::Method::kGptq, r1);
    const double over = Mean(report.window_losses_after) - Mean(report.window_losses_before);
    RecordProperty(std::string(rotate::KindName(r1)) + std::to_string(bits), std::to_string(over));
    return over;
  };
  for (const int bits : {4, 2}) {
    const double none = loss(bits, rotate::Kind::kNone, rotate::Kind::kNone);
    const double global = loss(bits, rotate::Kind::kHadamard, rotate::Kind::kHadamard);
    const double local = loss(bits, rotate::Kind::kGsr, rotate::Kind::kGsr);
    // 0.26 against 0.16 nat at 4 bits, 0.78 against 0.65 (global) and 0.68 (local) at 2.
    EXPECT_LT(none, bits == 4 ? 0.4 : 1.0);
    EXPECT_LT(global, none - 0.05);
    EXPECT_LT(local, none - 0.05);
  }
}

}  // namespace
}  // namespace walsh::pipeline
