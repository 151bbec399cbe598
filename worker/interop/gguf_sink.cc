// A GGUF file of architecture "llama", and the licence beside it.

#include <algorithm>
#include <cstddef>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/interop/encode_floats.h"
#include "worker/interop/gguf_blocks.h"
#include "worker/interop/gguf_vocabulary_writer.h"
#include "worker/interop/hf_sink.h"
#include "worker/interop/tensor_sink.h"
#include "worker/io/gguf_model.h"
#include "worker/io/gguf_writer.h"
#include "worker/tensor/half.h"

namespace walsh::interop {
namespace {

constexpr char kRopeFreqs[] = "rope_freqs.weight";
// llama.cpp's numbers for what most of a file's weights are.
constexpr uint32_t kMostlyQ4_0 = 2;
constexpr uint32_t kMostlyQ4_1 = 3;
constexpr uint32_t kMostlyQ8_0 = 7;
constexpr uint32_t kQuantizationVersion = 2;

using LinearTypes = std::map<std::string, StorageType>;  // by the linear's name

absl::Status CheckArchitecture(const ArtifactReader& artifact) {
  const ModelConfig& config = artifact.config();
  if (config.architecture != "LlamaForCausalLM" && config.architecture != "MistralForCausalLM") {
    return absl::UnimplementedError(
        absl::StrCat("models of architecture ", config.architecture,
                     " are not exported to GGUF; supported: LlamaForCausalLM, MistralForCausalLM"));
  }
  WALSH_ASSIGN_OR_RETURN(const nlohmann::json document, ConfigOfArtifact(artifact));
  const auto window = document.find("sliding_window");
  const bool slides =
      window != document.end() && window->is_number() && *window < config.max_position;
  if (!slides) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      "GGUF's architecture 'llama' has no sliding window; the model's is ", window->dump()));
}

// Every linear is looked at before anything is written.
absl::StatusOr<LinearTypes> Survey(const ArtifactReader& artifact) {
  LinearTypes types;
  for (const ExpectedTensor& tensor : ExpectedTensors(artifact.config())) {
    if (tensor.is_one_dimensional || !artifact.IsQuantized(LinearName(tensor.name))) continue;
    const std::string name = LinearName(tensor.name);
    WALSH_ASSIGN_OR_RETURN(const QuantizedMatrix matrix, artifact.ReadQuantized(name));
    const absl::StatusOr<StorageType> type = GgufTypeOf(matrix);
    if (!type.ok()) return OfLinear(name, type.status());
    types[name] = *type;
  }
  return types;
}

uint32_t FileType(const LinearTypes& types) {
  std::map<StorageType, int> counts;
  for (const auto& [name, type] : types) ++counts[type];
  const int n_q4_0 = counts[StorageType::kQ4_0];
  const int n_q4_1 = counts[StorageType::kQ4_1];
  if (counts[StorageType::kQ8_0] > n_q4_0 + n_q4_1) return kMostlyQ8_0;
  return n_q4_0 >= n_q4_1 ? kMostlyQ4_0 : kMostlyQ4_1;
}

GgufMetadata ModelMetadata(const ModelConfig& c, const std::string& name, uint32_t file_type) {
  GgufMetadata metadata;
  const auto set = [&](const char* key, int64_t value) {
    metadata.SetUint32(key, static_cast<uint32_t>(value));
  };
  metadata.SetString("general.architecture", "llama");
  metadata.SetString("general.name", name);
  metadata.SetUint32("general.file_type", file_type);
  metadata.SetUint32("general.quantization_version", kQuantizationVersion);
  set("llama.context_length", c.max_position);
  set("llama.embedding_length", c.hidden);
  set("llama.block_count", c.n_layers);
  set("llama.feed_forward_length", c.intermediate);
  set("llama.attention.head_count", c.n_heads);
  set("llama.attention.head_count_kv", c.n_kv_heads);
  set("llama.attention.key_length", c.head_dim);
  set("llama.attention.value_length", c.head_dim);
  set("llama.rope.dimension_count", c.head_dim);
  set("llama.vocab_size", c.vocab);
  metadata.SetFloat32("llama.attention.layer_norm_rms_epsilon", static_cast<float>(c.rms_norm_eps));
  metadata.SetFloat32("llama.rope.freq_base", static_cast<float>(c.rope_theta));
  if (c.rope_scaling.kind == RopeScaling::Kind::kLinear) {
    metadata.SetString("llama.rope.scaling.type", "linear");
    metadata.SetFloat32("llama.rope.scaling.factor", static_cast<float>(c.rope_scaling.factor));
  }
  return metadata;
}

// Stored row 2·i + j of a head is HF's row j·(head_dim/2) + i: RoPE pairs neighbours in these
// files.
std::vector<int64_t> InterleavedRows(int64_t rows, int64_t n_heads) {
  std::vector<int64_t> order(static_cast<size_t>(rows));
  const int64_t head_dim = rows / n_heads;
  for (int64_t stored = 0; stored < rows; ++stored) {
    const int64_t within = stored % head_dim;
    order[static_cast<size_t>(stored)] = stored - within + within % 2 * (head_dim / 2) + within / 2;
  }
  return order;
}

// In which order HF's rows of a tensor are stored.
std::vector<int64_t> StoredRows(const std::string& name, int64_t rows, const ModelConfig& config) {
  const auto is_of = [&](std::string_view linear) {
    return name.find(linear) != std::string::npos;
  };
  if (is_of(".self_attn.q_proj")) return InterleavedRows(rows, config.n_heads);
  if (is_of(".self_attn.k_proj")) return InterleavedRows(rows, config.n_kv_heads);
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

class GgufSink final : public TensorSink {
 public:
  GgufSink(const ArtifactReader& artifact, const ExportOptions& options, std::string directory,
           LinearTypes types, std::vector<std::string> warnings)
      : artifact_(artifact),
        dtype_(options.dtype),
        directory_(std::move(directory)),
        file_name_(options.model_name + ".gguf"),
        types_(std::move(types)),
        warnings_(std::move(warnings)) {}

  absl::Status Open(const GgufMetadata& metadata) {
    const ModelConfig& config = artifact_.config();
    std::vector<GgufTensorInfo> tensors;
    const bool has_divisors = config.rope_scaling.kind == RopeScaling::Kind::kLlama3;
    if (has_divisors) {
      tensors.push_back(
          {.name = kRopeFreqs, .dims = {config.head_dim / 2}, .type = StorageType::kF32});
    }
    for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
      WALSH_ASSIGN_OR_RETURN(std::string name, GgufTensorName(tensor.name));
      const auto linear = types_.find(LinearName(tensor.name));
      const bool is_linear = !tensor.is_one_dimensional && linear != types_.end();
      tensors.push_back({.name = std::move(name),
                         .dims = tensor.is_one_dimensional
                                     ? std::vector<int64_t>{tensor.cols}
                                     : std::vector<int64_t>{tensor.cols, tensor.rows},
                         .type = is_linear ? linear->second : DenseType(tensor)});
    }
    WALSH_ASSIGN_OR_RETURN(file_, GgufWriter::Create(absl::StrCat(directory_, "/", file_name_),
                                                     metadata, std::move(tensors)));
    if (!has_divisors) return absl::OkStatus();
    const std::vector<float> divisors =
        Llama3FrequencyDivisors(config.rope_scaling, config.head_dim, config.rope_theta);
    return file_->Append(std::as_bytes(std::span(divisors)));
  }

  absl::Status WriteLinear(const std::string& name, const QuantizedMatrix& matrix) override {
    std::vector<std::byte> bytes;
    for (const int64_t row : StoredRows(name, matrix.rows, artifact_.config())) {
      EncodeGgufRow(matrix, types_.at(name), row, bytes);
      WALSH_RETURN_IF_ERROR(file_->Append(bytes));
    }
    return absl::OkStatus();
  }

  absl::Status BeginDense(const ExpectedTensor& tensor) override {
    current_ = tensor;
    held_.clear();
    return absl::OkStatus();
  }

  // Rows that change places are held until the tensor is whole; embeddings and head are not.
  absl::Status AppendDense(std::span<const uint16_t> values) override {
    if (!ChangesRows()) return Append(values);
    held_.insert(held_.end(), values.begin(), values.end());
    if (static_cast<int64_t>(held_.size()) < current_.rows * current_.cols) {
      return absl::OkStatus();
    }
    const int64_t rows = current_.is_one_dimensional ? current_.cols : current_.rows;
    const auto cols = static_cast<int64_t>(held_.size()) / rows;
    for (const int64_t row : StoredRows(current_.name, rows, artifact_.config())) {
      WALSH_RETURN_IF_ERROR(Append(
          std::span(held_).subspan(static_cast<size_t>(row * cols), static_cast<size_t>(cols))));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<std::string>> Finish() override {
    WALSH_RETURN_IF_ERROR(file_->Finish());
    std::vector<std::string> files = {file_name_};
    for (const char* name : {"LICENSE", "LICENSE.txt"}) {
      const auto license = artifact_.side_files().find(name);
      if (license == artifact_.side_files().end()) continue;
      WALSH_RETURN_IF_ERROR(PublishFile(absl::StrCat(directory_, "/", name), license->second));
      files.emplace_back(name);
    }
    return files;
  }

  std::vector<std::string> warnings() const override { return warnings_; }

 private:
  // ggml adds and multiplies by vectors (norms, biases) in F32 only.
  StorageType DenseType(const ExpectedTensor& tensor) const {
    return tensor.is_one_dimensional ? StorageType::kF32 : dtype_;
  }

  bool ChangesRows() const {
    return current_.name.find(".self_attn.q_proj") != std::string::npos ||
           current_.name.find(".self_attn.k_proj") != std::string::npos;
  }

  absl::Status Append(std::span<const uint16_t> values) {
    std::vector<float> floats(values.size());
    std::transform(values.begin(), values.end(), floats.begin(), Bf16ToFloat);
    WALSH_ASSIGN_OR_RETURN(const std::vector<std::byte> bytes,
                           EncodeFloats(current_.name, DenseType(current_), floats));
    return file_->Append(bytes);
  }

  const ArtifactReader& artifact_;
  const StorageType dtype_;
  const std::string directory_;
  const std::string file_name_;
  const LinearTypes types_;
  const std::vector<std::string> warnings_;
  std::unique_ptr<GgufWriter> file_;
  ExpectedTensor current_;
  std::vector<uint16_t> held_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TensorSink>> MakeGgufSink(const ArtifactReader& artifact,
                                                         const ExportOptions& options,
                                                         const std::string& directory) {
  WALSH_RETURN_IF_ERROR(CheckArchitecture(artifact));
  const ModelConfig& config = artifact.config();
  WALSH_ASSIGN_OR_RETURN(WrittenVocabulary written,
                         MakeGgufVocabulary(artifact.tokenizer(), config));
  WALSH_ASSIGN_OR_RETURN(LinearTypes types, Survey(artifact));
  GgufMetadata metadata = ModelMetadata(config, options.model_name, FileType(types));
  AddVocabulary(written.vocabulary, config, artifact.tokenizer().chat_template, metadata);
  auto sink = std::make_unique<GgufSink>(artifact, options, directory, std::move(types),
                                         std::move(written.warnings));
  WALSH_RETURN_IF_ERROR(sink->Open(metadata));
  return sink;
}

}  // namespace walsh::interop
