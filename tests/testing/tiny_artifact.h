// Artifacts of small models, quantized by round-to-nearest: no calibration, no rotation.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/tensor/matrix.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::testing {

// Good enough to have something to store. `group_size` −1: one group per output.
QuantizedMatrix RoundToNearest(const Matrix& weights, int bits, int64_t group_size,
                               bool symmetric = false);

struct TinyArtifactOptions {
  int bits = 4;
  int64_t group_size = 32;
  bool symmetric = false;
  std::map<std::string, int> bits_of = {};  // of single linears; 0 leaves one in floats
  nlohmann::json quantization_config = {};  // members to add or replace; null removes one
  // Changes each linear before it is written.
  std::function<void(const std::string& name, QuantizedMatrix&)> edit = {};
  // OrderedMatrix::input_order of each linear, where quantization_config says desc_act; its groups
  // are of inputs in that order.
  std::function<std::vector<int32_t>(const std::string& name, int64_t cols)> input_order = {};
};

absl::StatusOr<ArtifactInfo> WriteTinyArtifact(const Checkpoint& source,
                                               const std::string& directory,
                                               const TinyArtifactOptions& options = {});

}  // namespace walsh::testing
