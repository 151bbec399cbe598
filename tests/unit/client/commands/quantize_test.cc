#include "client/commands/quantize.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include "tests/testing/status_matchers.h"

namespace walsh::client {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;

QuantizeFlags MinimalFlags() {
  QuantizeFlags flags;
  flags.model = "/models/tiny";
  flags.name = "tiny-4bit";
  return flags;
}

// As the client sends it: parts of the config are there, with no field set.
v1::QuantizationConfig NothingSet() {
  v1::QuantizationConfig config;
  config.mutable_rotation();
  config.mutable_calibration();
  config.mutable_evaluation();
  return config;
}

// What was not asked for is the preset's and the service's to choose.
TEST(MakeQuantizeRequestTest, SendsOnlyWhatWasGiven) {
  ASSERT_OK_AND_ASSIGN(v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(MinimalFlags(), true));
  v1::QuantizationJob& job = *request.mutable_quantization_job();
  EXPECT_EQ(job.source_model(), "/models/tiny");
  EXPECT_EQ(job.model_name(), "tiny-4bit");
  EXPECT_TRUE(job.config().has_auto_load());
  EXPECT_FALSE(request.validate_only());
  job.mutable_config()->clear_auto_load();
  EXPECT_EQ(job.config().SerializeAsString(), NothingSet().SerializeAsString());

  QuantizeFlags flags = MinimalFlags();
  flags.preset = "gsr-w2a16";
  flags.bits = 4;
  ASSERT_OK_AND_ASSIGN(request, MakeQuantizeRequest(flags, false));
  v1::QuantizationConfig expected = NothingSet();
  expected.set_preset("gsr-w2a16");
  expected.set_bits(4);
  EXPECT_EQ(request.quantization_job().config().SerializeAsString(), expected.SerializeAsString());
}

TEST(MakeQuantizeRequestTest, TurnsOffWhatAPresetTurnsOn) {
  QuantizeFlags flags = MinimalFlags();
  flags.preset = "quarot-w4a4kv4";
  flags.group_size = "auto";
  flags.symmetric = false;
  flags.no_mse_clip = false;
  flags.error_propagation = 0;
  flags.rotation_signs = "none";
  flags.online_rotation = "none";
  flags.act_bits = 16;
  flags.kv_bits = 16;
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const v1::QuantizationConfig& config = request.quantization_job().config();
  EXPECT_TRUE(config.has_group_size());
  EXPECT_EQ(config.group_size(), 0);
  EXPECT_TRUE(config.has_symmetric());
  EXPECT_FALSE(config.symmetric());
  EXPECT_TRUE(config.has_disable_mse_clip());
  EXPECT_FALSE(config.disable_mse_clip());
  EXPECT_TRUE(config.has_error_propagation());
  EXPECT_EQ(config.rotation().signs(), v1::Rotation::NO_SIGNS);
  EXPECT_EQ(config.rotation().online_kind(), v1::Rotation::NONE);
  EXPECT_EQ(config.activation_quantization().bits(), 16);
  EXPECT_EQ(config.kv_cache_quantization().bits(), 16);
}

// Only the service knows whether the preset's quantizer is on.
TEST(MakeQuantizeRequestTest, ChangesAPresetsQuantizer) {
  QuantizeFlags flags = MinimalFlags();
  flags.preset = "quarot-w4a4kv4";
  flags.act_clip = 0.8;
  flags.kv_group_size = "64";
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const v1::QuantizationConfig& config = request.quantization_job().config();
  EXPECT_EQ(config.activation_quantization().bits(), 0) << "the preset's";
  EXPECT_EQ(config.activation_quantization().clip_ratio(), 0.8);
  EXPECT_EQ(config.kv_cache_quantization().bits(), 0);
  EXPECT_EQ(config.kv_cache_quantization().group_size(), 64);
  flags.act_bits = 16;
  EXPECT_THAT(MakeQuantizeRequest(flags, false),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--act-clip")));
}

TEST(MakeQuantizeRequestTest, CarriesEveryFlag) {
  QuantizeFlags flags = MinimalFlags();
  flags.bits = 2;
  flags.group_size = "channel";
  flags.symmetric = true;
  flags.method = "rtn";
  flags.rotation = "local-hadamard";
  flags.rotation_block = 32;
  flags.rotation_signs = "seeded";
  flags.seed = 18446744073709551615u;
  flags.calibration = "/texts/calibration.jsonl";
  flags.num_samples = 16;
  flags.seq_len = 256;
  flags.column_order = "natural";
  flags.damp = 0.05;
  flags.no_mse_clip = true;
  flags.error_propagation = 0;
  flags.eval_text = "/texts/eval.txt";
  flags.eval_text_format = "wikitext";
  flags.eval_window = 512;
  flags.eval_stride = 128;
  flags.eval_windows = 3;
  flags.eval_tasks = {"/tasks/piqa.jsonl", "/tasks/arc_easy.jsonl"};
  flags.eval_limit = 100;
  flags.eval_no_bos = true;
  flags.no_eval = true;
  flags.max_perplexity_ratio = 1.5;
  flags.max_kl = 0.25;
  flags.validate_only = true;
  flags.request_id = "r";
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const v1::QuantizationConfig& config = request.quantization_job().config();
  EXPECT_EQ(config.bits(), 2);
  EXPECT_EQ(config.group_size(), -1);
  EXPECT_TRUE(config.symmetric());
  EXPECT_EQ(config.method(), v1::QuantizationConfig::RTN);
  EXPECT_EQ(config.rotation().kind(), v1::Rotation::LOCAL_HADAMARD);
  EXPECT_EQ(config.rotation().block_size(), 32);
  EXPECT_EQ(config.rotation().signs(), v1::Rotation::SEEDED);
  EXPECT_EQ(config.seed(), 18446744073709551615u);
  EXPECT_EQ(config.calibration().uri(), "/texts/calibration.jsonl");
  EXPECT_EQ(config.calibration().num_samples(), 16);
  EXPECT_EQ(config.calibration().sequence_length(), 256);
  EXPECT_EQ(config.column_order(), v1::QuantizationConfig::NATURAL);
  EXPECT_EQ(config.damp_percent(), 0.05);
  EXPECT_TRUE(config.disable_mse_clip());
  EXPECT_TRUE(config.has_error_propagation());
  EXPECT_EQ(config.error_propagation(), 0);
  EXPECT_EQ(config.evaluation().uri(), "/texts/eval.txt");
  EXPECT_EQ(config.evaluation().format(), v1::TextEvaluation::WIKITEXT);
  EXPECT_EQ(config.evaluation().sequence_length(), 512);
  EXPECT_EQ(config.evaluation().stride(), 128);
  EXPECT_EQ(config.evaluation().max_windows(), 3);
  ASSERT_EQ(config.evaluation().tasks_size(), 2);
  EXPECT_EQ(config.evaluation().tasks(1).uri(), "/tasks/arc_easy.jsonl");
  EXPECT_EQ(config.evaluation().tasks(1).limit(), 100);
  EXPECT_TRUE(config.evaluation().skip_bos());
  EXPECT_TRUE(config.evaluation().disable());
  EXPECT_EQ(config.quality_gate().max_perplexity_ratio(), 1.5);
  EXPECT_EQ(config.quality_gate().max_kl_divergence(), 0.25);
  EXPECT_FALSE(config.has_auto_load());
  EXPECT_TRUE(request.validate_only());
  EXPECT_EQ(request.request_id(), "r");
}

TEST(MakeQuantizeRequestTest, CarriesEachMethodAndOrder) {
  QuantizeFlags flags = MinimalFlags();
  flags.method = "gptaq";
  flags.gptaq_alpha = 0.5;
  flags.column_order = "act-order";
  flags.overrides = {"layers.{0,1}.*=4", "a=b=8"};
  flags.grid = "codebook";
  flags.zero_point = "float";
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const v1::QuantizationConfig& config = request.quantization_job().config();
  EXPECT_EQ(config.method(), v1::QuantizationConfig::GPTAQ);
  EXPECT_EQ(config.gptaq_alpha(), 0.5);
  EXPECT_FALSE(config.has_error_propagation());
  EXPECT_EQ(config.column_order(), v1::QuantizationConfig::ACT_ORDER);
  ASSERT_EQ(config.overrides_size(), 2);
  EXPECT_EQ(config.overrides(0).pattern(), "layers.{0,1}.*");
  EXPECT_EQ(config.overrides(0).bits(), 4);
  EXPECT_EQ(config.overrides(1).pattern(), "a=b");
  EXPECT_EQ(config.overrides(1).bits(), 8);
  EXPECT_EQ(config.grid(), v1::QuantizationConfig::CODEBOOK);
  EXPECT_EQ(config.zero_point(), v1::QuantizationConfig::FLOAT_ZERO);
}

// The command line as a person types it.
class QuantizeCommandTest : public ::testing::Test {
 protected:
  CLI::App app_;
  GlobalFlags global_;
  Chosen chosen_;
};

TEST_F(QuantizeCommandTest, ActOrderIsAColumnOrder) {
  AddQuantizeCommand(app_, global_, chosen_);
  EXPECT_NO_THROW(app_.parse("quantize model --name m --act-order"));
  EXPECT_TRUE(chosen_ != nullptr);
  EXPECT_THROW(app_.parse("quantize model --name m --act-order --column-order natural"),
               CLI::ExcludesError);
}

TEST_F(QuantizeCommandTest, OverridesMayBeRepeatedAndLeaveTheModelAlone) {
  AddQuantizeCommand(app_, global_, chosen_);
  EXPECT_NO_THROW(
      app_.parse("quantize --name m --override 'layers.{0,1}.*=4' --override *=3 model"));
  for (const char* text : {"layers.0", "=4", "layers.0=", "layers.0=four"}) {
    EXPECT_THROW(app_.parse(std::string("quantize model --name m --override ") + text),
                 CLI::ValidationError)
        << text;
  }
}

TEST_F(QuantizeCommandTest, ListingPresetsNeedsNoModel) {
  AddQuantizeCommand(app_, global_, chosen_);
  EXPECT_NO_THROW(app_.parse("quantize --list-presets"));
  EXPECT_TRUE(chosen_ != nullptr);
}

TEST_F(QuantizeCommandTest, AnythingElseNeedsAModelAndAName) {
  AddQuantizeCommand(app_, global_, chosen_);
  EXPECT_THROW(app_.parse("quantize --preset gsr-w2a16"), CLI::RequiredError);
  EXPECT_THROW(app_.parse("quantize model --preset gsr-w2a16"), CLI::RequiredError);
  EXPECT_NO_THROW(app_.parse("quantize model --name m --preset gsr-w2a16 --asymmetric --mse-clip"));
}

TEST(MakeQuantizeRequestTest, CarriesWhatIsDoneAtRunTime) {
  QuantizeFlags flags = MinimalFlags();
  flags.online_rotation = "gsr";
  flags.online_rotation_block = 64;
  flags.qk_rotation = "off";
  flags.head_rotation = "on";
  flags.act_bits = 4;
  flags.act_group_size = "128";
  flags.act_asymmetric = true;
  flags.act_clip = 0.85;
  flags.kv_bits = 2;
  flags.kv_group_size = "64";
  flags.kv_clip = 0.9;
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const v1::QuantizationConfig& config = request.quantization_job().config();
  EXPECT_EQ(config.rotation().online_kind(), v1::Rotation::GSR);
  EXPECT_EQ(config.rotation().online_block_size(), 64);
  EXPECT_TRUE(config.rotation().has_query_key());
  EXPECT_FALSE(config.rotation().query_key());
  EXPECT_TRUE(config.rotation().head());
  EXPECT_EQ(config.activation_quantization().bits(), 4);
  EXPECT_EQ(config.activation_quantization().group_size(), 128);
  EXPECT_TRUE(config.activation_quantization().asymmetric());
  EXPECT_EQ(config.activation_quantization().clip_ratio(), 0.85);
  EXPECT_EQ(config.kv_cache_quantization().bits(), 2);
  EXPECT_EQ(config.kv_cache_quantization().group_size(), 64);
  EXPECT_EQ(config.kv_cache_quantization().clip_ratio(), 0.9);

  flags = MinimalFlags();
  flags.act_bits = 8;
  flags.kv_bits = 8;
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest whole,
                       MakeQuantizeRequest(flags, false));
  EXPECT_EQ(whole.quantization_job().config().activation_quantization().group_size(), 0);
  EXPECT_EQ(whole.quantization_job().config().kv_cache_quantization().group_size(), 0);
}

TEST(MakeQuantizeRequestTest, RefusesWhatIsSetOfAQuantizerThatIsOff) {
  const auto refused = [](const std::function<void(QuantizeFlags&)>& set, const char* flag) {
    QuantizeFlags flags = MinimalFlags();
    set(flags);
    EXPECT_THAT(MakeQuantizeRequest(flags, false),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(flag)));
  };
  refused([](auto& f) { f.act_group_size = "64"; }, "--act-group-size");
  refused([](auto& f) { f.act_asymmetric = true; }, "--act-asymmetric");
  refused([](auto& f) { f.act_clip = 0.9; }, "--act-clip");
  refused([](auto& f) { f.kv_group_size = "64"; }, "--kv-group-size");
  refused([](auto& f) { f.kv_clip = 0.9; }, "--kv-clip");
  refused([](auto& f) { f.act_group_size = "row"; }, "'row' is not token or a number");
  refused([](auto& f) { f.kv_group_size = "0"; }, "'0' is not head or a number");
}

TEST(MakeQuantizeRequestTest, ALimitIsOfTasks) {
  QuantizeFlags flags = MinimalFlags();
  flags.eval_limit = 5;
  EXPECT_THAT(MakeQuantizeRequest(flags, false),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("--eval-limit has no meaning without --eval-tasks")));
}

TEST(MakeQuantizeRequestTest, RelativePathsAreTheCallers) {
  QuantizeFlags flags = MinimalFlags();
  flags.model = "./sub/../tiny";
  flags.calibration = "c.txt";
  flags.eval_text = "e.txt";
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  const std::string here = std::filesystem::current_path().string();
  EXPECT_EQ(request.quantization_job().source_model(), here + "/tiny");
  EXPECT_EQ(request.quantization_job().config().calibration().uri(), here + "/c.txt");
  EXPECT_EQ(request.quantization_job().config().evaluation().uri(), here + "/e.txt");
}

TEST(MakeQuantizeRequestTest, UrlsOfBucketsStayAsTheyAre) {
  QuantizeFlags flags = MinimalFlags();
  flags.model = "s3://bucket/models/tiny";
  flags.calibration = "s3://bucket/c.txt";
  ASSERT_OK_AND_ASSIGN(const v1::CreateQuantizationJobRequest request,
                       MakeQuantizeRequest(flags, false));
  EXPECT_EQ(request.quantization_job().source_model(), flags.model);
  EXPECT_EQ(request.quantization_job().config().calibration().uri(), flags.calibration);
}

TEST(MakeQuantizeRequestTest, RefusesAGroupSizeThatIsNoNumberAndTextThatIsNotUtf8) {
  for (const char* group_size : {"big", "0", "-64", "64x"}) {
    QuantizeFlags flags = MinimalFlags();
    flags.group_size = group_size;
    EXPECT_THAT(MakeQuantizeRequest(flags, false), HasCode(absl::StatusCode::kInvalidArgument))
        << group_size;
  }
  QuantizeFlags flags = MinimalFlags();
  flags.name = "\xff";
  EXPECT_THAT(MakeQuantizeRequest(flags, false), HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::client
