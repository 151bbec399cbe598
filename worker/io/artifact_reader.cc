#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/artifact.h"
#include "worker/io/artifact_config.h"
#include "worker/io/artifact_manifest.h"
#include "worker/io/bounded_json.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/hf_directory.h"
#include "worker/io/not_finite.h"
#include "worker/io/random_access_file.h"
#include "worker/io/safetensors.h"
#include "worker/io/stored_tensor.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

using nlohmann::json;

struct LocatedEntry {
  size_t file_index = 0;
  SafetensorsEntry entry;
};
using Entries = std::map<std::string, LocatedEntry, std::less<>>;

std::string Describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

absl::StatusOr<const LocatedEntry*> Require(const Entries& entries, const std::string& name) {
  const auto it = entries.find(name);
  if (it != entries.end()) return &it->second;
  return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is missing"));
}

absl::Status RequireForm(const LocatedEntry& located, const char* dtype,
                         const std::vector<int64_t>& shape) {
  const SafetensorsEntry& entry = located.entry;
  if (entry.dtype == dtype && entry.shape == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensor '", entry.name, "' is ", entry.dtype, " ",
                                                 Describe(entry.shape), ", expected ", dtype, " ",
                                                 Describe(shape)));
}

absl::Status Named(std::string_view linear, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("linear '", std::string(linear),
                                                  "': ", std::string(status.message())));
}

// A quantized linear's tensors, whose shapes tell bits and groups. Null: its grid has none.
struct QuantizedLinear {
  GptqShape shape;
  const LocatedEntry* qweight = nullptr;
  const LocatedEntry* g_idx = nullptr;
  const LocatedEntry* qzeros = nullptr;
  const LocatedEntry* scales = nullptr;
  const LocatedEntry* zeros = nullptr;
  const LocatedEntry* levels = nullptr;
};

// What a linear has beside its codes tells its grid: the tensors of one grid, and no others.
absl::Status FindGrid(const Entries& entries, const std::string& name, QuantizedLinear& linear) {
  const auto refuse = [&](const char* other, const char* beside) {
    return absl::InvalidArgumentError(
        absl::StrCat("linear '", name, "' has ", other, " beside ", beside));
  };
  const bool has_zeros = entries.contains(name + ".zeros");
  if (has_zeros && entries.contains(name + ".qzeros")) return refuse("qzeros", "zeros");
  if (entries.contains(name + ".levels")) {
    for (const char* other : {"scales", "zeros", "qzeros"}) {
      if (entries.contains(absl::StrCat(name, ".", other))) return refuse(other, "levels");
    }
    linear.shape.grid = StoredGrid::kCodebook;
    WALSH_ASSIGN_OR_RETURN(linear.levels, Require(entries, name + ".levels"));
    return absl::OkStatus();
  }
  WALSH_ASSIGN_OR_RETURN(linear.scales, Require(entries, name + ".scales"));
  if (has_zeros) {
    linear.shape.grid = StoredGrid::kFloatZeros;
    WALSH_ASSIGN_OR_RETURN(linear.zeros, Require(entries, name + ".zeros"));
    return absl::OkStatus();
  }
  WALSH_ASSIGN_OR_RETURN(linear.qzeros, Require(entries, name + ".qzeros"));
  return absl::OkStatus();
}

absl::StatusOr<QuantizedLinear> FindQuantized(const Entries& entries, const std::string& name,
                                              int64_t rows, int64_t cols, bool symmetric) {
  QuantizedLinear linear;
  linear.shape = {.rows = rows, .cols = cols, .symmetric = symmetric};
  WALSH_ASSIGN_OR_RETURN(linear.qweight, Require(entries, name + ".qweight"));
  WALSH_RETURN_IF_ERROR(FindGrid(entries, name, linear));
  WALSH_ASSIGN_OR_RETURN(linear.g_idx, Require(entries, name + ".g_idx"));
  const std::vector<int64_t>& weight_shape = linear.qweight->entry.shape;
  const LocatedEntry& grid = linear.levels != nullptr ? *linear.levels : *linear.scales;
  const std::vector<int64_t>& scale_shape = grid.entry.shape;
  const int64_t words = weight_shape.empty() ? 0 : weight_shape[0];
  const int64_t groups = scale_shape.empty() ? 0 : scale_shape[0];
  // Widths are at most 2^19, so the products fit easily; the shapes are then compared exactly.
  if (cols % 32 != 0 || words < 1 || words > cols || words % (cols / 32) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, ".qweight' has shape ",
                                                   Describe(weight_shape), ", which no width of ",
                                                   cols, " inputs gives"));
  }
  if (groups < 1 || cols % groups != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", grid.entry.name, "' has shape ",
                                                   Describe(scale_shape), ": ", groups,
                                                   " groups do not divide ", cols, " inputs"));
  }
  linear.shape.bits = static_cast<int>(words / (cols / 32));
  linear.shape.group_size = cols / groups;
  if (const absl::Status status = ValidateGptqShape(linear.shape); !status.ok()) {
    return Named(name, status);
  }
  WALSH_RETURN_IF_ERROR(RequireForm(*linear.qweight, "I32", {linear.shape.weight_words(), rows}));
  if (linear.qzeros != nullptr) {
    WALSH_RETURN_IF_ERROR(RequireForm(*linear.qzeros, "I32", {groups, linear.shape.zero_words()}));
  }
  if (linear.scales != nullptr) {
    WALSH_RETURN_IF_ERROR(RequireForm(*linear.scales, "F16", {groups, rows}));
  }
  if (linear.zeros != nullptr) {
    WALSH_RETURN_IF_ERROR(RequireForm(*linear.zeros, "F16", {groups, rows}));
  }
  if (linear.levels != nullptr) {
    WALSH_RETURN_IF_ERROR(
        RequireForm(*linear.levels, "F16", {groups, rows, int64_t{1} << linear.shape.bits}));
  }
  WALSH_RETURN_IF_ERROR(RequireForm(*linear.g_idx, "I32", {cols}));
  return linear;
}

const char* Describe(StoredGrid grid) {
  switch (grid) {
    case StoredGrid::kGptq:
      return "integer zeros";
    case StoredGrid::kFloatZeros:
      return "float zeros";
    case StoredGrid::kCodebook:
      return "a codebook";
  }
  return "";
}

// Whoever reads the configuration only must not take a linear for another than its tensors make it.
absl::Status CheckGrid(const std::string& name, const GptqShape& shape, StoredGrid configured) {
  constexpr int kCodebookBits = 2;
  const bool is_override = configured == StoredGrid::kCodebook && shape.bits != kCodebookBits;
  const StoredGrid expected = is_override ? StoredGrid::kGptq : configured;
  if (shape.grid == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("linear '", name, "' has ", Describe(shape.grid), " at ", shape.bits,
                   " bits, quantization_config says ", Describe(expected)));
}

std::string LinearName(const std::string& weight) {
  const std::string suffix = ".weight";
  return weight.substr(0, weight.size() - suffix.size());
}

class Reader final : public ArtifactReader {
 public:
  static absl::StatusOr<std::unique_ptr<ArtifactReader>> Open(const std::string& directory,
                                                              bool verify, int n_threads,
                                                              const KeepGoing& keep_going) {
    auto reader = std::make_unique<Reader>();
    WALSH_ASSIGN_OR_RETURN(reader->manifest_, ReadManifest(directory));
    WALSH_ASSIGN_OR_RETURN(reader->side_files_, reader->ReadListedSideFiles(directory));
    WALSH_RETURN_IF_ERROR(reader->ReadConfig(reader->side_files_));
    WALSH_ASSIGN_OR_RETURN(reader->tokenizer_, TokenizerSourceOf(reader->side_files_));
    WALSH_RETURN_IF_ERROR(reader->OpenShards(directory));
    if (verify) WALSH_RETURN_IF_ERROR(reader->VerifyShards(directory, n_threads, keep_going));
    WALSH_RETURN_IF_ERROR(reader->CheckTensors());
    return reader;
  }

  const ModelConfig& config() const override { return config_; }
  const TokenizerSource& tokenizer() const override { return tokenizer_; }
  const ArtifactInfo& info() const override { return manifest_.info; }
  const OnlineTransforms& online() const override { return online_; }
  const SideFiles& side_files() const override { return side_files_; }

  bool IsQuantized(std::string_view name) const override {
    return linears_.find(name) != linears_.end();
  }

  absl::StatusOr<QuantizedMatrix> ReadQuantized(std::string_view name) const override {
    WALSH_ASSIGN_OR_RETURN(const QuantizedLinear* linear, FindLinear(name));
    WALSH_ASSIGN_OR_RETURN(const GptqTensors tensors, ReadTensors(*linear));
    WALSH_RETURN_IF_ERROR(CheckGroupIndex(name, linear->shape, tensors.g_idx));
    absl::StatusOr<QuantizedMatrix> matrix = UnpackGptq(tensors, linear->shape);
    if (matrix.ok()) return matrix;
    return Named(name, matrix.status());
  }

  absl::StatusOr<OrderedMatrix> ReadOrdered(std::string_view name) const override {
    WALSH_ASSIGN_OR_RETURN(const QuantizedLinear* linear, FindLinear(name));
    WALSH_ASSIGN_OR_RETURN(const GptqTensors tensors, ReadTensors(*linear));
    if (!has_act_order_) {
      WALSH_RETURN_IF_ERROR(CheckGroupIndex(name, linear->shape, tensors.g_idx));
    }
    absl::StatusOr<OrderedMatrix> ordered = UnpackOrdered(tensors, linear->shape);
    if (ordered.ok()) return ordered;
    return Named(name, ordered.status());
  }

  absl::StatusOr<Matrix> ReadDense(std::string_view name) const override {
    WALSH_ASSIGN_OR_RETURN(const DenseTensor* dense, FindDense(name));
    return ReadStoredRows(*files_[dense->file_index], dense->tensor, 0, dense->tensor.rows);
  }

  absl::StatusOr<GptqShape> ShapeOf(std::string_view name) const override {
    WALSH_ASSIGN_OR_RETURN(const QuantizedLinear* linear, FindLinear(name));
    return linear->shape;
  }

  absl::Status ReadPacked(std::string_view name, const PackedSpans& into) const override {
    WALSH_ASSIGN_OR_RETURN(const QuantizedLinear* linear, FindLinear(name));
    WALSH_RETURN_IF_ERROR(ReadInto(*linear->qweight, into.qweight));
    WALSH_RETURN_IF_ERROR(ReadTensor(name, "qzeros", linear->qzeros, into.qzeros));
    WALSH_RETURN_IF_ERROR(ReadTensor(name, "scales", linear->scales, into.scales));
    WALSH_RETURN_IF_ERROR(ReadTensor(name, "zeros", linear->zeros, into.zeros));
    WALSH_RETURN_IF_ERROR(ReadTensor(name, "levels", linear->levels, into.levels));
    if (!into.in_any_order || !has_act_order_) {
      std::vector<int32_t> g_idx;
      WALSH_RETURN_IF_ERROR(ReadAll(linear->g_idx, g_idx));
      WALSH_RETURN_IF_ERROR(CheckGroupIndex(name, linear->shape, g_idx));
    }
    for (const absl::Status& status :
         {CheckScales(into.scales, linear->shape), CheckZeros(into.zeros, linear->shape),
          CheckLevels(into.levels, linear->shape)}) {
      if (!status.ok()) return Named(name, status);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<int32_t>> ReadInputOrder(std::string_view name) const override {
    WALSH_ASSIGN_OR_RETURN(const QuantizedLinear* linear, FindLinear(name));
    if (!has_act_order_) return std::vector<int32_t>();
    std::vector<int32_t> g_idx;
    WALSH_RETURN_IF_ERROR(ReadAll(linear->g_idx, g_idx));
    absl::StatusOr<std::vector<int32_t>> order = InputOrder(g_idx, linear->shape);
    if (order.ok()) return order;
    return Named(name, order.status());
  }

  absl::Status ReadBf16(std::string_view name, int64_t first, int64_t n,
                        std::span<uint16_t> into) const override {
    WALSH_ASSIGN_OR_RETURN(const DenseTensor* dense, FindDense(name));
    return ReadBf16(*files_[dense->file_index], dense->tensor, first, n, into);
  }

  absl::Status ReadStoredBf16(std::string_view name, int64_t first, int64_t n,
                              std::span<uint16_t> into) const override {
    WALSH_ASSIGN_OR_RETURN(const DenseTensor* dense, FindDense(name));
    StoredTensor as_stored = dense->tensor;
    as_stored.added = 0;
    return ReadBf16(*files_[dense->file_index], as_stored, first, n, into);
  }

 private:
  struct DenseTensor {
    size_t file_index = 0;
    StoredTensor tensor;
  };

  static absl::Status ReadBf16(const RandomAccessFile& file, const StoredTensor& tensor,
                               int64_t first, int64_t n, std::span<uint16_t> into) {
    WALSH_RETURN_IF_ERROR(ReadStoredBytes(file, tensor, first, n, std::as_writable_bytes(into)));
    const std::optional<int64_t> bad = FirstNotFiniteBf16(into);
    if (!bad.has_value()) return absl::OkStatus();
    return NotFiniteError(file, tensor, first, *bad, Bf16ToFloat(into[static_cast<size_t>(*bad)]));
  }

  absl::StatusOr<const QuantizedLinear*> FindLinear(std::string_view name) const {
    const auto it = linears_.find(name);
    if (it != linears_.end()) return &it->second;
    return absl::NotFoundError(
        absl::StrCat("the artifact has no quantized linear '", std::string(name), "'"));
  }

  absl::StatusOr<const DenseTensor*> FindDense(std::string_view name) const {
    const auto it = dense_.find(name);
    if (it != dense_.end()) return &it->second;
    return absl::NotFoundError(
        absl::StrCat("the artifact has no dense tensor '", std::string(name), "'"));
  }

  static absl::Status Differs(const std::string& name, const char* how) {
    return absl::DataLossError(absl::StrCat(name, ": differs from what ", kManifestFile,
                                            " records (", how, "); the artifact is damaged"));
  }

  // The small files that walsh.json lists, each compared with its digest: they are in memory
  // anyway.
  absl::StatusOr<SideFiles> ReadListedSideFiles(const std::string& directory) const {
    WALSH_ASSIGN_OR_RETURN(SideFiles present, ReadSideFiles(directory));
    WALSH_ASSIGN_OR_RETURN(
        present[kWeightsIndexFile],
        ReadSmallFile(absl::StrCat(directory, "/", kWeightsIndexFile), limits::kJsonFileBytesMax));
    SideFiles listed;
    for (const auto& [name, file] : manifest_.files) {
      if (IsShard(name)) continue;
      const auto it = present.find(name);
      if (it == present.end()) {
        return absl::DataLossError(
            absl::StrCat(kManifestFile, " lists ", name, ", which is missing"));
      }
      WALSH_RETURN_IF_ERROR(CheckContents(name, it->second, file));
      listed[name] = std::move(it->second);
    }
    for (const char* name : {"config.json", kWeightsIndexFile}) {
      if (!listed.contains(name)) {
        return absl::InvalidArgumentError(
            absl::StrCat(kManifestFile, ": member 'files' does not list ", name));
      }
    }
    return listed;
  }

  static bool IsShard(const std::string& name) {
    constexpr std::string_view kSuffix = ".safetensors";
    return name.size() > kSuffix.size() &&
           std::string_view(name).substr(name.size() - kSuffix.size()) == kSuffix;
  }

  static absl::Status CheckContents(const std::string& name, std::string_view contents,
                                    const ManifestFile& file) {
    if (static_cast<int64_t>(contents.size()) != file.size_bytes) return Differs(name, "size");
    for (size_t chunk = 0; chunk < file.sha256.size(); ++chunk) {
      constexpr auto kChunkBytes = static_cast<size_t>(kHashChunkBytes);
      if (Sha256Hex(contents.substr(chunk * kChunkBytes, kChunkBytes)) != file.sha256[chunk]) {
        return Differs(name, "SHA-256");
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadConfig(const SideFiles& files) {
    WALSH_ASSIGN_OR_RETURN(config_, ConfigOf(files));
    if (config_.tied_embeddings) {
      return absl::InvalidArgumentError("config.json: an artifact's embeddings are not tied");
    }
    if (config_.has_fused_linears) {
      return absl::UnimplementedError(
          absl::StrCat("config.json: architecture '", config_.architecture,
                       "': artifacts hold the parts of fused linears, as MistralForCausalLM"));
    }
    WALSH_ASSIGN_OR_RETURN(const json document,
                           ParseBoundedJson("config.json", files.at("config.json"),
                                            {.bytes_max = limits::kConfigFileBytesMax,
                                             .depth_max = limits::kJsonDepthMax}));
    WALSH_ASSIGN_OR_RETURN(weight_map_, ParseWeightMap(files.at(kWeightsIndexFile)));
    WALSH_RETURN_IF_ERROR(CheckQuantizationConfig(document));
    WALSH_ASSIGN_OR_RETURN(online_,
                           ParseOnlineTransforms(document["quantization_config"], config_));
    WALSH_RETURN_IF_ERROR(CheckReportedTransforms());
    WALSH_ASSIGN_OR_RETURN(grid_, ParseStoredGrid(document["quantization_config"]));
    has_act_order_ = document["quantization_config"]["desc_act"].get<bool>();
    return absl::OkStatus();
  }

  // Both files of an artifact of ours say what a forward pass does. An imported one's may not.
  absl::Status CheckReportedTransforms() const {
    const auto reported = manifest_.report.find("online_transforms");
    if (reported == manifest_.report.end()) return absl::OkStatus();
    const json configured = OnlineTransformsJson(online_);
    if (*reported == configured) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(
        kManifestFile, ": online_transforms is ", reported->dump().substr(0, 256),
        ", config.json has ", configured.dump().substr(0, 256), "; the artifact is damaged"));
  }

  absl::Status OpenShards(const std::string& directory) {
    WALSH_ASSIGN_OR_RETURN(shards_, ShardsOf(weight_map_));
    const auto n_listed = std::count_if(manifest_.files.begin(), manifest_.files.end(),
                                        [](const auto& file) { return IsShard(file.first); });
    if (n_listed != static_cast<int64_t>(shards_.size())) {
      return absl::InvalidArgumentError(absl::StrCat(kManifestFile, " lists ", n_listed,
                                                     " weight files, ", kWeightsIndexFile, " ",
                                                     shards_.size()));
    }
    for (const std::string& shard : shards_) {
      const auto listed = manifest_.files.find(shard);
      if (listed == manifest_.files.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat(kManifestFile, ": member 'files' does not list ", shard));
      }
      WALSH_ASSIGN_OR_RETURN(auto file, OpenRandomAccessFile(absl::StrCat(directory, "/", shard)));
      if (file->size() != listed->second.size_bytes) return Differs(shard, "size");
      WALSH_ASSIGN_OR_RETURN(std::vector<SafetensorsEntry> entries, ParseSafetensors(*file));
      for (SafetensorsEntry& entry : entries) {
        const auto mapped = weight_map_.find(entry.name);
        if (mapped == weight_map_.end() || mapped->second != shard) {
          return absl::InvalidArgumentError(absl::StrCat(kWeightsIndexFile, ": tensor '",
                                                         entry.name, "' is not listed in ", shard));
        }
        const std::string name = entry.name;
        entries_[name] = {.file_index = files_.size(), .entry = std::move(entry)};
      }
      files_.push_back(std::move(file));
    }
    return absl::OkStatus();
  }

  absl::Status VerifyShards(const std::string& directory, int n_threads,
                            const KeepGoing& keep_going) const {
    for (size_t i = 0; i < shards_.size(); ++i) {
      WALSH_ASSIGN_OR_RETURN(
          const std::vector<std::string> chunks,
          Sha256FileChunks(absl::StrCat(directory, "/", shards_[i]), n_threads, keep_going));
      if (chunks != manifest_.files.at(shards_[i]).sha256) return Differs(shards_[i], "SHA-256");
      WALSH_RETURN_IF_ERROR(files_[i]->CheckUnchanged());
    }
    return absl::OkStatus();
  }

  absl::Status CheckTensors() {
    for (const ExpectedTensor& tensor : ExpectedTensors(config_)) {
      if (!tensor.is_one_dimensional &&
          entries_.find(LinearName(tensor.name) + ".qweight") != entries_.end()) {
        const std::string name = LinearName(tensor.name);
        WALSH_ASSIGN_OR_RETURN(
            QuantizedLinear linear,
            FindQuantized(entries_, name, tensor.rows, tensor.cols, manifest_.info.symmetric));
        WALSH_RETURN_IF_ERROR(CheckGrid(name, linear.shape, grid_));
        linears_[name] = linear;
        continue;
      }
      WALSH_ASSIGN_OR_RETURN(const LocatedEntry* located, Require(entries_, tensor.name));
      const std::vector<int64_t> shape = tensor.is_one_dimensional
                                             ? std::vector<int64_t>{tensor.cols}
                                             : std::vector<int64_t>{tensor.rows, tensor.cols};
      WALSH_RETURN_IF_ERROR(RequireForm(*located, "BF16", shape));
      dense_[tensor.name] = {.file_index = located->file_index,
                             .tensor = {.name = tensor.name,
                                        .type = StorageType::kBf16,
                                        .offset = located->entry.offset,
                                        .rows = tensor.rows,
                                        .cols = tensor.cols,
                                        .is_one_dimensional = tensor.is_one_dimensional,
                                        .added = tensor.is_norm ? config_.norm_offset : 0.0f}};
    }
    return absl::OkStatus();
  }

  // As they are stored, in whatever order columns are.
  absl::StatusOr<GptqTensors> ReadTensors(const QuantizedLinear& linear) const {
    GptqTensors tensors;
    WALSH_RETURN_IF_ERROR(ReadAll(linear.qweight, tensors.qweight));
    WALSH_RETURN_IF_ERROR(ReadAll(linear.qzeros, tensors.qzeros));
    WALSH_RETURN_IF_ERROR(ReadAll(linear.scales, tensors.scales));
    WALSH_RETURN_IF_ERROR(ReadAll(linear.zeros, tensors.zeros));
    WALSH_RETURN_IF_ERROR(ReadAll(linear.levels, tensors.levels));
    WALSH_RETURN_IF_ERROR(ReadAll(linear.g_idx, tensors.g_idx));
    return tensors;
  }

  // One of a linear's tensors, which its grid may not have.
  template <typename T>
  absl::Status ReadTensor(std::string_view name, const char* tensor, const LocatedEntry* located,
                          std::span<T> out) const {
    if (located != nullptr) return ReadInto(*located, out);
    if (out.empty()) return absl::OkStatus();
    return Named(name,
                 absl::InvalidArgumentError(absl::StrCat("room for ", out.size(), " values of ",
                                                         tensor, ", which it does not have")));
  }

  // Nothing where there is no such tensor.
  template <typename T>
  absl::Status ReadAll(const LocatedEntry* located, std::vector<T>& values) const {
    if (located == nullptr) return absl::OkStatus();
    values.resize(ValuesIn<T>(*located));
    return ReadInto(*located, std::span(values));
  }

  template <typename T>
  static size_t ValuesIn(const LocatedEntry& located) {
    return static_cast<size_t>(located.entry.size_bytes) / sizeof(T);
  }

  template <typename T>
  absl::Status ReadInto(const LocatedEntry& located, std::span<T> out) const {
    if (out.size() != ValuesIn<T>(located)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", located.entry.name, "': room for ",
                                                     out.size(), " values, it has ",
                                                     ValuesIn<T>(located)));
    }
    const RandomAccessFile& file = *files_[located.file_index];
    WALSH_RETURN_IF_ERROR(file.ReadAt(located.entry.offset, std::as_writable_bytes(out)));
    return file.CheckUnchanged();
  }

  static absl::Status CheckGroupIndex(std::string_view name, const GptqShape& shape,
                                      const std::vector<int32_t>& g_idx) {
    for (size_t i = 0; i < g_idx.size(); ++i) {
      const int64_t expected = static_cast<int64_t>(i) / shape.group_size;
      if (g_idx[i] == expected) continue;
      return absl::UnimplementedError(absl::StrCat("tensor '", std::string(name), ".g_idx' is ",
                                                   g_idx[i], " at [", i, "], expected ", expected,
                                                   ": columns out of order are not supported"));
    }
    return absl::OkStatus();
  }

  Manifest manifest_;
  ModelConfig config_;
  OnlineTransforms online_;
  StoredGrid grid_ = StoredGrid::kGptq;  // of the linears, but for overrides
  bool has_act_order_ = false;
  TokenizerSource tokenizer_;
  SideFiles side_files_;
  WeightMap weight_map_;
  std::vector<std::string> shards_;
  std::vector<std::unique_ptr<RandomAccessFile>> files_;  // of the shards
  Entries entries_;
  std::map<std::string, QuantizedLinear, std::less<>> linears_;
  std::map<std::string, DenseTensor, std::less<>> dense_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ArtifactReader>> ArtifactReader::Open(const std::string& directory,
                                                                     bool verify, int n_threads,
                                                                     const KeepGoing& keep_going) {
  return Reader::Open(directory, verify, n_threads, keep_going);
}

absl::StatusOr<ArtifactInfo> ArtifactReader::ReadInfo(const std::string& directory) {
  WALSH_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(directory));
  return manifest.info;
}

}  // namespace walsh
