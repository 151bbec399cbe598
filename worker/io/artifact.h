// A quantized model on disk: a HF directory that other tools read, plus walsh.json.
//
//   config.json        of the source, with tie_word_embeddings false and quantization_config in the
//                      gptq_v2 convention; with online transforms marked as walsh's own
//   model-0000N-of-0000M.safetensors, model.safetensors.index.json
//                      <linear>.qweight [in/32·bits, out] I32, .qzeros [groups, out/32·bits] I32,
//                      .scales [groups, out] F16, .g_idx [in] I32; with float zero points .zeros
//                      [groups, out] F16 instead of .qzeros; with a codebook .levels
//                      [groups, out, 4] F16 instead of .qzeros and .scales; everything else BF16
//   tokenizer files    of the source; for a GGUF source written from its vocabulary
//   walsh.json         source, options, rotation, calibration fingerprint, figures, and digests of
//                      every other file
//
// Layout and fields: docs/artifact-format.md. Nothing in an artifact tells time, place or job: two
// runs with the same input, options and seed give the same bytes. A writer's directory is temporary
// until the caller publishes it (common/publish.h); a reader refuses a directory whose files differ
// from walsh.json.
//
// Errors:  as worker/io/checkpoint.h; DATA_LOSS names the file whose digest differs
// Threads: a reader's const methods are safe from several threads; a writer is used by one.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gptq_packing.h"
#include "worker/io/online_transforms.h"
#include "worker/io/recorded_tensors.h"
#include "worker/io/sharded_safetensors_writer.h"
#include "worker/tensor/quantized_matrix.h"
#include "worker/tensor/uninitialized_vector.h"

namespace walsh {

struct ArtifactInfo {
  int bits = 0;
  int64_t group_size = 0;  // −1: per channel
  bool symmetric = false;
  double bits_per_weight = 0;      // of the quantized linears, with their grids; 0: not told
  std::vector<int> override_bits;  // other bits that some linears have, ascending
  std::string grid;                // "uniform", "float-zero", "codebook"
  int activation_bits = 0;         // at run time; 0: not rounded
  int kv_cache_bits = 0;           // likewise
  std::string method;              // "gptq" or "rtn"
  std::string rotation;            // "gsr", "none", …
  int64_t rotation_block = 0;
  std::string job;  // not in the artifact: filled from the records of whoever published it
  double perplexity_before = 0;  // 0: not evaluated
  double perplexity_after = 0;
  int64_t size_bytes = 0;        // of all files
  std::string sha256;            // of walsh.json, and through it of everything
  int64_t create_time_unix = 0;  // modification time of walsh.json
};

// A linear in the tensors of the gptq_v2 convention, as a device packs them.
struct PackedTensors {
  int64_t rows = 0;  // outputs
  int64_t cols = 0;  // inputs
  int bits = 0;
  int64_t group_size = 0;                 // divides cols; cols itself: one group per output
  UninitializedVector<uint32_t> qweight;  // [cols / 32 · bits, rows]
  UninitializedVector<uint32_t> qzeros;   // [groups, rows / 32 · bits]
  UninitializedVector<uint16_t> scales;   // [groups, rows], half precision
};

// Where a reader wants a linear's tensors, those of its grid (worker/io/gptq_packing.h): of the
// sizes that the linear's shape gives, the others empty.
struct PackedSpans {
  std::span<uint32_t> qweight, qzeros;
  std::span<uint16_t> scales, zeros, levels;
  // Columns as they are stored, whatever their order: ReadInputOrder tells it.
  bool in_any_order = false;
};

// 16-bit brain floats by their bits, row-major.
struct Bf16Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  UninitializedVector<uint16_t> values;
};

class ArtifactWriter {
 public:
  // Creates `directory`, which must not exist. `source` gives the configuration and tokenizer
  // files; it is read now and not kept.
  static absl::StatusOr<std::unique_ptr<ArtifactWriter>> Create(
      const std::string& directory, const Checkpoint& source,
      int64_t shard_bytes_max = kShardBytesMax);
  virtual ~ArtifactWriter() = default;
  // `name` without suffix: "model.layers.0.mlp.down_proj". Both widths must be multiples of 32.
  virtual absl::Status WriteQuantized(std::string_view name, const QuantizedMatrix& matrix) = 0;
  // The same with columns in another order, which quantization_config must then say (desc_act).
  virtual absl::Status WriteOrdered(std::string_view name, const OrderedMatrix& ordered) = 0;
  // `name` in full: "model.norm.weight". Stored as BF16; 1-D when `matrix` has one row and
  // `one_dimensional`.
  virtual absl::Status WriteDense(std::string_view name, const Matrix& matrix,
                                  bool one_dimensional) = 0;
  // The same two from their stored form, to the same bytes. INVALID_ARGUMENT when a size does not
  // fit the shape; DATA_LOSS names a value that is not finite.
  virtual absl::Status WritePacked(std::string_view name, const PackedTensors& linear) = 0;
  virtual absl::Status WriteBf16(std::string_view name, const Bf16Matrix& matrix,
                                 bool one_dimensional) = 0;
  // From here on what is written is appended to `recording` as well, which must outlive that; null:
  // to none. A writer of the same model makes the same bytes of it, with WriteRecorded.
  virtual void Record(RecordedTensors* recording) = 0;
  // INVALID_ARGUMENT where the recording's bytes are not those of its entries.
  virtual absl::Status WriteRecorded(const RecordedTensors& recorded) = 0;
  // Writes the remaining files, `report` as walsh.json (its members "files", "format_version" and
  // "digest" are set here), and syncs. FAILED_PRECONDITION when a tensor of the model was not
  // written. The digests are taken by `n_threads`, which ask `keep_going` every 64 MiB.
  virtual absl::StatusOr<ArtifactInfo> Finish(const nlohmann::json& quantization_config,
                                              nlohmann::json report, int n_threads,
                                              const KeepGoing& keep_going = {}) = 0;
  virtual int64_t bytes_written() const = 0;
};

// Replaces one member of a finished artifact's walsh.json, such as "quality", which is known only
// after the artifact was evaluated. walsh.json carries its own digest: nothing else may edit it.
absl::Status ReplaceReportMember(const std::string& directory, std::string_view member,
                                 const nlohmann::json& value);

class ArtifactReader {
 public:
  // `verify` hashes every file and asks `keep_going` every 64 MiB; without it sizes and structure
  // are checked only.
  static absl::StatusOr<std::unique_ptr<ArtifactReader>> Open(const std::string& directory,
                                                              bool verify, int n_threads,
                                                              const KeepGoing& keep_going = {});
  // What walsh.json says, without opening the weights.
  static absl::StatusOr<ArtifactInfo> ReadInfo(const std::string& directory);
  virtual ~ArtifactReader() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const TokenizerSource& tokenizer() const = 0;
  virtual const ArtifactInfo& info() const = 0;
  // What a forward pass must do beside the weights.
  virtual const OnlineTransforms& online() const = 0;
  // config.json, tokenizer files and licence, by name: those that walsh.json lists.
  virtual const std::map<std::string, std::string>& side_files() const = 0;
  // `name` without suffix, as in WriteQuantized. UNIMPLEMENTED where columns are not in order.
  virtual bool IsQuantized(std::string_view name) const = 0;
  virtual absl::StatusOr<QuantizedMatrix> ReadQuantized(std::string_view name) const = 0;
  // The same, with another order of columns where quantization_config says desc_act.
  virtual absl::StatusOr<OrderedMatrix> ReadOrdered(std::string_view name) const = 0;
  // `name` in full, as in WriteDense; one-dimensional tensors come as one row.
  virtual absl::StatusOr<Matrix> ReadDense(std::string_view name) const = 0;
  // The same two in their stored form, into memory of exactly its size (INVALID_ARGUMENT else): a
  // linear, UNIMPLEMENTED where its columns are in another order and that was not asked for, and
  // rows [first, first + n) of a dense tensor.
  virtual absl::StatusOr<GptqShape> ShapeOf(std::string_view name) const = 0;
  // OrderedMatrix::input_order of a linear; empty where columns are in order. Where no other order
  // is announced (desc_act), g_idx is looked at when the linear is read.
  virtual absl::StatusOr<std::vector<int32_t>> ReadInputOrder(std::string_view name) const = 0;
  virtual absl::Status ReadPacked(std::string_view name, const PackedSpans& into) const = 0;
  virtual absl::Status ReadBf16(std::string_view name, int64_t first, int64_t n,
                                std::span<uint16_t> into) const = 0;
  // The same as HF checkpoints have it: of a norm that multiplies by 1 + γ, γ, which is what is
  // stored. ReadBf16 is UNIMPLEMENTED there.
  virtual absl::Status ReadStoredBf16(std::string_view name, int64_t first, int64_t n,
                                      std::span<uint16_t> into) const = 0;
};

}  // namespace walsh
