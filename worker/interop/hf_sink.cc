#include "worker/interop/hf_sink.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/interop/encode_floats.h"
#include "worker/io/bounded_json.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/hf_directory.h"
#include "worker/tensor/half.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

constexpr char kConfigFile[] = "config.json";
constexpr char kQuantizationConfig[] = "quantization_config";

const char* TorchName(StorageType dtype) {
  switch (dtype) {
    case StorageType::kF16:
      return "float16";
    case StorageType::kF32:
      return "float32";
    default:
      return "bfloat16";
  }
}

bool IsLayerLinear(const ExpectedTensor& tensor) {
  return !tensor.is_one_dimensional && tensor.name.starts_with("model.layers.");
}

int64_t HeaderBytes(const ModelConfig& config) {
  int64_t bytes = 256;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    // A linear becomes four tensors at most, with about so much in the header for each.
    constexpr int64_t kEntryBytes = 200;
    bytes += 4 * (static_cast<int64_t>(tensor.name.size()) + kEntryBytes);
  }
  return bytes;
}

class DequantizedSink final : public HfSink {
 public:
  DequantizedSink(const ArtifactReader& artifact, json config_json, const ExportOptions& options,
                  std::string directory)
      : HfSink(artifact, std::move(config_json), options.dtype, options, std::move(directory)) {
    config().erase(kQuantizationConfig);
  }

  absl::Status WriteLinear(const std::string& name, const QuantizedMatrix& matrix) override {
    const std::string tensor = name + ".weight";
    WALSH_RETURN_IF_ERROR(BeginFloats(tensor, {matrix.rows, matrix.cols}));
    return AppendFloats(tensor, Dequantize(matrix).span());
  }
};

// A regular expression that matches this name and no other.
std::string ExactPattern(const std::string& name) {
  return absl::StrCat("^", absl::StrReplaceAll(name, {{".", "\\."}}), "$");
}

class GptqSink final : public HfSink {
 public:
  GptqSink(const ArtifactReader& artifact, json config_json, const ExportOptions& options,
           std::string directory, const std::vector<LinearForm>& linears)
      : HfSink(artifact, std::move(config_json), StorageType::kBf16, options, std::move(directory)),
        is_v1_(options.format == ExportFormat::kGptq),
        symmetric_(artifact.info().symmetric) {
    json& quantization = config()[kQuantizationConfig];
    quantization["checkpoint_format"] = std::string(FormatName(options.format));
    // A job's artifact names its exceptions already, by the names of fused linears too.
    const auto dynamic = quantization.find("dynamic");
    if (dynamic != quantization.end() && !dynamic->empty()) return;
    if (json exceptions = Exceptions(artifact, linears); !exceptions.empty()) {
      quantization["dynamic"] = std::move(exceptions);
    }
  }

  absl::Status WriteLinear(const std::string& name, const QuantizedMatrix& matrix) override {
    if (!is_v1_) return Write(name, matrix);
    QuantizedMatrix shifted = matrix;
    for (size_t i = 0; i < shifted.zeros.size(); ++i) {
      if (shifted.zeros[i] == 0) return ZeroOfV1(name, matrix, static_cast<int64_t>(i));
      --shifted.zeros[i];
    }
    return Write(name, shifted);
  }

  std::vector<std::string> warnings() const override {
    if (!is_v1_ || symmetric_) return {};
    return {
        "GPTQModel, and transformers through it, load an asymmetric model of format gptq only if "
        "GPTQModel wrote it; gptq_v2 has no such rule"};
  }

 private:
  // What a reader that knows one width for all linears must be told, as GPTQModel names it.
  static json Exceptions(const ArtifactReader& artifact, const std::vector<LinearForm>& linears) {
    json dynamic = json::object();
    const ArtifactInfo& info = artifact.info();
    for (const LinearForm& linear : linears) {
      const bool has_same_group =
          info.group_size < 0 ? linear.is_per_channel : linear.group_size == info.group_size;
      if (linear.bits == info.bits && has_same_group) continue;
      const int64_t group_size = linear.is_per_channel ? -1 : linear.group_size;
      dynamic["+:" + ExactPattern(linear.name)] = {{"bits", linear.bits},
                                                   {"group_size", group_size}};
    }
    for (const std::string& name : DenseLinears(artifact)) {
      dynamic["-:" + ExactPattern(name)] = json::object();
    }
    return dynamic;
  }

  static absl::Status ZeroOfV1(const std::string& name, const QuantizedMatrix& matrix,
                               int64_t index) {
    return absl::FailedPreconditionError(
        absl::StrCat("tensor '", name, ".qzeros' has a zero of 0 at output ",
                     index / matrix.groups(), ", group ", index % matrix.groups(),
                     ": format gptq stores zero - 1 and cannot hold it; gptq_v2 can"));
  }

  absl::Status Write(const std::string& name, const QuantizedMatrix& matrix) {
    const absl::StatusOr<GptqTensors> packed = PackGptq(matrix);
    if (!packed.ok()) return OfLinear(name, packed.status());
    const int64_t groups = matrix.groups();
    WALSH_RETURN_IF_ERROR(weights().Write(name + ".g_idx", "I32", {matrix.cols},
                                          std::as_bytes(std::span(packed->g_idx))));
    WALSH_RETURN_IF_ERROR(weights().Write(name + ".qweight", "I32",
                                          {matrix.cols / 32 * matrix.bits, matrix.rows},
                                          std::as_bytes(std::span(packed->qweight))));
    WALSH_RETURN_IF_ERROR(weights().Write(name + ".qzeros", "I32",
                                          {groups, matrix.rows / 32 * matrix.bits},
                                          std::as_bytes(std::span(packed->qzeros))));
    return weights().Write(name + ".scales", "F16", {groups, matrix.rows},
                           std::as_bytes(std::span(packed->scales)));
  }

  const bool is_v1_;
  const bool symmetric_;
};

}  // namespace

absl::Status OfLinear(const std::string& name, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("linear '", name, "': ", std::string(status.message())));
}

std::string LinearName(const std::string& weight) {
  constexpr std::string_view kSuffix = ".weight";
  return weight.substr(0, weight.size() - kSuffix.size());
}

absl::StatusOr<std::vector<LinearForm>> LinearForms(const ArtifactReader& artifact) {
  std::vector<LinearForm> linears;
  for (const ExpectedTensor& tensor : ExpectedTensors(artifact.config())) {
    if (tensor.is_one_dimensional || !artifact.IsQuantized(LinearName(tensor.name))) continue;
    const std::string name = LinearName(tensor.name);
    WALSH_ASSIGN_OR_RETURN(const GptqShape shape, artifact.ShapeOf(name));
    linears.push_back(
        {.name = name,
         .bits = shape.bits,
         .group_size = shape.group_size,
         .is_per_channel = artifact.info().group_size < 0 && shape.group_size == shape.cols});
  }
  return linears;
}

std::vector<std::string> DenseLinears(const ArtifactReader& artifact) {
  std::vector<std::string> names;
  for (const ExpectedTensor& tensor : ExpectedTensors(artifact.config())) {
    if (!IsLayerLinear(tensor) || artifact.IsQuantized(LinearName(tensor.name))) continue;
    names.push_back(LinearName(tensor.name));
  }
  return names;
}

absl::StatusOr<json> ConfigOfArtifact(const ArtifactReader& artifact) {
  return ParseBoundedJson(
      kConfigFile, artifact.side_files().at(kConfigFile),
      {.bytes_max = limits::kConfigFileBytesMax, .depth_max = limits::kJsonDepthMax});
}

HfSink::HfSink(const ArtifactReader& artifact, json config, StorageType dtype,
               const ExportOptions& options, std::string directory)
    : dtype_(dtype),
      directory_(std::move(directory)),
      side_files_(artifact.side_files()),
      config_(std::move(config)),
      weights_(directory_, HeaderBytes(artifact.config()), options.shard_bytes_max) {
  side_files_.erase(kConfigFile);
  side_files_.erase(kWeightsIndexFile);
  // transformers 5 calls it dtype.
  config_[config_.contains("dtype") ? "dtype" : "torch_dtype"] = TorchName(dtype_);
}

absl::Status HfSink::BeginFloats(const std::string& tensor, const std::vector<int64_t>& shape) {
  int64_t n_bytes = Info(dtype_).block_bytes;
  for (const int64_t dim : shape) n_bytes *= dim;
  return weights_.Begin(tensor, Info(dtype_).name.data(), shape, n_bytes);
}

absl::Status HfSink::AppendFloats(const std::string& tensor, std::span<const float> values) {
  constexpr size_t kPiece = size_t{1} << 20;
  std::vector<std::byte> piece;
  for (size_t first = 0; first < values.size(); first += kPiece) {
    WALSH_ASSIGN_OR_RETURN(
        piece, EncodeFloats(tensor, dtype_,
                            values.subspan(first, std::min(kPiece, values.size() - first))));
    WALSH_RETURN_IF_ERROR(weights_.Append(piece));
  }
  return absl::OkStatus();
}

absl::Status HfSink::BeginDense(const ExpectedTensor& tensor) {
  current_ = tensor.name;
  if (tensor.is_one_dimensional) return BeginFloats(tensor.name, {tensor.cols});
  return BeginFloats(tensor.name, {tensor.rows, tensor.cols});
}

absl::Status HfSink::AppendDense(std::span<const uint16_t> values) {
  if (dtype_ == StorageType::kBf16) return weights_.Append(std::as_bytes(values));
  std::vector<float> floats(values.size());
  std::transform(values.begin(), values.end(), floats.begin(), Bf16ToFloat);
  return AppendFloats(current_, floats);
}

absl::StatusOr<std::vector<std::string>> HfSink::Finish() {
  WALSH_ASSIGN_OR_RETURN(std::vector<std::string> files, weights_.Finish());
  side_files_[kConfigFile] = config_.dump(2) + "\n";
  for (const auto& [name, text] : side_files_) {
    WALSH_RETURN_IF_ERROR(PublishFile(absl::StrCat(directory_, "/", name), text));
    files.push_back(name);
  }
  return files;
}

absl::StatusOr<std::unique_ptr<TensorSink>> MakeDequantizedSink(const ArtifactReader& artifact,
                                                                const ExportOptions& options,
                                                                const std::string& directory) {
  WALSH_ASSIGN_OR_RETURN(json config, ConfigOfArtifact(artifact));
  return std::make_unique<DequantizedSink>(artifact, std::move(config), options, directory);
}

absl::StatusOr<std::unique_ptr<TensorSink>> MakeGptqSink(const ArtifactReader& artifact,
                                                         const ExportOptions& options,
                                                         const std::string& directory) {
  WALSH_ASSIGN_OR_RETURN(json config, ConfigOfArtifact(artifact));
  WALSH_ASSIGN_OR_RETURN(const std::vector<LinearForm> linears, LinearForms(artifact));
  return std::make_unique<GptqSink>(artifact, std::move(config), options, directory, linears);
}

}  // namespace walsh::interop
