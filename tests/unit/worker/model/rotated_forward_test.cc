// Folding and rotating stories260K, whose FFN of 172 the quantizer refuses, leaves its logits as
// they are.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/model/dense_model.h"
#include "tests/unit/worker/model/llama2c.h"
#include "worker/pipeline/rotation_gate.h"
#include "worker/rotate/fold.h"

namespace walsh {
namespace {

using rotate::Kind;
using rotate::Rotation;
using testing::DenseModel;

DenseLinear& Dense(const std::unique_ptr<Linear>& linear) {
  return dynamic_cast<DenseLinear&>(*linear);
}

void Rotate(DenseModel& model, const Rotation& r1, const Rotation& r2, ThreadPool& pool) {
  model.head = model.embedding.Copy();
  rotate::RotateReader(model.head, model.final_norm, r1, pool);
  rotate::RotateReader(model.embedding, {}, r1, pool);
  std::fill(model.final_norm.begin(), model.final_norm.end(), 1.0f);
  for (DecoderLayer& layer : model.layers) {
    DenseLinear& v = Dense(layer.v_proj);
    DenseLinear& o = Dense(layer.o_proj);
    DenseLinear& down = Dense(layer.down_proj);
    rotate::FoldLayer(
        {layer.input_norm, layer.post_attention_norm, Dense(layer.q_proj).weights(),
         Dense(layer.k_proj).weights(), v.weights(), o.weights(), Dense(layer.gate_proj).weights(),
         Dense(layer.up_proj).weights(), down.weights(), v.bias(), o.bias(), down.bias()},
        r1, r2, pool);
  }
}

absl::StatusOr<Matrix> Logits(const DenseModel& model) {
  const std::vector<int32_t> tokens = {1, 403, 407, 261, 378, 417, 411, 13, 15, 300, 299, 31};
  testing::Sequence sequence(model, {}, static_cast<int64_t>(tokens.size()));
  return sequence.Append(tokens);
}

double RelativeDifference(const Matrix& a, const Matrix& b) {
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(double{a.data()[i]}));
    difference = std::max(difference, std::abs(double{a.data()[i]} - b.data()[i]));
  }
  return difference / largest;
}

TEST(RotatedForwardTest, EveryRotationLeavesTheLogitsOfStories260KUnchanged) {
  WALSH_REQUIRE_DATA(dir, "models/stories260K");
  const std::string path = dir + "/stories260K.bin";
  ASSERT_OK_AND_ASSIGN(const DenseModel original, testing::ReadLlama2cModel(path));
  ASSERT_OK_AND_ASSIGN(const Matrix expected, Logits(original));
  ThreadPool pool(2);
  for (Kind kind : {Kind::kNone, Kind::kHadamard, Kind::kWalsh, Kind::kLocalHadamard, Kind::kGsr}) {
    SCOPED_TRACE(std::string(rotate::KindName(kind)));
    const int64_t block = rotate::IsLocal(kind) ? 32 : 0;
    ASSERT_OK_AND_ASSIGN(
        const Rotation r1,
        Rotation::Create(original.config.hidden, {kind, block, kind != Kind::kNone, 5}));
    const Kind head_kind = kind == Kind::kNone ? Kind::kNone : Kind::kWalsh;
    ASSERT_OK_AND_ASSIGN(const Rotation r2,
                         Rotation::Create(original.config.head_dim, {head_kind, 0, false, 0}));
    ASSERT_OK_AND_ASSIGN(DenseModel model, testing::ReadLlama2cModel(path));
    Rotate(model, r1, r2, pool);
    ASSERT_OK_AND_ASSIGN(const Matrix rotated, Logits(model));
    EXPECT_LT(RelativeDifference(expected, rotated), pipeline::kRotationGateMax);

    // The gate would notice: one linear more is turned than should be.
    if (kind == Kind::kNone) continue;
    rotate::RotateReader(Dense(model.layers[2].up_proj).weights(), {}, r1, pool);
    ASSERT_OK_AND_ASSIGN(const Matrix wrong, Logits(model));
    EXPECT_GT(RelativeDifference(expected, wrong), 100 * pipeline::kRotationGateMax);
  }
}

}  // namespace
}  // namespace walsh
