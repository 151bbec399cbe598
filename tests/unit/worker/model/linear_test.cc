#include "worker/model/linear.h"

#include <gtest/gtest.h>

#include <cstring>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "tests/unit/worker/kernels/random_quantized.h"

namespace walsh {
namespace {

using testing::RandomFloats;
using testing::RandomQuantized;

Matrix RandomMatrix(int64_t rows, int64_t cols, uint64_t stream) {
  Matrix m(rows, cols);
  const auto values = RandomFloats(m.size(), stream);
  std::copy(values.begin(), values.end(), m.data());
  return m;
}

std::unique_ptr<PackedLinear> RandomPacked(int64_t out, int64_t in, int bits) {
  absl::StatusOr<kernels::PackedMatrix> packed =
      kernels::PackedMatrix::Pack(RandomQuantized(out, in, bits, 32, false));
  EXPECT_OK(packed);
  return std::make_unique<PackedLinear>(*std::move(packed), RandomFloats(out, 9));
}

TEST(DenseLinearTest, AppliesWeightsAndBias) {
  const DenseLinear linear(RandomMatrix(5, 7, 1), {1, 2, 3, 4, 5});
  EXPECT_EQ(linear.in(), 7);
  EXPECT_EQ(linear.out(), 5);
  EXPECT_EQ(linear.size_bytes(), 5 * 7 * 4);
  const auto x = RandomFloats(2 * 7, 2);
  std::vector<float> y(2 * 5);
  ASSERT_OK(linear.Apply(x.data(), 2, y.data(), {}));
  for (int64_t t = 0; t < 2; ++t) {
    for (int64_t o = 0; o < 5; ++o) {
      double sum = static_cast<double>(o + 1);
      for (int64_t i = 0; i < 7; ++i) {
        sum += static_cast<double>(linear.weights()(o, i)) * x[t * 7 + i];
      }
      EXPECT_NEAR(y[t * 5 + o], sum, 1e-5);
    }
  }
}

TEST(PackedLinearTest, AppliesWeightsAndBias) {
  const auto linear = RandomPacked(33, 64, 4);
  const auto x = RandomFloats(3 * 64, 2);
  std::vector<float> y(3 * 33);
  std::vector<float> expected(3 * 33);
  ASSERT_OK(linear->Apply(x.data(), 3, y.data(), {}));
  ASSERT_OK(linear->Apply(x.data(), 3, expected.data(), {.backend = kernels::Backend::kRef}));
  EXPECT_THAT(testing::CompareTensors(y, expected), testing::IsClose());
  EXPECT_EQ(linear->size_bytes(), linear->weights().size_bytes());
}

// Packed together, dense together, and mixed.
TEST(ApplyTogetherTest, EqualsEachAlone) {
  const auto packed_a = RandomPacked(33, 64, 4);
  const auto packed_b = RandomPacked(16, 64, 2);
  const DenseLinear dense(RandomMatrix(10, 64, 1));
  const std::vector<std::vector<const Linear*>> cases = {
      {packed_a.get(), packed_b.get()}, {&dense, &dense}, {packed_a.get(), &dense}};
  const auto x = RandomFloats(3 * 64, 2);
  for (const auto& linears : cases) {
    std::vector<std::vector<float>> together;
    std::vector<LinearOutput> outputs;
    for (const Linear* linear : linears) {
      together.emplace_back(static_cast<size_t>(3 * linear->out()));
    }
    for (size_t i = 0; i < linears.size(); ++i) outputs.push_back({linears[i], together[i].data()});
    ASSERT_OK(ApplyTogether(outputs, x.data(), 3, {}));
    for (size_t i = 0; i < linears.size(); ++i) {
      std::vector<float> alone(together[i].size());
      ASSERT_OK(linears[i]->Apply(x.data(), 3, alone.data(), {}));
      EXPECT_EQ(alone, together[i]);
    }
  }
}

}  // namespace
}  // namespace walsh
