// A model that an engine serves, wherever its weights lie, and what runs its steps.
//
// The engine, the scheduler and the service know these two classes alone: worker/engine runs a
// model on the CPU (loaded_model.h), worker/engine/cuda on a CUDA device.
//
// Threads: const methods of a model are safe from several threads; a runner is used by one, that of
//          its engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/block_manager.h"
#include "worker/engine/engine.h"
#include "worker/io/artifact.h"
#include "worker/io/model_config.h"
#include "worker/kernels/thread_pool.h"
#include "worker/tokenizer/chat_template.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::engine {

// What a step makes of a sequence beside its keys and values.
enum class Wanted {
  kNothing,
  kBest,    // the position of the largest logit of its last row
  kChosen,  // a token as its Choice says, of a runner that can_choose() by it
  kLogits,  // the logits, and the position of the largest
};

// In place of a token.
inline constexpr int32_t kNotFinite = -1;    // a NaN, +infinity, or nothing above −infinity
inline constexpr int32_t kNoTokenLeft = -2;  // nothing above −infinity after the exclusions

// A token of a sequence's prompt or output.
struct SeenToken {
  int32_t token = 0;
  int32_t n_output = 0;  // how often it is in the output
};

// How a token is chosen: what worker/engine/sampler.h needs beside the logits.
struct Choice {
  double temperature = 1;  // 0: the largest logit
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  uint64_t seed = 0;
  uint64_t position = 0;  // tokens generated before
  int32_t top_k = 0;      // 0: off
  // −1: no log-probabilities; otherwise the token's, and of so many of the most probable.
  int32_t n_top_logprobs = -1;
  // Must not be chosen: the same in all choices of a sequence that have any.
  std::span<const int32_t> excluded = {};
  // Where there are penalties, the tokens of the prompt and of the first n_counted of the output.
  // Each is there once and keeps its place; new ones come at the end. A step that is still on its
  // way may make the one that is missing from the output.
  std::span<const SeenToken> seen = {};
  uint64_t n_counted = 0;   // position, or one less
  size_t last_counted = 0;  // where in `seen` the last of them is

  bool has_penalties() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
};

// Rows of several sequences in one pass.
struct StepBatch {
  struct Sequence {
    int64_t first_row = 0, n_rows = 0, n_past = 0;
    std::span<const BlockId> blocks;  // of the runner's KV memory, for n_past + n_rows tokens
    Wanted wanted = Wanted::kNothing;
    Choice choice = {};  // where a chosen token is wanted; valid until Start returns
    // Its own among all sequences of the runner: by it the runner finds again what it keeps of the
    // choices before.
    uint64_t id = 0;
  };
  // [n_rows]; those of a sequence follow one another. FromStepBefore where a step that is still on
  // its way makes the token.
  std::vector<int32_t> tokens;
  std::vector<Sequence> sequences;
  // Called while the pass goes on, unless empty: a sign of life, as one may take long.
  std::function<void()> on_layer;

  // The token that best() will tell of `sequences[index]` of the step that was started before this
  // one.
  static constexpr int32_t FromStepBefore(size_t index) { return -1 - static_cast<int32_t>(index); }
  static constexpr size_t IndexBefore(int32_t token) { return static_cast<size_t>(-1 - token); }
};

// Runs a model's steps. It owns the KV memory and all buffers of a step.
//
// A step is started, and waited for. A runner that can run ahead takes the start of a second one
// before the first has been waited for: a device need not stand still while the host looks at what
// it made. Steps run in the order of their starts.
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;
  virtual bool can_run_ahead() const { return false; }
  // Whether a chosen token of this choice may be wanted.
  virtual bool can_choose(const Choice&) const { return false; }
  // INVALID_ARGUMENT for a batch that does not fit the model or its memory. Of a device that fails,
  // what worker/kernels/device_failure.h calls broken. Only a step that was started is waited for.
  virtual absl::Status Start(const StepBatch& batch) = 0;
  // Returns when the earliest step that has not been waited for is done: keys and values of its
  // rows are in their blocks.
  virtual absl::Status Wait() = 0;
  absl::Status Run(const StepBatch& batch) {
    if (absl::Status status = Start(batch); !status.ok()) return status;
    return Wait();
  }
  // What the step that was waited for last made of `batch.sequences[index]`, until the next Wait.
  // Several threads may ask, each for another sequence.
  // The chosen token where one was wanted; kNotFinite or kNoTokenLeft where there is none.
  virtual int32_t best(size_t index) const = 0;
  // That token with the log-probabilities that its choice asked for.
  virtual TokenLogprob chosen(size_t index) const { return {.token = best(index)}; }
  virtual std::span<float> logits(size_t index) = 0;  // [vocab]; the caller may overwrite them
  // What the block holds is lost; its memory may go back to the system.
  virtual void Discard(BlockId block) = 0;
  // Memory that the KV cache takes when all of it is in use.
  virtual int64_t kv_cache_bytes() const = 0;
};

class ServedModel {
 public:
  virtual ~ServedModel() = default;
  virtual const ModelConfig& config() const = 0;
  virtual const ArtifactInfo& info() const = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const ChatTemplate* chat_template()
      const = 0;  // null: the model has none. Renders to UNIMPLEMENTED where the template cannot be
                  // parsed.
  // What ends a text: the configuration's EOS tokens and the tokenizer's.
  std::vector<int32_t> EndTokens() const;
  virtual int64_t memory_bytes() const = 0;
  virtual int64_t packed_bytes_per_token() const = 0;  // weights read for one token at batch 1

  struct RunnerLimits {
    int64_t n_blocks = 0;        // of KV memory
    int64_t n_rows = 0;          // of a batch, at most
    int64_t n_sequences = 0;     // likewise
    int64_t n_context = 0;       // tokens of a sequence, likewise
    ThreadPool* pool = nullptr;  // outlives the runner, which may use it during its calls
  };
  // RESOURCE_EXHAUSTED when the memory is not there. The model outlives the runner.
  virtual absl::StatusOr<std::unique_ptr<ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const = 0;
  // KV memory of a token.
  virtual int64_t kv_token_bytes() const = 0;
  // Memory that a runner takes beside its KV cache, for the buffers of its steps.
  virtual int64_t step_bytes(const RunnerLimits& limits) const = 0;
  // What is free of the memory that a runner's KV cache would take, where that is not the host's.
  virtual std::optional<int64_t> free_device_bytes() const { return std::nullopt; }
};

}  // namespace walsh::engine
