// An artifact in the format of another program.
//
//   dequantized         a plain HF checkpoint: of every weight the float that its code stands for
//
//   gptq_v2, gptq       GPTQ checkpoints, which differ in how a zero is stored: as it is, or less 1
//
//   compressed-tensors  the library's "pack-quantized", 4 and 8 bits
//
//   gguf                one file of architecture llama, where one of ggml's types holds every
//                       weight exactly: Q4_0 or Q4_1 for 4 bits, Q8_0 for 8
//
// Only what is exact is exported (but for rounding to the type that `dtype` names): an artifact
// that a format cannot hold is refused, before anything is written where that can be told. What
// needs transforms at run time fits none of them. Rotations are folded into the weights, so no
// reader needs to know of them. docs/interoperability.md has the layouts.
//
// Errors:  FAILED_PRECONDITION  the artifact does not fit the format; the message names member or
//                               linear and says why
//          INVALID_ARGUMENT     a dtype that the format does not have
//          UNIMPLEMENTED        an architecture or tokenizer that GGUF has no name for
//          those of reading the artifact and of writing files
// Threads: one.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/artifact.h"
#include "worker/io/storage_type.h"

namespace walsh::interop {

enum class ExportFormat { kDequantized, kGptqV2, kGptq, kCompressedTensors, kGguf };

// As users write it: "compressed-tensors".
std::string_view FormatName(ExportFormat format);

struct ExportOptions {
  ExportFormat format = ExportFormat::kDequantized;
  // kBf16, kF16 or kF32: of all weights for dequantized, of embeddings and head for gguf. Others
  // keep what is not quantized as the artifact has it, BF16.
  StorageType dtype = StorageType::kBf16;
  std::string model_name;  // of the GGUF file
  int64_t shard_bytes_max = kShardBytesMax;
};

struct ExportReport {
  std::vector<std::string> files;
  int64_t size_bytes = 0;  // of all of them
  std::vector<std::string> warnings;
};

// Called after each tensor. A status that is not OK ends the export and becomes its result.
using ExportProgress = std::function<absl::Status(int64_t tensors_done, int64_t tensors_total)>;

// Whether the format can hold the artifact, as far as its configuration tells.
absl::Status CheckExportable(const ArtifactReader& artifact, const ExportOptions& options);

// At most this much disk.
int64_t ExportBytesMax(const ModelConfig& config, const ExportOptions& options);

// Writes into `directory`, which exists, is empty and temporary: its owner publishes it, or removes
// it after an error. The same artifact and options give the same bytes.
absl::StatusOr<ExportReport> ExportArtifact(const ArtifactReader& artifact,
                                            const ExportOptions& options,
                                            const std::string& directory,
                                            const ExportProgress& progress);

// Beside the exported files: what was exported from what.
inline constexpr char kExportManifestFile[] = "walsh-export.json";

}  // namespace walsh::interop
