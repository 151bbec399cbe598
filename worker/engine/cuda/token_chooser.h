// What a runner on the device chooses tokens with: the parameters, the tokens that a sequence's
// penalties concern, and the log-probabilities that come back.
//
// A sequence's seen tokens lie on the device from its first choice on. The host knows them too, and
// sends with each step what has changed: one entry, the token that it took last. A step that is
// started ahead does not know the last token yet: there the kernel counts what the step before made
// (SampleRow::uncounted), without keeping it, so that the host's list is always the truth. A
// sequence that was away for some steps, or comes back after others took its place, is sent whole.
//
// Memory:  allocated by Create: 12 bytes for each token of a context (or of the vocabulary, if that
//          is smaller) and 1 KiB, for each sequence; 164 bytes for each row
// Errors:  RESOURCE_EXHAUSTED from Create; INVALID_ARGUMENT for what CanChoose denies; the device's
// Threads: used by one thread; asynchronous on the stream that it was created with
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/engine/served_model.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/pinned_buffer.h"
#include "worker/kernels/cuda/sample_rows.h"

namespace walsh::engine::cuda {

using kernels::cuda::DeviceBuffer;

class TokenChooser {
 public:
  struct Limits {
    int64_t n_sequences = 0;  // of a step
    int64_t n_context = 0;    // tokens of a sequence
    int64_t n_rows = 0;       // of logits
    int64_t vocab = 0;
  };
  static absl::StatusOr<TokenChooser> Create(const Limits& limits, cudaStream_t stream);
  // Device memory that Create allocates.
  static int64_t SizeBytes(const Limits& limits);

  bool CanChoose(const Choice& choice) const;
  // How a row's token is chosen. What is known of its sequence goes to the device with the row,
  // which must be sampled next of all that sequence's. `made_at`: where SampleRowsParams::made has
  // its last token, if a step that is on its way makes that.
  absl::StatusOr<kernels::cuda::SampleRow> RowOf(const StepBatch::Sequence& sequence,
                                                 std::optional<int64_t> made_at);
  // To be called before the first row of each step.
  void BeginStep() { ++step_; }
  // After a step that could not be started: what it has sent may not have been sampled with.
  void Forget() { histories_.assign(histories_.size(), {}); }

  // All that SampleRows takes but logits, rows and tokens, for rows of logits from `first` on.
  kernels::cuda::SampleRowsParams Params(int64_t first);

  // Log-probabilities of all rows of a step, on the host.
  class Logprobs {
   public:
    static absl::StatusOr<Logprobs> Allocate(int64_t n_rows);
    // Sets them, with n_top of the most probable.
    void Fill(int64_t row, int32_t n_top, TokenLogprob& token) const;

   private:
    friend class TokenChooser;
    int64_t n_rows_ = 0;
    // [n_rows] of the tokens, then [n_rows, kTopLogprobsMax]; and the ids of these.
    std::span<float> values_;
    std::span<int32_t> top_ids_;
    kernels::cuda::PinnedBuffer values_memory_, top_ids_memory_;
  };
  // Copies those of n rows from `first` on, once they are there.
  absl::Status Fetch(int64_t first, int64_t n, Logprobs& logprobs) const;

 private:
  // Whose tokens a place on the device has.
  struct History {
    bool is_used = false;
    uint64_t id = 0;
    uint64_t step = 0;      // the last that asked for it
    bool has_seen = false;  // the seen tokens of the first n_counted of the output
    uint64_t n_counted = 0;
    bool has_excluded = false;
  };

  explicit TokenChooser(const Limits& limits, cudaStream_t stream)
      : limits_(limits), stream_(stream) {}
  absl::Status Allocate();
  // Calls visit(buffer, its elements) for all.
  template <typename Visit>
  void ForEachBuffer(Visit&& visit);
  // The place of a sequence: its own, or that of whom nobody has asked for the longest.
  int64_t PlaceOf(uint64_t id);
  absl::Status SetSeen(const Choice& choice, std::optional<int64_t> made_at, int64_t place,
                       kernels::cuda::SampleRow& row);
  absl::Status SetExcluded(const Choice& choice, int64_t place, kernels::cuda::SampleRow& row);
  int64_t n_seen_max() const;

  Limits limits_;
  cudaStream_t stream_;
  uint64_t step_ = 0;
  std::vector<History> histories_;
  DeviceBuffer<kernels::cuda::SeenToken> seen_;  // [n_sequences, n_seen_max]
  DeviceBuffer<float> seen_logits_;
  DeviceBuffer<int32_t> excluded_;  // [n_sequences, kExcludedMax]
  DeviceBuffer<float> logprobs_;    // [n_rows]
  DeviceBuffer<int32_t> top_ids_;   // [n_rows, kTopLogprobsMax]
  DeviceBuffer<float> top_logprobs_;
};

}  // namespace walsh::engine::cuda
