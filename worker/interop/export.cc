#include "worker/interop/export.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "worker/interop/hf_sink.h"
#include "worker/interop/tensor_sink.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

// Of quantization_config: what every format can say, or what is for information. Any other member
// says something about the weights that an export would leave out.
constexpr std::array<std::string_view, 13> kKnownMembers = {"quant_method",
                                                            "checkpoint_format",
                                                            "bits",
                                                            "group_size",
                                                            "sym",
                                                            "desc_act",
                                                            "static_groups",
                                                            "damp_percent",
                                                            "pack_dtype",
                                                            "lm_head",
                                                            "true_sequential",
                                                            "meta",
                                                            "dynamic"};

bool IsEmpty(const json& value) {
  return value.is_null() || (value.is_structured() && value.empty());
}

absl::Status CheckDtype(const ExportOptions& options) {
  const bool has_choice =
      options.format == ExportFormat::kDequantized || options.format == ExportFormat::kGguf;
  if (has_choice || options.dtype == StorageType::kBf16) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("dtype ", std::string(Info(options.dtype).name), ": format ",
                   std::string(FormatName(options.format)),
                   " keeps what is not quantized in BF16; dequantized and gguf have a choice"));
}

absl::Status CheckQuantization(const ArtifactReader& artifact, const ExportOptions& options) {
  WALSH_ASSIGN_OR_RETURN(const json config, ConfigOfArtifact(artifact));
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || !quantization->is_object()) {
    return absl::InvalidArgumentError("config.json: field 'quantization_config' is missing");
  }
  for (const auto& [member, value] : quantization->items()) {
    // The grid of the weights, which are floats there.
    if (member == "walsh") {
      if (options.format == ExportFormat::kDequantized) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("quantization_config.walsh is ", value.dump().substr(0, 128),
                       ", which only the format dequantized can hold"));
    }
    if (member == "desc_act" && value == true) {
      return absl::UnimplementedError(
          "the model has its columns in act-order (quantization_config.desc_act), which is not "
          "exported");
    }
    const bool is_known =
        std::find(kKnownMembers.begin(), kKnownMembers.end(), member) != kKnownMembers.end();
    if (is_known || IsEmpty(value)) continue;
    if (member == "online_transforms") {
      return absl::FailedPreconditionError(absl::StrCat(
          "the model needs transforms at run time (quantization_config.online_transforms: ",
          value.dump().substr(0, 128), "), which no exported format can say"));
    }
    return absl::FailedPreconditionError(absl::StrCat("quantization_config.", member.substr(0, 64),
                                                      " is ", value.dump().substr(0, 128),
                                                      ", which no exported format can say"));
  }
  return absl::OkStatus();
}

// Embeddings and head are in floats in every format.
absl::Status CheckOuterTensors(const ArtifactReader& artifact) {
  for (const std::string_view tensor : {kEmbeddingTensor, kLmHeadTensor}) {
    const std::string name = LinearName(std::string(tensor));
    if (!artifact.IsQuantized(name)) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("'", name, "' is quantized, which is not exported"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<TensorSink>> MakeSink(const ArtifactReader& artifact,
                                                     const ExportOptions& options,
                                                     const std::string& directory) {
  switch (options.format) {
    case ExportFormat::kDequantized:
      return MakeDequantizedSink(artifact, options, directory);
    case ExportFormat::kGptqV2:
    case ExportFormat::kGptq:
      return MakeGptqSink(artifact, options, directory);
    case ExportFormat::kCompressedTensors:
      return MakeCompressedTensorsSink(artifact, options, directory);
    case ExportFormat::kGguf:
      return MakeGgufSink(artifact, options, directory);
  }
  return absl::InternalError("an export format without a sink");
}

absl::Status CopyDense(const ArtifactReader& artifact, const ExpectedTensor& tensor,
                       TensorSink& sink) {
  WALSH_RETURN_IF_ERROR(sink.BeginDense(tensor));
  constexpr int64_t kPieceValues = int64_t{4} << 20;
  const int64_t rows_each = std::max<int64_t>(1, kPieceValues / tensor.cols);
  std::vector<uint16_t> piece;
  for (int64_t first = 0; first < tensor.rows; first += rows_each) {
    const int64_t n = std::min(rows_each, tensor.rows - first);
    piece.resize(static_cast<size_t>(n * tensor.cols));
    WALSH_RETURN_IF_ERROR(artifact.ReadStoredBf16(tensor.name, first, n, piece));
    WALSH_RETURN_IF_ERROR(sink.AppendDense(piece));
  }
  return absl::OkStatus();
}

absl::Status CopyLinear(const ArtifactReader& artifact, const std::string& name, TensorSink& sink) {
  WALSH_ASSIGN_OR_RETURN(const QuantizedMatrix matrix, artifact.ReadQuantized(name));
  return sink.WriteLinear(name, matrix);
}

std::string ManifestText(const ArtifactReader& artifact, const ExportOptions& options) {
  const json manifest = {{"format", std::string(FormatName(options.format))},
                         {"dtype", std::string(Info(options.dtype).name)},
                         {"artifact_sha256", artifact.info().sha256},
                         {"walsh_version", std::string(Version())}};
  return manifest.dump(2) + "\n";
}

}  // namespace

std::string_view FormatName(ExportFormat format) {
  switch (format) {
    case ExportFormat::kDequantized:
      return "dequantized";
    case ExportFormat::kGptqV2:
      return "gptq_v2";
    case ExportFormat::kGptq:
      return "gptq";
    case ExportFormat::kCompressedTensors:
      return "compressed-tensors";
    case ExportFormat::kGguf:
      return "gguf";
  }
  return "";
}

absl::Status CheckExportable(const ArtifactReader& artifact, const ExportOptions& options) {
  WALSH_RETURN_IF_ERROR(CheckDtype(options));
  WALSH_RETURN_IF_ERROR(CheckQuantization(artifact, options));
  return CheckOuterTensors(artifact);
}

int64_t ExportBytesMax(const ModelConfig& config, const ExportOptions& options) {
  // Integers have at most 8 bits, scales and zeros at most a quarter of that again.
  const int64_t dense_bytes = Info(options.dtype).block_bytes;
  const bool is_all_dense = options.format == ExportFormat::kDequantized;
  constexpr int64_t kOtherFiles = int64_t{64} << 20;
  int64_t bytes = kOtherFiles;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    const bool is_linear = !tensor.is_one_dimensional && tensor.name.starts_with("model.layers.");
    bytes += tensor.rows * tensor.cols * (is_linear && !is_all_dense ? 5 : 4 * dense_bytes) / 4;
  }
  return bytes;
}

absl::StatusOr<ExportReport> ExportArtifact(const ArtifactReader& artifact,
                                            const ExportOptions& options,
                                            const std::string& directory,
                                            const ExportProgress& progress) {
  WALSH_RETURN_IF_ERROR(CheckExportable(artifact, options));
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<TensorSink> sink,
                         MakeSink(artifact, options, directory));
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(artifact.config());
  int64_t n_done = 0;
  for (const ExpectedTensor& tensor : tensors) {
    const bool is_quantized =
        !tensor.is_one_dimensional && artifact.IsQuantized(LinearName(tensor.name));
    WALSH_RETURN_IF_ERROR(is_quantized ? CopyLinear(artifact, LinearName(tensor.name), *sink)
                                       : CopyDense(artifact, tensor, *sink));
    WALSH_RETURN_IF_ERROR(progress(++n_done, static_cast<int64_t>(tensors.size())));
  }
  ExportReport report;
  WALSH_ASSIGN_OR_RETURN(report.files, sink->Finish());
  WALSH_RETURN_IF_ERROR(PublishFile(absl::StrCat(directory, "/", kExportManifestFile),
                                    ManifestText(artifact, options)));
  report.files.emplace_back(kExportManifestFile);
  std::sort(report.files.begin(), report.files.end());
  WALSH_ASSIGN_OR_RETURN(report.size_bytes, TreeBytes(directory));
  report.warnings = sink->warnings();
  return report;
}

}  // namespace walsh::interop
