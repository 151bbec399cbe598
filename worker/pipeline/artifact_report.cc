#include "worker/pipeline/artifact_report.h"

#include <string>
#include <utility>

#include "common/utf8.h"
#include "common/version.h"
#include "worker/io/artifact.h"

namespace walsh::pipeline {
namespace {

using nlohmann::json;

const char* MethodName(gptq::Method method) {
  return method == gptq::Method::kRtn ? "rtn" : "gptq";
}

const char* OrderName(gptq::ColumnOrder order) {
  return order == gptq::ColumnOrder::kNatural ? "natural" : "group-aware";
}

json Linears(const JobReport& report) {
  json linears = json::array();
  for (const LinearReport& linear : report.linears) {
    json entry = {{"name", linear.name},
                  {"bits", linear.bits},
                  {"relative_error", linear.relative_error},
                  {"damp", linear.damp},
                  {"dead_columns", linear.dead_columns}};
    if (!linear.fallback.empty()) entry["fallback"] = linear.fallback;
    linears.push_back(std::move(entry));
  }
  return linears;
}

}  // namespace

json QuantizationConfig(const JobSpec& spec, const ResolvedJob& job) {
  return {
      {"quant_method", "gptq"},
      {"checkpoint_format", "gptq_v2"},
      {"bits", job.quantizer.bits},
      {"group_size", job.group_size},
      {"sym", job.quantizer.symmetric},
      // Columns are stored in their natural order whatever order they were quantized in.
      {"desc_act", false},
      {"static_groups", false},
      {"true_sequential", true},
      {"damp_percent", job.quantizer.damp},
      {"pack_dtype", "int32"},
      {"lm_head", false},
      {"meta",
       {{"quantizer", json::array({"walsh:" + std::string(Version())})},
        {"method", MethodName(job.quantizer.method)},
        {"rotation", std::string(rotate::KindName(spec.rotation))},
        {"rotation_block", job.rotation_block}}},
  };
}

json ArtifactReport(const ReportInputs& inputs, const JobReport& report) {
  const JobSpec& spec = inputs.spec;
  const ResolvedJob& job = inputs.job;
  const calibrate::TokenWindows& windows = inputs.texts.calibration;
  return {
      {"walsh_version", std::string(Version())},
      {"source",
       {{"format", inputs.checkpoint.format()},
        {"architecture", inputs.checkpoint.config().architecture},
        {"sha256", inputs.source_sha256},
        {"size_bytes", inputs.checkpoint.size_bytes()},
        {"license", ReplaceInvalidUtf8(inputs.checkpoint.license())}}},
      {"quantization",
       {{"method", MethodName(job.quantizer.method)},
        {"bits", job.quantizer.bits},
        {"group_size", job.group_size},
        {"symmetric", job.quantizer.symmetric},
        {"column_order", OrderName(job.quantizer.column_order)},
        {"damp", job.quantizer.damp},
        {"mse_clip", job.quantizer.mse_clip},
        {"error_propagation",
         gptq::PropagatesError(job.quantizer) ? job.quantizer.error_propagation : 0.0},
        {"bits_per_weight", report.bits_per_weight}}},
      {"rotation",
       {{"kind", std::string(rotate::KindName(spec.rotation))},
        {"block", job.rotation_block},
        {"signs", spec.rotation_signs ? "seeded" : "none"},
        {"head", job.r2.is_identity() ? "none" : "walsh"},
        {"gate", report.rotation_gate}}},
      {"seed", spec.seed},
      {"calibration",
       {{"text", spec.calibration_path.empty() ? "self" : "file"},
        {"windows", windows.count()},
        {"sequence_length", windows.length},
        {"tokens", windows.count() * windows.length},
        {"fingerprint", report.calibration_fingerprint},
        {"samples_kept", report.samples_kept},
        {"samples_dropped", report.samples_dropped},
        {"samples_short", report.samples_short}}},
      {"quality", json::object()},
      {"linears", Linears(report)},
      {"warnings", report.warnings},
  };
}

json QualityReport(const JobTexts& texts, const JobReport& report) {
  json quality = {
      {"perplexity_before", report.perplexity_before},
      {"perplexity_after", report.perplexity_after},
      {"text", "windows without overlap, first token of each not predicted"},
      {"window_length", texts.evaluation.length},
      {"tokens", report.evaluation_tokens},
      {"fingerprint", calibrate::Fingerprint(texts.evaluation)},
      {"window_losses_before", report.window_losses_before},
      {"window_losses_after", report.window_losses_after},
  };
  if (report.kl_divergence >= 0) quality["kl_divergence"] = report.kl_divergence;
  if (report.top1_agreement >= 0) quality["top1_agreement"] = report.top1_agreement;
  return quality;
}

}  // namespace walsh::pipeline
