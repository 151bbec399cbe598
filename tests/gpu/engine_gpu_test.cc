// The CUDA engine's runner beside the CPU's, over the same steps. It runs on a device, or on the
// host in its place (tests/testing/host_device).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "worker/engine/cuda/cuda_model.h"
#include "worker/engine/engine.h"
#include "worker/engine/loaded_model.h"
#include "worker/engine/sampler.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/tensor/half.h"

namespace walsh::engine {
namespace {

using testing::HasCode;
using ::testing::HasSubstr;
using testing::StatusIs;
using testing::TempDir;
using testing::TinyArtifactOptions;
using testing::TinyModel;
using testing::TinyModelOptions;

// A sequence's tokens, how many of them have been run, and its blocks.
struct Text {
  std::vector<int32_t> tokens;
  int64_t n_past = 0;
  std::vector<BlockId> blocks;
};

constexpr int64_t kContext = 256;

// Each has blocks of its own for a whole context, in an order that is not that of memory.
Text MakeText(int index, std::vector<int32_t> tokens) {
  Text text{.tokens = std::move(tokens)};
  const int64_t n_blocks = KvBlocks(kContext);
  for (int64_t i = 0; i < n_blocks; ++i) {
    text.blocks.push_back(static_cast<BlockId>(index * n_blocks + (i * 7 + 3) % n_blocks));
  }
  return text;
}

std::vector<int32_t> Tokens(int n, int seed, int32_t vocab = 320) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) tokens[static_cast<size_t>(i)] = (i * 37 + seed * 101 + 5) % vocab;
  return tokens;
}

// Runs the next n_rows[i] tokens of each text; logits of the last rows.
std::vector<std::vector<float>> Step(ModelRunner& runner, std::vector<Text*> texts,
                                     std::vector<int64_t> n_rows) {
  StepBatch batch;
  for (size_t i = 0; i < texts.size(); ++i) {
    const Text& text = *texts[i];
    batch.sequences.push_back({.first_row = static_cast<int64_t>(batch.tokens.size()),
                               .n_rows = n_rows[i],
                               .n_past = text.n_past,
                               .blocks = text.blocks,
                               .wanted = Wanted::kLogits});
    batch.tokens.insert(batch.tokens.end(), text.tokens.begin() + text.n_past,
                        text.tokens.begin() + text.n_past + n_rows[i]);
  }
  EXPECT_OK(runner.Run(batch));
  std::vector<std::vector<float>> logits;
  for (size_t i = 0; i < texts.size(); ++i) {
    texts[i]->n_past += n_rows[i];
    const std::span<float> row = runner.logits(i);
    logits.emplace_back(row.begin(), row.end());
    const auto largest = std::max_element(row.begin(), row.end());
    EXPECT_EQ(runner.best(i), largest - row.begin());
  }
  return logits;
}

// ‖a − b‖ / ‖b‖
double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0;
  double norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

class CudaEngineTest : public ::testing::Test {
 protected:
  void SetUp() override { baseline_ = kernels::cuda::DeviceMemoryUse().bytes_now; }
  void TearDown() override {
    runners_.clear();
    models_.clear();
    EXPECT_EQ(kernels::cuda::DeviceMemoryUse().bytes_now, baseline_);
  }

  void MakeArtifact(const TinyModelOptions& model, const TinyArtifactOptions& artifact) {
    std::filesystem::remove_all(dir_ / "source");
    std::filesystem::remove_all(dir_ / "artifact");
    TinyModel(model).WriteHf(dir_ / "source");
    ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir_ / "source"));
    ASSERT_OK(testing::WriteTinyArtifact(*checkpoint, dir_ / "artifact", artifact));
  }

  // Null without a device: the test has been skipped then.
  ModelRunner* CudaRunner(ServedModel::RunnerLimits limits = {}, bool use_graphs = kHasGraphs,
                          bool batch_invariant = false) {
    auto model = LoadCudaModel(dir_ / "artifact", {.batch_invariant = batch_invariant,
                                                   .kv_cache_dtype = kv_cache_dtype_,
                                                   .use_graphs = use_graphs});
    if (absl::IsFailedPrecondition(model.status())) {
      [&] { GTEST_SKIP() << "no GPU: " << model.status().message(); }();
      return nullptr;
    }
    EXPECT_OK(model);
    return model.ok() ? MakeRunner(*std::move(model), limits) : nullptr;
  }
  ModelRunner* CpuRunner(ServedModel::RunnerLimits limits = {}) {
    auto model = LoadedModel::LoadArtifact(dir_ / "artifact", {.kv_cache_dtype = kv_cache_dtype_});
    EXPECT_OK(model);
    return model.ok() ? MakeRunner(*std::move(model), limits) : nullptr;
  }
  ModelRunner* MakeRunner(std::shared_ptr<ServedModel> model, ServedModel::RunnerLimits limits) {
    if (limits.n_sequences == 0) limits.n_sequences = 4;
    limits.n_blocks = limits.n_sequences * KvBlocks(kContext);
    if (limits.n_rows == 0) limits.n_rows = 128;
    limits.n_context = kContext;
    limits.pool = &pool_;
    auto runner = model->MakeRunner(limits);
    EXPECT_OK(runner);
    if (!runner.ok()) return nullptr;
    models_.push_back(std::move(model));
    runners_.push_back(*std::move(runner));
    return runners_.back().get();
  }

#ifdef WALSH_DEVICE_IS_HOST
  static constexpr bool kHasGraphs = false;
#else
  static constexpr bool kHasGraphs = true;
#endif
  KvCacheDtype kv_cache_dtype_ = KvCacheDtype::kAuto;  // of runners
  TempDir dir_;
  ThreadPool pool_{2};
  std::vector<std::shared_ptr<ServedModel>> models_;
  std::vector<std::unique_ptr<ModelRunner>> runners_;
  int64_t baseline_ = 0;
};

// What an artifact can have beside integers and their scales. The codebook is the grid's own
// values, a little out of place; float zeros likewise.
TinyArtifactOptions WithCodebook() {
  return {.bits = 2,
          .quantization_config = {{"checkpoint_format", "walsh"},
                                  {"bits", nullptr},
                                  {"walsh", {{"grid", "codebook"}, {"bits", 2}}}},
          .edit = [](const std::string&, QuantizedMatrix& m) {
            if (m.bits != 2) return;
            for (size_t g = 0; g < m.scales.size(); ++g) {
              for (int code = 0; code < 4; ++code) {
                const float off = code == 2 ? 0.25f : 0.0f;
                const float level = m.scales[g] * (static_cast<float>(code - m.zeros[g]) + off);
                m.levels.push_back(HalfToFloat(FloatToHalf(level)));
              }
            }
            m.scales.clear();
            m.zeros.clear();
          }};
}
TinyArtifactOptions WithFloatZeros(int bits) {
  return {
      .bits = bits,
      .quantization_config = {{"checkpoint_format", "walsh"},
                              {"bits", nullptr},
                              {"walsh", {{"grid", "float-zero"}, {"bits", bits}}}},
      .edit = [](const std::string&, QuantizedMatrix& m) {
        for (size_t g = 0; g < m.zeros.size(); ++g) {
          m.float_zeros.push_back(static_cast<float>(m.zeros[g]) + (g % 2 == 0 ? 0.375f : -0.25f));
        }
        m.zeros.clear();
      }};
}
// Inputs of the linears whose names have `part` in it, one to another, `step` apart.
TinyArtifactOptions WithOrder(std::vector<std::pair<std::string, int64_t>> steps) {
  return {.bits = 4,
          .quantization_config = {{"desc_act", true}},
          .input_order = [steps](const std::string& name, int64_t cols) {
            std::vector<int32_t> order;
            for (const auto& [part, step] : steps) {
              if (name.find(part) == std::string::npos) continue;
              order.resize(static_cast<size_t>(cols));
              for (int64_t c = 0; c < cols; ++c) {
                order[static_cast<size_t>(c)] = static_cast<int32_t>((c * step + 3) % cols);
              }
            }
            // Within a group inputs are in their own order.
            for (size_t first = 0; first < order.size(); first += 32) {
              const auto begin = order.begin() + static_cast<std::ptrdiff_t>(first);
              std::sort(begin, begin + 32);
            }
            return order;
          }};
}
TinyArtifactOptions WithOrderAndFloats() {
  TinyArtifactOptions options = WithOrder({{"down_proj", 37}});
  options.bits_of = {{"model.layers.0.mlp.gate_proj", 0}};
  return options;
}
TinyArtifactOptions WithDownRotation(const char* matrix, int64_t block) {
  return {.bits = 4,
          .quantization_config = {{"checkpoint_format", "walsh"},
                                  {"quant_method", nullptr},
                                  {"online_transforms",
                                   {{"down_proj_input", {{"matrix", matrix}, {"block", block}}}}}}};
}

// Prompts in chunks, then tokens one by one, two sequences at once. The CPU rounds activations to
// 8 bits and the head in other groups: what that costs these random models is the bound.
TEST_F(CudaEngineTest, LogitsAreThoseOfTheCpu) {
  struct Case {
    const char* name;
    TinyModelOptions model;
    TinyArtifactOptions artifact;
  };
  const std::vector<Case> cases = {
      {"2 bits", {}, {.bits = 2}},
      {"3 bits", {}, {.bits = 3}},
      {"4 bits", {}, {.bits = 4}},
      {"8 bits", {}, {.bits = 8, .group_size = -1}},
      {"biases", {.has_attention_bias = true, .has_mlp_bias = true}, {.bits = 4}},
      {"symmetric", {.is_tied = true}, {.bits = 4, .group_size = 64, .symmetric = true}},
      {"norms of heads", {.architecture = "Qwen3ForCausalLM"}, {.bits = 4}},
      {"window", {.architecture = "MistralForCausalLM", .sliding_window = 24}, {.bits = 4}},
      {"fused linears", {.architecture = "Phi3ForCausalLM"}, {.bits = 4}},
      {"Gemma 3", {.architecture = "Gemma3ForCausalLM", .sliding_window = 24}, {.bits = 4}},
      {"Gemma 3, mixed widths",
       {.architecture = "Gemma3ForCausalLM", .sliding_window = 24},
       {.bits = 4, .bits_of = {{"model.layers.0.mlp.up_proj", 8}}}},
      {"mixed widths",
       {.has_attention_bias = true, .has_mlp_bias = true},
       {.bits = 4,
        .bits_of = {{"model.layers.0.self_attn.v_proj", 8},
                    {"model.layers.0.mlp.up_proj", 8},
                    {"model.layers.1.mlp.down_proj", 2}}}},
      {"some in floats",
       {.has_attention_bias = true, .has_mlp_bias = true},
       {.bits = 4,
        .bits_of = {{"model.layers.0.self_attn.k_proj", 0},
                    {"model.layers.0.self_attn.o_proj", 0},
                    {"model.layers.0.mlp.up_proj", 0},
                    {"model.layers.1.mlp.down_proj", 0}}}},
      {"a pair in floats",
       {},
       {.bits = 4,
        .bits_of = {{"model.layers.0.mlp.gate_proj", 0}, {"model.layers.0.mlp.up_proj", 0}}}},
      {"Walsh, 128", {.has_mlp_bias = true}, WithDownRotation("walsh", 128)},
      {"Walsh, 64", {}, WithDownRotation("walsh", 64)},
      {"Walsh, 32", {.intermediate = 160}, WithDownRotation("walsh", 32)},
      {"Hadamard, 16", {}, WithDownRotation("hadamard", 16)},
      {"codebook", {}, WithCodebook()},
      {"float zeros, 2 bits", {}, WithFloatZeros(2)},
      {"float zeros, 3 bits", {}, WithFloatZeros(3)},
      {"order of down_proj", {.has_mlp_bias = true}, WithOrder({{"down_proj", 37}})},
      {"order of down_proj, gate in floats", {.has_mlp_bias = true}, WithOrderAndFloats()},
      {"one order for q, k and v", {}, WithOrder({{"_proj", 37}})},
      {"another order for each",
       {.has_attention_bias = true},
       WithOrder({{"q_proj", 5}, {"v_proj", 11}, {"o_proj", 7}, {"up_proj", 9}})},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    ASSERT_NO_FATAL_FAILURE(MakeArtifact(c.model, c.artifact));
    ModelRunner* device = CudaRunner();
    if (device == nullptr) return;
    ModelRunner* host = CpuRunner();
    ASSERT_NE(host, nullptr);
    std::vector<Text> on_device = {MakeText(0, Tokens(60, 1)), MakeText(1, Tokens(40, 2))};
    std::vector<Text> on_host = on_device;
    const std::vector<std::vector<int64_t>> steps = {{30, 17}, {17, 1}, {1, 1}, {1, 1}, {1, 1}};
    for (const std::vector<int64_t>& step : steps) {
      const auto actual = Step(*device, {&on_device[0], &on_device[1]}, step);
      const auto expected = Step(*host, {&on_host[0], &on_host[1]}, step);
      for (size_t i = 0; i < 2; ++i) EXPECT_LT(Distance(actual[i], expected[i]), 0.05);
    }
  }
}

// Members of a quantization_config that ask for a KV cache of codes.
nlohmann::json KvCacheConfig(int bits, int64_t group, const char* matrix = nullptr,
                             int64_t block = 0) {
  nlohmann::json online = {{"kv_cache",
                            {{"bits", bits},
                             {"group_size", group},
                             {"symmetric", false},
                             {"clip_ratio", bits == 8 ? 1.0 : 0.95}}}};
  if (matrix != nullptr) online["query_key"] = {{"matrix", matrix}, {"block", block}};
  return {{"online_transforms", online}, {"quant_method", nullptr}, {"checkpoint_format", "walsh"}};
}

// Keys and values are on the same grids, of heads or of groups in the order of R3.
TEST_F(CudaEngineTest, KeysAndValuesAreRoundedAsOnTheCpu) {
  struct Case {
    const char* name;
    int64_t head_dim;
    nlohmann::json config;
    KvCacheDtype kv_cache_dtype = KvCacheDtype::kAuto;
    double limit = 0.05;
  };
  // Where the CPU's rounding of activations moves a value to the next of 16 codes.
  constexpr double kLimitOf4Bits = 0.2;
  const std::vector<Case> cases = {
      {"int8", 64, {}, KvCacheDtype::kInt8},
      {"int8, no R3", 96, {}, KvCacheDtype::kInt8},
      {"int4", 32, {}, KvCacheDtype::kInt4, kLimitOf4Bits},
      {"8 bits by head", 32, KvCacheConfig(8, 32)},
      {"8 bits by group, R3", 128, KvCacheConfig(8, 32, "walsh", 128)},
      {"4 bits by group", 64, KvCacheConfig(4, 32), KvCacheDtype::kAuto, kLimitOf4Bits},
      {"4 bits by group, R3", 128, KvCacheConfig(4, 64, "walsh", 128), KvCacheDtype::kAuto,
       kLimitOf4Bits},
      {"4 bits, R3 in natural order", 64, KvCacheConfig(4, 32, "hadamard", 64), KvCacheDtype::kAuto,
       kLimitOf4Bits},
      {"an artifact's 4 bits as 8", 64, KvCacheConfig(4, 64), KvCacheDtype::kInt8},
      {"an artifact's 2 bits as bf16", 64, KvCacheConfig(2, 64), KvCacheDtype::kBf16},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    ASSERT_NO_FATAL_FAILURE(
        MakeArtifact({.head_dim = c.head_dim}, {.quantization_config = c.config}));
    kv_cache_dtype_ = c.kv_cache_dtype;
    ModelRunner* device = CudaRunner();
    if (device == nullptr) return;
    ModelRunner* host = CpuRunner();
    ASSERT_NE(host, nullptr);
    std::vector<Text> on_device = {MakeText(0, Tokens(60, 1)), MakeText(1, Tokens(40, 2))};
    std::vector<Text> on_host = on_device;
    const std::vector<std::vector<int64_t>> steps = {{30, 17}, {17, 1}, {1, 1}, {1, 1}, {1, 1}};
    double largest = 0;
    for (const std::vector<int64_t>& step : steps) {
      const auto actual = Step(*device, {&on_device[0], &on_device[1]}, step);
      const auto expected = Step(*host, {&on_host[0], &on_host[1]}, step);
      for (size_t i = 0; i < 2; ++i) largest = std::max(largest, Distance(actual[i], expected[i]));
    }
    EXPECT_LT(largest, c.limit);
  }
}

// Codes change the answers a little, and a cache of them takes the memory that it says.
TEST_F(CudaEngineTest, ACacheOfCodesIsSmaller) {
  constexpr int64_t kHeads = 2;
  constexpr int64_t kHeadDim = 64;
  constexpr int64_t kGridBytes = 4;
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({.n_kv_heads = kHeads, .head_dim = kHeadDim}, {}));
  std::vector<std::vector<float>> logits;
  for (const auto& [dtype, head_bytes] :
       {std::pair(KvCacheDtype::kBf16, 2 * kHeadDim),
        std::pair(KvCacheDtype::kInt8, kHeadDim + kGridBytes),
        std::pair(KvCacheDtype::kInt4, kHeadDim / 2 + kGridBytes)}) {
    kv_cache_dtype_ = dtype;
    ModelRunner* runner = CudaRunner();
    if (runner == nullptr) return;
    constexpr int64_t kLayers = 2;
    EXPECT_EQ(models_.back()->kv_token_bytes(), kLayers * 2 * kHeads * head_bytes);
    EXPECT_EQ(runner->kv_cache_bytes(),
              4 * KvBlocks(kContext) * kKvBlockTokens * models_.back()->kv_token_bytes());
    Text text = MakeText(0, Tokens(60, 1));
    Step(*runner, {&text}, {50});
    logits.push_back(Step(*runner, {&text}, {1})[0]);
  }
  const double of_8_bits = Distance(logits[1], logits[0]);
  const double of_4_bits = Distance(logits[2], logits[0]);
  EXPECT_GT(of_8_bits, 0);
  EXPECT_LT(of_8_bits, 0.02);
  EXPECT_GT(of_4_bits, 3 * of_8_bits);
  EXPECT_LT(of_4_bits, 0.2);
}

// More rows than quantized products take are multiplied in bf16.
TEST_F(CudaEngineTest, LongChunksAreCloseToShortOnes) {
  for (const TinyArtifactOptions& options :
       {TinyArtifactOptions{.bits = 4, .bits_of = {{"model.layers.0.mlp.up_proj", 8}}},
        TinyArtifactOptions{.bits = 4,
        .bits_of = {{"model.layers.0.self_attn.v_proj", 0}, {"model.layers.1.mlp.down_proj", 0}}},
        WithDownRotation("walsh", 64), WithCodebook(), WithOrder({{"_proj", 37}}),
        WithOrder({{"k_proj", 11}, {"o_proj", 7}, {"gate_proj", 9}, {"down_proj", 5}})}) {
    ASSERT_NO_FATAL_FAILURE(
        MakeArtifact({.has_attention_bias = true, .has_mlp_bias = true}, options));
    ModelRunner* runner = CudaRunner({.n_rows = 240});
    if (runner == nullptr) return;
    Text whole = MakeText(0, Tokens(231, 1));
    Text cut = MakeText(1, Tokens(231, 1));
    const auto expected = Step(*runner, {&whole}, {230});
    Step(*runner, {&cut}, {100});
    const auto actual = Step(*runner, {&cut}, {130});
    EXPECT_LT(Distance(actual[0], expected[0]), 0.03);
    EXPECT_LT(Distance(Step(*runner, {&cut}, {1})[0], Step(*runner, {&whole}, {1})[0]), 0.03);
  }
}

// Where batches must not matter, neither does where a prompt was cut.
TEST_F(CudaEngineTest, InvariantPromptsHaveTheSameBitsHoweverTheyAreCut) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  ModelRunner* runner = CudaRunner({.n_rows = 480}, kHasGraphs, /*batch_invariant=*/true);
  if (runner == nullptr) return;
  Text whole = MakeText(0, Tokens(230, 1));
  Text cut = MakeText(1, Tokens(230, 1));
  Text other = MakeText(2, Tokens(230, 2));
  const auto expected = Step(*runner, {&whole}, {230});
  Step(*runner, {&other, &cut}, {150, 90});
  EXPECT_EQ(Step(*runner, {&cut, &other}, {140, 80})[0], expected[0]);
}

// The same bits, whatever runs beside a sequence and however a step is launched: where batches must
// not matter, and elsewhere among a few. Among many they are close, and the same every time.
TEST_F(CudaEngineTest, DecodingDoesNotDependOnTheBatchOrOnGraphs) {
  constexpr int kFew = 12;
  constexpr int kMany = 32;
  struct Case {
    const char* name;
    int bits;
    int64_t head_dim = 16;
    KvCacheDtype kv_cache_dtype = KvCacheDtype::kAuto;
  };
  for (const Case& c : {Case{"2 bits", 2}, Case{"3 bits", 3}, Case{"4 bits", 4},
                        Case{"8 bits of keys and values", 4, 64, KvCacheDtype::kInt8},
                        Case{"4 bits of keys and values", 4, 32, KvCacheDtype::kInt4}}) {
    SCOPED_TRACE(c.name);
    ASSERT_NO_FATAL_FAILURE(MakeArtifact({.head_dim = c.head_dim}, {.bits = c.bits}));
    kv_cache_dtype_ = c.kv_cache_dtype;
    for (const bool batch_invariant : {false, true}) {
      SCOPED_TRACE(batch_invariant ? "batch-invariant" : "as it is fastest");
      std::vector<std::vector<float>> expected;
      std::vector<std::vector<float>> expected_of_many;
      for (const bool use_graphs : {false, true}) {
        if (use_graphs && !kHasGraphs) continue;
        for (const int n : {1, 3, kFew, kMany}) {
          SCOPED_TRACE(n);
          ModelRunner* runner =
              CudaRunner({.n_rows = 1024, .n_sequences = kMany}, use_graphs, batch_invariant);
          if (runner == nullptr) return;
          std::vector<Text> texts;
          std::vector<Text*> all;
          for (int i = 0; i < n; ++i) texts.push_back(MakeText(i, Tokens(40 + i, i)));
          for (Text& text : texts) all.push_back(&text);
          for (Text& text : texts) Step(*runner, {&text}, {20});
          std::vector<std::vector<float>> actual;
          for (int step = 0; step < 4; ++step) {
            std::vector<int64_t> n_rows(all.size(), 1);
            // Others are prefilled meanwhile.
            if (n == kMany && step % 2 == 1) n_rows.back() = 5;
            actual.push_back(Step(*runner, all, n_rows).front());
          }
          if (expected.empty()) expected = actual;
          if (n < kMany || batch_invariant) {
            EXPECT_EQ(actual, expected);
            continue;
          }
          for (size_t i = 0; i < actual.size(); ++i) {
            EXPECT_LT(Distance(actual[i], expected[i]), 0.05);
          }
          if (expected_of_many.empty()) expected_of_many = actual;
          EXPECT_EQ(actual, expected_of_many);
        }
      }
    }
  }
}

TEST_F(CudaEngineTest, WhatIsNotWantedIsNotMade) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  ModelRunner* runner = CudaRunner();
  if (runner == nullptr) return;
  Text a = MakeText(0, Tokens(20, 1));
  Text b = MakeText(1, Tokens(20, 1));
  StepBatch batch;
  batch.tokens = {a.tokens[0], a.tokens[1], b.tokens[0], b.tokens[1], b.tokens[2]};
  batch.sequences = {{.first_row = 0, .n_rows = 2, .blocks = a.blocks},
                     {.first_row = 2, .n_rows = 3, .blocks = b.blocks, .wanted = Wanted::kBest}};
  ASSERT_OK(runner->Run(batch));
  const int32_t best = runner->best(1);
  a.n_past = 2;
  const auto logits = Step(*runner, {&a}, {1});
  EXPECT_EQ(std::max_element(logits[0].begin(), logits[0].end()) - logits[0].begin(), best);
}

// Rows of one token each; tokens from the step before where there is one on its way.
StepBatch NextTokens(std::vector<Text>& texts, bool is_before) {
  StepBatch batch;
  for (size_t i = 0; i < texts.size(); ++i) {
    batch.sequences.push_back({.first_row = static_cast<int64_t>(i),
                               .n_rows = 1,
                               .n_past = texts[i].n_past++,
                               .blocks = texts[i].blocks,
                               .wanted = Wanted::kBest});
    batch.tokens.push_back(is_before ? StepBatch::FromStepBefore(i) : texts[i].tokens.back());
  }
  return batch;
}

TEST_F(CudaEngineTest, AStepThatIsStartedAheadTakesTheTokensOfTheOneBefore) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  ModelRunner* runner = CudaRunner();
  if (runner == nullptr) return;
  ASSERT_TRUE(runner->can_run_ahead());
  std::vector<std::vector<int32_t>> made[2];
  for (const bool is_ahead : {false, true}) {
    std::vector<Text> texts = {MakeText(0, Tokens(21, 1)), MakeText(1, Tokens(9, 2)),
                               MakeText(2, Tokens(30, 3))};
    for (Text& text : texts) Step(*runner, {&text}, {static_cast<int64_t>(text.tokens.size()) - 1});
    const auto take = [&] {
      ASSERT_OK(runner->Wait());
      made[is_ahead].emplace_back();
      for (size_t i = 0; i < texts.size(); ++i) {
        texts[i].tokens.push_back(runner->best(i));
        made[is_ahead].back().push_back(runner->best(i));
      }
    };
    ASSERT_OK(runner->Start(NextTokens(texts, false)));
    for (int step = 0; step < 6; ++step) {
      if (!is_ahead) take();
      ASSERT_OK(runner->Start(NextTokens(texts, is_ahead)));
      if (is_ahead) take();
    }
    take();
  }
  EXPECT_EQ(made[1], made[0]);
}

TEST_F(CudaEngineTest, DrawnTokensAreThoseOfTheSampler) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  ModelRunner* runner = CudaRunner();
  if (runner == nullptr) return;
  ASSERT_TRUE(runner->can_choose({}));
  Text text = MakeText(0, Tokens(40, 1));
  Step(*runner, {&text}, {20});
  // The last row again: as a row that decodes, and with one more as a prompt, of which the logits
  // differ in the last bits.
  const auto last_rows = [&](int64_t n_rows, Wanted wanted, const Choice& choice) {
    StepBatch batch;
    batch.tokens = {text.tokens.begin() + 20 - n_rows, text.tokens.begin() + 20};
    batch.sequences = {{.n_rows = n_rows,
                        .n_past = 20 - n_rows,
                        .blocks = text.blocks,
                        .wanted = wanted,
                        .choice = choice}};
    return batch;
  };
  std::set<int32_t> seen;
  for (const int64_t n_rows : {1, 2}) {
    ASSERT_OK(runner->Run(last_rows(n_rows, Wanted::kLogits, {})));
    const std::vector<float> logits(runner->logits(0).begin(), runner->logits(0).end());
    for (uint64_t seed = 0; seed < 40; ++seed) {
      const SamplingOptions options{.temperature = 0.9,
                                    .top_p = seed % 2 == 0 ? 1.0 : 0.9,
                                    .top_k = seed % 3 == 0 ? 0 : 40,
                                    .min_p = seed % 5 == 0 ? 0.02 : 0.0,
                                    .seed = seed};
      ASSERT_OK(
          runner->Run(last_rows(n_rows, Wanted::kChosen, Sampler(options, {}, {}).ChoiceOf(0))));
      std::vector<float> row = logits;
      EXPECT_EQ(runner->best(0), Sampler(options, {}, {}).Sample(row)->token) << seed;
      seen.insert(runner->best(0));
    }
  }
  EXPECT_GT(seen.size(), 10u);
}

TEST_F(CudaEngineTest, BatchesThatDoNotFitAreRefused) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  ModelRunner* runner = CudaRunner();
  if (runner == nullptr) return;
  Text text = MakeText(0, Tokens(200, 1));
  const auto run = [&](std::vector<int32_t> tokens, StepBatch::Sequence sequence) {
    return runner->Run({.tokens = std::move(tokens), .sequences = {sequence}});
  };
  EXPECT_THAT(run({320}, {.n_rows = 1, .blocks = text.blocks}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token 320")));
  EXPECT_THAT(run(Tokens(129, 1), {.n_rows = 129, .blocks = text.blocks}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("129 rows")));
  EXPECT_THAT(run({1}, {.n_rows = 2, .blocks = text.blocks}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rows 0 to 2")));
  EXPECT_THAT(run({1}, {.n_rows = 1, .n_past = 16, .blocks = {text.blocks.data(), 1}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("table of 1 blocks")));
  text.blocks[0] = static_cast<BlockId>(4 * KvBlocks(kContext));
  EXPECT_THAT(run({1}, {.n_rows = 1, .blocks = text.blocks}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block 64, the pool has 64")));
}

TEST_F(CudaEngineTest, MemoryComesBack) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  if (CudaRunner() == nullptr) return;
  runners_.clear();
  models_.clear();
  for (int i = 0; i < 50; ++i) {
    ASSERT_NE(CudaRunner(), nullptr);
    EXPECT_GT(kernels::cuda::DeviceMemoryUse().bytes_now, baseline_);
    runners_.clear();
    models_.clear();
    ASSERT_EQ(kernels::cuda::DeviceMemoryUse().bytes_now, baseline_) << "load " << i;
  }
  // Each allocation fails once.
  int n_failed = 0;
  for (bool has_failed = true; has_failed; ++n_failed) {
    kernels::cuda::FailAllocationForTest(n_failed + 1);
    auto model = LoadCudaModel(dir_ / "artifact", {.use_graphs = kHasGraphs});
    absl::Status status = model.status();
    if (status.ok()) {
      status = (*model)
                   ->MakeRunner({.n_blocks = 16,
                                 .n_rows = 16,
                                 .n_sequences = 2,
                                 .n_context = kContext,
                                 .pool = &pool_})
                   .status();
    }
    has_failed = !status.ok();
    if (has_failed) {
      EXPECT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
    }
    model = absl::CancelledError();
    ASSERT_EQ(kernels::cuda::DeviceMemoryUse().bytes_now, baseline_) << "failure " << n_failed;
  }
  kernels::cuda::FailAllocationForTest(0);
  EXPECT_GT(n_failed, 30);
}

// What a KV cache leaves for steps is what they take: of few rows and of many, which have buffers
// of their own.
TEST_F(CudaEngineTest, StepBytesAreWhatARunnerAllocates) {
  struct Case {
    const char* name;
    TinyModelOptions model;
    TinyArtifactOptions artifact;
    int64_t n_rows;
  };
  for (const Case& c : std::vector<Case>{
           {"few rows", {}, {}, 16},
           {"many rows", {}, {}, 240},
           {"many rows, Gemma 3", {.architecture = "Gemma3ForCausalLM"}, {}, 240},
           {"many rows, rotated", {}, WithDownRotation("walsh", 64), 240},
           {"gate apart from up", {}, {.bits_of = {{"model.layers.0.mlp.up_proj", 8}}}, 16}}) {
    SCOPED_TRACE(c.name);
    ASSERT_NO_FATAL_FAILURE(MakeArtifact(c.model, c.artifact));
    const auto model = LoadCudaModel(dir_ / "artifact", {.use_graphs = kHasGraphs});
    if (absl::IsFailedPrecondition(model.status())) {
      GTEST_SKIP() << "no GPU: " << model.status().message();
    }
    ASSERT_OK(model);
    const ServedModel::RunnerLimits limits{.n_blocks = 16,
                                           .n_rows = c.n_rows,
                                           .n_sequences = 5,
                                           .n_context = kContext,
                                           .pool = &pool_};
    const int64_t before = kernels::cuda::DeviceMemoryUse().bytes_now;
    const auto runner = (*model)->MakeRunner(limits);
    ASSERT_OK(runner);
    EXPECT_EQ(kernels::cuda::DeviceMemoryUse().bytes_now - before - (*runner)->kv_cache_bytes(),
              (*model)->step_bytes(limits));
  }
}

// Each model's KV cache stays within its limit, and what one has taken the next does not count on.
TEST_F(CudaEngineTest, SeveralModelsShareTheDevice) {
  ASSERT_NO_FATAL_FAILURE(MakeArtifact({}, {}));
  constexpr int64_t kLimitBytes = 1 << 20;
  Options options{.max_sequences = 64, .n_threads = 1};
  std::vector<std::unique_ptr<Engine>> engines;
  for (int i = 0; i < 3; ++i) {
    auto model = LoadCudaModel(dir_ / "artifact", {.use_graphs = kHasGraphs});
    if (absl::IsFailedPrecondition(model.status())) {
      GTEST_SKIP() << "no GPU: " << model.status().message();
    }
    ASSERT_OK(model);
    const int64_t free_bytes = (*model)->free_device_bytes().value();
    options.kv_cache_bytes = i == 2 ? 0 : kLimitBytes;
    options.kv_memory_fraction =
        i == 2 ? static_cast<double>(kLimitBytes) / static_cast<double>(free_bytes) : 0.9;
    const int64_t token_bytes = (*model)->kv_token_bytes();
    ASSERT_GT(64 * kContext * token_bytes, 2 * kLimitBytes) << "or nothing limits it";
    auto engine = Engine::Create(*std::move(model), options, Clock::Real());
    ASSERT_OK(engine);
    EXPECT_LE((*engine)->kv_cache_bytes(), kLimitBytes);
    EXPECT_GT((*engine)->kv_cache_bytes(), kLimitBytes - 2 * kKvBlockTokens * token_bytes);
    engines.push_back(*std::move(engine));
#ifdef WALSH_DEVICE_IS_HOST  // a GPU's own account moves in larger steps
    EXPECT_LE(engines[i]->model().free_device_bytes(), free_bytes - engines[i]->kv_cache_bytes());
#endif
  }
}

TEST_F(CudaEngineTest, WhatNoKernelTakesIsNamed) {
  const auto load = [&](const TinyModelOptions& model, const TinyArtifactOptions& artifact) {
    MakeArtifact(model, artifact);
    return LoadCudaModel(dir_ / "artifact", {}).status();
  };
  EXPECT_THAT(load({.n_heads = 8, .n_kv_heads = 4, .head_dim = 8}, {}),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("heads of 8")));
  EXPECT_THAT(load({.intermediate = 256}, WithDownRotation("walsh", 256)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("in blocks of 256")));
  TinyArtifactOptions both = WithDownRotation("walsh", 64);
  both.input_order = WithOrder({{"1.mlp.down_proj", 5}}).input_order;
  both.quantization_config["desc_act"] = true;
  EXPECT_THAT(load({}, both), StatusIs(absl::StatusCode::kUnimplemented,
                                       HasSubstr("'model.layers.1.mlp.down_proj': a rotated")));
  TinyArtifactOptions floats = WithDownRotation("walsh", 64);
  floats.bits_of = {{"model.layers.1.mlp.down_proj", 0}};
  EXPECT_THAT(load({}, floats), StatusIs(absl::StatusCode::kUnimplemented,
                                         HasSubstr("'model.layers.1.mlp.down_proj': a rotated")));
  // Of the MLP's linears, since others have widths that are multiples of their 32 rows.
  TinyArtifactOptions odd_width;
  for (const char* layer : {"model.layers.0.mlp.", "model.layers.1.mlp."}) {
    for (const char* linear : {"gate_proj", "up_proj", "down_proj"}) {
      odd_width.bits_of[absl::StrCat(layer, linear)] = 0;
    }
  }
  EXPECT_THAT(
      load({.intermediate = 132}, odd_width),
      StatusIs(absl::StatusCode::kUnimplemented,
               HasSubstr("'model.layers.0.mlp.down_proj': unquantized weights of 132 columns")));
  const auto load_kv = [&](int64_t head_dim, const nlohmann::json& config) {
    return load({.head_dim = head_dim}, {.quantization_config = config});
  };
  EXPECT_THAT(load_kv(64, KvCacheConfig(2, 64)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("a KV cache of 2 bits")));
  EXPECT_THAT(load_kv(16, KvCacheConfig(8, 16)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("8 bits with heads of 16")));
  EXPECT_THAT(load_kv(64, KvCacheConfig(8, 128)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("in groups of 128")));
  EXPECT_THAT(load_kv(96, KvCacheConfig(8, 32)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("in groups of 32")));
  EXPECT_THAT(load_kv(96, KvCacheConfig(4, 96, "hadamard", 96)),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("R3 in blocks of 96")));
}

}  // namespace
}  // namespace walsh::engine
