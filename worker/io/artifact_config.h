// config.json of an artifact.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gptq_packing.h"

namespace walsh {

// The source's config.json, with embeddings untied and the weights' type bfloat16. For a GGUF file,
// and for a model with fused linears, whose artifact has their parts, one that is written from the
// configuration. quantization_config is still to be set.
absl::StatusOr<nlohmann::json> ArtifactConfig(const Checkpoint& source);

// quantization_config.checkpoint_format: GPTQ's, and of what that convention has no tensors for, or
// what needs transforms at run time (docs/artifact-format.md).
inline constexpr char kGptqFormat[] = "gptq_v2";
inline constexpr char kWalshFormat[] = "walsh";

// Whether walsh reads what `quantization_config` describes: GPTQ in the gptq_v2 convention or in
// walsh's own, head not quantized; marked as walsh's own where there are transforms at run
// time (worker/io/online_transforms.h) or a grid that has no form in that convention.
// UNIMPLEMENTED names what it does not.
absl::Status CheckQuantizationConfig(const nlohmann::json& config);

// The grid that quantization_config's member `walsh` names; kGptq where it has none. With a
// codebook, linears that an override gives other bits are kGptq all the same. UNIMPLEMENTED names
// what is not known.
absl::StatusOr<StoredGrid> ParseStoredGrid(const nlohmann::json& quantization_config);

}  // namespace walsh
