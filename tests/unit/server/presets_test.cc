#include "server/jobs/presets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "server/jobs/job_validation.h"
#include "tests/testing/status_matchers.h"

namespace walsh::jobs {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using v1::QuantizationConfig;
using v1::QuantizationPreset;
using v1::Rotation;
using ::walsh::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

v1::CreateQuantizationJobRequest Request(const std::string& preset) {
  v1::CreateQuantizationJobRequest request;
  request.mutable_quantization_job()->set_source_model("/models/tiny");
  request.mutable_quantization_job()->set_model_name("tiny");
  request.mutable_quantization_job()->mutable_config()->set_preset(preset);
  return request;
}

// The config of a stored job that names `preset` and sets what `set` does.
absl::StatusOr<QuantizationConfig> Stored(
    const std::string& preset,
    const std::function<void(QuantizationConfig&)>& set = [](QuantizationConfig&) {}) {
  v1::CreateQuantizationJobRequest request = Request(preset);
  set(*request.mutable_quantization_job()->mutable_config());
  const auto job = ValidateNewJob(request);
  if (!job.ok()) return job.status();
  return job->config();
}

const QuantizationPreset& Find(const std::string& name) {
  for (const QuantizationPreset& preset : Presets()) {
    if (preset.name() == name) return preset;
  }
  ADD_FAILURE() << "no preset " << name;
  return Presets().front();
}

TEST(PresetsTest, NamesAreUniqueAndKebabCase) {
  std::set<std::string> names;
  for (const QuantizationPreset& preset : Presets()) {
    EXPECT_THAT(preset.name(), MatchesRegex("[a-z0-9]+(-[a-z0-9]+)*"));
    EXPECT_LE(preset.name().size(), size_t{limits::kPresetNameBytesMax});
    EXPECT_TRUE(names.insert(preset.name()).second) << preset.name();
    EXPECT_NE(preset.description(), "") << preset.name();
    EXPECT_EQ(preset.config().preset(), preset.name());
  }
  for (const char* name :
       {"gptq-w4", "gptq-w3", "gptq-w2", "gptaq-w4", "gptaq-w2", "rtn-w4", "quarot-w4a16",
        "quarot-w2a16", "walsh-w2a16", "local-hadamard-w2a16", "gsr-w2a16", "quarot-w2a4",
        "gsr-w2a4", "gsr-w2a4kv4", "quarot-w4a4kv4", "gsr-w4a4kv4", "gsr-w2-portable",
        "gsr-w3-portable", "gsr-w4-portable"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

// What is not in a preset but decides the result would change with the service's defaults.
TEST(PresetsTest, EachIsAWholeRecipe) {
  for (const QuantizationPreset& preset : Presets()) {
    SCOPED_TRACE(preset.name());
    ASSERT_OK_AND_ASSIGN(QuantizationConfig stored, Stored(preset.name()));
    // What is not of the recipe: where texts come from and how much is measured.
    stored.clear_evaluation();
    EXPECT_EQ(stored.DebugString(), preset.config().DebugString());
  }
}

TEST(PresetsTest, PortableOnesDoNothingAtRunTimeAndHaveTheCommonGrid) {
  for (const QuantizationPreset& preset : Presets()) {
    SCOPED_TRACE(preset.name());
    const QuantizationConfig& config = preset.config();
    const bool is_offline =
        config.rotation().online_kind() == Rotation::NONE && !config.rotation().has_query_key() &&
        !config.has_activation_quantization() && !config.has_kv_cache_quantization();
    EXPECT_EQ(preset.portable(), is_offline);
    EXPECT_EQ(config.grid(), QuantizationConfig::UNIFORM);
    EXPECT_EQ(config.zero_point(), QuantizationConfig::INTEGER_ZERO);
    if (preset.name().ends_with("-portable")) {
      EXPECT_TRUE(preset.portable());
    }
  }
}

TEST(PresetsTest, DevicesAreThoseThatDoWhatItAsksFor) {
  EXPECT_THAT(Find("gsr-w2-portable").devices(), ElementsAre("cpu", "cuda"));
  EXPECT_THAT(Find("gptq-w4").devices(), ElementsAre("cpu", "cuda"));
  EXPECT_THAT(Find("gptaq-w4").devices(), ElementsAre("cpu", "cuda"));
  EXPECT_THAT(Find("gsr-w2a16").devices(), ElementsAre("cpu")) << "R4";
  EXPECT_THAT(Find("gsr-w2a4").devices(), ElementsAre("cpu"));
  EXPECT_THAT(Find("quarot-w4a4kv4").devices(), ElementsAre("cpu"));
}

TEST(PresetsTest, RowsOfPapersArePlain) {
  for (const QuantizationPreset& preset : Presets()) {
    SCOPED_TRACE(preset.name());
    const QuantizationConfig& config = preset.config();
    if (preset.name().ends_with("-portable")) {
      EXPECT_EQ(config.column_order(), QuantizationConfig::GROUP_AWARE);
      EXPECT_GT(config.error_propagation(), 0);
      continue;
    }
    EXPECT_EQ(config.error_propagation(), 0);
    EXPECT_EQ(config.column_order(), QuantizationConfig::NATURAL);
    const bool has_hessian = config.method() != QuantizationConfig::RTN;
    EXPECT_EQ(config.damp_percent(), has_hessian ? 0.01 : 0);
    EXPECT_EQ(config.calibration().num_samples(), 128);
    EXPECT_EQ(config.calibration().sequence_length(), 2048);
  }
}

// GSR's table changes R1 and nothing else.
TEST(PresetsTest, TheRowsOfGsrDifferInTheRotationOfTheResidualStreamOnly) {
  const auto without_r1 = [](const std::string& name) {
    QuantizationConfig config = Find(name).config();
    config.clear_preset();
    config.mutable_rotation()->clear_kind();
    config.mutable_rotation()->clear_signs();
    return config.DebugString();
  };
  const std::string quarot = without_r1("quarot-w2a16");
  EXPECT_EQ(without_r1("walsh-w2a16"), quarot);
  EXPECT_EQ(without_r1("local-hadamard-w2a16"), quarot);
  EXPECT_EQ(without_r1("gsr-w2a16"), quarot);
  EXPECT_EQ(without_r1("gsr-w2a4"), without_r1("quarot-w2a4"));
  EXPECT_EQ(without_r1("gsr-w4a4kv4"), without_r1("quarot-w4a4kv4"));
  EXPECT_EQ(Find("quarot-w2a16").config().rotation().signs(), Rotation::SEEDED);
  EXPECT_EQ(Find("gsr-w2a16").config().rotation().signs(), Rotation::NO_SIGNS);
  EXPECT_EQ(Find("gsr-w2a16").config().rotation().online_kind(), Rotation::HADAMARD);
}

TEST(PresetsTest, WhatTheJobSetsCounts) {
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig config, Stored("gsr-w2a16", [](auto& given) {
                         given.set_bits(4);
                         given.set_symmetric(true);
                         given.set_error_propagation(1);
                         given.mutable_rotation()->set_signs(Rotation::SEEDED);
                         given.mutable_rotation()->set_online_kind(Rotation::NONE);
                         given.mutable_calibration()->set_num_samples(8);
                         given.mutable_calibration()->set_uri("/texts/c.txt");
                         given.mutable_evaluation()->set_disable(true);
                         given.set_seed(7);
                       }));
  EXPECT_EQ(config.preset(), "gsr-w2a16") << "where the rest came from";
  EXPECT_EQ(config.bits(), 4);
  EXPECT_TRUE(config.symmetric());
  EXPECT_EQ(config.error_propagation(), 1);
  EXPECT_EQ(config.rotation().kind(), Rotation::GSR);
  EXPECT_EQ(config.rotation().signs(), Rotation::SEEDED);
  EXPECT_EQ(config.rotation().online_kind(), Rotation::NONE);
  EXPECT_EQ(config.column_order(), QuantizationConfig::NATURAL) << "the preset's";
  EXPECT_EQ(config.calibration().num_samples(), 8);
  EXPECT_EQ(config.calibration().sequence_length(), 2048);
  EXPECT_EQ(config.calibration().uri(), "/texts/c.txt");
  EXPECT_TRUE(config.evaluation().disable());
  EXPECT_EQ(config.seed(), 7u);
}

TEST(PresetsTest, WhatThePresetTurnsOnCanBeTurnedOff) {
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig quarot, Stored("quarot-w4a4kv4", [](auto& given) {
                         given.set_symmetric(false);
                         given.set_group_size(0);
                         given.mutable_rotation()->set_signs(Rotation::NO_SIGNS);
                         given.mutable_kv_cache_quantization()->set_bits(16);
                       }));
  EXPECT_FALSE(quarot.symmetric());
  EXPECT_EQ(quarot.group_size(), 0) << "auto, over one group a channel";
  EXPECT_EQ(quarot.rotation().signs(), Rotation::NO_SIGNS);
  EXPECT_EQ(quarot.kv_cache_quantization().bits(), 16);
  EXPECT_EQ(quarot.kv_cache_quantization().clip_ratio(), 0) << "was that of 4 bits";
  EXPECT_EQ(quarot.activation_quantization().bits(), 4);

  ASSERT_OK_AND_ASSIGN(const QuantizationConfig best, Stored("gsr-w2-portable", [](auto& given) {
                         given.set_error_propagation(0);
                         given.set_disable_mse_clip(true);
                       }));
  EXPECT_EQ(best.error_propagation(), 0);
  EXPECT_TRUE(best.disable_mse_clip());

  ASSERT_OK_AND_ASSIGN(const QuantizationConfig rtn,
                       Stored("rtn-w4", [](auto& given) { given.set_disable_mse_clip(false); }));
  EXPECT_FALSE(rtn.disable_mse_clip());
}

TEST(PresetsTest, WhatIsOfAnotherChoiceOfThePresetGoesWithIt) {
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig rtn, Stored("gsr-w2-portable", [](auto& given) {
                         given.set_method(QuantizationConfig::RTN);
                       }));
  EXPECT_FALSE(rtn.has_error_propagation());
  EXPECT_EQ(rtn.damp_percent(), 0);
  EXPECT_EQ(rtn.column_order(), QuantizationConfig::NATURAL);
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig unrotated, Stored("quarot-w2a16", [](auto& given) {
                         given.mutable_rotation()->set_kind(Rotation::NONE);
                       }));
  EXPECT_EQ(unrotated.rotation().signs(), Rotation::NO_SIGNS);
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig gptq, Stored("gptaq-w2", [](auto& given) {
                         given.set_method(QuantizationConfig::GPTQ);
                       }));
  EXPECT_FALSE(gptq.has_gptaq_alpha());
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig clipped, Stored("rtn-w4", [](auto& given) {
                         given.set_method(QuantizationConfig::GPTQ);
                       }));
  EXPECT_FALSE(clipped.disable_mse_clip()) << "RTN's baseline has no clip search, GPTQ has";
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig eight, Stored("gsr-w2a4", [](auto& given) {
                         given.mutable_activation_quantization()->set_bits(8);
                       }));
  EXPECT_EQ(eight.activation_quantization().clip_ratio(), 0) << "0.9 is of 4 bits";
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig same, Stored("gsr-w2a4", [](auto& given) {
                         given.mutable_activation_quantization()->set_bits(4);
                         given.mutable_activation_quantization()->set_group_size(32);
                       }));
  EXPECT_EQ(same.activation_quantization().clip_ratio(), 0.9);
  EXPECT_EQ(same.activation_quantization().group_size(), 32);
}

TEST(PresetsTest, OverridesStandAfterThePresets) {
  ASSERT_OK_AND_ASSIGN(const QuantizationConfig config, Stored("gsr-w2-portable", [](auto& given) {
                         given.add_overrides()->set_pattern("*down_proj");
                         given.mutable_overrides(0)->set_bits(4);
                       }));
  const int before = Find("gsr-w2-portable").config().overrides_size();
  ASSERT_EQ(config.overrides_size(), before + 1);
  EXPECT_EQ(config.overrides(before).pattern(), "*down_proj");
}

TEST(PresetsTest, WhatDoesNothingBesideThePresetIsRefused) {
  EXPECT_THAT(Stored("rtn-w4", [](auto& given) { given.set_damp_percent(0.05); }),
              StatusIs(kInvalid, HasSubstr("config.damp_percent")));
  EXPECT_THAT(
      Stored("rtn-w4", [](auto& given) { given.set_column_order(QuantizationConfig::ACT_ORDER); }),
      StatusIs(kInvalid, HasSubstr("config.column_order")));
  EXPECT_THAT(
      Stored("gptq-w4", [](auto& given) { given.mutable_rotation()->set_signs(Rotation::SEEDED); }),
      StatusIs(kInvalid, HasSubstr("config.rotation.signs")));
}

TEST(PresetsTest, RefusesUnknownNamesAndWhatDoesNotFit) {
  const auto unknown = Stored("gsr-w9");
  EXPECT_THAT(unknown, StatusIs(kInvalid, HasSubstr("config.preset")));
  for (const QuantizationPreset& preset : Presets()) {
    EXPECT_THAT(unknown.status().message(), HasSubstr(preset.name()));
  }
  EXPECT_THAT(Stored(std::string(limits::kPresetNameBytesMax + 1, 'a')),
              StatusIs(kInvalid, HasSubstr("at most 64")));
  EXPECT_THAT(Stored("gptq-w4", [](auto& given) { given.set_gptaq_alpha(0.5); }),
              StatusIs(kInvalid, HasSubstr("only GPTAQ")));
  EXPECT_THAT(
      Stored("gptq-w4",
             [](auto& given) { given.mutable_activation_quantization()->set_clip_ratio(0.9); }),
      StatusIs(kInvalid,
               AllOf(HasSubstr("activation_quantization.bits"), HasSubstr("clip_ratio is set"))));
  EXPECT_THAT(
      Stored("gptq-w4",
             [](auto& given) { given.mutable_kv_cache_quantization()->set_group_size(64); }),
      StatusIs(kInvalid, HasSubstr("kv_cache_quantization.bits")));
}

TEST(PresetsTest, ARequestIsItsNameNotWhatIsInIt) {
  v1::CreateQuantizationJobRequest expanded = Request("gptq-w4");
  ASSERT_OK(ExpandPreset(expanded.mutable_quantization_job()->mutable_config()));
  EXPECT_NE(BodySha256(expanded), BodySha256(Request("gptq-w4")));
  EXPECT_NE(BodySha256(Request("gptq-w3")), BodySha256(Request("gptq-w4")));
}

TEST(PresetsTest, WithoutANameNothingChanges) {
  QuantizationConfig config;
  config.set_bits(3);
  const std::string before = config.DebugString();
  ASSERT_OK(ExpandPreset(&config));
  EXPECT_EQ(config.DebugString(), before);
}

TEST(PresetsTest, EachHasItsRowInTheDocumentation) {
  const char* source = std::getenv("WALSH_SOURCE_DIR");
  ASSERT_NE(source, nullptr) << "set by ctest";
  std::ifstream file(std::string(source) + "/docs/quality.md");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  for (const QuantizationPreset& preset : Presets()) {
    EXPECT_THAT(text, HasSubstr(absl::StrCat("\n| `", preset.name(), "` |")));
  }
}

}  // namespace
}  // namespace walsh::jobs
