#include "worker/service/job_conversion.h"

#include "absl/strings/str_cat.h"
#include "common/evaluation_limits.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/quantization_limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "worker/pipeline/quality_errors.h"
#include "worker/service/proto_time.h"

namespace walsh::service {
namespace {

using v1::QuantizationConfig;
using v1::QuantizationJob;
using v1::Rotation;

constexpr int kDefaultBits = 4;
constexpr double kDefaultDamp = 0.01;
constexpr int64_t kDefaultCalibrationWindows = 128;
constexpr int64_t kDefaultEvaluationWindows = 20;
constexpr int64_t kDefaultSequenceLength = 2048;

absl::Status OutOfRange(std::string_view field, double value, std::string_view rule) {
  return InvalidField(field, absl::StrCat(value, ", must be ", std::string(rule)));
}

absl::StatusOr<gptq::Options> ToQuantizer(const QuantizationConfig& config) {
  gptq::Options options;
  switch (config.method()) {
    case QuantizationConfig::METHOD_UNSPECIFIED:
    case QuantizationConfig::GPTQ:
      options.method = gptq::Method::kGptq;
      break;
    case QuantizationConfig::GPTAQ:
      options.method = gptq::Method::kGptaq;
      break;
    case QuantizationConfig::RTN:
      options.method = gptq::Method::kRtn;
      break;
    default:
      return OutOfRange("config.method", config.method(), "RTN, GPTQ or GPTAQ");
  }
  options.bits = config.bits() == 0 ? kDefaultBits : config.bits();
  if (options.bits != 2 && options.bits != 3 && options.bits != 4 && options.bits != 8) {
    return OutOfRange("config.bits", options.bits, "2, 3, 4 or 8");
  }
  options.group_size = config.group_size();
  const int64_t group = options.group_size;
  if (group != 0 && group != -1 && group != 32 && group != 64 && group != 128) {
    return OutOfRange("config.group_size", static_cast<double>(group),
                      "32, 64, 128, -1 (per channel) or 0 (automatic)");
  }
  options.symmetric = config.symmetric();
  switch (config.column_order()) {
    case QuantizationConfig::NATURAL:
      options.column_order = gptq::ColumnOrder::kNatural;
      break;
    case QuantizationConfig::COLUMN_ORDER_UNSPECIFIED:
    case QuantizationConfig::GROUP_AWARE:
      options.column_order = gptq::ColumnOrder::kGroupAware;
      break;
    case QuantizationConfig::ACT_ORDER:
      options.column_order = gptq::ColumnOrder::kActOrder;
      break;
    default:
      return OutOfRange("config.column_order", config.column_order(),
                        "NATURAL, GROUP_AWARE or ACT_ORDER");
  }
  switch (config.grid()) {
    case QuantizationConfig::GRID_UNSPECIFIED:
    case QuantizationConfig::UNIFORM:
      options.grid = gptq::Grid::kUniform;
      break;
    case QuantizationConfig::CODEBOOK:
      options.grid = gptq::Grid::kCodebook;
      break;
    default:
      return OutOfRange("config.grid", config.grid(), "UNIFORM or CODEBOOK");
  }
  switch (config.zero_point()) {
    case QuantizationConfig::ZERO_POINT_UNSPECIFIED:
    case QuantizationConfig::INTEGER_ZERO:
      options.zero_point = gptq::ZeroPoint::kInteger;
      break;
    case QuantizationConfig::FLOAT_ZERO:
      options.zero_point = gptq::ZeroPoint::kFloat;
      break;
    default:
      return OutOfRange("config.zero_point", config.zero_point(), "INTEGER_ZERO or FLOAT_ZERO");
  }
  options.damp = config.damp_percent() == 0 ? kDefaultDamp : config.damp_percent();
  if (!(options.damp > 0 && options.damp <= 1)) {
    return OutOfRange("config.damp_percent", config.damp_percent(),
                      "a share above 0 and at most 1");
  }
  options.mse_clip = !config.disable_mse_clip();
  if (config.has_error_propagation()) options.error_propagation = config.error_propagation();
  if (!(options.error_propagation >= 0 && options.error_propagation <= 1)) {
    return OutOfRange("config.error_propagation", options.error_propagation, "from 0 to 1");
  }
  if (config.has_gptaq_alpha()) options.gptaq_alpha = config.gptaq_alpha();
  if (!(options.gptaq_alpha >= 0 && options.gptaq_alpha <= 1)) {
    return OutOfRange("config.gptaq_alpha", options.gptaq_alpha, "from 0 to 1");
  }
  return options;
}

absl::StatusOr<rotate::Kind> ToRotationKind(Rotation::Kind kind) {
  switch (kind) {
    case Rotation::NONE:
      return rotate::Kind::kNone;
    case Rotation::HADAMARD:
      return rotate::Kind::kHadamard;
    case Rotation::WALSH:
      return rotate::Kind::kWalsh;
    case Rotation::LOCAL_HADAMARD:
      return rotate::Kind::kLocalHadamard;
    case Rotation::KIND_UNSPECIFIED:
    case Rotation::GSR:
      return rotate::Kind::kGsr;
    default:
      return OutOfRange("config.rotation.kind", kind,
                        "NONE, HADAMARD, WALSH, LOCAL_HADAMARD or GSR");
  }
}

// `value` or, when it is 0, `default_value`; within [low, high].
absl::StatusOr<int64_t> Count(std::string_view field, int64_t value, int64_t default_value,
                              int64_t low, int64_t high) {
  if (value == 0) return default_value;
  if (value < low || value > high) {
    return OutOfRange(field, static_cast<double>(value), absl::StrCat(low, " to ", high));
  }
  return value;
}

// Off is 16, and 0.
int BitsAtRunTime(int bits) { return bits == 0 ? 16 : bits; }

absl::StatusOr<pipeline::OnlineSpec> ToOnlineSpec(const QuantizationConfig& config) {
  WALSH_RETURN_IF_ERROR(ValidateRunTimeQuantizers(config));
  pipeline::OnlineSpec online;
  const Rotation& rotation = config.rotation();
  if (rotation.online_kind() != Rotation::KIND_UNSPECIFIED) {
    WALSH_ASSIGN_OR_RETURN(online.down_rotation, ToRotationKind(rotation.online_kind()));
  }
  online.down_block = rotation.online_block_size();
  if (rotation.has_query_key()) online.query_key = rotation.query_key();

  const v1::ActivationQuantization& activations = config.activation_quantization();
  online.activation_bits = BitsAtRunTime(activations.bits());
  online.activation_group = activations.group_size();
  online.activations_symmetric = !activations.asymmetric();
  online.activation_clip = activations.clip_ratio();

  const v1::KvCacheQuantization& kv = config.kv_cache_quantization();
  online.kv_bits = BitsAtRunTime(kv.bits());
  online.kv_group = kv.group_size();
  online.kv_clip = kv.clip_ratio();
  return online;
}

}  // namespace

absl::StatusOr<std::string> ResolveField(const PathResolver& resolve, const std::string& field,
                                         const std::string& path) {
  absl::StatusOr<std::string> resolved = resolve(path);
  if (resolved.ok()) return resolved;
  absl::Status status(resolved.status().code(),
                      absl::StrCat(field, ": ", resolved.status().message()));
  resolved.status().ForEachPayload([&](absl::string_view type_url, const absl::Cord& detail) {
    status.SetPayload(type_url, detail);
  });
  return status;
}

absl::StatusOr<std::vector<evaluate::TaskSpec>> ToTaskSpecs(
    const std::string& field, const google::protobuf::RepeatedPtrField<v1::TaskEvaluation>& tasks,
    const PathResolver& resolve) {
  std::vector<evaluate::TaskSpec> specs;
  for (int i = 0; i < tasks.size(); ++i) {
    evaluate::TaskSpec& spec = specs.emplace_back();
    WALSH_ASSIGN_OR_RETURN(
        spec.path, ResolveField(resolve, absl::StrCat(field, "[", i, "].uri"), tasks[i].uri()));
    spec.name = tasks[i].uri();
    spec.limit = tasks[i].limit();
  }
  return specs;
}

v1::TaskResult ToProto(const evaluate::TaskReport& report) {
  v1::TaskResult result;
  result.set_name(report.name);
  result.set_items(report.items);
  result.set_accuracy(report.score.accuracy.mean);
  result.set_accuracy_stderr(report.score.accuracy.standard_error);
  if (report.score.accuracy_norm.has_value()) {
    result.set_accuracy_norm(report.score.accuracy_norm->mean);
    result.set_accuracy_norm_stderr(report.score.accuracy_norm->standard_error);
  }
  if (report.score.perplexity.has_value()) {
    result.set_perplexity(report.score.perplexity->mean);
    result.set_perplexity_stderr(report.score.perplexity->standard_error);
  }
  result.set_tokens(report.score.tokens);
  result.set_truncated_items(report.score.truncated_items);
  return result;
}

absl::StatusOr<pipeline::JobSpec> ToJobSpec(const QuantizationJob& job,
                                            const PathResolvers& resolve) {
  const QuantizationConfig& config = job.config();
  pipeline::JobSpec spec;
  spec.job_name = job.name();
  spec.model_name = job.model_name();
  if (!IsModelId(spec.model_name)) {
    return InvalidField(
        "model_name",
        absl::StrCat("'", spec.model_name, "' is not of the form [a-z0-9][a-z0-9._-]{0,63}"));
  }
  spec.preset = config.preset();
  WALSH_ASSIGN_OR_RETURN(spec.quantizer, ToQuantizer(config));
  WALSH_RETURN_IF_ERROR(ValidateOverrides(config));
  for (const v1::BitsOverride& entry : config.overrides()) {
    spec.overrides.push_back({entry.pattern(), entry.bits()});
  }
  WALSH_RETURN_IF_ERROR(ValidateRotation(config.rotation()));
  WALSH_ASSIGN_OR_RETURN(spec.rotation, ToRotationKind(config.rotation().kind()));
  spec.rotation_block = config.rotation().block_size();
  spec.rotation_signs = config.rotation().signs() == Rotation::SEEDED;
  if (config.rotation().has_head()) spec.head_rotation = config.rotation().head();
  WALSH_ASSIGN_OR_RETURN(spec.online, ToOnlineSpec(config));
  spec.seed = config.seed();
  const v1::Calibration& calibration = config.calibration();
  WALSH_ASSIGN_OR_RETURN(spec.n_calibration_windows,
                         Count("config.calibration.num_samples", calibration.num_samples(),
                               kDefaultCalibrationWindows, 1, limits::kCalibrationSamplesMax));
  WALSH_ASSIGN_OR_RETURN(
      spec.sequence_length,
      Count("config.calibration.sequence_length", calibration.sequence_length(),
            kDefaultSequenceLength, limits::kSequenceLengthMin, limits::kSequenceLengthMax));
  const v1::Evaluation& evaluation = config.evaluation();
  spec.evaluate = !evaluation.disable();
  WALSH_ASSIGN_OR_RETURN(spec.n_evaluation_windows,
                         Count("config.evaluation.max_windows", evaluation.max_windows(),
                               kDefaultEvaluationWindows, 1, limits::kCalibrationSamplesMax));
  WALSH_ASSIGN_OR_RETURN(
      spec.evaluation_length,
      Count("config.evaluation.sequence_length", evaluation.sequence_length(),
            kDefaultSequenceLength, limits::kSequenceLengthMin, limits::kSequenceLengthMax));
  WALSH_RETURN_IF_ERROR(ValidateEvaluation(evaluation));
  spec.evaluation_stride = evaluation.stride();
  spec.evaluation_joins_rows = evaluation.format() == v1::TextEvaluation::WIKITEXT;
  spec.evaluation_skips_bos = evaluation.skip_bos();

  WALSH_ASSIGN_OR_RETURN(spec.quality_gate, ToQualityGate(config));

  WALSH_ASSIGN_OR_RETURN(spec.source_path, resolve.model(job.source_model()));
  if (!calibration.uri().empty()) {
    WALSH_ASSIGN_OR_RETURN(spec.calibration_path, resolve.text(calibration.uri()));
    spec.calibration_name = calibration.uri();
  }
  if (!evaluation.uri().empty()) {
    WALSH_ASSIGN_OR_RETURN(spec.evaluation_path, resolve.text(evaluation.uri()));
    spec.evaluation_name = evaluation.uri();
  }
  WALSH_ASSIGN_OR_RETURN(spec.tasks,
                         ToTaskSpecs("config.evaluation.tasks", evaluation.tasks(), resolve.text));
  return spec;
}

absl::StatusOr<pipeline::QualityGate> ToQualityGate(const QuantizationConfig& config) {
  WALSH_RETURN_IF_ERROR(ValidateQualityGate(config));
  pipeline::QualityGate gate;
  const v1::QualityGate& asked = config.quality_gate();
  if (asked.has_max_perplexity_ratio()) gate.max_perplexity_ratio = asked.max_perplexity_ratio();
  if (asked.has_max_kl_divergence()) gate.max_kl_divergence = asked.max_kl_divergence();
  return gate;
}

QuantizationJob::Stage ToProto(pipeline::Stage stage) {
  switch (stage) {
    case pipeline::Stage::kFetching:
      return QuantizationJob::FETCHING;
    case pipeline::Stage::kValidating:
      return QuantizationJob::VALIDATING;
    case pipeline::Stage::kLoading:
      return QuantizationJob::LOADING;
    case pipeline::Stage::kRotating:
      return QuantizationJob::ROTATING;
    case pipeline::Stage::kCalibrating:
      return QuantizationJob::CALIBRATING;
    case pipeline::Stage::kQuantizing:
      return QuantizationJob::QUANTIZING;
    case pipeline::Stage::kPacking:
      return QuantizationJob::PACKING;
    case pipeline::Stage::kEvaluating:
      return QuantizationJob::EVALUATING;
    case pipeline::Stage::kPublishing:
      return QuantizationJob::PUBLISHING;
  }
  return QuantizationJob::STAGE_UNSPECIFIED;
}

QuantizationJob::LinearResult ToProto(const pipeline::LinearReport& linear) {
  QuantizationJob::LinearResult proto;
  proto.set_name(linear.name);
  proto.set_layer(static_cast<int32_t>(linear.layer));
  proto.set_bits(linear.bits);
  proto.set_relative_error(linear.relative_error);
  proto.set_damp_percent(linear.damp);
  proto.set_dead_columns(static_cast<int32_t>(linear.dead_columns));
  proto.set_fallback(linear.fallback);
  return proto;
}

v1::QuantizationJobEvent ToEvent(const pipeline::JobProgress& progress) {
  v1::QuantizationJobEvent event;
  event.set_state(QuantizationJob::RUNNING);
  event.set_stage(ToProto(progress.stage));
  event.set_layer(static_cast<int32_t>(progress.layer));
  event.set_message(progress.message);
  QuantizationJob::Progress& proto = *event.mutable_progress();
  proto.set_layers_done(static_cast<int32_t>(progress.layers_done));
  proto.set_layers_total(static_cast<int32_t>(progress.layers_total));
  proto.set_fraction(progress.fraction);
  if (progress.eta_seconds >= 0)
    *proto.mutable_eta() = ToProto(absl::Seconds(progress.eta_seconds));
  for (const pipeline::LinearReport& linear : progress.linears) {
    *event.add_linears() = ToProto(linear);
  }
  return event;
}

QuantizationJob::Result ToResult(const pipeline::JobReport& report, const std::string& model_id) {
  QuantizationJob::Result result;
  result.set_artifact_uri(ModelName(model_id));
  result.set_sha256(report.artifact.sha256);
  result.set_size_bytes(report.artifact.size_bytes);
  result.set_source_size_bytes(report.source_size_bytes);
  result.set_source_format(report.source_format);
  result.set_linear_bytes_before(report.linear_bytes_before);
  result.set_linear_bytes_after(report.linear_bytes_after);
  result.set_bits_per_weight(report.bits_per_weight);
  result.set_perplexity_before(report.perplexity_before);
  result.set_perplexity_after(report.perplexity_after);
  if (report.kl_divergence >= 0) result.set_kl_divergence(report.kl_divergence);
  if (report.top1_agreement >= 0) result.set_top1_agreement(report.top1_agreement);
  if (const auto errors = pipeline::StandardErrors(report); errors.has_value()) {
    result.set_perplexity_before_stderr(errors->perplexity_before);
    result.set_perplexity_after_stderr(errors->perplexity_after);
    result.set_perplexity_ratio_stderr(errors->perplexity_ratio);
    if (errors->kl_divergence.has_value()) {
      result.set_kl_divergence_stderr(*errors->kl_divergence);
    }
  }
  result.set_evaluation_tokens(report.evaluation_tokens);
  for (const pipeline::TaskQuality& task : report.tasks) {
    QuantizationJob::TaskQuality& quality = *result.add_tasks();
    *quality.mutable_before() = ToProto(task.before);
    *quality.mutable_after() = ToProto(task.after);
  }
  result.set_rotation_gate(report.rotation_gate);
  for (int stage = 0; stage < pipeline::kStages; ++stage) {
    if (report.stage_seconds[stage] <= 0) continue;
    QuantizationJob::StageTime& time = *result.add_stage_times();
    time.set_stage(ToProto(static_cast<pipeline::Stage>(stage)));
    time.set_seconds(report.stage_seconds[stage]);
  }
  for (const pipeline::StepTime& step : report.steps) {
    QuantizationJob::StepTime& time = *result.add_step_times();
    time.set_name(step.name);
    time.set_seconds(step.seconds);
  }
  for (const pipeline::LinearReport& linear : report.linears) {
    *result.add_per_layer() = ToProto(linear);
  }
  QuantizationJob::CalibrationReport& calibration = *result.mutable_calibration();
  calibration.set_samples_kept(report.samples_kept);
  calibration.set_samples_dropped(report.samples_dropped);
  calibration.set_samples_short(report.samples_short);
  calibration.set_windows(report.calibration_windows);
  calibration.set_tokens(report.calibration_tokens);
  calibration.set_fingerprint(report.calibration_fingerprint);
  result.set_group_size(static_cast<int32_t>(report.group_size));
  result.set_rotation_block_size(static_cast<int32_t>(report.rotation_block));
  result.set_online_block_size(static_cast<int32_t>(report.online_block));
  result.set_peak_memory_bytes(report.peak_memory_bytes);
  result.set_peak_device_memory_bytes(report.peak_device_memory_bytes);
  for (const std::string& warning : report.warnings) result.add_warnings(warning);
  return result;
}

internal::v1::ValidateJobResponse ToResponse(const pipeline::JobPlan& plan) {
  internal::v1::ValidateJobResponse response;
  response.set_architecture(plan.architecture);
  response.set_layers(static_cast<int32_t>(plan.layers));
  response.set_group_size(static_cast<int32_t>(plan.group_size));
  response.set_rotation_block_size(static_cast<int32_t>(plan.rotation_block));
  response.set_online_block_size(static_cast<int32_t>(plan.online_block));
  response.set_memory_bytes_needed(plan.memory_bytes_needed);
  response.set_device_memory_bytes_needed(plan.device_memory_bytes_needed);
  response.set_disk_bytes_needed(plan.disk_bytes_needed);
  for (const std::string& warning : plan.warnings) response.add_warnings(warning);
  return response;
}

}  // namespace walsh::service
