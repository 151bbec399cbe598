// What the formats that are HF directories have in common: shards, config.json, tokenizer files.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "worker/interop/tensor_sink.h"
#include "worker/io/sharded_safetensors_writer.h"

namespace walsh::interop {

// A quantized linear's width and groups.
struct LinearForm {
  std::string name;
  int bits = 0;
  int64_t group_size = 0;
  bool is_per_channel = false;
};

// Of all quantized linears, in the order of a forward pass.
absl::StatusOr<std::vector<LinearForm>> LinearForms(const ArtifactReader& artifact);
// The linears of the decoder layers that the artifact keeps in floats.
std::vector<std::string> DenseLinears(const ArtifactReader& artifact);

// The artifact's config.json.
absl::StatusOr<nlohmann::json> ConfigOfArtifact(const ArtifactReader& artifact);

class HfSink : public TensorSink {
 public:
  absl::Status BeginDense(const ExpectedTensor& tensor) override;
  absl::Status AppendDense(std::span<const uint16_t> values) override;
  absl::StatusOr<std::vector<std::string>> Finish() override;

 protected:
  // `dtype` is that of tensors which are not quantized; `config` what ConfigOfArtifact gave.
  HfSink(const ArtifactReader& artifact, nlohmann::json config, StorageType dtype,
         const ExportOptions& options, std::string directory);

  // config.json as it will be written.
  nlohmann::json& config() { return config_; }
  ShardedSafetensorsWriter& weights() { return weights_; }
  // Rows of floats as `dtype`. FAILED_PRECONDITION names the tensor where a value becomes infinite.
  absl::Status AppendFloats(const std::string& tensor, std::span<const float> values);
  absl::Status BeginFloats(const std::string& tensor, const std::vector<int64_t>& shape);

 private:
  const StorageType dtype_;
  const std::string directory_;
  std::map<std::string, std::string> side_files_;
  nlohmann::json config_;
  ShardedSafetensorsWriter weights_;
  std::string current_;  // the dense tensor that is being written
};

}  // namespace walsh::interop
