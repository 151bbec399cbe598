#include "worker/io/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "common/architectures.h"
#include "tests/testing/status_matchers.h"
#include "worker/io/bounded_json.h"

namespace walsh {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using walsh::testing::StatusIs;

json Base() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 128},
          {"intermediate_size", 384},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 4},
          {"vocab_size", 2048},
          {"max_position_embeddings", 512},
          {"rms_norm_eps", 1e-6},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

json With(const char* field, const json& value) {
  json config = Base();
  config[field] = value;
  return config;
}

json Without(const char* field) {
  json config = Base();
  config.erase(field);
  return config;
}

TEST(ModelConfigTest, ReadsLlama) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, ParseModelConfig(Base().dump()));
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.hidden, 128);
  EXPECT_EQ(config.intermediate, 384);
  EXPECT_EQ(config.n_layers, 2);
  EXPECT_EQ(config.n_heads, 8);
  EXPECT_EQ(config.n_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.q_width(), 128);
  EXPECT_EQ(config.kv_width(), 64);
  EXPECT_EQ(config.vocab, 2048);
  EXPECT_EQ(config.max_position, 512);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope_theta, 10000.0);
  EXPECT_EQ(config.rope_scaling.kind, RopeScaling::Kind::kNone);
  EXPECT_FALSE(config.tied_embeddings);
  EXPECT_EQ(config.bos_token, 1);
  EXPECT_THAT(config.eos_tokens, ElementsAre(2));
}

TEST(ModelConfigTest, ReadsOptionalFields) {
  json config = With("eos_token_id", {5, 7});
  config["head_dim"] = 32;
  config["tie_word_embeddings"] = true;
  config["attention_bias"] = true;
  config["mlp_bias"] = true;
  config.erase("bos_token_id");
  config.erase("num_key_value_heads");
  ASSERT_OK_AND_ASSIGN(const ModelConfig out, ParseModelConfig(config.dump()));
  EXPECT_EQ(out.head_dim, 32);
  EXPECT_EQ(out.q_width(), 256);
  EXPECT_EQ(out.n_kv_heads, 8);
  EXPECT_TRUE(out.tied_embeddings);
  EXPECT_TRUE(out.attention_bias);
  EXPECT_TRUE(out.mlp_bias);
  EXPECT_EQ(out.bos_token, -1);
  EXPECT_THAT(out.eos_tokens, ElementsAre(5, 7));
}

TEST(ModelConfigTest, TakesTheArchitectureFromModelTypeWhereItIsAllThereIs) {
  json config = Without("architectures");
  config["model_type"] = "llama";
  ASSERT_OK_AND_ASSIGN(const ModelConfig out, ParseModelConfig(config.dump()));
  EXPECT_EQ(out.architecture, "LlamaForCausalLM");
}

TEST(ModelConfigTest, ReadsLlama3Scaling) {
  const json scaling = {{"rope_type", "llama3"},
                        {"factor", 32.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 8192}};
  json config = With("rope_scaling", scaling);
  config["rope_theta"] = 500000.0;
  ASSERT_OK_AND_ASSIGN(const ModelConfig old_spelling, ParseModelConfig(config.dump()));
  EXPECT_EQ(old_spelling.rope_scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(old_spelling.rope_scaling.factor, 32.0);
  EXPECT_EQ(old_spelling.rope_scaling.high_freq_factor, 4.0);
  EXPECT_EQ(old_spelling.rope_scaling.original_max_position, 8192);
  EXPECT_EQ(old_spelling.rope_theta, 500000.0);

  // transformers 5: one object with the base inside.
  json parameters = scaling;
  parameters["rope_theta"] = 500000.0;
  ASSERT_OK_AND_ASSIGN(const ModelConfig new_spelling,
                       ParseModelConfig(With("rope_parameters", parameters).dump()));
  EXPECT_EQ(new_spelling.rope_scaling.kind, RopeScaling::Kind::kLlama3);
  EXPECT_EQ(new_spelling.rope_scaling.factor, 32.0);
  EXPECT_EQ(new_spelling.rope_theta, 500000.0);
}

TEST(ModelConfigTest, ReadsLinearScalingUnderBothNames) {
  for (const char* name : {"type", "rope_type"}) {
    const json config = With("rope_scaling", {{name, "linear"}, {"factor", 2.5}});
    ASSERT_OK_AND_ASSIGN(const ModelConfig out, ParseModelConfig(config.dump()));
    EXPECT_EQ(out.rope_scaling.kind, RopeScaling::Kind::kLinear);
    EXPECT_EQ(out.rope_scaling.factor, 2.5);
  }
}

json Family(const char* architecture) { return With("architectures", {architecture}); }

ModelConfig Parsed(const json& config) {
  const absl::StatusOr<ModelConfig> out = ParseModelConfig(config.dump());
  EXPECT_OK(out);
  return out.value_or(ModelConfig());
}

TEST(ModelConfigTest, ReadsTheSlidingWindowOfMistral) {
  json config = Family("MistralForCausalLM");
  config["sliding_window"] = 128;
  const ModelConfig sliding = Parsed(config);
  EXPECT_EQ(sliding.sliding_window, 128);
  EXPECT_EQ(sliding.window(0), 128);
  EXPECT_EQ(sliding.window(1), 128);
  // None, or one that reaches over the whole context of 512.
  for (const json& window : {json(nullptr), json(512), json(4096)}) {
    config["sliding_window"] = window;
    EXPECT_EQ(Parsed(config).sliding_window, 0) << window;
    EXPECT_EQ(Parsed(config).window(0), 0) << window;
  }
  config.erase("sliding_window");  // 4096 by default
  EXPECT_EQ(Parsed(config).window(0), 0);
  config["max_position_embeddings"] = 32768;
  EXPECT_EQ(Parsed(config).window(0), 4096);
  // Llama has no such field, whatever a file says.
  EXPECT_EQ(Parsed(With("sliding_window", 16)).window(0), 0);
}

TEST(ModelConfigTest, ReadsQwen2) {
  json config = Family("Qwen2ForCausalLM");
  config["use_sliding_window"] = false;
  config["sliding_window"] = 64;
  const ModelConfig out = Parsed(config);
  EXPECT_TRUE(out.has_bias("self_attn.q_proj"));
  EXPECT_TRUE(out.has_bias("self_attn.v_proj"));
  EXPECT_FALSE(out.has_bias("self_attn.o_proj"));
  EXPECT_FALSE(out.has_bias("mlp.up_proj"));
  EXPECT_FALSE(out.has_qk_norm);
  EXPECT_EQ(out.window(0), 0);
  EXPECT_EQ(out.window(1), 0);

  config["use_sliding_window"] = true;
  config["max_window_layers"] = 1;
  EXPECT_EQ(Parsed(config).window(0), 0);
  EXPECT_EQ(Parsed(config).window(1), 64);
  config["max_window_layers"] = 2;
  EXPECT_EQ(Parsed(config).sliding_window, 0);
  config["layer_types"] = {"sliding_attention", "full_attention"};
  EXPECT_EQ(Parsed(config).window(0), 64);
  EXPECT_EQ(Parsed(config).window(1), 0);
}

TEST(ModelConfigTest, ReadsQwen3) {
  const ModelConfig out = Parsed(Family("Qwen3ForCausalLM"));
  EXPECT_TRUE(out.has_qk_norm);
  EXPECT_FALSE(out.attention_bias);
  EXPECT_EQ(out.head_dim, 128);  // transformers' default
  EXPECT_FALSE(out.has_output_norms);
}

TEST(ModelConfigTest, ReadsPhi3) {
  json config = Family("Phi3ForCausalLM");
  config.erase("rms_norm_eps");
  EXPECT_TRUE(Parsed(config).has_fused_linears);
  EXPECT_EQ(Parsed(config).window(0), 0);
  EXPECT_EQ(Parsed(config).rms_norm_eps, 1e-5);
  config["sliding_window"] = 31;
  EXPECT_EQ(Parsed(config).window(1), 31);
}

json Gemma3() {
  json config = Family("Gemma3ForCausalLM");
  config["num_hidden_layers"] = 7;
  config["sliding_window"] = 64;
  return config;
}

TEST(ModelConfigTest, ReadsGemma3) {
  json config = Gemma3();
  const ModelConfig out = Parsed(config);
  EXPECT_TRUE(out.has_qk_norm);
  EXPECT_TRUE(out.has_output_norms);
  EXPECT_TRUE(out.tied_embeddings);
  EXPECT_EQ(out.norm_offset, 1.0f);
  EXPECT_EQ(out.activation, MlpActivation::kGeluTanh);
  EXPECT_EQ(out.embedding_scale, std::sqrt(128.0));
  EXPECT_EQ(out.head_dim, 256);
  EXPECT_EQ(out.attention_scale(), 1.0 / 16);
  EXPECT_EQ(out.rope_theta, 1e6);
  EXPECT_EQ(out.sliding_rope_theta, 1e4);
  EXPECT_EQ(out.window(4), 64);
  EXPECT_EQ(out.window(5), 0);
  EXPECT_EQ(out.window(6), 64);

  config["query_pre_attn_scalar"] = 64;
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8}};
  config["rope_local_base_freq"] = 5000;
  config["sliding_window"] = 4096;
  const ModelConfig wide = Parsed(config);
  EXPECT_EQ(wide.attention_scale(), 1.0 / 8);
  EXPECT_EQ(wide.rope_scaling.kind, RopeScaling::Kind::kLinear);
  EXPECT_EQ(wide.sliding_rope_theta, 5000);
  // Without a window that matters, the layers still have their own RoPE.
  EXPECT_EQ(wide.window(0), 0);
  EXPECT_TRUE(wide.is_sliding(0));
}

// transformers 5 has RoPE by the types of layers.
TEST(ModelConfigTest, ReadsRopeByLayerType) {
  json config = Gemma3();
  config["rope_parameters"] = {
      {"full_attention", {{"rope_type", "linear"}, {"factor", 8}, {"rope_theta", 2e6}}},
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 3e4}}}};
  const ModelConfig out = Parsed(config);
  EXPECT_EQ(out.rope_theta, 2e6);
  EXPECT_EQ(out.rope_scaling.factor, 8);
  EXPECT_EQ(out.sliding_rope_theta, 3e4);
}

TEST(ModelConfigTest, TakesEveryArchitectureThatItLists) {
  for (const std::string_view name : kHfArchitectures) {
    const ModelConfig out = Parsed(Family(std::string(name).c_str()));
    EXPECT_EQ(out.architecture, name);
  }
}

struct BadConfig {
  const char* name;
  std::string text;
  absl::StatusCode code;
  const char* message;
};

TEST(BoundedJsonTest, CountsValues) {
  std::string text = R"({"a":[0)";
  for (int i = 0; i < kJsonValuesMax; ++i) text += ",0";
  text += "]}";
  EXPECT_THAT(
      ParseBoundedJson("x.json", text, {.bytes_max = 64 << 20, .depth_max = 8}),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("x.json: more than 4194304 values")));
}

class BadModelConfigTest : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadModelConfigTest, IsRefused) {
  EXPECT_THAT(ParseModelConfig(GetParam().text),
              StatusIs(GetParam().code, HasSubstr(GetParam().message)));
}

std::string FamilyWith(const char* architecture, const char* field, const json& value) {
  json config = Family(architecture);
  config[field] = value;
  return config.dump();
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Rules, BadModelConfigTest,
    ::testing::Values(
        BadConfig{"NotJson", "{", kInvalid, "config.json: invalid JSON at byte"},
        BadConfig{"NotAnObject", "[]", kInvalid, "top level is not an object"},
        BadConfig{"Empty", "", kInvalid, "invalid JSON"},
        BadConfig{"NotUtf8", "{\"a\":\"\xff\"}", kInvalid, "not UTF-8"},
        BadConfig{"TooLarge", std::string((4 << 20) + 1, ' '), kInvalid, "at most 4194304"},
        BadConfig{"DuplicateKey", R"({"hidden_size":1,"hidden_size":2})", kInvalid,
                  "'hidden_size' appears twice"},
        BadConfig{"TooDeep", "{\"a\":" + std::string(40, '[') + std::string(40, ']') + "}",
                  kInvalid, "nested deeper than 32"},
        BadConfig{"NoArchitecture", Without("architectures").dump(), kInvalid,
                  "'architectures' is missing"},
        BadConfig{"ArchitectureNotAList", With("architectures", "LlamaForCausalLM").dump(),
                  kInvalid, "'architectures' is not a list"},
        BadConfig{"UnknownArchitecture", With("architectures", {"GPT2LMHeadModel"}).dump(),
                  kUnimplemented,
                  "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, "
                  "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, "
                  "Gemma3ForCausalLM"},
        BadConfig{"MissingWidth", Without("hidden_size").dump(), kInvalid,
                  "'hidden_size' is missing"},
        BadConfig{"WidthIsText", With("hidden_size", "128").dump(), kInvalid,
                  "'hidden_size' is not an integer but of type string"},
        BadConfig{"WidthIsFraction", With("hidden_size", 128.5).dump(), kInvalid,
                  "'hidden_size' is not an integer"},
        BadConfig{"WidthZero", With("hidden_size", 0).dump(), kInvalid,
                  "'hidden_size' is 0, must be 1 to 131072"},
        BadConfig{"WidthNegative", With("hidden_size", -8).dump(), kInvalid,
                  "'hidden_size' is -8, must be 1"},
        BadConfig{"WidthTooLarge", With("hidden_size", 131073).dump(), kInvalid,
                  "'hidden_size' is 131073, must be 1 to 131072"},
        BadConfig{"WidthBeyondInt64", With("hidden_size", 18446744073709551615u).dump(), kInvalid,
                  "'hidden_size' is 18446744073709551615, must be 1 to"},
        BadConfig{"LayersTooMany", With("num_hidden_layers", 1025).dump(), kInvalid,
                  "must be 1 to 1024"},
        BadConfig{"VocabularyTooLarge", With("vocab_size", (1 << 20) + 1).dump(), kInvalid,
                  "'vocab_size' is 1048577"},
        BadConfig{"ContextTooLong", With("max_position_embeddings", (1 << 22) + 1).dump(), kInvalid,
                  "'max_position_embeddings' is 4194305"},
        BadConfig{"HeadsDoNotDivide", With("num_attention_heads", 7).dump(), kInvalid,
                  "hidden_size 128 is no multiple of num_attention_heads 7"},
        BadConfig{"KvHeadsDoNotDivide", With("num_key_value_heads", 3).dump(), kInvalid,
                  "8 attention heads are no multiple of 3 KV heads"},
        BadConfig{"OddHeadWidth", With("head_dim", 15).dump(), kInvalid, "15 is odd"},
        BadConfig{"HeadWidthTooLarge", With("head_dim", 2048).dump(), kInvalid,
                  "'head_dim' is 2048, must be 1 to 1024"},
        BadConfig{"EpsilonNegative", With("rms_norm_eps", -1.0).dump(), kInvalid,
                  "RMSNorm epsilon is -1"},
        BadConfig{"ThetaZero", With("rope_theta", 0.0).dump(), kInvalid, "RoPE base is 0"},
        BadConfig{"ThetaIsText", With("rope_theta", "10000").dump(), kInvalid,
                  "'rope_theta' is not a number"},
        BadConfig{"Activation", With("hidden_act", "gelu").dump(), kUnimplemented,
                  "hidden_act 'gelu' is not supported; supported: silu"},
        BadConfig{"RopeKind", With("rope_scaling", {{"type", "yarn"}, {"factor", 4}}).dump(),
                  kUnimplemented, "RoPE scaling 'yarn' is not supported"},
        BadConfig{"RopeFactorMissing", With("rope_scaling", {{"type", "linear"}}).dump(), kInvalid,
                  "'factor' is missing"},
        BadConfig{"RopeFactorZero",
                  With("rope_scaling", {{"type", "linear"}, {"factor", 0}}).dump(), kInvalid,
                  "RoPE scaling factor is 0"},
        BadConfig{"Llama3Incomplete",
                  With("rope_scaling", {{"rope_type", "llama3"}, {"factor", 8}}).dump(), kInvalid,
                  "'low_freq_factor' is missing"},
        BadConfig{"Llama3FactorsSwapped",
                  With("rope_scaling", {{"rope_type", "llama3"},
                                        {"factor", 8},
                                        {"low_freq_factor", 4},
                                        {"high_freq_factor", 1},
                                        {"original_max_position_embeddings", 8192}})
                      .dump(),
                  kInvalid, "high_freq_factor is 1, must be above low_freq_factor"},
        BadConfig{
            "PartialRotary",
            With("rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}})
                .dump(),
            kUnimplemented, "partial_rotary_factor 0.5"},
        BadConfig{"RopeScalingNotAnObject", With("rope_scaling", 2).dump(), kInvalid,
                  "'rope_scaling' is not an object"},
        BadConfig{"EosBeyondVocabulary", With("eos_token_id", 2048).dump(), kInvalid,
                  "'eos_token_id' is 2048, must be 0 to 2047"},
        BadConfig{"EosIsText", With("eos_token_id", {1, "2"}).dump(), kInvalid,
                  "'eos_token_id' is not an integer"},
        BadConfig{"BosBeyondVocabulary", With("bos_token_id", 4000).dump(), kInvalid,
                  "'bos_token_id' is 4000"},
        BadConfig{"SlidingWindowZero", FamilyWith("MistralForCausalLM", "sliding_window", 0),
                  kInvalid, "'sliding_window' is 0, must be 1 to"},
        BadConfig{
            "LongRope",
            FamilyWith("Phi3ForCausalLM", "rope_scaling",
                       {{"type", "longrope"}, {"short_factor", {1.0}}, {"long_factor", {1.0}}}),
            kUnimplemented, "RoPE scaling 'longrope' is not supported"},
        BadConfig{"PartialRotaryOfPhi3",
                  FamilyWith("Phi3ForCausalLM", "partial_rotary_factor", 0.75), kUnimplemented,
                  "partial_rotary_factor 0.75 is not supported"},
        BadConfig{"SoftCapping", FamilyWith("Gemma3ForCausalLM", "final_logit_softcapping", 30.0),
                  kUnimplemented, "final_logit_softcapping is not supported"},
        BadConfig{"Bidirectional",
                  FamilyWith("Gemma3ForCausalLM", "use_bidirectional_attention", true),
                  kUnimplemented, "use_bidirectional_attention is not supported"},
        BadConfig{"GemmaActivation", FamilyWith("Gemma3ForCausalLM", "hidden_activation", "gelu"),
                  kUnimplemented,
                  "hidden_activation 'gelu' is not supported; supported: gelu_pytorch_tanh"},
        // Its root would be no number, or make infinite scores.
        BadConfig{"QueryScalarTiny",
                  FamilyWith("Gemma3ForCausalLM", "query_pre_attn_scalar", 1e-80), kInvalid,
                  "query_pre_attn_scalar is 1e-80, must be 1 to 1e6"},
        BadConfig{"QueryScalarHuge", FamilyWith("Gemma3ForCausalLM", "query_pre_attn_scalar", 1e7),
                  kInvalid, "query_pre_attn_scalar is 1e+07, must be 1 to 1e6"},
        BadConfig{"QueryScalarZero", FamilyWith("Gemma3ForCausalLM", "query_pre_attn_scalar", 0),
                  kInvalid, "'query_pre_attn_scalar' is 0, must be above 0"},
        BadConfig{"LayerTypesTooFew",
                  FamilyWith("Gemma3ForCausalLM", "layer_types", {"full_attention"}), kInvalid,
                  "'layer_types' is not a list of 2 names"},
        BadConfig{
            "LayerTypeUnknown",
            FamilyWith("Gemma3ForCausalLM", "layer_types", {"full_attention", "chunked_attention"}),
            kUnimplemented, "\"chunked_attention\", supported: full_attention"},
        BadConfig{"ScaledSlidingRope",
                  FamilyWith("Gemma3ForCausalLM", "rope_parameters",
                             {{"sliding_attention", {{"rope_type", "linear"}, {"factor", 2}}}}),
                  kUnimplemented, "RoPE scaling of sliding_attention layers"},
        BadConfig{"SlidingRopeBaseZero",
                  FamilyWith("Gemma3ForCausalLM", "rope_local_base_freq", 0.5), kInvalid,
                  "RoPE base of sliding layers is 0.5, must be 1 to 1e12"}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace walsh
