#include "worker/pipeline/rotation_gate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "tests/unit/worker/pipeline/job_fixture.h"

namespace walsh::pipeline {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

// A rotated model whose head is changed afterwards.
class SpoiledSource : public RotatedSource {
 public:
  SpoiledSource(const Checkpoint& checkpoint, const rotate::Rotation& r1,
                const rotate::Rotation& r2, ThreadPool& pool, std::function<void(Matrix&)> spoil)
      : RotatedSource(checkpoint, r1, r2, pool), spoil_(std::move(spoil)) {}
  absl::StatusOr<Matrix> Head() override {
    WALSH_ASSIGN_OR_RETURN(Matrix head, RotatedSource::Head());
    spoil_(head);
    return head;
  }

 private:
  const std::function<void(Matrix&)> spoil_;
};

class RotationGateTest : public testing::JobTest {
 protected:
  void SetUp() override {
    auto checkpoint = Checkpoint::Open(TinyJob().source_path);
    ASSERT_OK(checkpoint);
    checkpoint_ = *std::move(checkpoint);
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(checkpoint_->tokenizer()));
    ASSERT_OK_AND_ASSIGN(windows_, GateWindows(checkpoint_->config(), *tokenizer));
    ASSERT_OK_AND_ASSIGN(r1_, Gsr(checkpoint_->config().hidden, 0));
    ASSERT_OK_AND_ASSIGN(r2_, Gsr(checkpoint_->config().head_dim, 0));
  }

  static absl::StatusOr<rotate::Rotation> Gsr(int64_t width, uint64_t seed) {
    return rotate::Rotation::Create(width, {rotate::Kind::kGsr, 16, seed != 0, seed});
  }

  absl::StatusOr<double> Check(RotatedSource& rotated, const std::function<void()>& after_layer) {
    return CheckRotation(*checkpoint_, rotated, windows_, pool_, [&] {
      after_layer();
      return absl::OkStatus();
    });
  }
  absl::StatusOr<double> CheckSpoiled(std::function<void(Matrix&)> spoil) {
    SpoiledSource rotated(*checkpoint_, r1_, r2_, pool_, std::move(spoil));
    return Check(rotated, [] {});
  }
  // All logits off by this share of themselves: so is the largest.
  absl::StatusOr<double> CheckHeadTimes(float factor) {
    return CheckSpoiled([factor](Matrix& head) {
      for (float& w : head.span()) w *= factor;
    });
  }

  ThreadPool pool_{2};
  std::unique_ptr<Checkpoint> checkpoint_;
  calibrate::TokenWindows windows_;
  rotate::Rotation r1_, r2_;
};

TEST_F(RotationGateTest, LetsAnEquivalentModelPass) {
  RotatedSource rotated(*checkpoint_, r1_, r2_, pool_);
  int n_layers = 0;
  ASSERT_OK_AND_ASSIGN(const double difference, Check(rotated, [&] { ++n_layers; }));
  EXPECT_LT(difference, 1e-5);
  EXPECT_GT(difference, 0);
  EXPECT_EQ(n_layers, checkpoint_->config().n_layers);
}

// What is rotated at run time is undone by the weights after it (R4) or cancels (R3), with a
// rotated residual stream and without. The FFN's width of 192 has a global rotation by its core
// of 12.
TEST_F(RotationGateTest, LetsOnlineRotationsPass) {
  ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(TinyJob({.intermediate = 192}).source_path));
  const ModelConfig& config = checkpoint_->config();
  ASSERT_OK_AND_ASSIGN(const rotate::Rotation none,
                       rotate::Rotation::Create(config.hidden, {.kind = rotate::Kind::kNone}));
  for (const OnlineTransforms::BlockRotation& down :
       {OnlineTransforms::BlockRotation{64, true}, OnlineTransforms::BlockRotation{32, false},
        OnlineTransforms::BlockRotation{192, true}, OnlineTransforms::BlockRotation{192, false}}) {
    ASSERT_OK_AND_ASSIGN(const auto online,
                         OnlineForward::Create({.down_input = down,
                                                .query_key = {config.head_dim, true},
                                                .activations = {},
                                                .kv_cache = {}},
                                               config));
    for (const rotate::Rotation& r1 : {r1_, none}) {
      RotatedSource rotated(*checkpoint_, r1, r2_, pool_, online);
      ASSERT_OK_AND_ASSIGN(const double difference, Check(rotated, [] {}));
      EXPECT_LT(difference, 1e-5);
      EXPECT_GT(difference, 0);
    }
  }
}

// The second layer is turned by another rotation than the first, the embedding and the head.
TEST_F(RotationGateTest, RefusesAMismatchedRotation) {
  ASSERT_OK_AND_ASSIGN(const rotate::Rotation other, Gsr(checkpoint_->config().hidden, 7));
  const rotate::Rotation first = r1_;
  RotatedSource rotated(*checkpoint_, r1_, r2_, pool_);
  int n_layers = 0;
  EXPECT_THAT(Check(rotated, [&] { r1_ = ++n_layers == 1 ? other : first; }),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(ContainsRegex("differ by [0-9.]+ of the largest"),
                             HasSubstr(absl::StrCat("the limit is ", kRotationGateMax)))));
  ASSERT_EQ(n_layers, 2);
}

TEST_F(RotationGateTest, LimitIsWhereItIsSaid) {
  ASSERT_OK_AND_ASSIGN(const double inside,
                       CheckHeadTimes(1 + 0.9f * static_cast<float>(kRotationGateMax)));
  EXPECT_NEAR(inside, 0.9 * kRotationGateMax, 0.05 * kRotationGateMax);
  EXPECT_THAT(CheckHeadTimes(1 + 1.1f * static_cast<float>(kRotationGateMax)),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(ContainsRegex("differ by 0\\.0001[01]"), HasSubstr("0.0001"))));
}

TEST_F(RotationGateTest, ALogitThatIsNotFiniteIsNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(CheckSpoiled([bad](Matrix& head) { head(5, 0) = bad; }),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("logit 5 of token 0 is")));
  }
}

}  // namespace
}  // namespace walsh::pipeline
