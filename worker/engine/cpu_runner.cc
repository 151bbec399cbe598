// Steps of a LoadedModel: its forward pass on the CPU with a KV pool of the host's memory.
#include <cmath>
#include <new>
#include <utility>

#include "common/status_macros.h"
#include "worker/engine/loaded_model.h"
#include "worker/engine/logits.h"

namespace walsh::engine {
namespace {

class CpuRunner final : public ModelRunner {
 public:
  CpuRunner(const LoadedModel* model, ThreadPool* pool, KvPool kv)
      : model_(*model), stream_{.pool = pool}, kv_(std::move(kv)) {}

  absl::Status Start(const StepBatch& batch) override {
    LoadedModel::Batch pass{.tokens = batch.tokens, .kv = &kv_, .on_layer = batch.on_layer};
    row_of_.assign(batch.sequences.size(), -1);
    int64_t n_wanted = 0;
    for (size_t i = 0; i < batch.sequences.size(); ++i) {
      const StepBatch::Sequence& sequence = batch.sequences[i];
      const bool needs_logits = sequence.wanted != Wanted::kNothing;
      if (needs_logits) row_of_[i] = n_wanted++;
      pass.sequences.push_back({.first_row = sequence.first_row,
                                .n_rows = sequence.n_rows,
                                .n_past = sequence.n_past,
                                .blocks = sequence.blocks,
                                .needs_logits = needs_logits});
      for (int64_t row = 0; row < sequence.n_rows; ++row) {
        pass.positions.push_back(static_cast<int32_t>(sequence.n_past + row));
      }
    }
    try {
      return model_.Forward(pass, stream_, scratch_, logits_);
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError("no memory for a step of the model");
    }
  }

  absl::Status Wait() override { return absl::OkStatus(); }  // Start has done it all

  int32_t best(size_t index) const override {
    const int64_t row = row_of_[index];
    const int64_t best = ArgMax({logits_.row(row), static_cast<size_t>(model_.config().vocab)});
    return best < 0 || std::isinf(logits_.row(row)[best]) ? -1 : static_cast<int32_t>(best);
  }
  std::span<float> logits(size_t index) override {
    return {logits_.row(row_of_[index]), static_cast<size_t>(model_.config().vocab)};
  }
  void Discard(BlockId block) override { kv_.Discard(block); }
  int64_t kv_cache_bytes() const override {
    return kv_.n_blocks() * kKvBlockTokens * model_.kv_token_bytes();
  }

 private:
  const LoadedModel& model_;
  const kernels::Stream stream_;
  KvPool kv_;
  ForwardScratch scratch_;
  Matrix logits_;
  std::vector<int64_t> row_of_;  // of logits_, by sequence; −1: none
};

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> LoadedModel::MakeRunner(
    const RunnerLimits& limits) const {
  WALSH_ASSIGN_OR_RETURN(KvPool kv, KvPool::Create({.n_layers = config().n_layers,
                                                    .kv_width = config().kv_width(),
                                                    .n_blocks = limits.n_blocks}));
  return std::make_unique<CpuRunner>(this, limits.pool, std::move(kv));
}

int64_t LoadedModel::step_bytes(const RunnerLimits& limits) const {
  const int64_t residual_stream = limits.n_rows * config().hidden;
  const int64_t logits = limits.n_sequences * (config().hidden + config().vocab);
  return ForwardScratch::SizeBytes(config(), limits.n_rows) +
         (residual_stream + logits) * static_cast<int64_t>(sizeof(float));
}

}  // namespace walsh::engine
