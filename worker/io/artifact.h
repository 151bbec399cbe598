// A quantized model on disk: a HF directory that other tools read, plus walsh.json.
//
//   config.json              of the source, with tie_word_embeddings false and quantization_config
//   in
//                            the gptq_v2 convention
//   model-0000N-of-0000M.safetensors, model.safetensors.index.json
//       <linear>.qweight [in/32·bits, out] int32, .qzeros [groups, out/32·bits] int32, .scales
//       [groups, out] F16, .g_idx [in] int32; embeddings, head and norms BF16
//   tokenizer files          of the source; for a GGUF source written from its vocabulary
//   walsh.json               source, options, rotation, calibration fingerprint, figures, and
//   SHA-256 of
//                            every other file in 64 MiB chunks
//
// Layout and fields: docs/artifact-format.md. A writer's directory is temporary until the caller
// publishes it (common/publish.h); a reader refuses a directory whose files differ from walsh.json.
//
// Errors:  as worker/io/checkpoint.h; DATA_LOSS names the file whose digest differs
// Threads: a reader's const methods are safe from several threads; a writer is used by one.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh {

struct ArtifactInfo {
  int bits = 0;
  int64_t group_size = 0;  // −1: per channel
  bool symmetric = false;
  std::string method;    // "gptq" or "rtn"
  std::string rotation;  // "gsr", "none", …
  int64_t rotation_block = 0;
  std::string job;
  double perplexity_before = 0;
  double perplexity_after = 0;
  int64_t size_bytes = 0;
  std::string sha256;  // of walsh.json
  int64_t create_time_unix = 0;
};

class ArtifactWriter {
 public:
  // Creates `directory`, which must not exist. `source` gives the configuration and tokenizer
  // files.
  static absl::StatusOr<std::unique_ptr<ArtifactWriter>> Create(const std::string& directory,
                                                                const Checkpoint& source);
  virtual ~ArtifactWriter() = default;
  // `name` without suffix: "model.layers.0.mlp.down_proj".
  virtual absl::Status WriteQuantized(std::string_view name, const QuantizedMatrix& matrix) = 0;
  // Stored as BF16; 1-D when `matrix` has one row and `one_dimensional`.
  virtual absl::Status WriteDense(std::string_view name, const Matrix& matrix,
                                  bool one_dimensional) = 0;
  // Writes the remaining files, `report` as walsh.json (its "files" member is filled here), and
  // syncs.
  virtual absl::StatusOr<ArtifactInfo> Finish(const nlohmann::json& quantization_config,
                                              nlohmann::json report) = 0;
  virtual int64_t bytes_written() const = 0;
};

class ArtifactReader {
 public:
  // `verify` hashes every file; without it sizes and structure are checked only.
  static absl::StatusOr<std::unique_ptr<ArtifactReader>> Open(const std::string& directory,
                                                              bool verify, int n_threads);
  // What walsh.json says, without opening the weights.
  static absl::StatusOr<ArtifactInfo> ReadInfo(const std::string& directory);
  virtual ~ArtifactReader() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const TokenizerSource& tokenizer() const = 0;
  virtual const ArtifactInfo& info() const = 0;
  virtual bool IsQuantized(std::string_view name) const = 0;
  virtual absl::StatusOr<QuantizedMatrix> ReadQuantized(std::string_view name) const = 0;
  virtual absl::StatusOr<Matrix> ReadDense(std::string_view name) const = 0;
};

}  // namespace walsh
