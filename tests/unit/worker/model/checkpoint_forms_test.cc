// One tiny model as a HF directory and as a GGUF file: the same logits, bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/status_macros.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/model/dense_model.h"

namespace walsh {
namespace {

using testing::DenseModel;
using testing::TinyModelOptions;

// Of the model written as a folder "tiny" or a file "tiny.gguf".
absl::StatusOr<Matrix> LogitsOf(const TinyModelOptions& options, const std::string& form) {
  const testing::TempDir dir;
  const testing::TinyModel tiny(options);
  tiny.WriteHf(dir / "tiny");
  tiny.WriteGguf(dir / "tiny.gguf");
  const std::vector<int32_t> tokens = {3, 99, 250, 17, 4, 4, 181, 256, 30, 64, 65, 66};
  WALSH_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(dir / form));
  WALSH_ASSIGN_OR_RETURN(const DenseModel model, DenseModel::Load(*checkpoint));
  testing::Sequence sequence(model, {}, static_cast<int64_t>(tokens.size()));
  return sequence.Append(tokens);
}

class CheckpointFormsTest : public ::testing::TestWithParam<TinyModelOptions> {};

TEST_P(CheckpointFormsTest, HfAndGgufGiveEqualLogits) {
  ASSERT_OK_AND_ASSIGN(const Matrix hf, LogitsOf(GetParam(), "tiny"));
  ASSERT_OK_AND_ASSIGN(const Matrix gguf, LogitsOf(GetParam(), "tiny.gguf"));
  ASSERT_EQ(hf.size(), gguf.size());
  EXPECT_NE(hf(0, 0), hf(11, 0));
  EXPECT_EQ(std::memcmp(hf.data(), gguf.data(), static_cast<size_t>(hf.size()) * sizeof(float)), 0);
}

constexpr char kLinear[] = R"({"rope_scaling": {"rope_type": "linear", "factor": 4.0}})";
// The frequencies of a GGUF file are divided by floats, and so differ in a last bit.
constexpr char kLlama3[] =
    R"({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}})";

// Both forms give logits that differ from those without scaling by far more than from each other.
TEST(RopeScalingTest, HfAndGgufGiveEqualLogits) {
  for (const char* scaling : {kLinear, kLlama3}) {
    TinyModelOptions options{.rope_theta = 500000.0};
    ASSERT_OK_AND_ASSIGN(const Matrix plain, LogitsOf(options, "tiny"));
    options.config_overrides = scaling;
    ASSERT_OK_AND_ASSIGN(const Matrix hf, LogitsOf(options, "tiny"));
    ASSERT_OK_AND_ASSIGN(const Matrix gguf, LogitsOf(options, "tiny.gguf"));
    const auto difference = [&](const Matrix& other) {
      float most = 0;
      for (int64_t i = 0; i < hf.size(); ++i) {
        most = std::max(most, std::abs(hf.data()[i] - other.data()[i]));
      }
      return most;
    };
    EXPECT_LT(difference(gguf), 1e-3f * difference(plain)) << scaling;
    EXPECT_GT(difference(plain), 0) << scaling;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CheckpointFormsTest,
    ::testing::Values(TinyModelOptions{}, TinyModelOptions{.dtype = "F16"},
                      TinyModelOptions{.dtype = "BF16"}, TinyModelOptions{.is_tied = true},
                      TinyModelOptions{.n_heads = 3, .n_kv_heads = 1, .head_dim = 32},
                      TinyModelOptions{.has_attention_bias = true, .has_mlp_bias = true},
                      TinyModelOptions{.rope_theta = 500000.0}));

}  // namespace
}  // namespace walsh
