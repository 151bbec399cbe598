#include "worker/rotate/fold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh::rotate {
namespace {

constexpr int64_t kHidden = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kIntermediate = 96;

using Vector = std::vector<double>;

std::mt19937& Random() {
  static std::mt19937 random(11);
  return random;
}

Matrix RandomMatrix(int64_t rows, int64_t cols) {
  std::normal_distribution<float> normal;
  Matrix m(rows, cols);
  for (float& v : m.span()) v = normal(Random()) / 8;
  return m;
}

std::vector<float> RandomVector(int64_t n) {
  std::normal_distribution<float> normal(1.0f, 0.3f);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = normal(Random());
  return v;
}

Vector Multiply(const Matrix& w, const Vector& x, const std::vector<float>& bias = {}) {
  Vector y(static_cast<size_t>(w.rows()), 0.0);
  for (int64_t i = 0; i < w.rows(); ++i) {
    for (int64_t j = 0; j < w.cols(); ++j) y[i] += double{w(i, j)} * x[j];
    if (!bias.empty()) y[i] += bias[i];
  }
  return y;
}

Vector Norm(const Vector& x, const std::vector<float>& weight) {
  double sum = 0;
  for (double v : x) sum += v * v;
  const double factor = 1 / std::sqrt(sum / static_cast<double>(x.size()) + 1e-5);
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * factor * (weight.empty() ? 1.0 : weight[i]);
  return y;
}

struct Layer {
  std::vector<float> input_norm = RandomVector(kHidden);
  std::vector<float> post_attention_norm = RandomVector(kHidden);
  Matrix q = RandomMatrix(kHeads * kHeadDim, kHidden);
  Matrix k = RandomMatrix(kKvHeads * kHeadDim, kHidden);
  Matrix v = RandomMatrix(kKvHeads * kHeadDim, kHidden);
  Matrix o = RandomMatrix(kHidden, kHeads* kHeadDim);
  Matrix gate = RandomMatrix(kIntermediate, kHidden);
  Matrix up = RandomMatrix(kIntermediate, kHidden);
  Matrix down = RandomMatrix(kHidden, kIntermediate);
  std::vector<float> v_bias = RandomVector(kKvHeads * kHeadDim);
  std::vector<float> o_bias = RandomVector(kHidden);
  std::vector<float> down_bias = RandomVector(kHidden);

  LayerWeights View() {
    return {input_norm, post_attention_norm, q, k, v, o, gate, up, down, v_bias, o_bias, down_bias};
  }

  // A layer on three tokens whose attention weights are fixed: enough to mix tokens and heads.
  std::vector<Vector> Forward(std::vector<Vector> hidden) const {
    std::vector<Vector> queries, values;
    for (const Vector& h : hidden) {
      queries.push_back(Multiply(q, Norm(h, input_norm)));
      values.push_back(Multiply(v, Norm(h, input_norm), v_bias));
    }
    for (size_t t = 0; t < hidden.size(); ++t) {
      Vector attended(kHeads * kHeadDim, 0.0);
      for (int64_t head = 0; head < kHeads; ++head) {
        for (size_t s = 0; s <= t; ++s) {
          const double weight = std::tanh(queries[t][head * kHeadDim]) + 0.5 * double(s);
          const int64_t kv = head / (kHeads / kKvHeads);
          for (int64_t d = 0; d < kHeadDim; ++d) {
            attended[head * kHeadDim + d] += weight * values[s][kv * kHeadDim + d];
          }
        }
      }
      const Vector output = Multiply(o, attended, o_bias);
      for (int64_t i = 0; i < kHidden; ++i) hidden[t][i] += output[i];
      const Vector normed = Norm(hidden[t], post_attention_norm);
      Vector activation = Multiply(gate, normed);
      const Vector ups = Multiply(up, normed);
      for (size_t i = 0; i < activation.size(); ++i) {
        activation[i] = activation[i] / (1 + std::exp(-activation[i])) * ups[i];
      }
      const Vector mlp = Multiply(down, activation, down_bias);
      for (int64_t i = 0; i < kHidden; ++i) hidden[t][i] += mlp[i];
    }
    return hidden;
  }
};

std::vector<Vector> RandomHidden() {
  std::normal_distribution<double> normal;
  std::vector<Vector> hidden(3, Vector(kHidden));
  for (Vector& h : hidden) {
    for (double& v : h) v = normal(Random());
  }
  return hidden;
}

struct Case {
  Kind kind;
  bool signs;
};

class FoldLayerTest : public ::testing::TestWithParam<Case> {};

// The folded layer maps h·R1 to (the original layer's output)·R1, biases and grouped queries
// included.
TEST_P(FoldLayerTest, ComputesTheSameFunctionInTheRotatedBasis) {
  Layer layer;
  const std::vector<Vector> hidden = RandomHidden();
  const std::vector<Vector> expected = layer.Forward(hidden);

  ASSERT_OK_AND_ASSIGN(const Rotation r1,
                       Rotation::Create(kHidden, {GetParam().kind, 32, GetParam().signs, 5}));
  const Kind r2_kind = GetParam().kind == Kind::kNone ? Kind::kNone : Kind::kWalsh;
  ASSERT_OK_AND_ASSIGN(const Rotation r2, Rotation::Create(kHeadDim, {r2_kind, 0, false, 0}));
  ThreadPool pool(2);
  FoldLayer(layer.View(), r1, r2, pool);
  EXPECT_TRUE(layer.input_norm.empty());
  EXPECT_TRUE(layer.post_attention_norm.empty());

  std::vector<Vector> rotated = hidden;
  for (Vector& h : rotated) r1.ApplyRight(h.data(), 1, kHidden);
  std::vector<Vector> actual = layer.Forward(rotated);
  for (size_t t = 0; t < actual.size(); ++t) {
    r1.ApplyRightTransposed(actual[t].data(), 1, kHidden);
    for (int64_t i = 0; i < kHidden; ++i) ASSERT_NEAR(actual[t][i], expected[t][i], 2e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(AllKinds, FoldLayerTest,
                         ::testing::Values(Case{Kind::kNone, false}, Case{Kind::kHadamard, false},
                                           Case{Kind::kWalsh, false}, Case{Kind::kWalsh, true},
                                           Case{Kind::kLocalHadamard, true},
                                           Case{Kind::kGsr, false}, Case{Kind::kGsr, true}));

TEST(FoldTest, BytesDoNotDependOnThreads) {
  ASSERT_OK_AND_ASSIGN(const Rotation r1, Rotation::Create(576, {Kind::kWalsh, 0, true, 5}));
  const Matrix reader = RandomMatrix(200, 576), writer = RandomMatrix(576, 200);
  const std::vector<float> norm = RandomVector(576);
  Matrix first_reader, first_writer;
  for (int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    Matrix a = reader.Copy(), b = writer.Copy();
    std::vector<float> bias;
    RotateReader(a, norm, r1, pool);
    RotateWriter(b, bias, r1, pool);
    if (threads == 1) {
      first_reader = std::move(a);
      first_writer = std::move(b);
      continue;
    }
    EXPECT_TRUE(std::equal(a.span().begin(), a.span().end(), first_reader.data()));
    EXPECT_TRUE(std::equal(b.span().begin(), b.span().end(), first_writer.data()));
  }
}

// Rotating keeps the length of every row (reader) and column (writer).
TEST(FoldTest, KeepsLengths) {
  ThreadPool pool(1);
  ASSERT_OK_AND_ASSIGN(const Rotation r1, Rotation::Create(384, {Kind::kGsr, 128, false, 0}));
  const Matrix before = RandomMatrix(5, 384);
  Matrix after = before.Copy();
  RotateReader(after, {}, r1, pool);
  for (int64_t i = 0; i < 5; ++i) {
    double a = 0, b = 0;
    for (int64_t j = 0; j < 384; ++j) {
      a += double{before(i, j)} * before(i, j);
      b += double{after(i, j)} * after(i, j);
    }
    EXPECT_NEAR(a, b, 1e-6 * a);
  }
}

}  // namespace
}  // namespace walsh::rotate
