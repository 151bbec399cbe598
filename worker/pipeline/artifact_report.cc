#include "worker/pipeline/artifact_report.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/utf8.h"
#include "common/version.h"
#include "worker/io/artifact.h"
#include "worker/io/artifact_config.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/quality_errors.h"

namespace walsh::pipeline {
namespace {

using nlohmann::json;

const char* MethodName(gptq::Method method) {
  switch (method) {
    case gptq::Method::kRtn:
      return "rtn";
    case gptq::Method::kGptq:
      return "gptq";
    case gptq::Method::kGptaq:
      return "gptaq";
  }
  return "";
}

const char* OrderName(gptq::ColumnOrder order) {
  switch (order) {
    case gptq::ColumnOrder::kNatural:
      return "natural";
    case gptq::ColumnOrder::kGroupAware:
      return "group-aware";
    case gptq::ColumnOrder::kActOrder:
      return "act-order";
  }
  return "";
}

// Of a grid that the gptq_v2 convention has no tensors for; null for others.
const char* OwnGrid(const gptq::Options& options) {
  if (options.grid == gptq::Grid::kCodebook) return "codebook";
  if (options.zero_point == gptq::ZeroPoint::kFloat) return "float-zero";
  return nullptr;
}

json Overrides(const JobSpec& spec) {
  json overrides = json::array();
  for (const BitsOverride& entry : spec.overrides) {
    overrides.push_back({{"pattern", entry.pattern}, {"bits", entry.bits}});
  }
  return overrides;
}

// Whether columns have an order and a damping at all.
bool HasHessian(const gptq::Options& options) { return options.method != gptq::Method::kRtn; }

// Whether some linear has a uniform grid, with a clip and zero points.
bool HasUniformGrid(const ResolvedJob& job) {
  return job.quantizer.grid == gptq::Grid::kUniform || !job.bits.empty();
}

// The options as they acted; those that do nothing in such a job are null.
json Quantization(const JobSpec& spec, const ResolvedJob& job, const JobReport& report) {
  const gptq::Options& quantizer = job.quantizer;
  json out = {
      {"method", MethodName(quantizer.method)},
      {"bits", quantizer.bits},
      {"overrides", Overrides(spec)},
      {"group_size", job.group_size},
      {"symmetric", quantizer.symmetric},
      {"grid", quantizer.grid == gptq::Grid::kCodebook ? "codebook" : "uniform"},
      {"zero_point", nullptr},
      {"column_order", nullptr},
      {"damp", nullptr},
      {"mse_clip", nullptr},
      {"error_propagation", gptq::PropagatesError(quantizer) ? quantizer.error_propagation : 0.0},
      {"gptaq_alpha", gptq::CorrectsAsymmetry(quantizer) ? quantizer.gptaq_alpha : 0.0},
      {"bits_per_weight", report.bits_per_weight}};
  if (HasHessian(quantizer)) {
    out["column_order"] = OrderName(quantizer.column_order);
    out["damp"] = quantizer.damp;
  }
  if (HasUniformGrid(job)) {
    out["mse_clip"] = quantizer.mse_clip;
    out["zero_point"] = quantizer.zero_point == gptq::ZeroPoint::kFloat ? "float" : "integer";
  }
  return out;
}

// What readers that fuse linears call them, beside the names of the parts.
struct FusedLinears {
  std::vector<std::string_view> parts;  // names of LinearShapes()
  const char* modules;                  // a regular expression of all their names
};
const std::vector<FusedLinears>& Fusions() {
  static const std::vector<FusedLinears> fusions = {
      {{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
       R"(self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj))"},
      {{"mlp.gate_proj", "mlp.up_proj"}, R"(mlp\.(?:gate_proj|up_proj|gate_up_proj))"}};
  return fusions;
}

// The linears of a layer whose bits are not the model's, as regular expressions of their names
// inside the layer: those that readers fuse together where they are of one kind.
std::vector<std::pair<std::string, int>> OtherBits(const std::vector<LinearShape>& shapes,
                                                   const std::vector<int>& bits, int model_bits) {
  std::map<std::string_view, int> left;
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (bits[i] != model_bits) left[shapes[i].name] = bits[i];
  }
  std::vector<std::pair<std::string, int>> modules;
  for (const FusedLinears& fusion : Fusions()) {
    const auto first = left.find(fusion.parts.front());
    if (first == left.end()) continue;
    const int common = first->second;
    const bool is_one = std::all_of(fusion.parts.begin(), fusion.parts.end(), [&](auto part) {
      const auto it = left.find(part);
      return it != left.end() && it->second == common;
    });
    if (!is_one) continue;
    modules.emplace_back(fusion.modules, common);
    for (std::string_view part : fusion.parts) left.erase(part);
  }
  for (const auto& [name, n] : left) {
    modules.emplace_back(absl::StrReplaceAll(std::string(name), {{".", "\\."}}), n);
  }
  return modules;
}

// Overrides as GPTQModel writes them: regular expressions of modules, none of which meets another,
// since readers take the first that matches and JSON members have no order.
json Dynamic(const ModelConfig& config, const ResolvedJob& job) {
  std::map<std::pair<std::string, int>, std::vector<int64_t>> layers;
  const std::vector<LinearShape> shapes = LinearShapes(config);
  for (size_t layer = 0; layer < job.bits.size(); ++layer) {
    for (auto& entry : OtherBits(shapes, job.bits[layer], job.quantizer.bits)) {
      layers[std::move(entry)].push_back(static_cast<int64_t>(layer));
    }
  }
  json dynamic = json::object();
  for (const auto& [entry, numbers] : layers) {
    const auto& [modules, bits] = entry;
    dynamic[absl::StrCat(R"(+:^model\.layers\.(?:)", absl::StrJoin(numbers, "|"), R"()\.)", modules,
                         "$")] = {{"bits", bits}};
  }
  return dynamic;
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

json TextQuality(const ResolvedJob& job, const JobTexts& texts, const JobReport& report) {
  const bool overlap = job.evaluation_stride < texts.evaluation.length;
  json quality = {
      {"perplexity_before", report.perplexity_before},
      {"perplexity_after", report.perplexity_after},
      {"text", overlap ? "overlapping windows, each token predicted once"
                       : "windows without overlap, first token of each not predicted"},
      {"window_length", texts.evaluation.length},
      {"stride", std::min(job.evaluation_stride, texts.evaluation.length)},
      {"tokens", report.evaluation_tokens},
      {"fingerprint", calibrate::Fingerprint(texts.evaluation)},
      {"window_losses_before", report.window_losses_before},
      {"window_losses_after", report.window_losses_after},
  };
  if (report.kl_divergence >= 0) quality["kl_divergence"] = report.kl_divergence;
  if (report.top1_agreement >= 0) quality["top1_agreement"] = report.top1_agreement;
  if (!report.window_divergences.empty()) {
    quality["window_divergences"] = report.window_divergences;
  }
  if (const std::optional<QualityErrors> errors = StandardErrors(report); errors.has_value()) {
    quality["perplexity_before_stderr"] = errors->perplexity_before;
    quality["perplexity_after_stderr"] = errors->perplexity_after;
    quality["perplexity_ratio_stderr"] = errors->perplexity_ratio;
    if (errors->kl_divergence.has_value()) quality["kl_divergence_stderr"] = *errors->kl_divergence;
  }
  return quality;
}

void AddEstimate(const char* name, const evaluate::Estimate& estimate, json& out) {
  out[name] = estimate.mean;
  out[absl::StrCat(name, "_stderr")] = estimate.standard_error;
}

json Score(const evaluate::TaskScore& score) {
  json out;
  AddEstimate("accuracy", score.accuracy, out);
  if (score.accuracy_norm.has_value()) AddEstimate("accuracy_norm", *score.accuracy_norm, out);
  if (score.perplexity.has_value()) AddEstimate("perplexity", *score.perplexity, out);
  return out;
}

}  // namespace

json QuantizationConfig(const JobSpec& spec, const ModelConfig& model, const ResolvedJob& job) {
  json config = {
      {"quant_method", "gptq"},
      {"checkpoint_format", kGptqFormat},
      {"bits", job.quantizer.bits},
      {"group_size", job.group_size},
      {"sym", job.quantizer.symmetric},
      // Columns are stored in their natural order whatever order they were quantized in.
      {"desc_act", false},
      {"static_groups", HasHessian(job.quantizer) && gptq::HasStaticGroups(job.quantizer)},
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
  // Nothing but walsh reads such grids. Without "bits", which every reader of GPTQ needs, others
  // stop here instead of making weights of what they do not know.
  const gptq::Options& quantizer = job.quantizer;
  if (const char* grid = OwnGrid(quantizer); grid != nullptr) {
    config["checkpoint_format"] = kWalshFormat;
    config.erase("bits");
    config["walsh"] = {{"grid", grid}, {"bits", quantizer.bits}};
  }
  if (json dynamic = Dynamic(model, job); !dynamic.empty()) config["dynamic"] = std::move(dynamic);
  if (!job.online.empty()) {
    // Programs that know plain GPTQ take neither a missing method nor an unknown format.
    config.erase("quant_method");
    config["checkpoint_format"] = kWalshFormat;
    config["online_transforms"] = OnlineTransformsJson(job.online);
  }
  return config;
}

json ArtifactReport(const ReportInputs& inputs, const JobReport& report) {
  const JobSpec& spec = inputs.spec;
  const ResolvedJob& job = inputs.job;
  const calibrate::TokenWindows& windows = inputs.texts.calibration;
  json document = {
      {"walsh_version", std::string(Version())},
      {"source",
       {{"format", inputs.checkpoint.format()},
        {"architecture", inputs.checkpoint.config().architecture},
        {"sha256", inputs.source_sha256},
        {"size_bytes", inputs.checkpoint.size_bytes()},
        {"license", ReplaceInvalidUtf8(inputs.checkpoint.license())}}},
      {"quantization", Quantization(spec, job, report)},
      {"rotation",
       {{"kind", std::string(rotate::KindName(spec.rotation))},
        {"block", job.rotation_block},
        {"signs", spec.rotation_signs && !job.r1.is_identity() ? "seeded" : "none"},
        {"head", job.r2.is_identity() ? "none" : "walsh"},
        {"gate", report.rotation_gate}}},
      {"online_transforms", OnlineTransformsJson(job.online)},
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
  if (!spec.preset.empty()) document["quantization"]["preset"] = spec.preset;
  return document;
}

json QualityReport(const ResolvedJob& job, const JobTexts& texts, const JobReport& report) {
  json quality = texts.evaluation.count() == 0 ? json::object() : TextQuality(job, texts, report);
  for (const TaskQuality& task : report.tasks) {
    quality["tasks"].push_back({{"name", task.after.name},
                                {"items", task.after.items},
                                {"tokens", task.after.score.tokens},
                                {"truncated_items", task.after.score.truncated_items},
                                {"before", Score(task.before.score)},
                                {"after", Score(task.after.score)}});
  }
  return quality;
}

}  // namespace walsh::pipeline
