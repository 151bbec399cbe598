#include "worker/io/hf_directory.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/io/random_access_file.h"

namespace walsh {
namespace {

using nlohmann::json;

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

std::string Get(const SideFiles& files, const char* name) {
  const auto it = files.find(name);
  return it == files.end() ? "" : it->second;
}

absl::StatusOr<json> ParseSideFile(const SideFiles& files, const char* name) {
  return ParseBoundedJson(
      name, Get(files, name),
      {.bytes_max = limits::kConfigFileBytesMax, .depth_max = limits::kJsonDepthMax});
}

// Chat models often list their end-of-turn token here and not in config.json.
absl::Status AddGenerationEos(const SideFiles& files, ModelConfig& config) {
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
absl::StatusOr<std::string> TemplateFromTokenizerConfig(const SideFiles& files) {
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

// A plain file name of a shard: nothing that could lead out of the directory.
bool IsShardName(const std::string& name) {
  const std::string suffix = kShardSuffix;
  const bool is_plain = std::all_of(name.begin(), name.end(), [](char c) {
    return c > 0x20 && c < 0x7f && c != '/' && c != '\\';
  });
  return is_plain && name.size() > suffix.size() && name.size() <= 255 && name.front() != '.' &&
         name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
}

}  // namespace

std::span<const char* const> SideFileNames() { return kSideFiles; }

absl::StatusOr<SideFiles> ReadSideFiles(const std::string& directory) {
  SideFiles files;
  for (const char* name : kSideFiles) {
    auto contents = ReadSmallFile(absl::StrCat(directory, "/", name), limits::kJsonFileBytesMax);
    if (absl::IsNotFound(contents.status())) continue;
    WALSH_RETURN_IF_ERROR(contents.status());
    files[name] = *std::move(contents);
  }
  return files;
}

absl::StatusOr<ModelConfig> ConfigOf(const SideFiles& files) {
  WALSH_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(Get(files, "config.json")));
  WALSH_RETURN_IF_ERROR(AddGenerationEos(files, config));
  return config;
}

absl::StatusOr<TokenizerSource> TokenizerSourceOf(const SideFiles& files) {
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

absl::StatusOr<WeightMap> ParseWeightMap(const std::string& text) {
  WALSH_ASSIGN_OR_RETURN(const json index, ParseBoundedJson(kWeightsIndexFile, text,
                                                            {.bytes_max = limits::kJsonFileBytesMax,
                                                             .depth_max = limits::kJsonDepthMax}));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(kWeightsIndexFile, ": field 'weight_map' is missing or no object"));
  }
  if (map->size() > static_cast<size_t>(limits::kTensorsMax)) {
    return absl::InvalidArgumentError(absl::StrCat(kWeightsIndexFile, ": ", map->size(),
                                                   " tensors, at most ", limits::kTensorsMax));
  }
  WeightMap shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !IsShardName(shard.get<std::string>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(kWeightsIndexFile, ": the shard of tensor '", tensor.substr(0, 256),
                       "' is no plain file name that ends in ", kShardSuffix));
    }
    shards[tensor] = shard.get<std::string>();
  }
  return shards;
}

absl::StatusOr<std::optional<WeightMap>> ReadWeightMap(const std::string& directory) {
  const auto single = OpenRandomAccessFile(absl::StrCat(directory, "/", kSingleWeightsFile));
  if (single.ok()) return std::optional<WeightMap>();
  if (!absl::IsNotFound(single.status())) return single.status();
  const auto index =
      ReadSmallFile(absl::StrCat(directory, "/", kWeightsIndexFile), limits::kJsonFileBytesMax);
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(
        absl::StrCat("the model has neither ", kSingleWeightsFile, " nor ", kWeightsIndexFile));
  }
  WALSH_RETURN_IF_ERROR(index.status());
  WALSH_ASSIGN_OR_RETURN(WeightMap map, ParseWeightMap(*index));
  return std::optional<WeightMap>(std::move(map));
}

absl::StatusOr<std::vector<std::string>> ShardsOf(const WeightMap& map) {
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : map) shards.insert(shard);
  if (shards.size() > static_cast<size_t>(limits::kShardsMax)) {
    return absl::InvalidArgumentError(absl::StrCat(kWeightsIndexFile, ": ", shards.size(),
                                                   " shards, at most ", limits::kShardsMax));
  }
  return std::vector<std::string>(shards.begin(), shards.end());
}

}  // namespace walsh
