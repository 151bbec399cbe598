// Bounds for a model that can be reckoned by hand.
#include "worker/evaluate/evaluation_memory.h"

#include <gtest/gtest.h>

#include <string>

namespace walsh::evaluate {
namespace {

// Llama-2-7B.
ModelConfig Config() {
  ModelConfig config;
  config.hidden = 4096;
  config.intermediate = 11008;
  config.n_layers = 32;
  config.n_heads = 32;
  config.n_kv_heads = 32;
  config.head_dim = 128;
  config.vocab = 32000;
  config.max_position = 4096;
  return config;
}

constexpr double kMiB = 1 << 20;

// A layer in floats has 772 MiB, the head 500, a block of 8,192 tokens 128, beside which some
// hundred MiB of buffers are small; of the original its hidden states and head wait.
TEST(EvaluationBytesTest, OfAText) {
  const ModelConfig config = Config();
  const EvaluationShape shape{.window = 2048, .block_tokens = 8192};
  const double alone = static_cast<double>(EvaluationBytes(config, nullptr, shape)) / kMiB;
  EXPECT_GT(alone, 128 + 772);
  EXPECT_LT(alone, 128 + 772 + 1024);
  const double both = static_cast<double>(EvaluationBytes(config, &config, shape)) / kMiB;
  EXPECT_GT(both, alone + 128 + 500);
  EXPECT_LT(both, alone + 128 + 500 + 64);
}

// Keys and values of a token have 32 KiB, twice for a context that is longer than a batch.
TEST(EvaluationBytesTest, OfTasks) {
  const ModelConfig config = Config();
  const double usual =
      static_cast<double>(EvaluationBytes(config, nullptr, {.item_tokens_max = 500})) / kMiB;
  EXPECT_GT(usual, 2 * 500 + 772);
  EXPECT_LT(usual, 2 * 500 + 772 + 2048);
  const double huge =
      static_cast<double>(EvaluationBytes(config, nullptr, {.item_tokens_max = 262144})) / kMiB;
  EXPECT_GT(huge, 262144 * (16 + 2 * 32) / 1024.0) << "hidden states, keys and values";
}

TEST(EvaluationBytesTest, OfWhatIsHeldBesideThem) {
  const ModelConfig config = Config();
  EXPECT_EQ(EvaluationBytes(config, nullptr, {.held_bytes = 77}), 77);
}

// The largest item decides, each of whose choices is cut to the context; all texts are held.
TEST(AddTasksTest, CountsTheLargestItemAndAllTexts) {
  ModelConfig config = Config();
  Task task;
  task.items = {{.contexts = {std::string(100, 'a')}, .continuations = {"bb", "ccc"}},
                {.contexts = {"a"}, .continuations = {"b"}}};
  EvaluationShape shape;
  AddTasks({&task, 1}, config, shape);
  EXPECT_EQ(shape.item_tokens_max, 106);
  EXPECT_GE(shape.held_bytes, 107 * 5);
  const int64_t held = shape.held_bytes;
  AddTasks({&task, 1}, config, shape);
  EXPECT_EQ(shape.item_tokens_max, 106);
  EXPECT_EQ(shape.held_bytes, 2 * held);
  config.max_position = 10;
  EvaluationShape cut;
  AddTasks({&task, 1}, config, cut);
  EXPECT_EQ(cut.item_tokens_max, 2 * 11);
}

}  // namespace
}  // namespace walsh::evaluate
