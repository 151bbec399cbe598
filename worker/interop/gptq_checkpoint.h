// A HF directory that another program quantized with GPTQ: AutoGPTQ, GPTQModel, optimum.
//
// Read are checkpoint formats gptq (version 1, zeros stored less one) and gptq_v2; 2, 3, 4 and 8
// bits, which may differ between linears; any group size that divides a linear's inputs; symmetric
// and asymmetric; act-order (desc_act), where g_idx says which group an input is of. Weights of
// linears are what the integers stand for, exactly; everything else is in floats.
//
// As a Checkpoint it gives every weight in floats, and so can be compared with what is made of it.
//
// Source:  AutoGPTQ's and GPTQModel's QuantLinear
// Errors:  those of worker/io/checkpoint.h. UNIMPLEMENTED also names another checkpoint format, a
//          quantized head, biases that the architecture does not have; INVALID_ARGUMENT a zero of
//          version 1 that its readers do not agree about
// Threads: const methods are safe from several threads.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gptq_packing.h"

namespace walsh::interop {

// Of older AutoGPTQ checkpoints, beside a config.json without quantization_config.
inline constexpr char kOldConfigFile[] = "quantize_config.json";

class GptqCheckpoint : public Checkpoint {
 public:
  static absl::StatusOr<std::unique_ptr<GptqCheckpoint>> Open(const std::string& directory);

  // `name` without suffix: "model.layers.0.mlp.down_proj".
  virtual bool IsQuantized(std::string_view name) const = 0;
  virtual absl::StatusOr<OrderedMatrix> ReadOrdered(std::string_view name) const = 0;

  // As the checkpoint's configuration says.
  virtual int bits() const = 0;
  virtual int64_t group_size() const = 0;  // −1: per channel
};

}  // namespace walsh::interop
