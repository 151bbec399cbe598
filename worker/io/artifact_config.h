// config.json of an artifact.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"

namespace walsh {

// The source's config.json, with embeddings untied and the weights' type bfloat16. For a GGUF file,
// and for a model with fused linears, whose artifact has their parts, one that is written from the
// configuration. quantization_config is still to be set.
absl::StatusOr<nlohmann::json> ArtifactConfig(const Checkpoint& source);

// checkpoint_format of what the gptq_v2 convention has no tensors for (docs/artifact-format.md).
inline constexpr const char* kWalshFormat = "walsh";

// Whether walsh reads what `quantization_config` describes: GPTQ in the gptq_v2 convention or in
// walsh's own, columns in order, head not quantized, no transforms at run time. UNIMPLEMENTED names
// what it does not.
absl::Status CheckQuantizationConfig(const nlohmann::json& config);

}  // namespace walsh
