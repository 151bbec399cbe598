// A model in the host's memory, ready to be served by the CPU: packed weights, tokenizer, chat
// template.
//
// Threads: const methods are safe from several threads, one forward at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/kv_cache_dtype.h"
#include "worker/engine/kv_pool.h"
#include "worker/engine/served_model.h"
#include "worker/io/artifact.h"
#include "worker/io/checkpoint.h"
#include "worker/model/decoder_layer.h"
#include "worker/tokenizer/chat_template.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::engine {

class LoadedModel : public ServedModel {
 public:
  struct Options {
    int n_threads = 1;
    bool verify = true;     // check walsh.json's digests
    bool head_8bit = true;  // lm_head at 8 bits; false keeps 32-bit floats
    // Keys and values are rounded to its grid and kept as floats all the same.
    KvCacheDtype kv_cache_dtype = KvCacheDtype::kAuto;
  };
  // DATA_LOSS when a file differs from its digest, UNIMPLEMENTED for what this backend cannot
  // serve.
  static absl::StatusOr<std::shared_ptr<LoadedModel>> LoadArtifact(const std::string& directory,
                                                                   const Options& options);
  // Unquantized, in floats: the reference that packed weights are compared with.
  static absl::StatusOr<std::shared_ptr<LoadedModel>> LoadDense(const Checkpoint& checkpoint);
  // Linears and head rounded to 8 bits, embeddings to 16, one layer after another: for calibration
  // by the model's own text, in about a quarter of the floats' memory.
  static absl::StatusOr<std::shared_ptr<LoadedModel>> Load8Bit(const Checkpoint& checkpoint);

  // Steps by Forward, on the limits' pool.
  absl::StatusOr<std::unique_ptr<ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const override;
  int64_t kv_token_bytes() const override {
    return KvPool::BytesPerToken(config().n_layers, config().kv_width());
  }
  int64_t step_bytes(const RunnerLimits& limits) const override;

  // Rows of several sequences in one pass.
  struct Batch {
    std::vector<int32_t> tokens;     // [n_rows]
    std::vector<int32_t> positions;  // [n_rows]
    struct Sequence {
      int64_t first_row = 0, n_rows = 0, n_past = 0;
      std::span<const BlockId> blocks;  // of kv, for n_past + n_rows tokens
      bool needs_logits = false;        // of its last row
    };
    std::vector<Sequence> sequences;
    const KvPool* kv = nullptr;  // the pass writes the new rows' keys and values there
    // Called before each layer, unless empty: a sign of life, as a pass may take long.
    std::function<void()> on_layer;
  };
  // logits [n sequences that need them, vocab], in their order.
  virtual absl::Status Forward(const Batch& batch, const kernels::Stream& stream,
                               ForwardScratch& scratch, Matrix& logits) const = 0;
};

}  // namespace walsh::engine
