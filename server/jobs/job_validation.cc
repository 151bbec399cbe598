#include "server/jobs/job_validation.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <cmath>
#include <cstdint>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/evaluation_limits.h"
#include "common/field_checks.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/quantization_limits.h"
#include "common/resource_name.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "server/jobs/presets.h"

namespace walsh::jobs {
namespace {

using v1::Calibration;
using v1::Evaluation;
using v1::QuantizationConfig;
using v1::QuantizationJob;
using v1::Rotation;

constexpr double kDampDefault = 0.01;
constexpr double kErrorPropagationDefault = 0.5;
constexpr double kGptaqAlphaDefault = 0.25;
constexpr int kBitsDefault = 4;
constexpr int kSamplesDefault = 128;
constexpr int kSequenceLengthDefault = 2048;
constexpr int kEvaluationWindowsDefault = 20;

// 0 means the default and is replaced by it.
absl::Status ResolveInt(std::string_view field, int value, int min, int max, int default_value,
                        void (*set)(QuantizationConfig*, int), QuantizationConfig* config) {
  if (value != 0 && (value < min || value > max)) {
    return InvalidField(field, absl::StrCat("must be 0 (", default_value, ") or from ", min, " to ",
                                            max, ", is ", value));
  }
  set(config, value == 0 ? default_value : value);
  return absl::OkStatus();
}

absl::Status ResolveRotation(Rotation* rotation) {
  WALSH_RETURN_IF_ERROR(ValidateRotation(*rotation));
  if (rotation->kind() == Rotation::KIND_UNSPECIFIED) rotation->set_kind(Rotation::GSR);
  if (rotation->signs() == Rotation::SIGNS_UNSPECIFIED) rotation->set_signs(Rotation::NO_SIGNS);
  if (rotation->online_kind() == Rotation::KIND_UNSPECIFIED) {
    rotation->set_online_kind(Rotation::NONE);
  }
  return absl::OkStatus();
}

// What only one method has: each makes up for the errors of earlier layers in its own way.
absl::Status ResolveMethodOptions(QuantizationConfig* config) {
  const auto check = [&](std::string_view field, double value, QuantizationConfig::Method method) {
    if (!std::isfinite(value) || value < 0 || value > 1) {
      return InvalidField(field, absl::StrCat("must be from 0 to 1, is ", value));
    }
    if (value > 0 && config->method() != method) {
      return InvalidField(field, absl::StrCat("is ", value, ", and only ",
                                              QuantizationConfig::Method_Name(method), " has it"));
    }
    return absl::OkStatus();
  };
  WALSH_RETURN_IF_ERROR(
      check("config.error_propagation", config->error_propagation(), QuantizationConfig::GPTQ));
  WALSH_RETURN_IF_ERROR(
      check("config.gptaq_alpha", config->gptaq_alpha(), QuantizationConfig::GPTAQ));
  if (!config->has_error_propagation() && config->method() == QuantizationConfig::GPTQ) {
    config->set_error_propagation(kErrorPropagationDefault);
  }
  if (!config->has_gptaq_alpha() && config->method() == QuantizationConfig::GPTAQ) {
    config->set_gptaq_alpha(kGptaqAlphaDefault);
  }
  return absl::OkStatus();
}

absl::Status ResolveGrid(QuantizationConfig* config) {
  if (!QuantizationConfig::Grid_IsValid(config->grid())) {
    return InvalidField("config.grid",
                        absl::StrCat(static_cast<int>(config->grid()), " is not a grid"));
  }
  if (!QuantizationConfig::ZeroPoint_IsValid(config->zero_point())) {
    return InvalidField("config.zero_point", absl::StrCat(static_cast<int>(config->zero_point()),
                                                          " is not a kind of zero point"));
  }
  const bool has_codebook = config->grid() == QuantizationConfig::CODEBOOK;
  if (has_codebook && config->bits() != 2) {
    return InvalidField("config.grid", absl::StrCat("is CODEBOOK, which is of 2 bits, but bits is ",
                                                    config->bits()));
  }
  if (has_codebook && config->symmetric()) {
    return InvalidField("config.symmetric", "is set, but levels of a CODEBOOK are not symmetric");
  }
  if (config->zero_point() == QuantizationConfig::FLOAT_ZERO &&
      (has_codebook || config->symmetric())) {
    return InvalidField("config.zero_point",
                        absl::StrCat("is FLOAT_ZERO, but a ",
                                     has_codebook ? "CODEBOOK" : "symmetric grid", " has none"));
  }
  if (config->grid() == QuantizationConfig::GRID_UNSPECIFIED) {
    config->set_grid(QuantizationConfig::UNIFORM);
  }
  if (config->zero_point() == QuantizationConfig::ZERO_POINT_UNSPECIFIED) {
    config->set_zero_point(QuantizationConfig::INTEGER_ZERO);
  }
  return absl::OkStatus();
}

absl::Status ResolveQuantizer(QuantizationConfig* config) {
  if (!QuantizationConfig::Method_IsValid(config->method())) {
    return InvalidField("config.method",
                        absl::StrCat(static_cast<int>(config->method()), " is not a method"));
  }
  if (config->method() == QuantizationConfig::METHOD_UNSPECIFIED) {
    config->set_method(QuantizationConfig::GPTQ);
  }
  WALSH_RETURN_IF_ERROR(CheckOneOf("config.bits", config->bits(), {0, 2, 3, 4, 8}, "2, 3, 4 or 8"));
  if (config->bits() == 0) config->set_bits(kBitsDefault);
  WALSH_RETURN_IF_ERROR(CheckOneOf("config.group_size", config->group_size(), {-1, 0, 32, 64, 128},
                                   "0 (auto), 32, 64, 128 or -1 (per channel)"));
  if (!QuantizationConfig::ColumnOrder_IsValid(config->column_order())) {
    return InvalidField(
        "config.column_order",
        absl::StrCat(static_cast<int>(config->column_order()), " is not a column order"));
  }
  if (config->column_order() == QuantizationConfig::COLUMN_ORDER_UNSPECIFIED) {
    config->set_column_order(QuantizationConfig::GROUP_AWARE);
  }
  const double damp = config->damp_percent();
  if (!std::isfinite(damp) || damp < 0 || damp > 1) {
    return InvalidField(
        "config.damp_percent",
        absl::StrCat("must be from 0 to 1 (a share of the mean diagonal), is ", damp));
  }
  if (damp == 0) config->set_damp_percent(kDampDefault);
  // Present from here on: a stored job tells them whatever they are.
  config->set_group_size(config->group_size());
  config->set_symmetric(config->symmetric());
  config->set_disable_mse_clip(config->disable_mse_clip());
  WALSH_RETURN_IF_ERROR(ResolveMethodOptions(config));
  WALSH_RETURN_IF_ERROR(ResolveGrid(config));
  return ValidateOverrides(*config);
}

// What the caller set and can do nothing beside the rest. `given` is what was set, before any
// default; `expanded` has what a preset adds to it. A default that is named is no more than that.
absl::Status CheckIdleOptions(const QuantizationConfig& given, const QuantizationConfig& expanded) {
  if (expanded.rotation().kind() == Rotation::NONE &&
      given.rotation().signs() == Rotation::SEEDED) {
    return InvalidField("config.rotation.signs", "is SEEDED, but kind is NONE: there are no signs");
  }
  if (expanded.method() == QuantizationConfig::RTN) {
    if (given.damp_percent() != 0 && given.damp_percent() != kDampDefault) {
      return InvalidField("config.damp_percent",
                          absl::StrCat("is ", given.damp_percent(), ", and RTN has no Hessian"));
    }
    if (given.column_order() == QuantizationConfig::ACT_ORDER) {
      return InvalidField("config.column_order",
                          "is ACT_ORDER, and RTN takes every column by itself");
    }
  }
  // Linears that an override gives other bits have a uniform grid.
  if (expanded.grid() == QuantizationConfig::CODEBOOK && expanded.overrides().empty() &&
      given.disable_mse_clip()) {
    return InvalidField("config.disable_mse_clip", "is set, but a CODEBOOK has no clip");
  }
  return absl::OkStatus();
}

// What defaults have left that does nothing: a stored job tells what acts, and can be sent again.
void DropIdleOptions(QuantizationConfig* config) {
  if (config->rotation().kind() == Rotation::NONE) {
    config->mutable_rotation()->set_signs(Rotation::NO_SIGNS);
  }
  if (config->method() == QuantizationConfig::RTN) {
    config->set_damp_percent(0);
    config->set_column_order(QuantizationConfig::NATURAL);
  }
  if (config->grid() == QuantizationConfig::CODEBOOK && config->overrides().empty()) {
    config->set_disable_mse_clip(false);
    config->set_zero_point(QuantizationConfig::ZERO_POINT_UNSPECIFIED);
  }
}

absl::Status ResolveTexts(QuantizationConfig* config) {
  const Calibration& calibration = config->calibration();
  const Evaluation& evaluation = config->evaluation();
  WALSH_RETURN_IF_ERROR(
      CheckLine("config.calibration.uri", calibration.uri(), limits::kPathBytesMax));
  WALSH_RETURN_IF_ERROR(
      CheckLine("config.evaluation.uri", evaluation.uri(), limits::kPathBytesMax));
  WALSH_RETURN_IF_ERROR(ResolveInt(
      "config.calibration.num_samples", calibration.num_samples(), 1,
      limits::kCalibrationSamplesMax, kSamplesDefault,
      [](QuantizationConfig* c, int v) { c->mutable_calibration()->set_num_samples(v); }, config));
  WALSH_RETURN_IF_ERROR(ResolveInt(
      "config.calibration.sequence_length", calibration.sequence_length(),
      limits::kSequenceLengthMin, limits::kSequenceLengthMax, kSequenceLengthDefault,
      [](QuantizationConfig* c, int v) { c->mutable_calibration()->set_sequence_length(v); },
      config));
  WALSH_RETURN_IF_ERROR(ResolveInt(
      "config.evaluation.max_windows", evaluation.max_windows(), 1, limits::kEvaluationWindowsMax,
      kEvaluationWindowsDefault,
      [](QuantizationConfig* c, int v) { c->mutable_evaluation()->set_max_windows(v); }, config));
  WALSH_RETURN_IF_ERROR(ResolveInt(
      "config.evaluation.sequence_length", evaluation.sequence_length(), limits::kSequenceLengthMin,
      limits::kSequenceLengthMax, kSequenceLengthDefault,
      [](QuantizationConfig* c, int v) { c->mutable_evaluation()->set_sequence_length(v); },
      config));
  return ValidateEvaluation(evaluation);
}

absl::Status CheckLabels(const QuantizationJob& job) {
  if (job.labels_size() > limits::kLabelsMax) {
    return InvalidField("labels", absl::StrCat("has ", job.labels_size(), " entries, at most ",
                                               limits::kLabelsMax, " are taken"));
  }
  for (const auto& [key, value] : job.labels()) {
    if (key.empty()) return InvalidField("labels", "has an empty key");
    WALSH_RETURN_IF_ERROR(CheckLine("labels", key, limits::kLabelBytesMax));
    WALSH_RETURN_IF_ERROR(CheckLine("labels", value, limits::kLabelBytesMax));
  }
  return absl::OkStatus();
}

// What a client may set; everything else of a job is output only.
QuantizationJob InputOf(const QuantizationJob& job) {
  QuantizationJob input;
  input.set_display_name(job.display_name());
  input.set_source_model(job.source_model());
  input.set_model_name(job.model_name());
  if (job.has_config()) *input.mutable_config() = job.config();
  *input.mutable_labels() = job.labels();
  return input;
}

}  // namespace

absl::StatusOr<QuantizationJob> ValidateNewJob(const v1::CreateQuantizationJobRequest& request) {
  if (!request.has_quantization_job()) return InvalidField("quantization_job", "is missing");
  const std::string& id = request.quantization_job_id();
  if (!id.empty() && !IsJobId(id)) {
    WALSH_RETURN_IF_ERROR(CheckLine("quantization_job_id", id, limits::kJobIdBytesMax));
    return InvalidField("quantization_job_id",
                        absl::StrCat("'", id, "' is not of the form [a-z][a-z0-9-]{0,62}"));
  }
  WALSH_RETURN_IF_ERROR(CheckLine("request_id", request.request_id(), limits::kRequestIdBytesMax));

  QuantizationJob job = InputOf(request.quantization_job());
  WALSH_RETURN_IF_ERROR(
      CheckLine("display_name", job.display_name(), limits::kDisplayNameBytesMax));
  if (job.source_model().empty()) return InvalidField("source_model", "is missing");
  WALSH_RETURN_IF_ERROR(CheckLine("source_model", job.source_model(), limits::kPathBytesMax));
  if (!IsModelId(job.model_name())) {
    return InvalidField(
        "model_name", absl::StrCat("'", job.model_name().substr(0, 2 * limits::kModelNameBytesMax),
                                   "' is not of the form [a-z0-9][a-z0-9._-]{0,63}"));
  }
  WALSH_RETURN_IF_ERROR(CheckLabels(job));
  QuantizationConfig* config = job.mutable_config();
  WALSH_RETURN_IF_ERROR(CheckLine("config.preset", config->preset(), limits::kPresetNameBytesMax));
  const QuantizationConfig given = *config;
  WALSH_RETURN_IF_ERROR(ExpandPreset(config));
  WALSH_RETURN_IF_ERROR(CheckIdleOptions(given, *config));
  WALSH_RETURN_IF_ERROR(ResolveQuantizer(config));
  WALSH_RETURN_IF_ERROR(ResolveRotation(config->mutable_rotation()));
  DropIdleOptions(config);
  WALSH_RETURN_IF_ERROR(ValidateRunTimeQuantizers(*config));
  WALSH_RETURN_IF_ERROR(ResolveTexts(config));
  WALSH_RETURN_IF_ERROR(ValidateQualityGate(*config));
  return job;
}

std::string BodySha256(const v1::CreateQuantizationJobRequest& request) {
  v1::CreateQuantizationJobRequest body;
  *body.mutable_quantization_job() = InputOf(request.quantization_job());
  body.set_quantization_job_id(request.quantization_job_id());
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    // The order of a map's entries is otherwise a matter of chance.
    coded.SetSerializationDeterministic(true);
    body.SerializeToCodedStream(&coded);
  }
  return Sha256Hex(bytes);
}

}  // namespace walsh::jobs
