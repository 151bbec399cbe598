// The tensors that a configuration implies, and whether a checkpoint has exactly those.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/io/model_config.h"

namespace walsh {

struct ExpectedTensor {
  std::string name;  // HF's
  int64_t rows = 0;  // out; 1 for a vector
  int64_t cols = 0;  // in
  bool is_one_dimensional = false;
  bool is_norm = false;  // of which files of some families leave out norm_offset
};

// In the order of a forward pass. Without the head when embeddings are tied.
std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config);

// A matrix of the file that holds the rows of several of those, one behind the other.
struct FusedTensor {
  std::string name;
  std::vector<ExpectedTensor> parts;
  int64_t rows() const;
};
// Empty where the configuration has no fused linears.
std::vector<FusedTensor> FusedTensors(const ModelConfig& config);

struct TensorShape {
  int64_t rows = 0;
  int64_t cols = 0;
  bool is_one_dimensional = false;
};

// INVALID_ARGUMENT when a tensor is missing or has another shape, or when a layer has tensors that
// the configuration denies (biases, layers beyond the last): silently left out they would change
// the model. Other names, such as rotary_emb.inv_freq, are ignored.
absl::Status CheckTensors(const ModelConfig& config,
                          const std::map<std::string, TensorShape, std::less<>>& present);

}  // namespace walsh
