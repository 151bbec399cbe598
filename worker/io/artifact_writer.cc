#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/io/artifact.h"
#include "worker/io/artifact_config.h"
#include "worker/io/artifact_manifest.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/hf_directory.h"
#include "worker/io/not_finite.h"
#include "worker/io/random_access_file.h"
#include "worker/io/safetensors.h"
#include "worker/io/sharded_safetensors_writer.h"
#include "worker/io/tokenizer_json_writer.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr char kConfigFile[] = "config.json";
// Of the tensor that every quantized linear has.
constexpr char kCodesSuffix[] = ".qweight";

std::string WithoutSuffix(const std::string& name, const std::string& suffix) {
  const bool has_suffix = name.size() > suffix.size() &&
                          name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
  return has_suffix ? name.substr(0, name.size() - suffix.size()) : name;
}

absl::Status NotFiniteInBf16(const std::string& tensor, float value, int64_t element) {
  return absl::DataLossError(absl::StrCat("tensor '", tensor, "' is ", value, " at element ",
                                          element, ", must be finite in BF16"));
}

// Large floats round to infinity in BF16.
absl::Status CheckFiniteInBf16(const std::string& tensor, const Matrix& matrix) {
  for (int64_t i = 0; i < matrix.size(); ++i) {
    const float value = matrix.data()[i];
    if (!std::isfinite(Bf16ToFloat(FloatToBf16(value)))) return NotFiniteInBf16(tensor, value, i);
  }
  return absl::OkStatus();
}

// Room for the header of any shard.
int64_t HeaderBytes(ModelConfig model) {
  model.tied_embeddings = false;
  int64_t bytes = 256;
  for (const ExpectedTensor& tensor : ExpectedTensors(model)) {
    // A linear becomes four tensors, with about so much in the header for each.
    constexpr int64_t kEntryBytes = 200;
    bytes += 4 * (static_cast<int64_t>(tensor.name.size()) + kEntryBytes);
  }
  return bytes;
}

absl::Status CheckPacked(const PackedTensors& linear, const GptqShape& shape) {
  WALSH_RETURN_IF_ERROR(ValidateGptqShape(shape));
  const auto check_size = [](const char* tensor, size_t size, int64_t rows, int64_t cols) {
    if (static_cast<int64_t>(size) == rows * cols) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(tensor, " has ", size, " values, its shape [",
                                                   rows, ", ", cols, "] ", rows * cols));
  };
  WALSH_RETURN_IF_ERROR(
      check_size("qweight", linear.qweight.size(), shape.weight_words(), shape.rows));
  WALSH_RETURN_IF_ERROR(
      check_size("qzeros", linear.qzeros.size(), shape.groups(), shape.zero_words()));
  WALSH_RETURN_IF_ERROR(check_size("scales", linear.scales.size(), shape.groups(), shape.rows));
  return CheckScales(linear.scales, shape);
}

class Writer final : public ArtifactWriter {
 public:
  Writer(std::string directory, ModelConfig model, json config, SideFiles side_files,
         int64_t shard_bytes_max)
      : directory_(std::move(directory)),
        model_(std::move(model)),
        config_(std::move(config)),
        side_files_(std::move(side_files)),
        weights_(directory_, HeaderBytes(model_), shard_bytes_max) {
    // The head is written on its own, whether or not the source ties it.
    model_.tied_embeddings = false;
    for (const ExpectedTensor& tensor : ExpectedTensors(model_)) {
      if (tensor.is_norm && model_.norm_offset != 0) offset_norms_.insert(tensor.name);
    }
  }

  absl::Status WriteQuantized(std::string_view name, const QuantizedMatrix& matrix) override {
    return WriteTensors(std::string(name), matrix, PackGptq(matrix));
  }

  absl::Status WriteOrdered(std::string_view name, const OrderedMatrix& ordered) override {
    return WriteTensors(std::string(name), ordered.matrix, PackGptq(ordered));
  }

  absl::Status WritePacked(std::string_view name, const PackedTensors& packed) override {
    const std::string linear(name);
    const GptqShape shape = {.rows = packed.rows,
                             .cols = packed.cols,
                             .bits = packed.bits,
                             .group_size = packed.group_size};
    if (const absl::Status status = CheckPacked(packed, shape); !status.ok()) {
      return Named(linear, status);
    }
    return WriteLinear(linear, shape, GroupIndex(shape), packed.qweight, packed.qzeros,
                       packed.scales);
  }

  absl::Status WriteDense(std::string_view name, const Matrix& matrix,
                          bool one_dimensional) override {
    const std::string tensor(name);
    if (!offset_norms_.contains(tensor)) return WriteAsItIs(tensor, matrix, one_dimensional);
    Matrix stored = matrix.Copy();
    for (float& value : stored.span()) value -= model_.norm_offset;
    return WriteAsItIs(tensor, stored, one_dimensional);
  }

  absl::Status WriteBf16(std::string_view name, const Bf16Matrix& matrix,
                         bool one_dimensional) override {
    const std::string tensor(name);
    if (offset_norms_.contains(tensor)) {
      return absl::UnimplementedError(absl::StrCat("tensor '", tensor, "' is stored less ",
                                                   model_.norm_offset,
                                                   ": it is written from floats only"));
    }
    if (matrix.rows < 0 || matrix.cols < 0 ||
        static_cast<int64_t>(matrix.values.size()) != matrix.rows * matrix.cols) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor '", tensor, "' has ", matrix.values.size(), " values, its shape [",
                       matrix.rows, ", ", matrix.cols, "] ", matrix.rows * matrix.cols));
    }
    if (const std::optional<int64_t> bad = FirstNotFiniteBf16(matrix.values); bad.has_value()) {
      return NotFiniteInBf16(tensor, Bf16ToFloat(matrix.values[static_cast<size_t>(*bad)]), *bad);
    }
    WALSH_RETURN_IF_ERROR(BeginDense(tensor, matrix.rows, matrix.cols, one_dimensional));
    WALSH_RETURN_IF_ERROR(weights_.Append(std::as_bytes(std::span(matrix.values))));
    dense_.insert(tensor);
    return absl::OkStatus();
  }

  void Record(RecordedTensors* recording) override { weights_.Record(recording); }

  absl::Status WriteRecorded(const RecordedTensors& recorded) override {
    std::span<const char> rest(recorded.bytes);
    for (const RecordedTensors::Entry& entry : recorded.entries) {
      int64_t n_bytes = SafetensorsDtypeBytes(entry.dtype);
      for (const int64_t dim : entry.shape) n_bytes *= dim;
      if (n_bytes < 0 || n_bytes > static_cast<int64_t>(rest.size())) {
        return absl::InvalidArgumentError(absl::StrCat("the recording has ", rest.size(),
                                                       " bytes left for tensor '", entry.name,
                                                       "' of ", n_bytes));
      }
      const auto bytes = rest.first(static_cast<size_t>(n_bytes));
      WALSH_RETURN_IF_ERROR(
          weights_.Write(entry.name, entry.dtype.c_str(), entry.shape, std::as_bytes(bytes)));
      rest = rest.subspan(bytes.size());
      // One of a linear's tensors stands for all.
      if (entry.name.ends_with(kCodesSuffix)) {
        quantized_.insert(WithoutSuffix(entry.name, kCodesSuffix));
      } else {
        dense_.insert(entry.name);
      }
    }
    if (rest.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("the recording has ", rest.size(), " bytes beyond its tensors"));
  }

  absl::StatusOr<ArtifactInfo> Finish(const json& quantization_config, json report, int n_threads,
                                      const KeepGoing& keep_going) override {
    WALSH_RETURN_IF_ERROR(weights_.failure());
    WALSH_RETURN_IF_ERROR(CheckComplete());
    WALSH_ASSIGN_OR_RETURN(files_, weights_.Finish());
    config_["quantization_config"] = quantization_config;
    side_files_[kConfigFile] = config_.dump(2) + "\n";
    for (const auto& [name, text] : side_files_) WALSH_RETURN_IF_ERROR(WriteSmall(name, text));
    WALSH_ASSIGN_OR_RETURN(const auto digests,
                           DigestFiles(directory_, files_, n_threads, keep_going));
    WALSH_ASSIGN_OR_RETURN(const std::string manifest, ManifestText(std::move(report), digests));
    WALSH_RETURN_IF_ERROR(WriteSmall(kManifestFile, manifest));
    return ArtifactReader::ReadInfo(directory_);
  }

  int64_t bytes_written() const override { return weights_.bytes_written() + small_bytes_written_; }

 private:
  static absl::Status Named(const std::string& name, const absl::Status& status) {
    return absl::Status(status.code(),
                        absl::StrCat("linear '", name, "': ", std::string(status.message())));
  }

  absl::Status WriteTensors(const std::string& linear, const QuantizedMatrix& matrix,
                            const absl::StatusOr<GptqTensors>& packed) {
    if (!packed.ok()) return Named(linear, packed.status());
    const GptqShape shape = ShapeOf(matrix);
    if (shape.grid == StoredGrid::kGptq) {
      return WriteLinear(linear, shape, packed->g_idx, packed->qweight, packed->qzeros,
                         packed->scales);
    }
    WALSH_RETURN_IF_ERROR(WriteCodes(linear, shape, packed->g_idx, packed->qweight));
    if (shape.grid == StoredGrid::kCodebook) {
      WALSH_RETURN_IF_ERROR(weights_.Write(linear + ".levels", "F16",
                                           {shape.groups(), shape.rows, int64_t{1} << shape.bits},
                                           std::as_bytes(std::span(packed->levels))));
    } else {
      WALSH_RETURN_IF_ERROR(weights_.Write(linear + ".zeros", "F16", {shape.groups(), shape.rows},
                                           std::as_bytes(std::span(packed->zeros))));
      WALSH_RETURN_IF_ERROR(weights_.Write(linear + ".scales", "F16", {shape.groups(), shape.rows},
                                           std::as_bytes(std::span(packed->scales))));
    }
    quantized_.insert(linear);
    return absl::OkStatus();
  }

  absl::Status WriteLinear(const std::string& linear, const GptqShape& shape,
                           std::span<const int32_t> g_idx, std::span<const uint32_t> qweight,
                           std::span<const uint32_t> qzeros, std::span<const uint16_t> scales) {
    WALSH_RETURN_IF_ERROR(WriteCodes(linear, shape, g_idx, qweight));
    WALSH_RETURN_IF_ERROR(weights_.Write(
        linear + ".qzeros", "I32", {shape.groups(), shape.zero_words()}, std::as_bytes(qzeros)));
    WALSH_RETURN_IF_ERROR(weights_.Write(linear + ".scales", "F16", {shape.groups(), shape.rows},
                                         std::as_bytes(scales)));
    quantized_.insert(linear);
    return absl::OkStatus();
  }

  absl::Status WriteCodes(const std::string& linear, const GptqShape& shape,
                          std::span<const int32_t> g_idx, std::span<const uint32_t> qweight) {
    WALSH_RETURN_IF_ERROR(
        weights_.Write(linear + ".g_idx", "I32", {shape.cols}, std::as_bytes(g_idx)));
    return weights_.Write(linear + kCodesSuffix, "I32", {shape.weight_words(), shape.rows},
                          std::as_bytes(qweight));
  }

  absl::Status WriteAsItIs(const std::string& tensor, const Matrix& matrix, bool one_dimensional) {
    WALSH_RETURN_IF_ERROR(CheckFiniteInBf16(tensor, matrix));
    WALSH_RETURN_IF_ERROR(BeginDense(tensor, matrix.rows(), matrix.cols(), one_dimensional));
    constexpr int64_t kPiece = 1 << 20;  // elements
    std::vector<uint16_t> piece;
    for (int64_t first = 0; first < matrix.size(); first += kPiece) {
      const int64_t n = std::min(kPiece, matrix.size() - first);
      piece.resize(static_cast<size_t>(n));
      std::transform(matrix.data() + first, matrix.data() + first + n, piece.begin(), FloatToBf16);
      WALSH_RETURN_IF_ERROR(weights_.Append(std::as_bytes(std::span(piece))));
    }
    dense_.insert(tensor);
    return absl::OkStatus();
  }

  // The values follow through Append.
  absl::Status BeginDense(const std::string& tensor, int64_t rows, int64_t cols,
                          bool one_dimensional) {
    const std::vector<int64_t> shape = one_dimensional && rows == 1
                                           ? std::vector<int64_t>{cols}
                                           : std::vector<int64_t>{rows, cols};
    return weights_.Begin(tensor, "BF16", shape,
                          rows * cols * static_cast<int64_t>(sizeof(uint16_t)));
  }

  absl::Status WriteSmall(const std::string& name, const std::string& text) {
    WALSH_RETURN_IF_ERROR(PublishFile(absl::StrCat(directory_, "/", name), text));
    small_bytes_written_ += static_cast<int64_t>(text.size());
    files_.push_back(name);
    return absl::OkStatus();
  }

  absl::Status CheckComplete() const {
    for (const ExpectedTensor& tensor : ExpectedTensors(model_)) {
      if (dense_.contains(tensor.name)) continue;
      if (quantized_.contains(WithoutSuffix(tensor.name, ".weight"))) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("tensor '", tensor.name, "' was not written"));
    }
    return absl::OkStatus();
  }

  const std::string directory_;
  ModelConfig model_;
  json config_;
  SideFiles side_files_;
  ShardedSafetensorsWriter weights_;
  std::vector<std::string> files_;  // that walsh.json lists
  std::set<std::string> quantized_;
  std::set<std::string> dense_;
  std::set<std::string> offset_norms_;  // stored less the model's norm_offset
  int64_t small_bytes_written_ = 0;
};

// The source's own files, or tokenizer files made from a GGUF vocabulary.
absl::StatusOr<SideFiles> SideFilesOf(const Checkpoint& source) {
  SideFiles files = source.side_files();
  if (!source.tokenizer().gguf.has_value()) return files;
  WALSH_ASSIGN_OR_RETURN(
      TokenizerFiles tokenizer,
      MakeTokenizerFiles(*source.tokenizer().gguf, source.tokenizer().chat_template,
                         source.config().max_position));
  files["tokenizer.json"] = std::move(tokenizer.tokenizer_json);
  files["tokenizer_config.json"] = std::move(tokenizer.tokenizer_config_json);
  return files;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ArtifactWriter>> ArtifactWriter::Create(const std::string& directory,
                                                                       const Checkpoint& source,
                                                                       int64_t shard_bytes_max) {
  WALSH_ASSIGN_OR_RETURN(json config, ArtifactConfig(source));
  WALSH_ASSIGN_OR_RETURN(SideFiles side_files, SideFilesOf(source));
  if (mkdir(directory.c_str(), 0755) != 0) {
    if (errno == EEXIST) {
      return absl::AlreadyExistsError(
          absl::StrCat("the directory '", BaseName(directory), "' exists already"));
    }
    return ErrnoStatus(errno, "creating the artifact's directory");
  }
  return std::make_unique<Writer>(directory, source.config(), std::move(config),
                                  std::move(side_files), shard_bytes_max);
}

absl::Status ReplaceReportMember(const std::string& directory, std::string_view member,
                                 const json& value) {
  WALSH_ASSIGN_OR_RETURN(Manifest manifest, ReadManifest(directory));
  manifest.report[std::string(member)] = value;
  WALSH_ASSIGN_OR_RETURN(const std::string text,
                         ManifestText(std::move(manifest.report), manifest.files));
  return PublishFile(absl::StrCat(directory, "/", kManifestFile), text);
}

}  // namespace walsh
