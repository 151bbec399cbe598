// A layer's steps with online transforms against the same steps without them and the transforms in
// double.
#include "worker/model/online_forward.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/model/decoder_layer.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::CompareTensors;
using ::walsh::testing::IsClose;
using ::walsh::testing::StatusIs;
using BlockRotation = OnlineTransforms::BlockRotation;
using Rounding = OnlineTransforms::Rounding;

constexpr int64_t kTokens = 7;

std::vector<float> RandomRows(int64_t cols, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(kTokens * cols));
  for (float& v : x) v = normal(random);
  return x;
}

std::vector<double> Widen(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// Groups of a row to the nearest values of their grid (QuaRot's quantizers), in double. Values
// whose code is about to change become NaN: the other code is as good.
std::vector<double> Quantize(std::vector<double> x, int64_t group, const Rounding& how) {
  const int n_codes = 1 << how.bits;
  for (auto first = x.begin(); first != x.end(); first += group) {
    const double high = std::max(0.0, *std::max_element(first, first + group)) * how.clip_ratio;
    const double low = std::min(0.0, *std::min_element(first, first + group)) * how.clip_ratio;
    const double scale =
        how.symmetric ? std::max(high, -low) / (n_codes / 2 - 1) : (high - low) / (n_codes - 1);
    const double zero = how.symmetric ? n_codes / 2 : std::rint(-low / scale);
    std::transform(first, first + group, first, [&](double v) {
      const double exact = v / scale;
      if (std::abs(exact - std::floor(exact) - 0.5) < 1e-3) return std::nan("");
      return scale * (std::min(std::max(std::rint(exact) + zero, 0.0), n_codes - 1.0) - zero);
    });
  }
  return x;
}

// `limit` is that of floats; where `expected` is NaN nothing is expected.
void ExpectNear(const std::vector<float>& actual, const std::vector<double>& expected,
                double limit = 2e-5) {
  ASSERT_EQ(actual.size(), expected.size());
  int64_t n_compared = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::isnan(expected[i])) continue;
    ASSERT_NEAR(actual[i], expected[i], limit) << "element " << i;
    ++n_compared;
  }
  EXPECT_GT(n_compared, static_cast<int64_t>(actual.size()) * 9 / 10);
}

class OnlineLayerTest : public ::testing::Test {
 protected:
  // 96 · 2 outputs of the FFN have a Hadamard matrix with the core 12.
  void SetUp() override {
    testing::TinyModel({.hidden = 64, .intermediate = 192, .n_layers = 1}).WriteHf(dir_ / "model");
    ASSERT_OK_AND_ASSIGN(checkpoint_, Checkpoint::Open(dir_ / "model"));
    ASSERT_OK_AND_ASSIGN(layer_, LoadDenseLayer(*checkpoint_, 0));
    context_ = ForwardContext::Create(config(), {.pool = &pool_});
    for (int32_t i = 0; i < kTokens; ++i) positions_.push_back(i);
  }

  const ModelConfig& config() const { return checkpoint_->config(); }
  void Use(const OnlineTransforms& transforms) {
    auto online = OnlineForward::Create(transforms, config());
    ASSERT_OK(online);
    layer_.online = *std::move(online);
  }

  struct Heads {
    std::vector<float> q, k, v;
  };
  Heads RunProject(const std::vector<float>& normed) {
    Heads out{RandomRows(config().q_width(), 0), RandomRows(config().kv_width(), 0),
              RandomRows(config().kv_width(), 0)};
    EXPECT_OK(Project(context_, layer_, normed.data(), positions_, out.q.data(), out.k.data(),
                      out.v.data()));
    return out;
  }
  std::vector<float> RunMlpActivation(const std::vector<float>& normed) {
    std::vector<float> activation = RandomRows(config().intermediate, 0), scratch = activation;
    EXPECT_OK(
        MlpActivation(context_, layer_, normed.data(), kTokens, activation.data(), scratch.data()));
    return activation;
  }

  testing::TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ThreadPool pool_{2};
  DecoderLayer layer_;
  ForwardContext context_;
  std::vector<int32_t> positions_;
};

TEST_F(OnlineLayerTest, InputsOfEveryLinearAreRounded) {
  for (const Rounding& rounding :
       {Rounding{4, OnlineTransforms::kWholeRow, true, 0.9}, Rounding{8, 32, false, 1.0}}) {
    const auto expect = [&](const std::vector<float>& plain, const std::vector<float>& online) {
      const auto width = static_cast<int64_t>(plain.size()) / kTokens;
      const bool is_whole = rounding.group_size == OnlineTransforms::kWholeRow;
      ExpectNear(online, Quantize(Widen(plain), is_whole ? width : rounding.group_size, rounding));
    };
    const auto run = [&] {
      const std::vector<float> hidden = RandomRows(config().hidden, 3);
      std::vector<std::vector<float>> inputs(4);
      inputs[0].resize(hidden.size());
      EXPECT_OK(AttentionInput(context_, layer_, hidden.data(), kTokens, inputs[0].data()));
      // From the same values with and without: what is rounded before is not asked about here.
      const std::vector<float> q = RandomRows(config().q_width(), 4);
      std::vector<float> k = RandomRows(config().kv_width(), 5);
      std::vector<float> v = RandomRows(config().kv_width(), 6);
      // Two sequences.
      const std::vector<SequenceSlice> sequences = {
          {0, 3, 0, k.data(), v.data()},
          {3, 4, 0, k.data() + 3 * config().kv_width(), v.data() + 3 * config().kv_width()}};
      inputs[1].resize(q.size());
      EXPECT_OK(Attend(context_, layer_, q.data(), sequences, inputs[1].data()));
      inputs[2].resize(hidden.size());
      EXPECT_OK(MlpInput(context_, layer_, hidden.data(), kTokens, inputs[2].data()));
      inputs[3] = RunMlpActivation(hidden);
      return inputs;
    };
    layer_.online = nullptr;
    const auto plain = run();
    Use({.down_input = {}, .query_key = {}, .activations = rounding, .kv_cache = {}});
    const auto online = run();
    for (size_t i = 0; i < plain.size(); ++i) {
      SCOPED_TRACE(i);
      expect(plain[i], online[i]);
    }
  }
}

TEST_F(OnlineLayerTest, InputOfDownIsRotatedThenRounded) {
  const std::vector<float> normed = RandomRows(config().hidden, 3);
  const std::vector<float> plain = RunMlpActivation(normed);
  // Blocks in both orders; the whole width, by its core of 12.
  for (const BlockRotation& rotation : {BlockRotation{32, true}, BlockRotation{64, false},
                                        BlockRotation{192, true}, BlockRotation{192, false}}) {
    SCOPED_TRACE(rotation.block);
    const bool is_global = rotation.block == config().intermediate;
    const rotate::Kind kind =
        is_global ? (rotation.sequency ? rotate::Kind::kWalsh : rotate::Kind::kHadamard)
                  : (rotation.sequency ? rotate::Kind::kGsr : rotate::Kind::kLocalHadamard);
    ASSERT_OK_AND_ASSIGN(
        const rotate::Rotation dense,
        rotate::Rotation::Create(config().intermediate,
                                 {kind, is_global ? 0 : rotation.block, false, 0}));
    std::vector<double> rotated = Widen(plain);
    dense.ApplyRight(rotated.data(), kTokens, config().intermediate);
    Use({.down_input = rotation, .query_key = {}, .activations = {}, .kv_cache = {}});
    ExpectNear(RunMlpActivation(normed), rotated);

    const Rounding rounding{4, 32, true, 0.9};
    Use({.down_input = rotation, .query_key = {}, .activations = rounding, .kv_cache = {}});
    // Inputs of gate and up are not rounded here: MlpInput does that.
    ExpectNear(RunMlpActivation(normed), Quantize(rotated, 32, rounding));
  }
}

TEST_F(OnlineLayerTest, KeysAndValuesAreRotatedThenRounded) {
  const std::vector<float> normed = RandomRows(config().hidden, 3);
  const Heads plain = RunProject(normed);
  const int64_t head_dim = config().head_dim;
  ASSERT_OK_AND_ASSIGN(const rotate::Rotation walsh,
                       rotate::Rotation::Create(head_dim, {rotate::Kind::kWalsh, 0, false, 0}));
  std::vector<double> q = Widen(plain.q), k = Widen(plain.k);
  walsh.ApplyRight(q.data(), kTokens * config().n_heads, head_dim);
  walsh.ApplyRight(k.data(), kTokens * config().n_kv_heads, head_dim);
  const BlockRotation r3{head_dim, true};
  for (const int bits : {2, 4, 8}) {
    // A head, and both heads of a token.
    for (const int64_t group : {head_dim, config().kv_width()}) {
      const Rounding rounding{bits, group, false, 0.95};
      Use({.down_input = {}, .query_key = r3, .activations = {}, .kv_cache = rounding});
      const Heads online = RunProject(normed);
      ExpectNear(online.q, q);
      ExpectNear(online.k, Quantize(k, group, rounding));
      ExpectNear(online.v, Quantize(Widen(plain.v), group, rounding));
    }
  }
  // R3 cancels.
  Use({.down_input = {}, .query_key = r3, .activations = {}, .kv_cache = {}});
  Heads online = RunProject(normed), original = plain;
  const auto attend = [&](Heads& heads) {
    std::vector<float> y(heads.q.size());
    EXPECT_OK(Attend(context_, layer_, heads.q.data(),
                     {{{0, kTokens, 0, heads.k.data(), heads.v.data()}}}, y.data()));
    return y;
  };
  EXPECT_THAT(CompareTensors(attend(online), attend(original), {.max_abs = 1e-5, .max_rel = 1e-4}),
              IsClose());
}

TEST_F(OnlineLayerTest, RefusesWhatDoesNotFitTheModel) {
  const auto refused = [&](const OnlineTransforms& transforms, const char* message) {
    EXPECT_THAT(OnlineForward::Create(transforms, config()),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  refused({.down_input = {128, true}, .query_key = {}, .activations = {}, .kv_cache = {}},
          "a block of 128 does not divide the width 192");
  refused({.down_input = {8, true}, .query_key = {}, .activations = {}, .kv_cache = {}}, "8");
  refused({.down_input = {}, .query_key = {8, true}, .activations = {}, .kv_cache = {}},
          "must be the head dimension 16");
  refused({.down_input = {}, .query_key = {}, .activations = {2, -1, true, 1}, .kv_cache = {}},
          "4 or 8");
  refused({.down_input = {}, .query_key = {}, .activations = {4, 128, true, 1}, .kv_cache = {}},
          "a group of 128 does not divide the width 64");
  refused({.down_input = {}, .query_key = {}, .activations = {}, .kv_cache = {3, 16, false, 1}},
          "2, 4 or 8");
  refused({.down_input = {}, .query_key = {}, .activations = {}, .kv_cache = {4, 16, false, 1.5}},
          "clip ratio 1.5");
  EXPECT_EQ(OnlineForward::Create({}, config()).value(), nullptr);
}

}  // namespace
}  // namespace walsh
