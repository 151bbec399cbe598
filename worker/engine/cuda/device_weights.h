// A model's weights on the device, in the layout that its products read.
//
// Linears with one input are one product: q, k and v; gate and up. Where their widths, groups or
// grids differ, or the order of their columns, a product has several parts; a linear that was left
// unquantized is one of its own.
//
// What is done to a product's input first costs as little as can be: a Walsh matrix is a Hadamard
// matrix whose input is in another order, and down_proj's input is in whatever order the rows of
// gate and up are in. So both that order (R4) and one of down_proj's columns (act-order) are put
// into those rows, and what is left is a Hadamard matrix. Columns of other linears in another order
// are gathered by the product (LowBitMatmulParams::input_order).
//
// Errors:  those of worker/io/artifact.h; UNIMPLEMENTED names what no kernel takes;
//          RESOURCE_EXHAUSTED
// Memory:  beside the weights, two layers as they are stored while they are loaded
// Threads: loaded by one thread, then read by any
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/serving_layout.h"

namespace walsh::engine::cuda {

using kernels::cuda::bf16;
using kernels::cuda::Context;
using kernels::cuda::DeviceBuffer;
using kernels::cuda::ServingMatrix;

struct Product {
  struct Part {
    ServingMatrix weights;
    DeviceBuffer<bf16> dense;  // [rows, cols] instead, of a linear left unquantized
    int64_t first_row = 0;     // of the product's outputs
    int64_t rows = 0;
    DeviceBuffer<int32_t> input_order;  // [cols]: column c multiplies input_order[c]; empty: c
  };
  std::vector<Part> parts;
  DeviceBuffer<float> bias;  // [rows] or empty
  int64_t rows = 0;          // outputs of all parts
  int64_t cols = 0;
  int64_t rotation_block = 0;  // of the Hadamard matrices that the input is multiplied by; 0: none

  // Of a part's outputs, or null.
  const float* BiasOf(const Part& part) const {
    return bias.data() == nullptr ? nullptr : bias.data() + part.first_row;
  }
  // Whether anything is done to the input.
  bool has_transform() const;
  int64_t size_bytes() const;
};

struct LayerWeights {
  DeviceBuffer<float> input_norm, post_attention_norm;  // [hidden]
  DeviceBuffer<float> q_norm, k_norm;                   // [head_dim] or empty
  // Of what a sublayer adds to the residual stream, [hidden]; empty where the family has none.
  DeviceBuffer<float> attention_output_norm, mlp_output_norm;
  Product qkv, o, gate_up, down;
};

struct DeviceWeights {
  DeviceBuffer<bf16> embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  DeviceBuffer<float> final_norm;  // [hidden]
  ServingMatrix head;              // [vocab, hidden] at 8 bits
  DeviceBuffer<float> inverse_frequencies, sliding_inverse_frequencies;  // [head_dim / 2]

  // Everything that a step for one sequence reads but for norms, biases and a row of the embedding.
  int64_t packed_bytes() const;
  int64_t size_bytes() const;
};

// Whether the kernels serve it, but for its KV cache (kv_storage.h): UNIMPLEMENTED names the first
// thing that they do not.
absl::Status CheckServable(const ArtifactReader& artifact);
// Returns when all is there.
absl::StatusOr<DeviceWeights> LoadWeights(Context& context, const ArtifactReader& artifact);

}  // namespace walsh::engine::cuda
