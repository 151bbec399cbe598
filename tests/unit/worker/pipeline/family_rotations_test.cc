// Every rotation on a tiny model of every family: the same function, and served as it was
// evaluated.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/golden_model.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "tests/unit/worker/pipeline/served_logits.h"
#include "worker/pipeline/rotation_gate.h"

namespace walsh::pipeline {
namespace {

using ::walsh::testing::EvaluatedLogits;
using ::walsh::testing::RelativeDifference;
using ::walsh::testing::ServedLogits;

using BlockRotation = OnlineTransforms::BlockRotation;

constexpr char kLlama[] = "llama";
// More than every family's sliding window.
constexpr int64_t kTokens = 80;

std::vector<std::string> Families() {
  std::vector<std::string> families = testing::GoldenFamilies();
  families.emplace_back(kLlama);
  return families;
}

class FamilyRotationsTest : public testing::JobTest,
                            public ::testing::WithParamInterface<std::string> {
 protected:
  void SetUp() override {
    spec_ = TinyJob({.intermediate = 96});
    if (GetParam() == kLlama) {
      for (int32_t i = 0; i < kTokens; ++i) tokens_.push_back(i * 37 % 256);
    } else {
      testing::WriteGoldenModel(GetParam(), directory_ / "golden");
      spec_.source_path = directory_ / "golden";
      tokens_ = testing::ReadGoldenModel(GetParam()).tokens;
    }
    ASSERT_EQ(static_cast<int64_t>(tokens_.size()), kTokens);
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(spec_.source_path));
  }

  const ModelConfig& config() const { return checkpoint_->config(); }

  // Those that the norms of the family can be folded out of the way of.
  std::vector<rotate::Rotation::Options> ResidualRotations() const {
    using rotate::Kind;
    std::vector<rotate::Rotation::Options> all = {{.kind = Kind::kNone}};
    if (config().has_output_norms) return all;
    for (const Kind kind : {Kind::kHadamard, Kind::kWalsh, Kind::kLocalHadamard, Kind::kGsr}) {
      for (const bool has_signs : {false, true}) {
        all.push_back({kind, rotate::IsLocal(kind) ? 32 : 0, has_signs, 7});
      }
    }
    return all;
  }

  // R3 and R4, each alone and both; the width of 96 has a global matrix by its core of 12.
  std::vector<OnlineTransforms> OnlineRotations() const {
    std::vector<OnlineTransforms> all(1);
    for (const int64_t head : {int64_t{0}, config().head_dim}) {
      for (const BlockRotation& down :
           {BlockRotation{0, true}, BlockRotation{32, true}, BlockRotation{16, false},
            BlockRotation{96, true}, BlockRotation{96, false}}) {
        if (head == 0 && down.block == 0) continue;
        all.push_back(
            {.down_input = down, .query_key = {head, true}, .activations = {}, .kv_cache = {}});
      }
    }
    return all;
  }

  JobSpec spec_;
  std::vector<int32_t> tokens_;
  std::unique_ptr<Checkpoint> checkpoint_;
};

TEST_P(FamilyRotationsTest, KeepTheFunction) {
  const calibrate::TokenWindows windows = {.length = kTokens, .ids = tokens_};
  ThreadPool pool(2);
  for (const rotate::Rotation::Options& residual : ResidualRotations()) {
    ASSERT_OK_AND_ASSIGN(const auto r1, rotate::Rotation::Create(config().hidden, residual));
    for (const rotate::Kind head : {rotate::Kind::kNone, rotate::Kind::kWalsh}) {
      ASSERT_OK_AND_ASSIGN(const auto r2,
                           rotate::Rotation::Create(config().head_dim, {.kind = head}));
      for (const OnlineTransforms& online : OnlineRotations()) {
        SCOPED_TRACE(absl::StrCat(std::string(rotate::KindName(residual.kind)), ", signs ",
                                  residual.random_signs, ", R2 ",
                                  std::string(rotate::KindName(head)), ", ",
                                  OnlineTransformsJson(online).dump()));
        ASSERT_OK_AND_ASSIGN(const auto forward, OnlineForward::Create(online, config()));
        RotatedSource rotated(*checkpoint_, r1, r2, pool, forward);
        ASSERT_OK_AND_ASSIGN(
            const double difference,
            CheckRotation(*checkpoint_, rotated, windows, pool, [] { return absl::OkStatus(); }));
        EXPECT_LT(difference, 1e-5);
        EXPECT_EQ(difference > 0,
                  !r1.is_identity() || !r2.is_identity() || !online.rotations().empty());
      }
    }
  }
}

// With R3 behind the norms of queries and keys, R4 behind the activation, and rounded keys and
// values in windows that slide. What may differ is the rounding of the engine's packed products,
// and at 4 bits what then falls to the other side of a step.
TEST_P(FamilyRotationsTest, AreServedAsEvaluated) {
  spec_.rotation = config().has_output_norms ? rotate::Kind::kNone : rotate::Kind::kGsr;
  spec_.online.down_rotation = rotate::Kind::kWalsh;
  spec_.online.activation_bits = 8;
  spec_.evaluate = false;
  struct Case {
    int kv_bits;
    double tolerance;
  };
  for (const auto [kv_bits, tolerance] : {Case{8, 0.05}, Case{4, 0.15}}) {
    SCOPED_TRACE(absl::StrCat(kv_bits, " bits of keys and values"));
    spec_.online.kv_bits = kv_bits;
    spec_.output_directory = directory_ / absl::StrCat("kv", kv_bits);
    ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec_));
    EXPECT_GT(report.rotation_gate, 0);
    EXPECT_LT(report.rotation_gate, 1e-5);
    ASSERT_OK_AND_ASSIGN(const auto artifact,
                         ArtifactReader::Open(spec_.output_directory, true, 1));
    EXPECT_EQ(artifact->online().query_key.block, config().head_dim);
    EXPECT_EQ(artifact->online().down_input.block, config().intermediate);
    ASSERT_OK_AND_ASSIGN(const auto evaluated, EvaluatedLogits(*artifact, tokens_));
    for (const size_t step : {size_t{80}, size_t{7}, size_t{1}}) {
      ASSERT_OK_AND_ASSIGN(const auto served, ServedLogits(spec_.output_directory, tokens_, step));
      EXPECT_LT(RelativeDifference(served, evaluated), tolerance) << step;
    }
    ASSERT_OK_AND_ASSIGN(const auto wrong, EvaluatedLogits(*artifact, tokens_, false));
    EXPECT_GT(RelativeDifference(wrong, evaluated), 0.25);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyRotationsTest, ::testing::ValuesIn(Families()),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace walsh::pipeline
