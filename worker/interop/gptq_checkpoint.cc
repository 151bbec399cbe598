#include "worker/interop/gptq_checkpoint.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/interop/tensor_sink.h"
#include "worker/io/bounded_json.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/file_checkpoint.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/hf_directory.h"
#include "worker/io/safetensors.h"
#include "worker/io/stored_tensor.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

struct Settings {
  int bits = 0;
  int64_t group_size = 0;
  bool symmetric = false;
  bool has_act_order = false;
  bool is_v1 = true;
};

absl::Status Unsupported(const std::string& message) {
  return absl::UnimplementedError(absl::StrCat("quantization_config: ", message));
}

absl::Status Malformed(const std::string& message) {
  return absl::InvalidArgumentError(absl::StrCat("quantization_config: ", message));
}

// The member's text, or the fallback where it is absent or null.
absl::StatusOr<std::string> Text(const json& q, const char* member, const char* fallback) {
  const auto it = q.find(member);
  if (it == q.end() || it->is_null()) return std::string(fallback);
  if (it->is_string()) return it->get<std::string>().substr(0, 64);
  return Malformed(absl::StrCat("'", member, "' is no string"));
}

absl::StatusOr<bool> Truth(const json& q, const char* member, bool fallback) {
  const auto it = q.find(member);
  if (it == q.end() || it->is_null()) return fallback;
  if (it->is_boolean()) return it->get<bool>();
  return Malformed(absl::StrCat("'", member, "' is neither true nor false"));
}

absl::StatusOr<int64_t> Integer(const json& q, const char* member) {
  const auto it = q.find(member);
  const std::optional<int64_t> value = it == q.end() ? std::nullopt : Int64Of(*it);
  if (value.has_value()) return *value;
  return Malformed(absl::StrCat("'", member, "' is missing or no integer"));
}

absl::StatusOr<Settings> ReadSettings(const json& q) {
  Settings out;
  WALSH_ASSIGN_OR_RETURN(const std::string method, Text(q, "quant_method", "gptq"));
  if (method != "gptq") {
    return Unsupported(absl::StrCat("'quant_method' is '", method, "', only gptq is imported"));
  }
  WALSH_ASSIGN_OR_RETURN(const std::string old_format, Text(q, "format", "gptq"));
  WALSH_ASSIGN_OR_RETURN(const std::string format,
                         Text(q, "checkpoint_format", old_format.c_str()));
  if (format != "gptq" && format != "gptq_v2") {
    return Unsupported(
        absl::StrCat("'checkpoint_format' is '", format, "', imported are gptq and gptq_v2"));
  }
  out.is_v1 = format == "gptq";
  WALSH_ASSIGN_OR_RETURN(const std::string pack_dtype, Text(q, "pack_dtype", "int32"));
  if (pack_dtype != "int32") {
    return Unsupported(absl::StrCat("'pack_dtype' is '", pack_dtype, "', imported is int32"));
  }
  for (const char* member : {"lm_head", "is_marlin_format"}) {
    WALSH_ASSIGN_OR_RETURN(const bool is_set, Truth(q, member, false));
    if (is_set) return Unsupported(absl::StrCat("'", member, "' is true, which is not imported"));
  }
  WALSH_ASSIGN_OR_RETURN(const int64_t bits, Integer(q, "bits"));
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return Unsupported(absl::StrCat("'bits' is ", bits, ", imported are 2, 3, 4 and 8"));
  }
  out.bits = static_cast<int>(bits);
  WALSH_ASSIGN_OR_RETURN(out.group_size, Integer(q, "group_size"));
  if (out.group_size != -1 && (out.group_size < 1 || out.group_size > limits::kIntermediateMax)) {
    return Malformed(absl::StrCat("'group_size' is ", out.group_size, ", must be -1 or 1 to ",
                                  limits::kIntermediateMax));
  }
  WALSH_ASSIGN_OR_RETURN(out.symmetric, Truth(q, "sym", false));
  WALSH_ASSIGN_OR_RETURN(out.has_act_order, Truth(q, "desc_act", false));
  return out;
}

absl::StatusOr<json> ParseConfig(const char* name, const std::string& text) {
  return ParseBoundedJson(
      name, text, {.bytes_max = limits::kConfigFileBytesMax, .depth_max = limits::kJsonDepthMax});
}

absl::StatusOr<Settings> SettingsOf(const std::string& directory, const SideFiles& files) {
  WALSH_ASSIGN_OR_RETURN(const json config, ParseConfig("config.json", files.at("config.json")));
  const auto quantization = config.find("quantization_config");
  if (quantization != config.end() && quantization->is_object()) return ReadSettings(*quantization);
  const absl::StatusOr<std::string> old =
      ReadSmallFile(absl::StrCat(directory, "/", kOldConfigFile), limits::kConfigFileBytesMax);
  if (absl::IsNotFound(old.status())) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json has no quantization_config and there is no ", kOldConfigFile,
                     ": the model is not quantized with GPTQ; use `walsh quantize`"));
  }
  WALSH_RETURN_IF_ERROR(old.status());
  WALSH_ASSIGN_OR_RETURN(const json document, ParseConfig(kOldConfigFile, *old));
  return ReadSettings(document);
}

std::optional<StorageType> FloatType(const std::string& dtype) {
  if (dtype == "F32") return StorageType::kF32;
  if (dtype == "F16") return StorageType::kF16;
  if (dtype == "BF16") return StorageType::kBf16;
  return std::nullopt;
}

std::string Describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

struct Located {
  size_t file_index = 0;
  SafetensorsEntry entry;
};
using Entries = std::map<std::string, Located, std::less<>>;

struct QuantizedLinear {
  GptqShape shape;
  const Located* qweight = nullptr;
  const Located* qzeros = nullptr;
  const Located* scales = nullptr;
  const Located* g_idx = nullptr;  // null: in order
};

absl::StatusOr<const Located*> Require(const Entries& entries, const std::string& name,
                                       const char* dtype) {
  const auto it = entries.find(name);
  if (it == entries.end()) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is missing"));
  }
  if (it->second.entry.dtype == dtype) return &it->second;
  return absl::UnimplementedError(absl::StrCat("tensor '", name, "' is ", it->second.entry.dtype,
                                               ", imported are checkpoints where it is ", dtype));
}

absl::Status RequireShape(const Located& located, const std::vector<int64_t>& shape) {
  if (located.entry.shape == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tensor '", located.entry.name, "' is ",
                                                 Describe(located.entry.shape), ", expected ",
                                                 Describe(shape)));
}

absl::StatusOr<QuantizedLinear> FindLinear(const Entries& entries, const std::string& name,
                                           const ExpectedTensor& weight, const Settings& settings) {
  QuantizedLinear out;
  WALSH_ASSIGN_OR_RETURN(out.qweight, Require(entries, name + ".qweight", "I32"));
  WALSH_ASSIGN_OR_RETURN(out.qzeros, Require(entries, name + ".qzeros", "I32"));
  WALSH_ASSIGN_OR_RETURN(out.scales, Require(entries, name + ".scales", "F16"));
  if (entries.contains(name + ".g_idx")) {
    WALSH_ASSIGN_OR_RETURN(out.g_idx, Require(entries, name + ".g_idx", "I32"));
    WALSH_RETURN_IF_ERROR(RequireShape(*out.g_idx, {weight.cols}));
  } else if (settings.has_act_order) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", name, ".g_idx' is missing, and the checkpoint has act-order"));
  }
  const std::vector<int64_t>& packed = out.qweight->entry.shape;
  const std::vector<int64_t>& scales = out.scales->entry.shape;
  const int64_t runs = weight.cols / kPackingRun;
  const int64_t words = packed.empty() ? 0 : packed[0];
  const int64_t groups = scales.empty() ? 0 : scales[0];
  if (weight.cols % kPackingRun != 0 || words < 1 || words > weight.cols || words % runs != 0 ||
      groups < 1 || weight.cols % groups != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("linear '", name, "': qweight ", Describe(packed), " and scales ",
                     Describe(scales), " fit no width and groups of ", weight.cols, " inputs"));
  }
  out.shape = {.rows = weight.rows,
               .cols = weight.cols,
               .bits = static_cast<int>(words / runs),
               .group_size = weight.cols / groups,
               .symmetric = settings.symmetric};
  if (const absl::Status status = ValidateGptqShape(out.shape); !status.ok()) {
    return OfLinear(name, status);
  }
  WALSH_RETURN_IF_ERROR(RequireShape(*out.qweight, {out.shape.weight_words(), weight.rows}));
  WALSH_RETURN_IF_ERROR(RequireShape(*out.qzeros, {groups, out.shape.zero_words()}));
  WALSH_RETURN_IF_ERROR(RequireShape(*out.scales, {groups, weight.rows}));
  return out;
}

bool EndsWith(std::string_view text, std::string_view suffix) { return text.ends_with(suffix); }

class Reader final : public GptqCheckpoint {
 public:
  absl::Status OpenFiles(const std::string& directory) {
    directory_ = directory;
    WALSH_ASSIGN_OR_RETURN(side_files_, ReadSideFiles(directory));
    if (!side_files_.contains("config.json")) {
      return absl::NotFoundError(absl::StrCat("'", BaseName(directory), "' has no config.json"));
    }
    WALSH_ASSIGN_OR_RETURN(config_, ConfigOf(side_files_));
    WALSH_ASSIGN_OR_RETURN(settings_, SettingsOf(directory, side_files_));
    WALSH_ASSIGN_OR_RETURN(tokenizer_, TokenizerSourceOf(side_files_));
    WALSH_RETURN_IF_ERROR(ReadEntries());
    WALSH_RETURN_IF_ERROR(CollectLinears());
    return CollectDense();
  }

  // -- GptqCheckpoint

  bool IsQuantized(std::string_view name) const override { return linears_.contains(name); }
  int bits() const override { return settings_.bits; }
  int64_t group_size() const override { return settings_.group_size; }

  absl::StatusOr<OrderedMatrix> ReadOrdered(std::string_view name) const override {
    const auto it = linears_.find(name);
    if (it == linears_.end()) {
      return absl::NotFoundError(
          absl::StrCat("the checkpoint has no quantized linear '", std::string(name), "'"));
    }
    const QuantizedLinear& linear = it->second;
    GptqTensors tensors;
    WALSH_ASSIGN_OR_RETURN(tensors.qweight, ReadAll<uint32_t>(*linear.qweight));
    WALSH_ASSIGN_OR_RETURN(tensors.qzeros, ReadAll<uint32_t>(*linear.qzeros));
    WALSH_ASSIGN_OR_RETURN(tensors.scales, ReadAll<uint16_t>(*linear.scales));
    if (linear.g_idx == nullptr) {
      tensors.g_idx = GroupIndex(linear.shape);
    } else {
      WALSH_ASSIGN_OR_RETURN(tensors.g_idx, ReadAll<int32_t>(*linear.g_idx));
    }
    absl::StatusOr<OrderedMatrix> ordered = UnpackOrdered(tensors, linear.shape);
    if (!ordered.ok()) return OfLinear(it->first, ordered.status());
    if (settings_.is_v1) WALSH_RETURN_IF_ERROR(AddOne(it->first, ordered->matrix));
    return ordered;
  }

  // -- Checkpoint

  const ModelConfig& config() const override { return config_; }
  const TokenizerSource& tokenizer() const override { return tokenizer_; }
  bool Has(std::string_view tensor) const override {
    return dense_->Has(tensor) || IsQuantized(LinearName(std::string(tensor)));
  }
  absl::StatusOr<Matrix> Read(std::string_view tensor) const override {
    const std::string name(tensor);
    if (!EndsWith(name, ".weight") || !IsQuantized(LinearName(name))) return dense_->Read(tensor);
    WALSH_ASSIGN_OR_RETURN(const OrderedMatrix ordered, ReadOrdered(LinearName(name)));
    return Dequantize(ordered);
  }
  absl::StatusOr<Matrix> ReadRows(std::string_view tensor, int64_t first,
                                  int64_t n) const override {
    return dense_->ReadRows(tensor, first, n);
  }
  absl::StatusOr<StoredForm> FormOf(std::string_view tensor) const override {
    return dense_->FormOf(tensor);
  }
  absl::Status ReadStored(std::string_view tensor, int64_t first, int64_t n,
                          std::span<std::byte> bytes) const override {
    return dense_->ReadStored(tensor, first, n, bytes);
  }
  int64_t size_bytes() const override {
    int64_t bytes = 0;
    for (const auto& file : files_) bytes += file->size();
    return bytes;
  }
  std::string format() const override {
    return absl::StrCat("safetensors GPTQ ", settings_.is_v1 ? "v1" : "v2");
  }
  absl::StatusOr<std::string> Fingerprint(int n_threads,
                                          const KeepGoing& keep_going) const override {
    return dense_->Fingerprint(n_threads, keep_going);
  }
  std::string license() const override { return dense_->license(); }
  const std::map<std::string, std::string>& side_files() const override { return side_files_; }

 private:
  absl::Status ReadEntries() {
    WALSH_ASSIGN_OR_RETURN(const std::optional<WeightMap> map, ReadWeightMap(directory_));
    std::vector<std::string> names = {kSingleWeightsFile};
    if (map.has_value()) {
      WALSH_ASSIGN_OR_RETURN(names, ShardsOf(*map));
    }
    for (const std::string& name : names) {
      const std::string path = absl::StrCat(directory_, "/", name);
      WALSH_ASSIGN_OR_RETURN(auto file, OpenRandomAccessFile(path));
      WALSH_ASSIGN_OR_RETURN(std::vector<SafetensorsEntry> entries, ParseSafetensors(*file));
      for (SafetensorsEntry& entry : entries) {
        const std::string tensor = entry.name;
        const bool is_new =
            entries_.try_emplace(tensor, Located{files_.size(), std::move(entry)}).second;
        if (!is_new) {
          return absl::InvalidArgumentError(
              absl::StrCat("tensor '", tensor, "' is in two files, one of them ", name));
        }
      }
      files_.push_back(std::move(file));
      paths_.push_back(path);
    }
    return absl::OkStatus();
  }

  absl::Status CollectLinears() {
    for (const ExpectedTensor& tensor : ExpectedTensors(config_)) {
      if (tensor.is_one_dimensional) continue;
      const std::string name = LinearName(tensor.name);
      if (!entries_.contains(name + ".qweight")) continue;
      if (!tensor.name.starts_with("model.layers.")) {
        return absl::UnimplementedError(
            absl::StrCat("'", name, "' is quantized; imported are linears of the layers"));
      }
      WALSH_ASSIGN_OR_RETURN(linears_[name], FindLinear(entries_, name, tensor, settings_));
    }
    if (linears_.empty()) {
      return absl::InvalidArgumentError("the checkpoint has no tensor that ends in .qweight");
    }
    return CheckSettings();
  }

  // Widths and groups may differ between linears, but some linear has those that are named.
  absl::Status CheckSettings() const {
    const auto has = [&](auto is_it) {
      return std::ranges::any_of(linears_, [&](const auto& entry) { return is_it(entry.second); });
    };
    const auto& [name, first] = *linears_.begin();
    if (!has([&](const QuantizedLinear& l) { return l.shape.bits == settings_.bits; })) {
      return Malformed(absl::StrCat("'bits' is ", settings_.bits, ", which no linear has: '", name,
                                    "' has ", first.shape.bits));
    }
    const auto has_group = [&](const QuantizedLinear& l) {
      return l.shape.group_size == (settings_.group_size < 0 ? l.shape.cols : settings_.group_size);
    };
    if (has(has_group)) return absl::OkStatus();
    return Malformed(absl::StrCat("'group_size' is ", settings_.group_size,
                                  ", which no linear has: '", name, "' has ",
                                  first.shape.group_size));
  }

  // What is in floats, as a checkpoint of its own that checks it.
  absl::Status CollectDense() {
    CheckpointContents contents;
    contents.config = config_;
    contents.tokenizer = tokenizer_;
    contents.format_family = "safetensors";
    contents.side_files = side_files_;
    contents.fingerprint_paths = paths_;
    for (const auto& [name, text] : side_files_) {
      contents.fingerprint_paths.push_back(absl::StrCat(directory_, "/", name));
    }
    for (const char* name : {"LICENSE.txt", "LICENSE"}) {
      const auto it = side_files_.find(name);
      if (it != side_files_.end()) contents.license = it->second;
    }
    for (const std::string& path : paths_) {
      WALSH_ASSIGN_OR_RETURN(auto file, OpenRandomAccessFile(path));
      contents.files.push_back(std::move(file));
    }
    std::set<std::string, std::less<>> expected;
    for (const ExpectedTensor& tensor : ExpectedTensors(config_)) {
      expected.insert(tensor.name);
      if (tensor.is_one_dimensional || !IsQuantized(LinearName(tensor.name))) continue;
      // Stands for the quantized weight, of the right shape: it is never read.
      contents.tensors[tensor.name] = {
          .file_index = 0,
          .tensor = {.name = tensor.name, .rows = tensor.rows, .cols = tensor.cols}};
    }
    for (const auto& [name, located] : entries_) {
      const std::optional<StorageType> type = FloatType(located.entry.dtype);
      const size_t rank = located.entry.shape.size();
      if (!type.has_value() || rank < 1 || rank > 2 || EndsWith(name, ".scales")) continue;
      if (linears_.contains(LinearOf(name)) && EndsWith(name, ".weight")) {
        return absl::InvalidArgumentError(
            absl::StrCat("linear '", LinearOf(name), "' has both a weight and a qweight"));
      }
      const StoredTensor stored{.name = name,
                                .type = *type,
                                .offset = located.entry.offset,
                                .rows = rank == 1 ? 1 : located.entry.shape[0],
                                .cols = located.entry.shape.back(),
                                .is_one_dimensional = rank == 1};
      if (EndsWith(name, ".bias") && !expected.contains(name)) {
        WALSH_RETURN_IF_ERROR(RequireNoBias(located, stored));
        continue;
      }
      contents.tensors[name] = {.file_index = located.file_index, .tensor = stored};
    }
    WALSH_ASSIGN_OR_RETURN(dense_, MakeFileCheckpoint(std::move(contents)));
    return absl::OkStatus();
  }

  static std::string LinearOf(const std::string& tensor) {
    return tensor.substr(0, tensor.rfind('.'));
  }

  // AutoGPTQ stores zeros for the biases that a model does not have.
  absl::Status RequireNoBias(const Located& located, const StoredTensor& stored) const {
    WALSH_ASSIGN_OR_RETURN(const Matrix bias,
                           ReadStoredRows(*files_[located.file_index], stored, 0, stored.rows));
    if (std::ranges::all_of(bias.span(), [](float value) { return value == 0; })) {
      return absl::OkStatus();
    }
    return absl::UnimplementedError(absl::StrCat("tensor '", stored.name, "' is a bias that ",
                                                 config_.architecture,
                                                 " does not have, and it is not zero"));
  }

  // Zeros of version 1 are stored less one. What would be 2^bits has been read as that, as 0, and
  // with a carry into the next zero: no reader's word counts more than another's.
  static absl::Status AddOne(const std::string& name, QuantizedMatrix& matrix) {
    const int top = (1 << matrix.bits) - 1;
    for (size_t i = 0; i < matrix.zeros.size(); ++i) {
      if (matrix.zeros[i] == top) {
        const auto index = static_cast<int64_t>(i);
        return absl::InvalidArgumentError(absl::StrCat(
            "tensor '", name, ".qzeros' holds ", top, " at output ", index / matrix.groups(),
            ", group ", index % matrix.groups(), ": a zero of ", top + 1,
            ", or of 0 that has wrapped around, about which readers of format gptq do not agree"));
      }
      ++matrix.zeros[i];
    }
    return absl::OkStatus();
  }

  template <typename T>
  absl::StatusOr<std::vector<T>> ReadAll(const Located& located) const {
    std::vector<T> values(static_cast<size_t>(located.entry.size_bytes) / sizeof(T));
    const RandomAccessFile& file = *files_[located.file_index];
    WALSH_RETURN_IF_ERROR(
        file.ReadAt(located.entry.offset, std::as_writable_bytes(std::span(values))));
    WALSH_RETURN_IF_ERROR(file.CheckUnchanged());
    return values;
  }

  std::string directory_;
  SideFiles side_files_;
  ModelConfig config_;
  Settings settings_;
  TokenizerSource tokenizer_;
  std::vector<std::string> paths_;
  std::vector<std::unique_ptr<RandomAccessFile>> files_;
  Entries entries_;
  std::map<std::string, QuantizedLinear, std::less<>> linears_;
  std::unique_ptr<Checkpoint> dense_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GptqCheckpoint>> GptqCheckpoint::Open(const std::string& directory) {
  auto reader = std::make_unique<Reader>();
  WALSH_RETURN_IF_ERROR(reader->OpenFiles(directory));
  return reader;
}

}  // namespace walsh::interop
