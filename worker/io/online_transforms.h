// What a model does at run time beside its weights: rotations that could not be folded into them,
// and rounding of activations and of the KV cache.
//
// Rotations are block-diagonal, of equal blocks that are orthonormal Hadamard or Walsh matrices
// without random signs; one block of the whole width is a global rotation. In an artifact they are
// the member `online_transforms` of quantization_config (docs/artifact-format.md); where it is not
// empty, `quant_method` is left out and `checkpoint_format` is "walsh", so that a reader that knows
// plain GPTQ only refuses the artifact and does not serve it wrongly.
//
// Source:  QuaRot (arXiv 2404.00456): R3, R4, and the quantizers' conventions
// Errors:  INVALID_ARGUMENT  a value that does not fit the model; names member, limit and value
//          UNIMPLEMENTED     a member or a kind that this version does not know
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/model_config.h"

namespace walsh {

struct OnlineTransforms {
  struct BlockRotation {
    int64_t block = 0;     // order of the matrix; 0: no rotation
    bool sequency = true;  // Walsh; false: Hadamard in natural order
    bool operator==(const BlockRotation&) const = default;
  };
  struct Rounding {
    static constexpr int kOff = 16;
    int bits = kOff;
    // Adjacent values of a row that share a grid; kWholeRow: all of the row.
    int64_t group_size = kWholeRow;
    bool symmetric = false;
    double clip_ratio = 1;  // of the group's largest value, that the grid reaches; from 0.01 to 1
    bool is_on() const { return bits != kOff; }
    bool operator==(const Rounding&) const = default;
  };
  static constexpr int64_t kWholeRow = -1;

  BlockRotation down_input;  // R4: of the input of down_proj
  BlockRotation query_key;   // R3: of Q and K after RoPE; a block is a head
  Rounding activations;      // of the inputs of all quantized linears
  Rounding kv_cache;         // of K and V, by token

  bool empty() const { return *this == OnlineTransforms(); }
  // Without the rounding: the same function as the original model's.
  OnlineTransforms rotations() const {
    return {.down_input = down_input, .query_key = query_key, .activations = {}, .kv_cache = {}};
  }
  bool operator==(const OnlineTransforms&) const = default;
};

// The clip ratios of values of so many bits where none is asked for: QuaRot's at its 4 bits; at 8
// what is cut off costs more than the finer grid gains.
double DefaultActivationClip(int bits);
double DefaultKvClip(int bits);

// Whether a model of this shape can do it, but for the existence of the Hadamard matrices.
absl::Status CheckOnlineTransforms(const OnlineTransforms& online, const ModelConfig& config);

// The member `online_transforms`; members of it that do nothing are left out.
nlohmann::json OnlineTransformsJson(const OnlineTransforms& online);
// The transforms of `quantization_config`, checked; none where it has no such member.
absl::StatusOr<OnlineTransforms> ParseOnlineTransforms(const nlohmann::json& quantization_config,
                                                       const ModelConfig& config);

}  // namespace walsh
