// Whole jobs on a tiny model of each family (tests/golden/models): rotated, quantized, stored,
// loaded.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "tests/testing/golden_model.h"
#include "tests/testing/hand_cache.h"
#include "tests/unit/worker/pipeline/job_fixture.h"
#include "worker/engine/loaded_model.h"
#include "worker/io/random_access_file.h"
#include "worker/pipeline/plan.h"
#include "worker/pipeline/rotation_gate.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::pipeline {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::GoldenModel;
using ::walsh::testing::StatusIs;

class ModelFamilyTest : public testing::JobTest, public ::testing::WithParamInterface<std::string> {
 protected:
  void SetUp() override {
    spec_ = TinyJob();
    testing::WriteGoldenModel(GetParam(), directory_ / "golden");
    spec_.source_path = directory_ / "golden";
    spec_.rotation = rotation();
    golden_ = testing::ReadGoldenModel(GetParam());
  }

  static bool IsGemma() { return GetParam() == "gemma3"; }
  static rotate::Kind rotation() { return IsGemma() ? rotate::Kind::kNone : rotate::Kind::kGsr; }

  // Logits of the golden tokens from the serving forward: half of them as a prompt, the rest one by
  // one.
  Matrix Serve(const engine::LoadedModel& model) {
    const ModelConfig& config = model.config();
    const auto n = static_cast<int64_t>(golden_.tokens.size());
    Matrix logits(n, config.vocab);
    testing::HandCache cache(config, n);
    const std::vector<engine::BlockId> blocks = cache.Take(n);
    ForwardScratch scratch;
    Matrix last;
    for (int64_t first = 0; first < n;) {
      const int64_t n_rows = first == 0 ? n / 2 : 1;
      engine::LoadedModel::Batch batch;
      batch.kv = cache.pool();
      for (int64_t i = first; i < first + n_rows; ++i) {
        batch.tokens.push_back(golden_.tokens[static_cast<size_t>(i)]);
        batch.positions.push_back(static_cast<int32_t>(i));
      }
      batch.sequences.push_back({0, n_rows, first, blocks, true});
      EXPECT_OK(model.Forward(batch, {}, scratch, last));
      first += n_rows;
      std::copy_n(last.data(), config.vocab, logits.row(first - 1));
    }
    return logits;
  }

  // Σ (served − golden)² over Σ golden², of the tokens whose logits Serve has.
  double Nmse(const Matrix& logits) const {
    double error = 0, power = 0;
    for (int64_t row = logits.rows() / 2 - 1; row < logits.rows(); ++row) {
      for (int64_t id = 0; id < logits.cols(); ++id) {
        const double wanted = golden_.logits(row, id);
        error += (logits(row, id) - wanted) * (logits(row, id) - wanted);
        power += wanted * wanted;
      }
    }
    return error / power;
  }

  JobSpec spec_;
  GoldenModel golden_;
};

TEST_P(ModelFamilyTest, IsServedAsTransformersComputesIt) {
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(spec_.source_path));
  ASSERT_OK_AND_ASSIGN(const auto model, engine::LoadedModel::LoadDense(*checkpoint));
  EXPECT_LT(Nmse(Serve(*model)), 1e-9);
}

// At 8 bits hardly anything is lost: what is not as it should be shows.
TEST_P(ModelFamilyTest, IsQuantizedStoredAndServed) {
  spec_.quantizer.bits = 8;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec_));
  EXPECT_LT(report.rotation_gate, 1e-5);
  EXPECT_EQ(report.rotation_gate > 0, !IsGemma());
  EXPECT_NEAR(report.perplexity_after / report.perplexity_before, 1, 0.01);
  ASSERT_OK_AND_ASSIGN(const auto model, engine::LoadedModel::LoadArtifact(spec_.output_directory,
                                                                           {.head_8bit = false}));
  EXPECT_LT(Nmse(Serve(*model)), 2e-3);
}

TEST_P(ModelFamilyTest, FourBitsGenerate) {
  spec_.quantizer.bits = 4;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec_));
  EXPECT_LT(report.perplexity_after / report.perplexity_before, 1.3);
  ASSERT_OK_AND_ASSIGN(const auto model,
                       engine::LoadedModel::LoadArtifact(spec_.output_directory, {}));
  EXPECT_LT(Nmse(Serve(*model)), 0.2);
}

// The model's own text for calibration goes through its 8-bit form.
TEST_P(ModelFamilyTest, CalibratesOnItsOwnText) {
  spec_.calibration_path.clear();
  spec_.n_calibration_windows = 4;
  spec_.evaluate = false;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec_));
  EXPECT_EQ(report.calibration_windows, 4);
}

TEST_P(ModelFamilyTest, ArtifactIsOfItsArchitecture) {
  spec_.evaluate = false;
  ASSERT_OK(Run(spec_).status());
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(spec_.source_path));
  ASSERT_OK_AND_ASSIGN(const auto artifact,
                       ArtifactReader::Open(spec_.output_directory, /*verify=*/true, 1));
  const ModelConfig& before = checkpoint->config();
  const ModelConfig& after = artifact->config();
  // The parts of fused linears are those of a Mistral.
  EXPECT_EQ(after.architecture,
            before.has_fused_linears ? "MistralForCausalLM" : before.architecture);
  EXPECT_FALSE(after.tied_embeddings);
  EXPECT_EQ(after.sliding_window, before.sliding_window);
  EXPECT_EQ(after.sliding_layers, before.sliding_layers);
  EXPECT_EQ(after.eos_tokens, before.eos_tokens);
  EXPECT_EQ(after.rms_norm_eps, before.rms_norm_eps);
  // Norms that are folded are ones; in Gemma's files that is 0, and there they are not folded.
  ASSERT_OK_AND_ASSIGN(const Matrix norm, artifact->ReadDense(kFinalNormTensor));
  ASSERT_OK_AND_ASSIGN(const Matrix original, checkpoint->Read(kFinalNormTensor));
  for (int64_t i = 0; i < norm.size(); ++i) {
    EXPECT_NEAR(norm(0, i), IsGemma() ? original(0, i) : 1.0f, 0.01f * std::abs(norm(0, i)));
  }
}

INSTANTIATE_TEST_SUITE_P(Families, ModelFamilyTest, ::testing::ValuesIn(testing::GoldenFamilies()),
                         [](const auto& param_info) { return param_info.param; });

class FamilyRulesTest : public testing::JobTest {
 protected:
  JobSpec Golden(const std::string& family) {
    JobSpec spec = TinyJob();
    testing::WriteGoldenModel(family, directory_ / family);
    spec.source_path = directory_ / family;
    return spec;
  }
};

// Every rotation of the residual stream, told before any work.
TEST_F(FamilyRulesTest, NormsBehindSublayersAdmitNoRotation) {
  JobSpec spec = Golden("gemma3");
  for (const rotate::Kind kind : {rotate::Kind::kHadamard, rotate::Kind::kWalsh,
                                  rotate::Kind::kLocalHadamard, rotate::Kind::kGsr}) {
    spec.rotation = kind;
    EXPECT_THAT(PlanJob(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                        HasSubstr("Gemma3ForCausalLM has a norm between each")));
  }
  spec.rotation = rotate::Kind::kNone;
  ASSERT_OK_AND_ASSIGN(const JobPlan plan, PlanJob(spec));
  EXPECT_EQ(plan.architecture, "Gemma3ForCausalLM");
}

// R2 stays within the attention: no norm is in its way. It is folded into the weights, which any
// program then serves.
TEST_F(FamilyRulesTest, ValuesOfGemma3MayBeRotated) {
  JobSpec spec = Golden("gemma3");
  spec.rotation = rotate::Kind::kNone;
  spec.quantizer.bits = 8;
  spec.head_rotation = true;
  ASSERT_OK_AND_ASSIGN(const JobReport report, Run(spec));
  EXPECT_GT(report.rotation_gate, 0) << "a job that only rotates heads is proven, too";
  EXPECT_LT(report.rotation_gate, 1e-5);
  EXPECT_NEAR(report.perplexity_after / report.perplexity_before, 1, 0.01);
  ASSERT_OK_AND_ASSIGN(const std::string text,
                       ReadSmallFile(spec.output_directory + "/walsh.json", 1 << 20));
  EXPECT_EQ(nlohmann::json::parse(text)["rotation"]["head"], "walsh");
  ASSERT_OK_AND_ASSIGN(const auto artifact, ArtifactReader::Open(spec.output_directory, true, 1));
  EXPECT_TRUE(artifact->online().empty());
  // The weights are other ones than those of a job without.
  ASSERT_OK_AND_ASSIGN(const auto rotated,
                       artifact->ReadQuantized("model.layers.0.self_attn.v_proj"));
  spec.head_rotation = std::nullopt;
  spec.output_directory += "2";
  ASSERT_OK(Run(spec));
  ASSERT_OK_AND_ASSIGN(const auto plain, ArtifactReader::Open(spec.output_directory, true, 1));
  ASSERT_OK_AND_ASSIGN(const auto original,
                       plain->ReadQuantized("model.layers.0.self_attn.v_proj"));
  EXPECT_NE(rotated.codes, original.codes);
}

// transformers and other readers take the artifact of a Phi-3 for the Mistral that it is.
TEST_F(FamilyRulesTest, Phi3IsStoredAsMistral) {
  JobSpec spec = Golden("phi3");
  spec.evaluate = false;
  ASSERT_OK(Run(spec).status());
  ASSERT_OK_AND_ASSIGN(const std::string text,
                       ReadSmallFile(spec.output_directory + "/config.json", 1 << 20));
  const auto config = nlohmann::json::parse(text);
  EXPECT_EQ(config["architectures"], nlohmann::json::array({"MistralForCausalLM"}));
  EXPECT_EQ(config["model_type"], "mistral");
  EXPECT_EQ(config["sliding_window"], 31);
  EXPECT_EQ(config["num_key_value_heads"], 2);
  EXPECT_EQ(config["rope_theta"], 10000.0);
  EXPECT_FALSE(config.contains("original_max_position_embeddings"));
}

// A GGUF file has no config.json: what is written for its family is read back as the same model.
class GgufFamilyJobTest : public testing::JobTest,
                          public ::testing::WithParamInterface<std::string> {};

TEST_P(GgufFamilyJobTest, WritesAConfigurationOfTheFamily) {
  const std::string architecture = GetParam();
  const bool is_gemma = architecture == "Gemma3ForCausalLM";
  const testing::TinyModelOptions options = {.n_layers = is_gemma ? 7 : 2,
                                             .head_dim = 32,
                                             .is_tied = is_gemma,
                                             .architecture = architecture,
                                             .sliding_window = 24};
  JobSpec spec = TinyJob(options);
  testing::TinyModel(options).WriteGguf(directory_ / "tiny.gguf");
  spec.rotation = is_gemma ? rotate::Kind::kNone : rotate::Kind::kGsr;
  spec.quantizer.bits = 8;
  ASSERT_OK_AND_ASSIGN(const JobReport hf, Run(spec));
  spec.source_path = directory_ / "tiny.gguf";
  spec.output_directory = directory_ / "from_gguf";
  ASSERT_OK_AND_ASSIGN(const JobReport gguf, Run(spec));
  EXPECT_EQ(hf.perplexity_before, gguf.perplexity_before);
  EXPECT_EQ(hf.perplexity_after, gguf.perplexity_after);
  ASSERT_OK_AND_ASSIGN(const auto from_hf,
                       engine::LoadedModel::LoadArtifact(directory_ / "out", {}));
  ASSERT_OK_AND_ASSIGN(const auto from_gguf,
                       engine::LoadedModel::LoadArtifact(spec.output_directory, {}));
  const ModelConfig& a = from_hf->config();
  const ModelConfig& b = from_gguf->config();
  EXPECT_EQ(a.architecture, b.architecture);
  EXPECT_EQ(a.sliding_layers, b.sliding_layers);
  EXPECT_EQ(a.sliding_rope_theta, b.sliding_rope_theta);
  EXPECT_EQ(a.query_pre_attention_scalar, b.query_pre_attention_scalar);
  EXPECT_EQ(a.attention_bias, b.attention_bias);
  EXPECT_EQ(a.output_bias, b.output_bias);
}

INSTANTIATE_TEST_SUITE_P(Families, GgufFamilyJobTest,
                         ::testing::Values("Qwen2ForCausalLM", "Qwen3ForCausalLM",
                                           "Phi3ForCausalLM", "Gemma3ForCausalLM"),
                         [](const auto& param_info) { return param_info.param; });

}  // namespace
}  // namespace walsh::pipeline
