// A decoder layer's steps, and that a sequence does not feel the others in its batch.
#include "worker/model/decoder_layer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "tests/unit/worker/kernels/random_quantized.h"

namespace walsh {
namespace {

using testing::RandomFloats;
using testing::RandomQuantized;

constexpr int64_t kCapacity = 300;

ModelConfig SmallConfig() {
  ModelConfig config;
  config.hidden = 96;
  config.intermediate = 160;
  config.n_layers = 1;
  config.n_heads = 6;
  config.n_kv_heads = 2;
  config.head_dim = 16;
  return config;
}

std::unique_ptr<Linear> RandomLinear(int64_t out, int64_t in, uint64_t stream, bool packed) {
  absl::StatusOr<kernels::PackedMatrix> matrix =
      kernels::PackedMatrix::Pack(RandomQuantized(out, in, 4, 32, false, stream));
  EXPECT_OK(matrix);
  if (packed) return std::make_unique<PackedLinear>(*std::move(matrix));
  return std::make_unique<DenseLinear>(matrix->Dequantize());
}

DecoderLayer RandomLayer(const ModelConfig& c, bool packed) {
  DecoderLayer layer;
  layer.input_norm = RandomFloats(c.hidden, 21);
  layer.post_attention_norm = RandomFloats(c.hidden, 22);
  layer.q_proj = RandomLinear(c.q_width(), c.hidden, 1, packed);
  layer.k_proj = RandomLinear(c.kv_width(), c.hidden, 2, packed);
  layer.v_proj = RandomLinear(c.kv_width(), c.hidden, 3, packed);
  layer.o_proj = RandomLinear(c.hidden, c.q_width(), 4, packed);
  layer.gate_proj = RandomLinear(c.intermediate, c.hidden, 5, packed);
  layer.up_proj = RandomLinear(c.intermediate, c.hidden, 6, packed);
  layer.down_proj = RandomLinear(c.hidden, c.intermediate, 7, packed);
  return layer;
}

TEST(LinearShapesTest, AreThoseOfTheLayersLinears) {
  const ModelConfig config = SmallConfig();
  const DecoderLayer layer = RandomLayer(config, /*packed=*/false);
  const std::vector<LinearShape> shapes = LinearShapes(config);
  ASSERT_EQ(shapes.size(), kLayerLinears.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    EXPECT_EQ(shapes[i].name, kLayerLinears[i].name);
    const Linear& linear = *(layer.*kLayerLinears[i].linear);
    EXPECT_EQ(shapes[i].in, linear.in()) << shapes[i].name;
    EXPECT_EQ(shapes[i].out, linear.out()) << shapes[i].name;
  }
}

TEST(ForwardScratchTest, TakesTheMemoryThatItSays) {
  const ModelConfig config = SmallConfig();
  ForwardScratch scratch;
  scratch.Reserve(config, 7);
  int64_t n = 0;
  for (const Matrix* matrix : {&scratch.normed, &scratch.q, &scratch.k, &scratch.v,
                               &scratch.attended, &scratch.gate, &scratch.up, &scratch.out}) {
    n += matrix->size();
  }
  EXPECT_EQ(ForwardScratch::SizeBytes(config, 7), n * static_cast<int64_t>(sizeof(float)));
}

// A sequence that is fed some rows at a time.
struct TestSequence {
  explicit TestSequence(const ModelConfig& config, uint64_t stream)
      : input(RandomFloats(kCapacity * config.hidden, stream)),
        keys(kCapacity, config.kv_width()),
        values(kCapacity, config.kv_width()) {}
  std::vector<float> input;
  std::vector<float> output;
  Matrix keys;
  Matrix values;
  int64_t n_past = 0;
};

// The next n_rows[i] rows of each sequence in one pass.
void Step(const ForwardContext& context, const DecoderLayer& layer,
          std::vector<TestSequence*> sequences, const std::vector<int64_t>& n_rows) {
  const int64_t width = context.config->hidden;
  std::vector<SequenceSlice> slices;
  std::vector<int32_t> positions;
  std::vector<float> hidden;
  for (size_t i = 0; i < sequences.size(); ++i) {
    TestSequence& s = *sequences[i];
    slices.push_back({.first_row = static_cast<int64_t>(positions.size()),
                      .n_rows = n_rows[i],
                      .n_past = s.n_past,
                      .keys = s.keys.data(),
                      .values = s.values.data()});
    for (int64_t row = s.n_past; row < s.n_past + n_rows[i]; ++row) {
      positions.push_back(static_cast<int32_t>(row));
    }
    const auto first = s.input.begin() + s.n_past * width;
    hidden.insert(hidden.end(), first, first + n_rows[i] * width);
  }
  ForwardScratch scratch;
  ASSERT_OK(ForwardLayer(context, layer, positions, slices, static_cast<int64_t>(positions.size()),
                         hidden.data(), scratch));
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto first = hidden.begin() + slices[i].first_row * width;
    sequences[i]->output.insert(sequences[i]->output.end(), first, first + n_rows[i] * width);
    sequences[i]->n_past += n_rows[i];
  }
}

TEST(ForwardLayerTest, CpuIsLikeTheReference) {
  const ModelConfig config = SmallConfig();
  for (const bool packed : {false, true}) {
    const DecoderLayer layer = RandomLayer(config, packed);
    TestSequence reference(config, 11);
    TestSequence cpu(config, 11);
    const auto ref_context = ForwardContext::Create(config, {.backend = kernels::Backend::kRef});
    const auto context = ForwardContext::Create(config, {});
    for (const int64_t n_rows : {20, 1, 3}) {
      Step(ref_context, layer, {&reference}, {n_rows});
      Step(context, layer, {&cpu}, {n_rows});
    }
    // Rounding of activations to int8 may tip over where the two differ in the last bit.
    const double nmse = packed ? 1e-5 : 1e-10;
    EXPECT_THAT(testing::CompareTensors(
                    cpu.output, reference.output,
                    {.max_abs = packed ? 0.1 : 1e-4, .max_rel = packed ? 0.1 : 1e-3, .nmse = nmse}),
                testing::IsClose());
  }
}

// With packed weights every row is computed by itself: alone, in batches of eight, with one thread
// or three, a sequence gets the same bits.
TEST(ForwardLayerTest, PackedSequencesDoNotFeelTheirBatch) {
  const ModelConfig config = SmallConfig();
  const DecoderLayer layer = RandomLayer(config, true);
  ThreadPool pool(3);
  const auto alone_context = ForwardContext::Create(config, {});
  const auto batch_context = ForwardContext::Create(config, {.pool = &pool});
  std::vector<std::unique_ptr<TestSequence>> alone;
  std::vector<std::unique_ptr<TestSequence>> batched;
  std::vector<TestSequence*> batch;
  for (uint64_t i = 0; i < 8; ++i) {
    alone.push_back(std::make_unique<TestSequence>(config, 100 + i));
    batched.push_back(std::make_unique<TestSequence>(config, 100 + i));
    batch.push_back(batched.back().get());
  }
  for (size_t i = 0; i < alone.size(); ++i) {
    Step(alone_context, layer, {alone[i].get()}, {static_cast<int64_t>(30 * i + 1)});
    for (int token = 0; token < 5; ++token) Step(alone_context, layer, {alone[i].get()}, {1});
  }
  std::vector<int64_t> prompts;
  for (size_t i = 0; i < batch.size(); ++i) prompts.push_back(static_cast<int64_t>(30 * i + 1));
  Step(batch_context, layer, batch, prompts);
  for (int token = 0; token < 5; ++token) {
    Step(batch_context, layer, batch, std::vector<int64_t>(batch.size(), 1));
  }
  for (size_t i = 0; i < alone.size(); ++i) {
    ASSERT_EQ(alone[i]->output.size(), batched[i]->output.size());
    EXPECT_EQ(0, std::memcmp(alone[i]->output.data(), batched[i]->output.data(),
                             alone[i]->output.size() * sizeof(float)))
        << "sequence " << i;
  }
}

// A prompt in pieces beside other work gives the same bits as in one piece.
TEST(ForwardLayerTest, PackedPromptMayBeCut) {
  const ModelConfig config = SmallConfig();
  const DecoderLayer layer = RandomLayer(config, true);
  const auto context = ForwardContext::Create(config, {});
  TestSequence whole(config, 5);
  Step(context, layer, {&whole}, {270});
  TestSequence pieces(config, 5);
  TestSequence other(config, 6);
  Step(context, layer, {&pieces}, {100});
  Step(context, layer, {&other, &pieces}, {17, 129});
  Step(context, layer, {&pieces, &other}, {41, 1});
  ASSERT_EQ(whole.output.size(), pieces.output.size());
  EXPECT_EQ(0, std::memcmp(whole.output.data(), pieces.output.data(),
                           whole.output.size() * sizeof(float)));
}

}  // namespace
}  // namespace walsh
