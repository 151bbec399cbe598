// An artifact of a checkpoint that another program quantized.
//
// Integers, scales and zeros are taken over as they are, and so is the order of act-order's inputs:
// the linears stand for exactly the same weights. What is not quantized becomes BF16, as in every
// artifact, which rounds the F16 that most GPTQ checkpoints have by up to 2^-9 of a value.
// walsh.json says that the model is imported: how it was calibrated and how good it is, is not ours
// to say.
//
// Errors:  those of GptqCheckpoint and of writing an artifact; CANCELLED as `progress` says
// Threads: one.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "worker/interop/gptq_checkpoint.h"

namespace walsh::interop {

// Called after each tensor. A status that is not OK ends the import and becomes its result.
using ImportProgress = std::function<absl::Status(int64_t tensors_done, int64_t tensors_total)>;

// Creates `directory`, which is temporary until its owner publishes it.
absl::Status ImportGptq(const GptqCheckpoint& source, const std::string& directory, int n_threads,
                        const ImportProgress& progress);

}  // namespace walsh::interop
