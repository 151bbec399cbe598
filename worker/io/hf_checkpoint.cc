// A HF model directory: config.json, safetensors weights, tokenizer files.

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
#include "worker/io/hf_directory.h"
#include "worker/io/safetensors.h"

namespace walsh {
namespace {

using nlohmann::json;

absl::Status RefuseQuantizedSource(const SideFiles& files) {
  WALSH_ASSIGN_OR_RETURN(const json config,
                         ParseBoundedJson("config.json", files.at("config.json"),
                                          {.bytes_max = limits::kConfigFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  if (!config.contains("quantization_config")) return absl::OkStatus();
  return absl::UnimplementedError(
      "config.json: the checkpoint is quantized already (quantization_config); walsh reads "
      "checkpoints in F32, F16 and BF16, and GGUF files");
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
    for (FusedTensor& tensor : FusedTensors(contents.config)) {
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
      return absl::InvalidArgumentError(absl::StrCat(kWeightsIndexFile, ": tensor '",
                                                     tensor.substr(0, 256), "' is not in ", shard));
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
  WALSH_ASSIGN_OR_RETURN(const std::optional<WeightMap> map, ReadWeightMap(directory));
  WeightCollector collector(directory, contents);
  if (!map.has_value()) return collector.AddFile(kSingleWeightsFile);
  WALSH_ASSIGN_OR_RETURN(const std::vector<std::string> shards, ShardsOf(*map));
  for (const std::string& shard : shards) WALSH_RETURN_IF_ERROR(collector.AddFile(shard));
  contents.fingerprint_paths.push_back(absl::StrCat(directory, "/", kWeightsIndexFile));
  return collector.CheckIndex(*map);
}

// HF's files of some families hold norms less an offset.
void AddNormOffset(CheckpointContents& contents) {
  for (const ExpectedTensor& tensor : ExpectedTensors(contents.config)) {
    const auto it = contents.tensors.find(tensor.name);
    if (!tensor.is_norm || it == contents.tensors.end()) continue;
    it->second.tensor.added = contents.config.norm_offset;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHfCheckpoint(const std::string& directory) {
  CheckpointContents contents;
  contents.format_family = "safetensors";
  WALSH_ASSIGN_OR_RETURN(contents.side_files, ReadSideFiles(directory));
  if (!contents.side_files.contains("config.json")) {
    return absl::NotFoundError(absl::StrCat("'", BaseName(directory), "' has no config.json"));
  }
  WALSH_ASSIGN_OR_RETURN(contents.config, ConfigOf(contents.side_files));
  WALSH_RETURN_IF_ERROR(RefuseQuantizedSource(contents.side_files));
  WALSH_ASSIGN_OR_RETURN(contents.tokenizer, TokenizerSourceOf(contents.side_files));
  for (const char* name : {"LICENSE.txt", "LICENSE"}) {
    const auto it = contents.side_files.find(name);
    if (it != contents.side_files.end()) contents.license = it->second;
  }
  for (const auto& [name, text] : contents.side_files) {
    contents.fingerprint_paths.push_back(absl::StrCat(directory, "/", name));
  }
  WALSH_RETURN_IF_ERROR(CollectWeights(directory, contents));
  AddNormOffset(contents);
  return MakeFileCheckpoint(std::move(contents));
}

}  // namespace walsh
