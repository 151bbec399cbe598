// The small files of a HF model directory, and which of its files hold the weights.
//
// Checkpoints and artifacts are both such directories.
//
// Errors:  INVALID_ARGUMENT  malformed (file and field named); NOT_FOUND no tokenizer, no weights
// Threads: safe.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"

namespace walsh {

// By name.
using SideFiles = std::map<std::string, std::string>;

// config.json, tokenizer files, licence: the names that are looked for, and those that are there.
std::span<const char* const> SideFileNames();
absl::StatusOr<SideFiles> ReadSideFiles(const std::string& directory);

// ParseModelConfig of config.json, with the end tokens of generation_config.json added: chat models
// often list their end of turn only there.
absl::StatusOr<ModelConfig> ConfigOf(const SideFiles& files);

absl::StatusOr<TokenizerSource> TokenizerSourceOf(const SideFiles& files);

inline constexpr char kSingleWeightsFile[] = "model.safetensors";
inline constexpr char kWeightsIndexFile[] = "model.safetensors.index.json";

using WeightMap = std::map<std::string, std::string>;  // tensor to shard

// The member weight_map of an index file: shards are plain file names that end in .safetensors.
absl::StatusOr<WeightMap> ParseWeightMap(const std::string& index_json);

// The index's map from tensors to shards; nullopt where model.safetensors holds everything, which
// wins over an index as in transformers.
absl::StatusOr<std::optional<WeightMap>> ReadWeightMap(const std::string& directory);

// The distinct shards, in order; INVALID_ARGUMENT beyond limits::kShardsMax.
absl::StatusOr<std::vector<std::string>> ShardsOf(const WeightMap& map);

}  // namespace walsh
