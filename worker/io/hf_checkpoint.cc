// A HF model directory: config.json, safetensors weights, tokenizer files.

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/io/expected_tensors.h"
#include "worker/io/file_checkpoint.h"
#include "worker/io/safetensors.h"

namespace walsh {
namespace {

using nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kShardSuffix[] = ".safetensors";

constexpr std::array<const char*, 12> kSideFiles = {"config.json",
                                                    "generation_config.json",
                                                    "tokenizer.json",
                                                    "tokenizer.model",
                                                    "tokenizer_config.json",
                                                    "special_tokens_map.json",
                                                    "added_tokens.json",
                                                    "vocab.json",
                                                    "merges.txt",
                                                    "chat_template.jinja",
                                                    "LICENSE",
                                                    "LICENSE.txt"};

// The contents of those that are there.
absl::StatusOr<std::map<std::string, std::string>> ReadSideFiles(const std::string& directory) {
  std::map<std::string, std::string> files;
  for (const char* name : kSideFiles) {
    auto contents = ReadSmallFile(absl::StrCat(directory, "/", name), limits::kJsonFileBytesMax);
    if (absl::IsNotFound(contents.status())) continue;
    WALSH_RETURN_IF_ERROR(contents.status());
    files[name] = *std::move(contents);
  }
  return files;
}

std::string Get(const std::map<std::string, std::string>& files, const char* name) {
  const auto it = files.find(name);
  return it == files.end() ? "" : it->second;
}

absl::StatusOr<json> ParseSideFile(const std::map<std::string, std::string>& files,
                                   const char* name) {
  return ParseBoundedJson(
      name, Get(files, name),
      {.bytes_max = limits::kConfigFileBytesMax, .depth_max = limits::kJsonDepthMax});
}

absl::Status RefuseQuantizedSource(const std::map<std::string, std::string>& files) {
  WALSH_ASSIGN_OR_RETURN(const json config, ParseSideFile(files, "config.json"));
  if (!config.contains("quantization_config")) return absl::OkStatus();
  return absl::UnimplementedError(
      "config.json: the checkpoint is quantized already (quantization_config); walsh reads F32, "
      "F16 "
      "and BF16 checkpoints and GGUF files");
}

// Chat models often list their end-of-turn token here and not in config.json.
absl::Status AddGenerationEos(const std::map<std::string, std::string>& files,
                              ModelConfig& config) {
  if (!files.contains("generation_config.json")) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const json generation, ParseSideFile(files, "generation_config.json"));
  const auto eos = generation.find("eos_token_id");
  if (eos == generation.end() || eos->is_null()) return absl::OkStatus();
  const json list = eos->is_array() ? *eos : json::array({*eos});
  for (const json& id : list) {
    if (!id.is_number_integer() || id < 0 || id >= config.vocab ||
        config.eos_tokens.size() >= static_cast<size_t>(limits::kStopTokensMax)) {
      return absl::InvalidArgumentError(
          absl::StrCat("generation_config.json: field 'eos_token_id' must hold at most ",
                       limits::kStopTokensMax, " ids from 0 to ", config.vocab - 1));
    }
    const auto token = id.get<int32_t>();
    if (std::find(config.eos_tokens.begin(), config.eos_tokens.end(), token) ==
        config.eos_tokens.end()) {
      config.eos_tokens.push_back(token);
    }
  }
  return absl::OkStatus();
}

// A string, or a list of {name, template} of which "default" counts.
absl::StatusOr<std::string> TemplateFromTokenizerConfig(
    const std::map<std::string, std::string>& files) {
  if (!files.contains("tokenizer_config.json")) return std::string();
  WALSH_ASSIGN_OR_RETURN(const json config, ParseSideFile(files, "tokenizer_config.json"));
  const auto value = config.find("chat_template");
  if (value == config.end() || value->is_null()) return std::string();
  if (value->is_string()) return value->get<std::string>();
  if (value->is_array()) {
    for (const json& entry : *value) {
      if (!entry.is_object() || !entry.contains("template")) continue;
      if (entry.value("name", json()) != "default" || !entry["template"].is_string()) continue;
      return entry["template"].get<std::string>();
    }
    return std::string();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer_config.json: field 'chat_template' is of type ", value->type_name(),
                   ", must be a string or a list"));
}

absl::StatusOr<TokenizerSource> ReadTokenizer(const std::map<std::string, std::string>& files) {
  TokenizerSource source;
  source.tokenizer_json = Get(files, "tokenizer.json");
  if (source.tokenizer_json.empty()) source.sentencepiece_model = Get(files, "tokenizer.model");
  if (source.tokenizer_json.empty() && source.sentencepiece_model.empty()) {
    return absl::NotFoundError("the model has neither tokenizer.json nor tokenizer.model");
  }
  source.tokenizer_config_json = Get(files, "tokenizer_config.json");
  source.chat_template = Get(files, "chat_template.jinja");
  if (source.chat_template.empty()) {
    WALSH_ASSIGN_OR_RETURN(source.chat_template, TemplateFromTokenizerConfig(files));
  }
  return source;
}

// A plain file name of a shard: nothing that could lead out of the directory.
bool IsShardName(const std::string& name) {
  const std::string suffix = kShardSuffix;
  const bool is_plain = std::all_of(name.begin(), name.end(), [](char c) {
    return c > 0x20 && c < 0x7f && c != '/' && c != '\\';
  });
  return is_plain && name.size() > suffix.size() && name.size() <= 255 && name.front() != '.' &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

using WeightMap = std::map<std::string, std::string>;  // tensor to shard

absl::StatusOr<WeightMap> ParseIndex(const std::string& text) {
  WALSH_ASSIGN_OR_RETURN(const json index, ParseBoundedJson(kIndexFile, text,
                                                            {.bytes_max = limits::kJsonFileBytesMax,
                                                             .depth_max = limits::kJsonDepthMax}));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": field 'weight_map' is missing or no object"));
  }
  if (map->size() > static_cast<size_t>(limits::kTensorsMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": ", map->size(), " tensors, at most ", limits::kTensorsMax));
  }
  WeightMap shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !IsShardName(shard.get<std::string>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(kIndexFile, ": the shard of tensor '", tensor.substr(0, 256),
                       "' is no plain file name that ends in ", kShardSuffix));
    }
    shards[tensor] = shard.get<std::string>();
  }
  return shards;
}

// model.safetensors wins over an index, as in transformers.
absl::StatusOr<std::optional<WeightMap>> FindWeightMap(const std::string& directory) {
  const auto single = OpenRandomAccessFile(absl::StrCat(directory, "/", kSingleFile));
  if (single.ok()) return std::optional<WeightMap>();
  if (!absl::IsNotFound(single.status())) return single.status();
  const auto index =
      ReadSmallFile(absl::StrCat(directory, "/", kIndexFile), limits::kJsonFileBytesMax);
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(
        absl::StrCat("the model has neither ", kSingleFile, " nor ", kIndexFile));
  }
  WALSH_RETURN_IF_ERROR(index.status());
  WALSH_ASSIGN_OR_RETURN(WeightMap map, ParseIndex(*index));
  return std::optional<WeightMap>(std::move(map));
}

std::optional<StorageType> FloatType(const std::string& dtype) {
  if (dtype == "F32") return StorageType::kF32;
  if (dtype == "F16") return StorageType::kF16;
  if (dtype == "BF16") return StorageType::kBf16;
  return std::nullopt;
}

class WeightCollector {
 public:
  WeightCollector(const std::string& directory, CheckpointContents& contents)
      : directory_(directory), contents_(contents) {
    for (ExpectedTensor& tensor : ExpectedTensors(contents.config)) {
      needed_.insert(std::move(tensor.name));
    }
  }

  absl::Status AddFile(const std::string& name) {
    const std::string path = absl::StrCat(directory_, "/", name);
    WALSH_ASSIGN_OR_RETURN(std::unique_ptr<RandomAccessFile> file, OpenRandomAccessFile(path));
    WALSH_ASSIGN_OR_RETURN(const std::vector<SafetensorsEntry> entries, ParseSafetensors(*file));
    for (const SafetensorsEntry& entry : entries) WALSH_RETURN_IF_ERROR(AddTensor(name, entry));
    contents_.files.push_back(std::move(file));
    contents_.fingerprint_paths.push_back(path);
    return absl::OkStatus();
  }

  // Every tensor of the index lies in the shard that it names.
  absl::Status CheckIndex(const WeightMap& map) const {
    for (const auto& [tensor, shard] : map) {
      const auto it = shard_of_.find(tensor);
      if (it != shard_of_.end() && it->second == shard) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(kIndexFile, ": tensor '", tensor.substr(0, 256), "' is not in ", shard));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status AddTensor(const std::string& file, const SafetensorsEntry& entry) {
    if (const auto [it, is_new] = shard_of_.emplace(entry.name, file); !is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor '", entry.name, "' is in both ", it->second, " and ", file));
    }
    const bool is_needed = needed_.contains(entry.name);
    const std::optional<StorageType> type = FloatType(entry.dtype);
    if (!type.has_value()) {
      if (!is_needed) return absl::OkStatus();
      return absl::UnimplementedError(absl::StrCat(file, ": tensor '", entry.name, "': dtype ",
                                                   entry.dtype,
                                                   ", weights are read as F32, F16 or BF16"));
    }
    const size_t rank = entry.shape.size();
    if (rank != 1 && rank != 2) {
      if (!is_needed) return absl::OkStatus();
      return absl::InvalidArgumentError(absl::StrCat(file, ": tensor '", entry.name, "' has ", rank,
                                                     " dimensions, must have 1 or 2"));
    }
    contents_.tensors[entry.name] = {.file_index = contents_.files.size(),
                                     .tensor = {.name = entry.name,
                                                .type = *type,
                                                .offset = entry.offset,
                                                .rows = rank == 1 ? 1 : entry.shape[0],
                                                .cols = entry.shape.back(),
                                                .is_one_dimensional = rank == 1}};
    return absl::OkStatus();
  }

  const std::string directory_;
  CheckpointContents& contents_;
  std::set<std::string> needed_;
  std::map<std::string, std::string> shard_of_;
};

absl::Status CollectWeights(const std::string& directory, CheckpointContents& contents) {
  WALSH_ASSIGN_OR_RETURN(const std::optional<WeightMap> map, FindWeightMap(directory));
  WeightCollector collector(directory, contents);
  if (!map.has_value()) return collector.AddFile(kSingleFile);
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : *map) shards.insert(shard);
  if (shards.size() > static_cast<size_t>(limits::kShardsMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat(kIndexFile, ": ", shards.size(), " shards, at most ", limits::kShardsMax));
  }
  for (const std::string& shard : shards) WALSH_RETURN_IF_ERROR(collector.AddFile(shard));
  contents.fingerprint_paths.push_back(absl::StrCat(directory, "/", kIndexFile));
  return collector.CheckIndex(*map);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHfCheckpoint(const std::string& directory) {
  CheckpointContents contents;
  contents.format_family = "safetensors";
  WALSH_ASSIGN_OR_RETURN(contents.side_files, ReadSideFiles(directory));
  if (!contents.side_files.contains("config.json")) {
    return absl::NotFoundError(absl::StrCat("'", BaseName(directory), "' has no config.json"));
  }
  WALSH_ASSIGN_OR_RETURN(contents.config, ParseModelConfig(contents.side_files["config.json"]));
  WALSH_RETURN_IF_ERROR(RefuseQuantizedSource(contents.side_files));
  WALSH_RETURN_IF_ERROR(AddGenerationEos(contents.side_files, contents.config));
  WALSH_ASSIGN_OR_RETURN(contents.tokenizer, ReadTokenizer(contents.side_files));
  contents.license = Get(contents.side_files, "LICENSE");
  if (contents.license.empty()) contents.license = Get(contents.side_files, "LICENSE.txt");
  for (const auto& [name, text] : contents.side_files) {
    contents.fingerprint_paths.push_back(absl::StrCat(directory, "/", name));
  }
  WALSH_RETURN_IF_ERROR(CollectWeights(directory, contents));
  return MakeFileCheckpoint(std::move(contents));
}

}  // namespace walsh
