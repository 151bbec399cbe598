#include "server/jobs/job_validation.h"

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/limits.h"
#include "tests/testing/status_matchers.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using v1::QuantizationConfig;
using v1::Rotation;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr int kIntMax = std::numeric_limits<int>::max();  // 2³¹ does not fit the field
constexpr int kIntMin = std::numeric_limits<int>::min();

v1::CreateQuantizationJobRequest Valid() {
  v1::CreateQuantizationJobRequest request;
  request.mutable_quantization_job()->set_source_model("/models/tiny");
  request.mutable_quantization_job()->set_model_name("tiny-4bit");
  return request;
}

TEST(JobValidationTest, DefaultsAreThoseOfTheProtocol) {
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, ValidateNewJob(Valid()));
  const QuantizationConfig& config = job.config();
  EXPECT_EQ(config.method(), QuantizationConfig::GPTQ);
  EXPECT_EQ(config.bits(), 4);
  EXPECT_EQ(config.group_size(), 0) << "auto: the worker knows the shapes";
  EXPECT_TRUE(config.has_group_size() && config.has_symmetric() && config.has_disable_mse_clip())
      << "a stored job tells them";
  EXPECT_FALSE(config.symmetric());
  EXPECT_FALSE(config.disable_mse_clip());
  EXPECT_EQ(config.column_order(), QuantizationConfig::GROUP_AWARE);
  EXPECT_EQ(config.damp_percent(), 0.01);
  EXPECT_EQ(config.error_propagation(), 0.5);
  EXPECT_EQ(config.rotation().kind(), Rotation::GSR);
  EXPECT_EQ(config.rotation().signs(), Rotation::NO_SIGNS);
  EXPECT_EQ(config.rotation().block_size(), 0);
  EXPECT_EQ(config.rotation().online_kind(), Rotation::NONE);
  EXPECT_FALSE(config.rotation().has_query_key()) << "the worker knows the shapes";
  EXPECT_FALSE(config.has_activation_quantization());
  EXPECT_FALSE(config.has_kv_cache_quantization());
  EXPECT_EQ(config.calibration().num_samples(), 128);
  EXPECT_EQ(config.calibration().sequence_length(), 2048);
  EXPECT_EQ(config.evaluation().max_windows(), 20);
  EXPECT_EQ(config.evaluation().sequence_length(), 2048);
}

TEST(JobValidationTest, OutputOnlyFieldsAreDropped) {
  v1::CreateQuantizationJobRequest request = Valid();
  v1::QuantizationJob* in = request.mutable_quantization_job();
  in->set_name("quantizationJobs/forged");
  in->set_state(v1::QuantizationJob::SUCCEEDED);
  in->set_attempt(9);
  in->mutable_result()->set_artifact_uri("x");
  in->mutable_create_time()->set_seconds(1);
  const std::string hash = BodySha256(request);
  EXPECT_EQ(hash, BodySha256(Valid()));
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, ValidateNewJob(request));
  EXPECT_EQ(job.name(), "");
  EXPECT_EQ(job.state(), v1::QuantizationJob::STATE_UNSPECIFIED);
  EXPECT_EQ(job.attempt(), 0);
  EXPECT_FALSE(job.has_result());
  EXPECT_FALSE(job.has_create_time());
}

struct IntField {
  std::string name;
  std::function<void(QuantizationConfig*, int)> set;
  std::vector<int> good;
  std::vector<int> bad;
};

TEST(JobValidationTest, EveryNumberAtItsLimits) {
  const auto method = [](int v) { return static_cast<QuantizationConfig::Method>(v); };
  const auto order = [](int v) { return static_cast<QuantizationConfig::ColumnOrder>(v); };
  const std::vector<IntField> fields = {
      {"config.method", [&](auto* c, int v) { c->set_method(method(v)); }, {0, 1, 2, 3}, {-1, 4}},
      {"config.bits",
       [](auto* c, int v) { c->set_bits(v); },
       {0, 2, 3, 4, 8},
       {-1, 1, 5, 6, 7, 9, 16}},
      {"config.group_size",
       [](auto* c, int v) { c->set_group_size(v); },
       {-1, 0, 32, 64, 128},
       {-2, 1, 31, 33, 63, 65, 127, 129, 256}},
      {"config.column_order",
       [&](auto* c, int v) { c->set_column_order(order(v)); },
       {0, 1, 2, 3},
       {-1, 4}},
      {"config.grid",
       [](auto* c, int v) {
         c->set_bits(2);
         c->set_grid(static_cast<QuantizationConfig::Grid>(v));
       },
       {0, 1, 2},
       {-1, 3}},
      {"config.zero_point",
       [](auto* c, int v) { c->set_zero_point(static_cast<QuantizationConfig::ZeroPoint>(v)); },
       {0, 1, 2},
       {-1, 3}},
      {"config.rotation.kind",
       [](auto* c, int v) { c->mutable_rotation()->set_kind(static_cast<Rotation::Kind>(v)); },
       {0, 1, 2, 3, 4, 5},
       {-1, 6}},
      {"config.rotation.signs",
       [](auto* c, int v) { c->mutable_rotation()->set_signs(static_cast<Rotation::Signs>(v)); },
       {0, 1, 2},
       {-1, 3}},
      {"config.rotation.block_size",
       [](auto* c, int v) { c->mutable_rotation()->set_block_size(v); },
       {0, 16, 32, 128, limits::kRotationBlockMax},
       {-1, -16, 1, 8, 15, 17, 48, limits::kRotationBlockMax + 1, 2 * limits::kRotationBlockMax}},
      {"config.calibration.num_samples",
       [](auto* c, int v) { c->mutable_calibration()->set_num_samples(v); },
       {0, 1, limits::kCalibrationSamplesMax - 1, limits::kCalibrationSamplesMax},
       {-1, limits::kCalibrationSamplesMax + 1}},
      {"config.calibration.sequence_length",
       [](auto* c, int v) { c->mutable_calibration()->set_sequence_length(v); },
       {0, limits::kSequenceLengthMin, limits::kSequenceLengthMin + 1, limits::kSequenceLengthMax},
       {-1, 1, limits::kSequenceLengthMin - 1, limits::kSequenceLengthMax + 1}},
      {"config.evaluation.max_windows",
       [](auto* c, int v) { c->mutable_evaluation()->set_max_windows(v); },
       {0, 1, limits::kEvaluationWindowsMax},
       {-1, limits::kEvaluationWindowsMax + 1}},
      {"config.evaluation.sequence_length",
       [](auto* c, int v) { c->mutable_evaluation()->set_sequence_length(v); },
       {0, limits::kSequenceLengthMin, limits::kSequenceLengthMax},
       {-1, limits::kSequenceLengthMin - 1, limits::kSequenceLengthMax + 1}},
  };
  for (const IntField& field : fields) {
    for (const int value : field.good) {
      v1::CreateQuantizationJobRequest request = Valid();
      field.set(request.mutable_quantization_job()->mutable_config(), value);
      EXPECT_OK(ValidateNewJob(request)) << field.name << " = " << value;
    }
    std::vector<int> bad = field.bad;
    bad.insert(bad.end(), {kIntMax, kIntMin});
    for (const int value : bad) {
      v1::CreateQuantizationJobRequest request = Valid();
      field.set(request.mutable_quantization_job()->mutable_config(), value);
      EXPECT_THAT(ValidateNewJob(request),
                  StatusIs(kInvalid, ::testing::AllOf(HasSubstr(field.name),
                                                      HasSubstr(std::to_string(value)))))
          << field.name << " = " << value;
    }
  }
}

TEST(JobValidationTest, Damping) {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double value : {0.0, 1e-9, 0.01, 1.0}) {
    v1::CreateQuantizationJobRequest request = Valid();
    request.mutable_quantization_job()->mutable_config()->set_damp_percent(value);
    EXPECT_OK(ValidateNewJob(request)) << value;
  }
  for (const double value : {-1e-9, -1.0, 1.000001, 2147483648.0, std::nan(""), inf, -inf}) {
    v1::CreateQuantizationJobRequest request = Valid();
    request.mutable_quantization_job()->mutable_config()->set_damp_percent(value);
    EXPECT_THAT(ValidateNewJob(request), StatusIs(kInvalid, HasSubstr("damp_percent"))) << value;
  }
}

TEST(JobValidationTest, QualityGate) {
  const double inf = std::numeric_limits<double>::infinity();
  const auto validate = [](std::optional<double> ratio, std::optional<double> divergence,
                           bool disable = false) {
    v1::CreateQuantizationJobRequest request = Valid();
    QuantizationConfig& config = *request.mutable_quantization_job()->mutable_config();
    v1::QualityGate& gate = *config.mutable_quality_gate();
    if (ratio.has_value()) gate.set_max_perplexity_ratio(*ratio);
    if (divergence.has_value()) gate.set_max_kl_divergence(*divergence);
    config.mutable_evaluation()->set_disable(disable);
    return ValidateNewJob(request);
  };
  for (const double ratio : {1.0, 1.05, 1e9}) EXPECT_OK(validate(ratio, {})) << ratio;
  for (const double ratio : {0.0, 0.999, -1.0, std::nan(""), inf, -inf}) {
    EXPECT_THAT(validate(ratio, {}), StatusIs(kInvalid, HasSubstr("max_perplexity_ratio")))
        << ratio;
  }
  for (const double divergence : {1e-9, 0.1, 1e9}) EXPECT_OK(validate({}, divergence));
  for (const double divergence : {0.0, -1.0, std::nan(""), inf, -inf}) {
    EXPECT_THAT(validate({}, divergence), StatusIs(kInvalid, HasSubstr("max_kl_divergence")))
        << divergence;
  }
  EXPECT_OK(validate({}, {}, /*disable=*/true));
  EXPECT_THAT(validate(1.5, {}, /*disable=*/true),
              StatusIs(kInvalid, HasSubstr("needs an evaluation")));
  EXPECT_THAT(validate({}, 0.5, /*disable=*/true),
              StatusIs(kInvalid, HasSubstr("needs an evaluation")));
}

// All of it is in common/evaluation_limits_test.cc.
TEST(JobValidationTest, Evaluation) {
  v1::CreateQuantizationJobRequest request = Valid();
  v1::Evaluation& evaluation =
      *request.mutable_quantization_job()->mutable_config()->mutable_evaluation();
  evaluation.set_stride(2048);
  evaluation.add_tasks()->set_uri("/piqa.jsonl");
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, ValidateNewJob(request));
  EXPECT_EQ(job.config().evaluation().stride(), 2048);
  EXPECT_EQ(job.config().evaluation().tasks_size(), 1);
  evaluation.set_stride(2049);
  EXPECT_THAT(ValidateNewJob(request),
              StatusIs(kInvalid, HasSubstr("config.evaluation.stride: must be 0 or from 1 to "
                                           "2048, is 2049")));
}

TEST(JobValidationTest, ErrorPropagation) {
  const auto validate = [](QuantizationConfig::Method method, double value) {
    v1::CreateQuantizationJobRequest request = Valid();
    QuantizationConfig& config = *request.mutable_quantization_job()->mutable_config();
    config.set_method(method);
    config.set_error_propagation(value);
    return ValidateNewJob(request);
  };
  for (const double value : {0.0, 1e-9, 0.5, 1.0}) {
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, validate(QuantizationConfig::GPTQ, value));
    EXPECT_EQ(job.config().error_propagation(), value);
  }
  for (const double value :
       {-1e-9, 1.000001, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT(validate(QuantizationConfig::GPTQ, value),
                StatusIs(kInvalid, HasSubstr("error_propagation")))
        << value;
  }
  EXPECT_THAT(validate(QuantizationConfig::RTN, 0.5), StatusIs(kInvalid, HasSubstr("only GPTQ")));
  EXPECT_OK(validate(QuantizationConfig::RTN, 0));
  v1::CreateQuantizationJobRequest request = Valid();
  request.mutable_quantization_job()->mutable_config()->set_method(QuantizationConfig::RTN);
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob rtn, ValidateNewJob(request));
  EXPECT_FALSE(rtn.config().has_error_propagation());
}

// The two ways to make up for earlier layers are alternatives: each method has one of them.
TEST(JobValidationTest, GptaqHasItsAlphaAndNoErrorPropagation) {
  const auto validate = [](QuantizationConfig::Method method,
                           const std::function<void(QuantizationConfig&)>& change) {
    v1::CreateQuantizationJobRequest request = Valid();
    QuantizationConfig& config = *request.mutable_quantization_job()->mutable_config();
    config.set_method(method);
    change(config);
    return ValidateNewJob(request);
  };
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job,
                       validate(QuantizationConfig::GPTAQ, [](auto&) {}));
  EXPECT_EQ(job.config().gptaq_alpha(), 0.25);
  EXPECT_FALSE(job.config().has_error_propagation());
  for (const double value : {0.0, 0.5, 1.0}) {
    ASSERT_OK_AND_ASSIGN(
        const v1::QuantizationJob with_alpha,
        validate(QuantizationConfig::GPTAQ, [&](auto& c) { c.set_gptaq_alpha(value); }));
    EXPECT_EQ(with_alpha.config().gptaq_alpha(), value);
  }
  for (const double value : {-1e-9, 1.000001, std::nan("")}) {
    EXPECT_THAT(validate(QuantizationConfig::GPTAQ, [&](auto& c) { c.set_gptaq_alpha(value); }),
                StatusIs(kInvalid, HasSubstr("gptaq_alpha")))
        << value;
  }
  EXPECT_THAT(
      validate(QuantizationConfig::GPTAQ, [](auto& c) { c.set_error_propagation(0.5); }),
      StatusIs(kInvalid, ::testing::AllOf(HasSubstr("error_propagation"), HasSubstr("only GPTQ"))));
  for (const auto method : {QuantizationConfig::GPTQ, QuantizationConfig::RTN}) {
    EXPECT_THAT(validate(method, [](auto& c) { c.set_gptaq_alpha(0.25); }),
                StatusIs(kInvalid, HasSubstr("only GPTAQ")));
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob without, validate(method, [](auto&) {}));
    EXPECT_FALSE(without.config().has_gptaq_alpha());
  }
}

TEST(JobValidationTest, Overrides) {
  const auto validate = [](const std::vector<std::pair<std::string, int>>& overrides) {
    v1::CreateQuantizationJobRequest request = Valid();
    for (const auto& [pattern, bits] : overrides) {
      auto* entry = request.mutable_quantization_job()->mutable_config()->add_overrides();
      entry->set_pattern(pattern);
      entry->set_bits(bits);
    }
    return ValidateNewJob(request);
  };
  EXPECT_OK(validate({{"layers.{0,1}.mlp.down_proj", 4}, {"*", 2}, {"*.q_proj", 8}, {"?", 3}}));
  EXPECT_THAT(validate({{"*", 4}, {"layers.{0", 4}}),
              StatusIs(kInvalid, ::testing::AllOf(HasSubstr("config.overrides[1].pattern"),
                                                  HasSubstr("'{' without '}'"))));
  EXPECT_THAT(validate({{"", 4}}), StatusIs(kInvalid, HasSubstr("empty")));
  for (const int bits : {-1, 0, 1, 5, 16}) {
    EXPECT_THAT(validate({{"*", bits}}),
                StatusIs(kInvalid, ::testing::AllOf(HasSubstr("config.overrides[0].bits"),
                                                    HasSubstr(std::to_string(bits)))));
  }
  const auto many = [](int n) { return std::vector<std::pair<std::string, int>>(n, {"*", 4}); };
  EXPECT_OK(validate(many(limits::kOverridesMax)));
  EXPECT_THAT(validate(many(limits::kOverridesMax + 1)),
              StatusIs(kInvalid, HasSubstr("at most 64")));
  EXPECT_OK(validate({{std::string(limits::kOverridePatternBytesMax, 'a'), 4}}));
  EXPECT_THAT(validate({{std::string(limits::kOverridePatternBytesMax + 1, 'a'), 4}}),
              StatusIs(kInvalid, HasSubstr("256")));
}

TEST(JobValidationTest, Grids) {
  const auto validate = [](const std::function<void(QuantizationConfig&)>& change) {
    v1::CreateQuantizationJobRequest request = Valid();
    change(*request.mutable_quantization_job()->mutable_config());
    return ValidateNewJob(request);
  };
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob plain, validate([](auto&) {}));
  EXPECT_EQ(plain.config().grid(), QuantizationConfig::UNIFORM);
  EXPECT_EQ(plain.config().zero_point(), QuantizationConfig::INTEGER_ZERO);
  EXPECT_OK(validate([](auto& c) { c.set_zero_point(QuantizationConfig::FLOAT_ZERO); }));
  const auto codebook = [](QuantizationConfig& c) {
    c.set_bits(2);
    c.set_grid(QuantizationConfig::CODEBOOK);
  };
  EXPECT_OK(validate(codebook));
  EXPECT_THAT(validate([&](auto& c) { codebook(c), c.set_bits(0); }),
              StatusIs(kInvalid, HasSubstr("bits is 4")));
  EXPECT_THAT(validate([&](auto& c) { codebook(c), c.set_symmetric(true); }),
              StatusIs(kInvalid, HasSubstr("config.symmetric")));
  EXPECT_THAT(
      validate([&](auto& c) { codebook(c), c.set_zero_point(QuantizationConfig::FLOAT_ZERO); }),
      StatusIs(kInvalid, HasSubstr("CODEBOOK has none")));
  EXPECT_THAT(validate([](auto& c) {
                c.set_symmetric(true);
                c.set_zero_point(QuantizationConfig::FLOAT_ZERO);
              }),
              StatusIs(kInvalid, HasSubstr("symmetric grid has none")));
}

// An option that is set and can do nothing is a mistake; what defaults leave of it is not stored.
TEST(JobValidationTest, OptionsThatDoNothingAreRefused) {
  const auto validate = [](const std::function<void(QuantizationConfig&)>& change) {
    v1::CreateQuantizationJobRequest request = Valid();
    change(*request.mutable_quantization_job()->mutable_config());
    return ValidateNewJob(request);
  };
  const auto unrotated = [](QuantizationConfig& c) {
    c.mutable_rotation()->set_kind(Rotation::NONE);
  };
  const auto rtn = [](QuantizationConfig& c) { c.set_method(QuantizationConfig::RTN); };
  const auto codebook = [](QuantizationConfig& c) {
    c.set_bits(2);
    c.set_grid(QuantizationConfig::CODEBOOK);
  };
  const auto refused = [&](const std::function<void(QuantizationConfig&)>& change,
                           const char* field) {
    EXPECT_THAT(validate(change), StatusIs(kInvalid, HasSubstr(field)));
  };
  refused([&](auto& c) { unrotated(c), c.mutable_rotation()->set_signs(Rotation::SEEDED); },
          "config.rotation.signs");
  refused([&](auto& c) { rtn(c), c.set_damp_percent(0.05); }, "config.damp_percent");
  refused([&](auto& c) { rtn(c), c.set_column_order(QuantizationConfig::ACT_ORDER); },
          "config.column_order");
  refused([&](auto& c) { codebook(c), c.set_disable_mse_clip(true); }, "config.disable_mse_clip");
  // Defaults that are named ask for nothing.
  EXPECT_OK(validate([&](auto& c) {
    rtn(c);
    c.set_damp_percent(0.01);
    c.set_column_order(QuantizationConfig::GROUP_AWARE);
  }));
  EXPECT_OK(
      validate([&](auto& c) { codebook(c), c.set_zero_point(QuantizationConfig::INTEGER_ZERO); }));
  refused([](auto& c) { c.mutable_activation_quantization()->set_group_size(64); },
          "config.activation_quantization.bits: is 0 (none), but group_size is set");
  refused(
      [](auto& c) {
        c.mutable_activation_quantization()->set_bits(16);
        c.mutable_activation_quantization()->set_clip_ratio(0.9);
      },
      "config.activation_quantization.bits: is 16 (none), but clip_ratio is set");
  refused([](auto& c) { c.mutable_activation_quantization()->set_asymmetric(true); },
          "but asymmetric is set");
  refused([](auto& c) { c.mutable_kv_cache_quantization()->set_group_size(64); },
          "config.kv_cache_quantization.bits");
  refused([](auto& c) { c.mutable_kv_cache_quantization()->set_clip_ratio(0.9); },
          "config.kv_cache_quantization.bits");

  // With overrides some linears have a uniform grid.
  EXPECT_OK(validate([&](auto& c) {
    codebook(c);
    c.set_disable_mse_clip(true);
    c.set_zero_point(QuantizationConfig::INTEGER_ZERO);
    c.add_overrides()->set_pattern("*.v_proj");
    c.mutable_overrides(0)->set_bits(4);
  }));
  for (const std::function<void(QuantizationConfig&)>& change :
       {std::function<void(QuantizationConfig&)>(unrotated),
        std::function<void(QuantizationConfig&)>(rtn),
        std::function<void(QuantizationConfig&)>(codebook)}) {
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, validate(change));
    // What a stored job tells can be sent again.
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob again,
                         validate([&](QuantizationConfig& c) { c = job.config(); }));
    EXPECT_EQ(again.config().SerializeAsString(), job.config().SerializeAsString());
    if (job.config().method() != QuantizationConfig::RTN) continue;
    EXPECT_EQ(job.config().damp_percent(), 0);
    EXPECT_EQ(job.config().column_order(), QuantizationConfig::NATURAL);
  }
}

TEST(JobValidationTest, OnlyBlockRotationsHaveBlocks) {
  for (int kind = 0; kind <= 5; ++kind) {
    v1::CreateQuantizationJobRequest request = Valid();
    Rotation* rotation = request.mutable_quantization_job()->mutable_config()->mutable_rotation();
    rotation->set_kind(static_cast<Rotation::Kind>(kind));
    rotation->set_block_size(64);
    const bool has_blocks = kind == 0 || kind == Rotation::GSR || kind == Rotation::LOCAL_HADAMARD;
    EXPECT_EQ(ValidateNewJob(request).ok(), has_blocks) << kind;
  }
}

TEST(JobValidationTest, OnlyOnlineBlockRotationsHaveOnlineBlocks) {
  for (int kind = 0; kind <= 5; ++kind) {
    v1::CreateQuantizationJobRequest request = Valid();
    Rotation* rotation = request.mutable_quantization_job()->mutable_config()->mutable_rotation();
    rotation->set_online_kind(static_cast<Rotation::Kind>(kind));
    EXPECT_OK(ValidateNewJob(request));
    rotation->set_online_block_size(64);
    const bool has_blocks = kind == Rotation::GSR || kind == Rotation::LOCAL_HADAMARD;
    EXPECT_EQ(ValidateNewJob(request).ok(), has_blocks) << kind;
  }
  v1::CreateQuantizationJobRequest request = Valid();
  Rotation* rotation = request.mutable_quantization_job()->mutable_config()->mutable_rotation();
  rotation->set_online_kind(static_cast<Rotation::Kind>(77));
  EXPECT_THAT(ValidateNewJob(request),
              StatusIs(kInvalid, HasSubstr("config.rotation.online_kind")));
  rotation->set_online_kind(Rotation::GSR);
  rotation->set_online_block_size(48);
  EXPECT_THAT(ValidateNewJob(request),
              StatusIs(kInvalid, HasSubstr("config.rotation.online_block_size")));
}

TEST(JobValidationTest, QuantizersAtRunTime) {
  const auto validate = [](const std::function<void(QuantizationConfig&)>& set) {
    v1::CreateQuantizationJobRequest request = Valid();
    set(*request.mutable_quantization_job()->mutable_config());
    return ValidateNewJob(request).status();
  };
  for (int bits = -1; bits <= 17; ++bits) {
    const bool is_off = bits == 0 || bits == 16;
    EXPECT_EQ(validate([&](auto& c) { c.mutable_activation_quantization()->set_bits(bits); }).ok(),
              is_off || bits == 4 || bits == 8)
        << bits;
    EXPECT_EQ(validate([&](auto& c) { c.mutable_kv_cache_quantization()->set_bits(bits); }).ok(),
              is_off || bits == 2 || bits == 4 || bits == 8)
        << bits;
  }
  for (const int group : {-1, 1, 16, 33, 256, kIntMax, kIntMin}) {
    EXPECT_THAT(
        validate([&](auto& c) { c.mutable_activation_quantization()->set_group_size(group); }),
        StatusIs(kInvalid, HasSubstr("config.activation_quantization.group_size")));
    EXPECT_THAT(
        validate([&](auto& c) { c.mutable_kv_cache_quantization()->set_group_size(group); }),
        StatusIs(kInvalid, HasSubstr("config.kv_cache_quantization.group_size")));
  }
  for (const double clip : {-1e-9, 1e-46, 0.0099, 1.000001, std::nan("")}) {
    EXPECT_THAT(
        validate([&](auto& c) { c.mutable_activation_quantization()->set_clip_ratio(clip); }),
        StatusIs(kInvalid, HasSubstr("config.activation_quantization.clip_ratio")));
    EXPECT_THAT(validate([&](auto& c) { c.mutable_kv_cache_quantization()->set_clip_ratio(clip); }),
                StatusIs(kInvalid, HasSubstr("config.kv_cache_quantization.clip_ratio")));
  }
  // R3 changes nothing where the cache is not quantized.
  EXPECT_THAT(validate([](auto& c) { c.mutable_rotation()->set_query_key(true); }),
              StatusIs(kInvalid, HasSubstr("config.rotation.query_key")));
  EXPECT_OK(validate([](auto& c) { c.mutable_rotation()->set_query_key(false); }));
  EXPECT_OK(validate([](auto& c) {
    c.mutable_rotation()->set_query_key(true);
    c.mutable_kv_cache_quantization()->set_bits(4);
  }));
}

struct TextField {
  std::string name;
  std::function<void(v1::CreateQuantizationJobRequest*, const std::string&)> set;
  int bytes_max;
};

TEST(JobValidationTest, EveryText) {
  const std::vector<TextField> fields = {
      {"display_name", [](auto* r, auto& v) { r->mutable_quantization_job()->set_display_name(v); },
       limits::kDisplayNameBytesMax},
      {"source_model", [](auto* r, auto& v) { r->mutable_quantization_job()->set_source_model(v); },
       limits::kPathBytesMax},
      {"config.calibration.uri",
       [](auto* r, auto& v) {
         r->mutable_quantization_job()->mutable_config()->mutable_calibration()->set_uri(v);
       },
       limits::kPathBytesMax},
      {"config.evaluation.uri",
       [](auto* r, auto& v) {
         r->mutable_quantization_job()->mutable_config()->mutable_evaluation()->set_uri(v);
       },
       limits::kPathBytesMax},
      {"request_id", [](auto* r, auto& v) { r->set_request_id(v); }, limits::kRequestIdBytesMax},
      {"labels",
       [](auto* r, auto& v) { (*r->mutable_quantization_job()->mutable_labels())["k"] = v; },
       limits::kLabelBytesMax},
      {"labels",
       [](auto* r, auto& v) { (*r->mutable_quantization_job()->mutable_labels())[v] = "v"; },
       limits::kLabelBytesMax},
      {"model_name", [](auto* r, auto& v) { r->mutable_quantization_job()->set_model_name(v); },
       limits::kModelNameBytesMax},
      {"quantization_job_id", [](auto* r, auto& v) { r->set_quantization_job_id(v); },
       limits::kJobIdBytesMax},
  };
  for (const TextField& field : fields) {
    v1::CreateQuantizationJobRequest request = Valid();
    field.set(&request, std::string(field.bytes_max, 'x'));
    EXPECT_OK(ValidateNewJob(request)) << field.name;
    for (const std::string& bad : {std::string(field.bytes_max + 1, 'x'), std::string("\xc3("),
                                   std::string("a\x1b[0m"), std::string("a\0b", 3)}) {
      request = Valid();
      field.set(&request, bad);
      EXPECT_THAT(ValidateNewJob(request), StatusIs(kInvalid, HasSubstr(field.name))) << field.name;
    }
  }
}

TEST(JobValidationTest, NamesHaveTheirForm) {
  for (const char* name : {"", "A", "-a", ".a", "a/b", "..", "a..b", "a b", "ä"}) {
    v1::CreateQuantizationJobRequest request = Valid();
    request.mutable_quantization_job()->set_model_name(name);
    EXPECT_THAT(ValidateNewJob(request), StatusIs(kInvalid, HasSubstr("model_name"))) << name;
  }
  for (const char* id : {"A", "1a", "-a", "a_b", "a.b", "a/b"}) {
    v1::CreateQuantizationJobRequest request = Valid();
    request.set_quantization_job_id(id);
    EXPECT_THAT(ValidateNewJob(request), StatusIs(kInvalid, HasSubstr("quantization_job_id")))
        << id;
  }
}

TEST(JobValidationTest, MissingParts) {
  EXPECT_THAT(ValidateNewJob({}), StatusIs(kInvalid, HasSubstr("quantization_job")));
  v1::CreateQuantizationJobRequest request = Valid();
  request.mutable_quantization_job()->clear_source_model();
  EXPECT_THAT(ValidateNewJob(request), StatusIs(kInvalid, HasSubstr("source_model")));
}

TEST(JobValidationTest, LabelsAreCounted) {
  v1::CreateQuantizationJobRequest request = Valid();
  auto* labels = request.mutable_quantization_job()->mutable_labels();
  for (int i = 0; i < limits::kLabelsMax; ++i) (*labels)["k" + std::to_string(i)] = "v";
  EXPECT_OK(ValidateNewJob(request));
  (*labels)["one-more"] = "v";
  EXPECT_THAT(ValidateNewJob(request), HasCode(kInvalid));
  labels->clear();
  (*labels)[""] = "v";
  EXPECT_THAT(ValidateNewJob(request), HasCode(kInvalid));
}

TEST(JobValidationTest, BodyHashIgnoresRequestIdAndMapOrderOnly) {
  v1::CreateQuantizationJobRequest a = Valid();
  v1::CreateQuantizationJobRequest b = Valid();
  a.set_request_id("1");
  b.set_request_id("2");
  b.set_validate_only(true);
  for (int i = 0; i < 50; ++i) {
    (*a.mutable_quantization_job()->mutable_labels())[std::to_string(i)] = "v";
    (*b.mutable_quantization_job()->mutable_labels())[std::to_string(49 - i)] = "v";
  }
  EXPECT_EQ(BodySha256(a), BodySha256(b));
  b.mutable_quantization_job()->mutable_config()->set_bits(2);
  EXPECT_NE(BodySha256(a), BodySha256(b));
  b = a;
  b.set_quantization_job_id("x");
  EXPECT_NE(BodySha256(a), BodySha256(b));
}

}  // namespace
}  // namespace walsh::jobs
