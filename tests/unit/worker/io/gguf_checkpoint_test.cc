#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <span>
#include <string>

#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/checkpoint.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/gguf_model.h"

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using walsh::testing::FloatBytes;
using walsh::testing::GgufBuilder;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::TinyModel;
using walsh::testing::TinyModelOptions;
using walsh::testing::TinyTensor;
using walsh::testing::WriteFile;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

// A new field breaks the bindings, so that none is forgotten. GGUF stores floats where JSON has
// doubles.
void ExpectEqualConfigs(const ModelConfig& hf, const ModelConfig& gguf) {
  const auto& [a_architecture, a_hidden, a_intermediate, a_layers, a_heads, a_kv_heads, a_head_dim,
               a_vocab, a_max_position, a_eps, a_theta, a_scaling, a_tied, a_attention_bias,
               a_output_bias, a_mlp_bias, a_qk_norm, a_output_norms, a_norm_offset, a_activation,
               a_embedding_scale, a_scalar, a_fused, a_window, a_sliding, a_sliding_theta, a_bos,
               a_eos] = hf;
  const auto& [b_architecture, b_hidden, b_intermediate, b_layers, b_heads, b_kv_heads, b_head_dim,
               b_vocab, b_max_position, b_eps, b_theta, b_scaling, b_tied, b_attention_bias,
               b_output_bias, b_mlp_bias, b_qk_norm, b_output_norms, b_norm_offset, b_activation,
               b_embedding_scale, b_scalar, b_fused, b_window, b_sliding, b_sliding_theta, b_bos,
               b_eos] = gguf;
  EXPECT_EQ(a_architecture, b_architecture);
  EXPECT_EQ(a_hidden, b_hidden);
  EXPECT_EQ(a_intermediate, b_intermediate);
  EXPECT_EQ(a_layers, b_layers);
  EXPECT_EQ(a_heads, b_heads);
  EXPECT_EQ(a_kv_heads, b_kv_heads);
  EXPECT_EQ(a_head_dim, b_head_dim);
  EXPECT_EQ(a_vocab, b_vocab);
  EXPECT_EQ(a_max_position, b_max_position);
  EXPECT_EQ(static_cast<float>(a_eps), static_cast<float>(b_eps));
  EXPECT_EQ(static_cast<float>(a_theta), static_cast<float>(b_theta));
  EXPECT_EQ(a_tied, b_tied);
  EXPECT_EQ(a_attention_bias, b_attention_bias);
  EXPECT_EQ(a_output_bias, b_output_bias);
  EXPECT_EQ(a_mlp_bias, b_mlp_bias);
  EXPECT_EQ(a_qk_norm, b_qk_norm);
  EXPECT_EQ(a_output_norms, b_output_norms);
  EXPECT_EQ(a_norm_offset, b_norm_offset);
  EXPECT_EQ(a_activation, b_activation);
  EXPECT_EQ(a_embedding_scale, b_embedding_scale);
  EXPECT_EQ(a_scalar, b_scalar);
  EXPECT_EQ(a_fused, b_fused);
  EXPECT_EQ(a_window, b_window);
  EXPECT_EQ(a_sliding, b_sliding);
  EXPECT_EQ(a_sliding_theta, b_sliding_theta);
  EXPECT_EQ(a_bos, b_bos);
  EXPECT_EQ(a_eos, b_eos);
  const auto& [a_kind, a_factor, a_low, a_high, a_original, a_divisors] = a_scaling;
  const auto& [b_kind, b_factor, b_low, b_high, b_original, b_divisors] = b_scaling;
  EXPECT_EQ(a_kind, b_kind);
  EXPECT_EQ(a_factor, b_factor);
  EXPECT_EQ(a_low, b_low);
  EXPECT_EQ(a_high, b_high);
  EXPECT_EQ(a_original, b_original);
  EXPECT_EQ(a_divisors, b_divisors);
}

class GgufCheckpointTest : public ::testing::TestWithParam<TinyModelOptions> {};

// The two forms of one model: same tensors, names and configuration.
TEST_P(GgufCheckpointTest, EqualsTheHfForm) {
  const TempDir dir;
  const TinyModel model(GetParam());
  model.WriteHf(dir / "tiny");
  model.WriteGguf(dir / "tiny.gguf");
  ASSERT_OK_AND_ASSIGN(const auto hf, Checkpoint::Open(dir / "tiny"));
  ASSERT_OK_AND_ASSIGN(const auto gguf, Checkpoint::Open(dir / "tiny.gguf"));
  for (const TinyTensor& tensor : model.tensors()) {
    ASSERT_OK_AND_ASSIGN(const Matrix a, hf->Read(tensor.name));
    ASSERT_OK_AND_ASSIGN(const Matrix b, gguf->Read(tensor.name));
    ASSERT_EQ(a.rows(), b.rows()) << tensor.name;
    ASSERT_EQ(a.cols(), b.cols()) << tensor.name;
    EXPECT_TRUE(std::equal(a.data(), a.data() + a.size(), b.data())) << tensor.name;
    if (a.rows() < 8) continue;
    ASSERT_OK_AND_ASSIGN(const Matrix rows, gguf->ReadRows(tensor.name, 3, 5));
    EXPECT_TRUE(std::equal(rows.data(), rows.data() + rows.size(), a.row(3))) << tensor.name;
  }
  ExpectEqualConfigs(hf->config(), gguf->config());
  EXPECT_EQ(gguf->format(), "GGUF " + GetParam().dtype);
  EXPECT_EQ(gguf->license(), "apache-2.0");
  EXPECT_TRUE(gguf->Has(kLmHeadTensor));
}

// Q and K are permuted in the file; what comes is HF's order, to the bit.
TEST_P(GgufCheckpointTest, ReadsWhatIsStoredInHfOrder) {
  const TempDir dir;
  const TinyModel model(GetParam());
  model.WriteGguf(dir / "tiny.gguf");
  ASSERT_OK_AND_ASSIGN(const auto gguf, Checkpoint::Open(dir / "tiny.gguf"));
  const auto expect = [&](std::string_view name, const TinyTensor& tensor) {
    // Norms and biases in GGUF are always F32.
    const std::string dtype = tensor.shape.size() == 1 ? "F32" : GetParam().dtype;
    ASSERT_OK_AND_ASSIGN(const StoredForm form, gguf->FormOf(name));
    EXPECT_EQ(Info(form.type).name, dtype) << name;
    EXPECT_EQ(form.rows, tensor.shape.size() == 1 ? 1 : tensor.shape[0]) << name;
    EXPECT_EQ(form.cols, tensor.shape.back()) << name;
    std::string bytes(static_cast<size_t>(form.size_bytes), '?');
    ASSERT_OK(gguf->ReadStored(name, 0, form.rows, std::as_writable_bytes(std::span(bytes))));
    EXPECT_EQ(bytes, FloatBytes(tensor.values, dtype)) << name;
  };
  for (const TinyTensor& tensor : model.tensors()) expect(tensor.name, tensor);
  if (GetParam().is_tied) expect(kLmHeadTensor, model.tensor("model.embed_tokens.weight"));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, GgufCheckpointTest,
    ::testing::Values(TinyModelOptions{}, TinyModelOptions{.dtype = "F16"},
                      TinyModelOptions{.dtype = "BF16"}, TinyModelOptions{.is_tied = true},
                      TinyModelOptions{.n_heads = 3, .n_kv_heads = 1, .head_dim = 32},
                      TinyModelOptions{.has_attention_bias = true, .has_mlp_bias = true}));

// The same for the other families, whose GGUF names, row orders and norms differ.
class FamilyGgufTest : public ::testing::TestWithParam<TinyModelOptions> {};

TEST_P(FamilyGgufTest, EqualsTheHfForm) {
  const TempDir dir;
  const TinyModel model(GetParam());
  model.WriteHf(dir / "tiny");
  model.WriteGguf(dir / "tiny.gguf");
  ASSERT_OK_AND_ASSIGN(const auto hf, Checkpoint::Open(dir / "tiny"));
  ASSERT_OK_AND_ASSIGN(const auto gguf, Checkpoint::Open(dir / "tiny.gguf"));
  ExpectEqualConfigs(hf->config(), gguf->config());
  for (const ExpectedTensor& tensor : ExpectedTensors(hf->config())) {
    ASSERT_OK_AND_ASSIGN(const Matrix a, hf->Read(tensor.name));
    ASSERT_OK_AND_ASSIGN(const Matrix b, gguf->Read(tensor.name));
    ASSERT_EQ(a.rows(), tensor.rows) << tensor.name;
    ASSERT_EQ(b.rows(), tensor.rows) << tensor.name;
    EXPECT_TRUE(std::equal(a.data(), a.data() + a.size(), b.data())) << tensor.name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Families, FamilyGgufTest,
    ::testing::Values(TinyModelOptions{.architecture = "Qwen2ForCausalLM"},
                      TinyModelOptions{.head_dim = 32, .architecture = "Qwen3ForCausalLM"},
                      TinyModelOptions{.architecture = "Phi3ForCausalLM", .sliding_window = 31},
                      TinyModelOptions{.architecture = "Phi3ForCausalLM"},
                      TinyModelOptions{.n_layers = 7,
                                       .is_tied = true,
                                       .architecture = "Gemma3ForCausalLM",
                                       .sliding_window = 24}),
    [](const auto& param_info) {
      return param_info.param.architecture + std::to_string(param_info.index);
    });

// The parts of a fused matrix are its rows, one part behind the other.
TEST(FusedLinearsTest, AreSplitByRows) {
  const TempDir dir;
  const TinyModel model({.architecture = "Phi3ForCausalLM"});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  for (const FusedTensor& fused : FusedTensors(checkpoint->config())) {
    const std::vector<float>& whole = model.tensor(fused.name).values;
    EXPECT_FALSE(checkpoint->Has(fused.name));
    auto at = whole.begin();
    for (const ExpectedTensor& part : fused.parts) {
      ASSERT_OK_AND_ASSIGN(const Matrix rows, checkpoint->Read(part.name));
      EXPECT_TRUE(std::equal(rows.span().begin(), rows.span().end(), at)) << part.name;
      at += rows.size();
    }
    EXPECT_EQ(at, whole.end());
  }
}

// Norms that a file holds less 1 have no stored form that is theirs.
TEST(NormOffsetTest, IsAddedToFloatsAndRefusedForStoredBytes) {
  const TempDir dir;
  const TinyModel model({.architecture = "Gemma3ForCausalLM"});
  model.WriteHf(dir / "tiny");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(dir / "tiny"));
  const std::string name = "model.layers.1.post_feedforward_layernorm.weight";
  ASSERT_OK_AND_ASSIGN(const Matrix norm, checkpoint->Read(name));
  EXPECT_EQ(norm(0, 5), 1.0f + model.tensor(name).values[5]);
  std::vector<std::byte> bytes(static_cast<size_t>(norm.size()) * sizeof(float));
  EXPECT_THAT(checkpoint->ReadStored(name, 0, 1, bytes),
              StatusIs(kUnimplemented, HasSubstr("is stored less 1")));
}

// Metadata of a model with one layer, hidden 32, one head of 32, and its tensors.
GgufBuilder Small() {
  GgufBuilder gguf;
  gguf.String("general.architecture", "llama")
      .Uint32("llama.block_count", 1)
      .Uint32("llama.context_length", 64)
      .Uint32("llama.embedding_length", 32)
      .Uint32("llama.feed_forward_length", 32)
      .Uint32("llama.attention.head_count", 1)
      .Float32("llama.attention.layer_norm_rms_epsilon", 1e-5f)
      .String("tokenizer.ggml.model", "llama")
      .Strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a"})
      .Floats("tokenizer.ggml.scores", {0, 0, 0, -1})
      .Ints("tokenizer.ggml.token_type", {2, 3, 3, 1});
  const std::string vector = FloatBytes(std::vector<float>(32, 1.0f), "F32");
  const std::string square = FloatBytes(std::vector<float>(32 * 32, 0.5f), "F32");
  gguf.Tensor("token_embd.weight", {32, 4}, 0, std::string(512, '\0'))
      .Tensor("output_norm.weight", {32}, 0, vector)
      .Tensor("blk.0.attn_norm.weight", {32}, 0, vector)
      .Tensor("blk.0.ffn_norm.weight", {32}, 0, vector);
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"}) {
    gguf.Tensor("blk.0." + std::string(name) + ".weight", {32, 32}, 0, square);
  }
  return gguf;
}
constexpr char kLast[] = "blk.0.ffn_down.weight";

GgufBuilder Whole() {
  return Small().Tensor(kLast, {32, 32}, 0, FloatBytes(std::vector<float>(32 * 32, 0.5f), "F32"));
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const GgufBuilder& gguf) {
  const TempDir dir;
  WriteFile(dir / "m.gguf", gguf.Build());
  return Checkpoint::Open(dir / "m.gguf");
}

TEST(GgufCheckpointTest, FillsInDefaults) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Open(Whole()));
  const ModelConfig& config = checkpoint->config();
  EXPECT_EQ(config.n_kv_heads, 1);
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_EQ(config.vocab, 4);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_EQ(config.bos_token, -1);
  EXPECT_TRUE(config.eos_tokens.empty());
  const GgufVocabulary& vocabulary = *checkpoint->tokenizer().gguf;
  EXPECT_TRUE(vocabulary.add_bos);  // SentencePiece models do unless told otherwise
  EXPECT_FALSE(vocabulary.has_add_bos);
  EXPECT_TRUE(vocabulary.add_space_prefix);
  EXPECT_THAT(vocabulary.scores, ElementsAre(0, 0, 0, -1));
}

TEST(GgufCheckpointTest, RefusesTwoNamesForOneTensor) {
  const std::string square = FloatBytes(std::vector<float>(32 * 32, 0.5f), "F32");
  EXPECT_THAT(Open(Whole().Tensor("model.layers.0.self_attn.q_proj.weight", {32, 32}, 0, square)),
              StatusIs(kInvalid, HasSubstr("'blk.0.attn_q.weight' and "
                                           "'model.layers.0.self_attn.q_proj.weight' are both")));
}

TEST(GgufCheckpointTest, CollectsEveryEndToken) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Open(Whole()
                                                       .Uint32("tokenizer.ggml.eos_token_id", 2)
                                                       .Uint32("tokenizer.ggml.eot_token_id", 3)
                                                       .Uint32("tokenizer.ggml.eom_token_id", 2)));
  EXPECT_THAT(checkpoint->config().eos_tokens, ElementsAre(2, 3));
}

TEST(GgufCheckpointTest, ReadsLinearScaling) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint,
                       Open(Whole()
                                .String("llama.rope.scaling.type", "linear")
                                .Float32("llama.rope.scaling.factor", 4.0f)));
  EXPECT_EQ(checkpoint->config().rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(checkpoint->config().rope_scaling.factor, 4.0);
}

// llama.cpp: "linear" is what a file means that names no kind, 0 is no factor, and a kind of "none"
// switches every factor off.
TEST(GgufCheckpointTest, ScalesLinearlyWhereNoKindIsNamed) {
  const auto scaling = [](GgufBuilder gguf) -> RopeScaling {
    const auto checkpoint = Open(gguf);
    EXPECT_OK(checkpoint);
    return checkpoint.ok() ? (*checkpoint)->config().rope_scaling : RopeScaling();
  };
  const char* factor = "llama.rope.scaling.factor";
  const char* old_factor = "llama.rope.scale_linear";
  EXPECT_EQ(scaling(Whole().Float32(factor, 4.0f)).kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(scaling(Whole().Float32(factor, 4.0f)).factor, 4.0);
  EXPECT_EQ(scaling(Whole().Float32(old_factor, 2.0f)).kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(scaling(Whole().Float32(old_factor, 2.0f)).factor, 2.0);
  EXPECT_EQ(scaling(Whole().Float32(old_factor, 2.0f).Float32(factor, 4.0f)).factor, 4.0);
  for (const float none : {0.0f, 1.0f}) {
    EXPECT_EQ(scaling(Whole().Float32(factor, none)).kind, RopeScaling::Kind::kNone);
    EXPECT_EQ(scaling(Whole().Float32(old_factor, none)).kind, RopeScaling::Kind::kNone);
  }
  EXPECT_EQ(scaling(Whole().String("llama.rope.scaling.type", "none").Float32(factor, 4.0f)).kind,
            RopeScaling::Kind::kNone);
}

// llama.cpp's formula for rope_freqs.weight, written out again.
std::vector<float> RopeFreqs(double factor, double theta, int head_dim) {
  std::vector<float> out;
  for (int i = 0; i < head_dim; i += 2) {
    const double frequency = 1.0 / std::pow(theta, static_cast<double>(i) / head_dim);
    const double wavelength = 2 * M_PI / frequency;
    if (wavelength < 8192 / 4.0) {
      out.push_back(1.0f);
    } else if (wavelength > 8192 / 1.0) {
      out.push_back(static_cast<float>(factor));
    } else {
      const double smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0);
      out.push_back(static_cast<float>(1 / ((1 - smooth) / factor + smooth)));
    }
  }
  return out;
}

TEST(GgufCheckpointTest, RecognizesLlama3ByItsDivisors) {
  const std::vector<float> divisors = RopeFreqs(32.0, 500000.0, 32);
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Open(Whole()
                                                       .Float32("llama.rope.freq_base", 500000.0f)
                                                       .Tensor("rope_freqs.weight", {16}, 0,
                                                               FloatBytes(divisors, "F32"))));
  const RopeScaling& scaling = checkpoint->config().rope_scaling;
  EXPECT_EQ(scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(scaling.factor, 32.0);
  EXPECT_EQ(scaling.original_max_position, 8192);
  EXPECT_EQ(scaling.frequency_divisors, divisors);

  std::vector<float> odd = divisors;
  odd.back() *= 1.01f;
  EXPECT_THAT(Open(Whole()
                       .Float32("llama.rope.freq_base", 500000.0f)
                       .Tensor("rope_freqs.weight", {16}, 0, FloatBytes(odd, "F32"))),
              StatusIs(kUnimplemented, HasSubstr("rope_freqs.weight is not by any published")));
}

struct BadModel {
  const char* name;
  GgufBuilder gguf;
  absl::StatusCode code;
  const char* message;
};

class BadGgufCheckpointTest : public ::testing::TestWithParam<BadModel> {};

TEST_P(BadGgufCheckpointTest, IsRefused) {
  EXPECT_THAT(Open(GetParam().gguf), StatusIs(GetParam().code, HasSubstr(GetParam().message)));
}

GgufBuilder Architecture(const char* name) {
  return GgufBuilder().String("general.architecture", name);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadGgufCheckpointTest,
    ::testing::Values(
        BadModel{"NoArchitecture", GgufBuilder().Uint32("x", 1), kInvalid,
                 "key 'general.architecture' is missing"},
        BadModel{
            "OtherArchitecture", Architecture("gpt2"), kUnimplemented,
            "architecture 'gpt2' is not supported; supported: llama, qwen2, qwen3, phi3, gemma3"},
        BadModel{"ArchitectureIsANumber", GgufBuilder().Uint32("general.architecture", 1), kInvalid,
                 "'general.architecture' is not a string"},
        BadModel{"Experts", Architecture("llama").Uint32("llama.expert_count", 8), kUnimplemented,
                 "mixtures of experts"},
        BadModel{"NoWidth", Architecture("llama"), kInvalid,
                 "key 'llama.embedding_length' is missing"},
        BadModel{"WidthTooLarge", Architecture("llama").Uint32("llama.embedding_length", 1u << 30),
                 kInvalid, "'llama.embedding_length' is 1073741824, must be 1 to 131072"},
        BadModel{"WidthIsText", Architecture("llama").String("llama.embedding_length", "32"),
                 kInvalid, "'llama.embedding_length' is not an integer"},
        BadModel{"PartialRotary", Whole().Uint32("llama.rope.dimension_count", 16), kUnimplemented,
                 "'llama.rope.dimension_count' is 16, only the head width 32"},
        BadModel{"OtherValueWidth", Whole().Uint32("llama.attention.value_length", 16),
                 kUnimplemented, "'llama.attention.value_length' is 16"},
        BadModel{"Yarn", Whole().String("llama.rope.scaling.type", "yarn"), kUnimplemented,
                 "RoPE scaling 'yarn' is not supported"},
        BadModel{"KvHeads", Whole().Uint32("llama.attention.head_count_kv", 3), kInvalid,
                 "1 attention heads are no multiple of 3 KV heads"},
        BadModel{"BosBeyondVocabulary", Whole().Uint32("tokenizer.ggml.bos_token_id", 4), kInvalid,
                 "'tokenizer.ggml.bos_token_id' is 4, must be below 4"},
        BadModel{"MissingTensor", Small(), kInvalid,
                 "tensor 'model.layers.0.mlp.down_proj.weight' is missing"},
        BadModel{
            "WrongShape",
            Small().Tensor(kLast, {64, 16}, 0, FloatBytes(std::vector<float>(1024, 0.5f), "F32")),
            kInvalid, "has shape [16, 64], the configuration implies [32, 32]"},
        BadModel{"UnknownLayerTensor",
                 Whole().Tensor("blk.0.attn_q_norm.weight", {32}, 0, std::string(128, '\0')),
                 kInvalid, "'model.layers.0.self_attn.q_norm.weight' is not part of the model"},
        BadModel{"ThreeDimensions",
                 Small().Tensor(kLast, {32, 16, 2}, 0,
                                FloatBytes(std::vector<float>(1024, 0.5f), "F32")),
                 kInvalid, "has 3 dimensions, must have 1 or 2"}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

GgufBuilder Vocabulary(const char* model) {
  return GgufBuilder().String("tokenizer.ggml.model", model);
}

absl::StatusOr<GgufVocabulary> ReadVocabulary(const GgufBuilder& gguf) {
  const TempDir dir;
  WriteFile(dir / "v.gguf", gguf.Build());
  return ReadGgufVocabulary(dir / "v.gguf");
}

TEST(GgufVocabularyTest, RefusesWhatDoesNotFit) {
  const std::vector<std::string> tokens = {"a", "b"};
  const auto expect = [](const GgufBuilder& gguf, absl::StatusCode code, const char* message) {
    EXPECT_THAT(ReadVocabulary(gguf), StatusIs(code, HasSubstr(message)));
  };
  expect(GgufBuilder().Uint32("x", 1), kInvalid, "'tokenizer.ggml.model' is missing");
  expect(Vocabulary("bert"), kUnimplemented, "'bert' is not supported; supported: gpt2, llama");
  expect(Vocabulary("gpt2"), kInvalid, "'tokenizer.ggml.tokens' is missing");
  expect(Vocabulary("gpt2").Strings("tokenizer.ggml.tokens", {}), kInvalid, "has 0 items");
  expect(Vocabulary("gpt2").Strings("tokenizer.ggml.tokens", tokens), kInvalid,
         "'tokenizer.ggml.merges' is missing");
  for (const char* merge : {"ab", "a ", " b", ""}) {
    expect(Vocabulary("gpt2")
               .Strings("tokenizer.ggml.tokens", tokens)
               .Strings("tokenizer.ggml.merges", {merge}),
           kInvalid, "holds an entry that is not two tokens");
  }
  expect(Vocabulary("llama").Strings("tokenizer.ggml.tokens", tokens), kInvalid,
         "'tokenizer.ggml.scores' is missing");
  expect(Vocabulary("llama")
             .Strings("tokenizer.ggml.tokens", tokens)
             .Floats("tokenizer.ggml.scores", {1}),
         kInvalid, "'tokenizer.ggml.scores' has 1 items, the vocabulary 2");
  expect(Vocabulary("llama")
             .Strings("tokenizer.ggml.tokens", tokens)
             .Floats("tokenizer.ggml.scores", {1, NAN}),
         kInvalid, "not finite");
  expect(Vocabulary("llama")
             .Strings("tokenizer.ggml.tokens", tokens)
             .Floats("tokenizer.ggml.scores", {1, 2})
             .Ints("tokenizer.ggml.token_type", {1, 1, 1}),
         kInvalid, "'tokenizer.ggml.token_type' has 3 items");
  expect(Vocabulary("llama")
             .Strings("tokenizer.ggml.tokens", tokens)
             .Floats("tokenizer.ggml.scores", {1, 2})
             .Uint32("tokenizer.ggml.unknown_token_id", 9),
         kInvalid, "'tokenizer.ggml.unknown_token_id' is 9, must be below 2");
}

TEST(GgufVocabularyTest, ReadsVocabularyOnlyFiles) {
  WALSH_REQUIRE_DATA(gpt2_path, "tokenizer-vectors/ggml-vocab-gpt-2.gguf");
  ASSERT_OK_AND_ASSIGN(const GgufVocabulary gpt2, ReadGgufVocabulary(gpt2_path));
  EXPECT_EQ(gpt2.model, "gpt2");
  EXPECT_EQ(gpt2.pre, "gpt-2");
  EXPECT_EQ(gpt2.tokens.size(), 50257u);
  EXPECT_EQ(gpt2.merges.size(), 50000u);
  EXPECT_EQ(gpt2.tokens[0], "!");
  EXPECT_EQ(gpt2.eos, 50256);

  WALSH_REQUIRE_DATA(spm_path, "tokenizer-vectors/ggml-vocab-llama-spm.gguf");
  ASSERT_OK_AND_ASSIGN(const GgufVocabulary spm, ReadGgufVocabulary(spm_path));
  EXPECT_EQ(spm.model, "llama");
  EXPECT_EQ(spm.tokens.size(), 32000u);
  EXPECT_EQ(spm.scores.size(), 32000u);
  EXPECT_EQ(spm.types[3], 6);
  EXPECT_EQ(spm.bos, 1);
  EXPECT_EQ(spm.eos, 2);
}

TEST(GgufCheckpointTest, ReadsSmolLm2) {
  WALSH_REQUIRE_SMOLLM2(path);
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
  const ModelConfig& config = checkpoint->config();
  EXPECT_EQ(config.hidden, 576);
  EXPECT_EQ(config.intermediate, 1536);
  EXPECT_EQ(config.n_layers, 30);
  EXPECT_EQ(config.n_heads, 9);
  EXPECT_EQ(config.n_kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.vocab, 49152);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_EQ(checkpoint->format(), "GGUF Q4_1");
  EXPECT_EQ(checkpoint->tokenizer().gguf->pre, "smollm");
  EXPECT_FALSE(checkpoint->tokenizer().chat_template.empty());
  for (const char* name : {"model.layers.0.self_attn.q_proj.weight",
                           "model.layers.29.mlp.down_proj.weight", "model.norm.weight"}) {
    ASSERT_OK_AND_ASSIGN(const Matrix weights, checkpoint->Read(name));
    double sum_of_squares = 0;
    for (const float value : weights.span()) sum_of_squares += double{value} * double{value};
    EXPECT_GT(sum_of_squares, 0.0) << name;
  }
  EXPECT_OK(checkpoint->ReadRows(kEmbeddingTensor, 49151, 1));
}

// One name, three meanings.
TEST(HfTensorNameTest, DependsOnTheArchitecture) {
  const auto name = [](std::string_view suffix, const char* architecture) {
    return HfTensorName("blk.0." + std::string(suffix) + ".weight", architecture);
  };
  EXPECT_EQ(name("ffn_norm", "Qwen2ForCausalLM"), "model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(name("ffn_norm", "Gemma3ForCausalLM"),
            "model.layers.0.pre_feedforward_layernorm.weight");
  EXPECT_EQ(name("post_attention_norm", "Gemma3ForCausalLM"),
            "model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(name("ffn_up", "Gemma3ForCausalLM"), "model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(name("ffn_up", "Phi3ForCausalLM"), "model.layers.0.mlp.gate_up_proj.weight");
  EXPECT_EQ(name("attn_qkv", "Phi3ForCausalLM"), "model.layers.0.self_attn.qkv_proj.weight");
}

TEST(HfTensorNameTest, MapsEveryName) {
  EXPECT_EQ(HfTensorName("token_embd.weight", "LlamaForCausalLM"), "model.embed_tokens.weight");
  EXPECT_EQ(HfTensorName("output.weight", "LlamaForCausalLM"), "lm_head.weight");
  EXPECT_EQ(HfTensorName("blk.12.attn_output.weight", "LlamaForCausalLM"),
            "model.layers.12.self_attn.o_proj.weight");
  EXPECT_EQ(HfTensorName("blk.0.attn_q.bias", "LlamaForCausalLM"),
            "model.layers.0.self_attn.q_proj.bias");
  EXPECT_EQ(HfTensorName("blk.0.other.weight", "LlamaForCausalLM"), "model.layers.0.other.weight");
  EXPECT_EQ(HfTensorName("rope_freqs.weight", "LlamaForCausalLM"), "rope_freqs.weight");
  EXPECT_EQ(HfTensorName("blk.", "LlamaForCausalLM"), "blk.");
  EXPECT_EQ(HfTensorName("blk.0", "LlamaForCausalLM"), "blk.0");
}

}  // namespace
}  // namespace walsh
