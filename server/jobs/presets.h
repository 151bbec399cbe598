// Recipes with names: the rows of the papers that walsh can repeat, and what it does best.
//
// A preset is a config that a job's own is laid over. Rows of papers have the recipe of the code
// that made them: plain GPTQ, columns in natural order, a clip search; ours have what was measured
// to be best (docs/quality.md, which has each preset's whole protocol). Groups are 128 where that
// divides every linear's input, else what the service chooses, so that a preset takes any model.
//
// Threads: safe
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "walsh/v1/quantization.pb.h"

namespace walsh::jobs {

// In the order in which they are listed. `config` of each has everything that makes the result, but
// texts, which are files of the worker.
const std::vector<v1::QuantizationPreset>& Presets();

// Lays the config over the preset that it names; without a name it stays as it is. Set fields
// count, overrides stand after the preset's. What the preset has for its method, its activations or
// its KV cache alone goes where the config has another method or other bits.
// INVALID_ARGUMENT for an unknown name, with those that there are.
absl::Status ExpandPreset(v1::QuantizationConfig* config);

}  // namespace walsh::jobs
