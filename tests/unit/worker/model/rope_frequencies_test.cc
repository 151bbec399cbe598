#include <gtest/gtest.h>

#include <cmath>

#include "worker/model/decoder_layer.h"

namespace walsh {
namespace {

TEST(RopeFrequenciesTest, Plain) {
  const std::vector<float> f = RopeInverseFrequencies({.head_dim = 8, .rope_theta = 10000.0});
  ASSERT_EQ(f.size(), 4u);
  EXPECT_FLOAT_EQ(f[0], 1.0f);
  EXPECT_FLOAT_EQ(f[1], 0.1f);
  EXPECT_FLOAT_EQ(f[2], 0.01f);
  EXPECT_FLOAT_EQ(f[3], 0.001f);
}

TEST(RopeFrequenciesTest, Linear) {
  ModelConfig config{.head_dim = 4, .rope_theta = 10000.0};
  config.rope_scaling = {.kind = RopeScaling::Kind::kLinear, .factor = 4.0};
  const std::vector<float> f = RopeInverseFrequencies(config);
  EXPECT_FLOAT_EQ(f[0], 0.25f);
  EXPECT_FLOAT_EQ(f[1], 0.0025f);
}

// Llama-3.2-1B; expected values by transformers' formula, in double, with Python.
TEST(RopeFrequenciesTest, Llama3) {
  ModelConfig config{.head_dim = 64, .rope_theta = 500000.0};
  config.rope_scaling = {.kind = RopeScaling::Kind::kLlama3,
                         .factor = 32.0,
                         .low_freq_factor = 1.0,
                         .high_freq_factor = 4.0,
                         .original_max_position = 8192};
  const std::vector<float> f = RopeInverseFrequencies(config);
  const std::vector<std::pair<size_t, float>> expected = {
      {0, 1.000000000e+00f},  {1, 6.636012377e-01f},  {10, 1.656044008e-02f},
      {13, 4.839421346e-03f}, {14, 3.211445995e-03f}, {15, 1.290547928e-03f},
      {16, 4.295567966e-04f}, {17, 9.708287803e-05f}, {18, 1.946163818e-05f},
      {20, 8.570255490e-06f}, {31, 9.418306725e-08f}};
  for (const auto& [i, value] : expected) EXPECT_FLOAT_EQ(f[i], value) << i;
}

TEST(RopeFrequenciesTest, DivisorsOfAGguf) {
  ModelConfig config{.head_dim = 4, .rope_theta = 10000.0};
  config.rope_scaling.frequency_divisors = {1.0f, 32.0f};
  const std::vector<float> f = RopeInverseFrequencies(config);
  EXPECT_FLOAT_EQ(f[0], 1.0f);
  EXPECT_FLOAT_EQ(f[1], 0.01f / 32.0f);
}

}  // namespace
}  // namespace walsh
