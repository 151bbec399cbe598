// One tiny model as a HF directory and as a GGUF file: the same logits, bit for bit.
#include <gtest/gtest.h>

#include <cstring>

#include "common/status_macros.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "tests/unit/worker/model/dense_model.h"

namespace walsh {
namespace {

using testing::DenseModel;
using testing::TinyModelOptions;

class CheckpointFormsTest : public ::testing::TestWithParam<TinyModelOptions> {};

TEST_P(CheckpointFormsTest, HfAndGgufGiveEqualLogits) {
  const testing::TempDir dir;
  const testing::TinyModel tiny(GetParam());
  tiny.WriteHf(dir / "tiny");
  tiny.WriteGguf(dir / "tiny.gguf");
  const std::vector<int32_t> tokens = {3, 99, 250, 17, 4, 4, 181, 256, 30, 64, 65, 66};
  const auto logits = [&](const std::string& path) -> absl::StatusOr<Matrix> {
    WALSH_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(path));
    WALSH_ASSIGN_OR_RETURN(const DenseModel model, DenseModel::Load(*checkpoint));
    testing::Sequence sequence(model, {}, static_cast<int64_t>(tokens.size()));
    return sequence.Append(tokens);
  };
  ASSERT_OK_AND_ASSIGN(const Matrix hf, logits(dir / "tiny"));
  ASSERT_OK_AND_ASSIGN(const Matrix gguf, logits(dir / "tiny.gguf"));
  ASSERT_EQ(hf.size(), gguf.size());
  EXPECT_NE(hf(0, 0), hf(11, 0));
  EXPECT_EQ(std::memcmp(hf.data(), gguf.data(), static_cast<size_t>(hf.size()) * sizeof(float)), 0);
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
