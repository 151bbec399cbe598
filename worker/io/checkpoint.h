// A model on disk, whatever its format: a HF directory (safetensors, single or sharded) or a GGUF
// file.
//
// Tensors have HF names and HF layout in both ("model.layers.0.self_attn.q_proj.weight", [out, in],
// Q and K rows un-permuted). Opening checks everything that can be checked without reading weights:
// sizes, overlaps, gaps, dtypes, shapes against the configuration, and that no tensor is missing.
// Files are hostile: no allocation comes from an unchecked number.
//
// Errors:  NOT_FOUND         no such file or directory
//          INVALID_ARGUMENT  malformed: the message names file, tensor, limit and value
//          DATA_LOSS         truncated, changed while it was read, or a value that is not finite
//                            (tensor and index named)
//          UNIMPLEMENTED     format, dtype or architecture that walsh does not read
// Threads: const methods are safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/io/gguf_vocabulary.h"
#include "worker/io/model_config.h"
#include "worker/io/storage_type.h"
#include "worker/tensor/matrix.h"

namespace walsh {

// What a tokenizer can be built from; exactly one of the first three is set.
struct TokenizerSource {
  std::string tokenizer_json;          // contents of tokenizer.json
  std::string sentencepiece_model;     // contents of tokenizer.model
  std::optional<GgufVocabulary> gguf;  // tokenizer.ggml.* of a GGUF file
  std::string tokenizer_config_json;   // HF; may be empty
  std::string chat_template;           // Jinja source; may be empty
};

struct StoredForm {
  StorageType type = StorageType::kF32;
  int64_t rows = 0;  // 1 for a 1-D tensor
  int64_t cols = 0;
  int64_t size_bytes = 0;
};

class Checkpoint {
 public:
  // `path` is a directory with config.json or a file that ends in .gguf.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& path);
  virtual ~Checkpoint() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const TokenizerSource& tokenizer() const = 0;

  virtual bool Has(std::string_view tensor) const = 0;
  // A 2-D tensor as floats, [rows, cols]; 1-D tensors come as one row. Refuses non-finite values.
  virtual absl::StatusOr<Matrix> Read(std::string_view tensor) const = 0;
  // Rows [first, first + n) only, for embeddings.
  virtual absl::StatusOr<Matrix> ReadRows(std::string_view tensor, int64_t first,
                                          int64_t n) const = 0;

  // How a tensor is stored, for a reader that converts it itself.
  virtual absl::StatusOr<StoredForm> FormOf(std::string_view tensor) const = 0;
  // The bytes of rows [first, first + n) as they are stored, in HF order, into `bytes`, which has
  // exactly their number. Values are not looked at: the reader refuses those that are not finite. A
  // 1-D tensor of a block format may be UNIMPLEMENTED here; Read has it.
  virtual absl::Status ReadStored(std::string_view tensor, int64_t first, int64_t n,
                                  std::span<std::byte> bytes) const = 0;

  // Bytes on disk, and what the weights are stored as: "safetensors BF16", "GGUF Q4_1".
  virtual int64_t size_bytes() const = 0;
  virtual std::string format() const = 0;
  // SHA-256 over the names and digests of all files, hashed in parallel; identifies the source.
  // Asks `keep_going` every 64 MiB.
  virtual absl::StatusOr<std::string> Fingerprint(int n_threads,
                                                  const KeepGoing& keep_going = {}) const = 0;
  // Contents of LICENSE or general.license; may be empty.
  virtual std::string license() const = 0;
  // The small files that an artifact carries along, by name: config.json, generation_config.json,
  // tokenizer files, LICENSE. Empty for a GGUF file.
  virtual const std::map<std::string, std::string>& side_files() const = 0;
};

// HF names of a layer's tensors.
std::string LayerTensor(int64_t layer, std::string_view suffix);  // "model.layers.{layer}.{suffix}"
inline constexpr std::string_view kEmbeddingTensor = "model.embed_tokens.weight";
inline constexpr std::string_view kFinalNormTensor = "model.norm.weight";
inline constexpr std::string_view kLmHeadTensor = "lm_head.weight";  // tied: reads the embedding

}  // namespace walsh
