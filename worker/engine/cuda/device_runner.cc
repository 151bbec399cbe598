#include "worker/engine/cuda/device_runner.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/engine/cuda/captured_graph.h"
#include "worker/engine/cuda/forward_pass.h"
#include "worker/engine/cuda/token_chooser.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/event.h"
#include "worker/kernels/cuda/pinned_buffer.h"
#include "worker/kernels/cuda/sample_rows.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;
using ops::KvBatchLayout;
using ops::PinnedBuffer;

int64_t AlignedTo(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// How many sequences a decoding pass has room for: few sizes, as each has a graph, and none much
// larger than what it is taken for.
int64_t DecodeSize(int64_t n_sequences) {
  for (const int64_t size : {1, 2, 4, 8, 16, 24, 32, 48, 64}) {
    if (n_sequences <= size) return size;
  }
  constexpr int64_t kStep = 64;  // as many as one product takes
  return AlignedTo(n_sequences, kStep);
}

// What a pass knows of its rows, on the host and on the device: their tokens, then the KvBatch.
struct Image {
  PinnedBuffer host;
  DeviceBuffer<int32_t> device;

  static int64_t Size(const KvBatchLayout& layout) {
    return AlignedTo(layout.n_rows, ops::kTableAlignment) + layout.size();
  }
  static absl::StatusOr<Image> Allocate(int64_t n, cudaStream_t stream) {
    Image image;
    WALSH_ASSIGN_OR_RETURN(image.host,
                           PinnedBuffer::Allocate(n * static_cast<int64_t>(sizeof(int32_t))));
    WALSH_ASSIGN_OR_RETURN(image.device, DeviceBuffer<int32_t>::Allocate(n, stream));
    return image;
  }
  std::span<int32_t> values(int64_t n) {
    return {reinterpret_cast<int32_t*>(host.span().data()), static_cast<size_t>(n)};
  }
  absl::Status Send(const KvBatchLayout& layout, cudaStream_t stream) {
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(device.data(), host.span().data(),
                                               static_cast<size_t>(Size(layout)) * sizeof(int32_t),
                                               cudaMemcpyHostToDevice, stream));
    return absl::OkStatus();
  }
  ForwardPass::Rows Rows(const KvBatchLayout& layout, const int32_t* made, bool is_decode) const {
    return {.n = layout.n_rows,
            .tokens = device.data(),
            .made = made,
            .kv = layout.View(device.data() + AlignedTo(layout.n_rows, ops::kTableAlignment)),
            .is_decode = is_decode};
  }
};

// What a runner has room for, by its limits.
struct Sizes {
  explicit Sizes(const ServedModel::RunnerLimits& limits)
      : n_decode_slots(DecodeSize(limits.n_sequences)),
        n_slots(n_decode_slots + limits.n_sequences),
        n_rows(std::max(limits.n_rows, n_decode_slots)),
        max_blocks(AlignedTo(KvBlocks(limits.n_context), ops::kTableAlignment)) {}
  KvBatchLayout LargestLayout() const {
    return {.n_sequences = n_decode_slots, .n_rows = n_rows, .max_blocks = max_blocks};
  }

  // Places of logits and tokens: first those of the largest decoding pass.
  int64_t n_decode_slots;
  int64_t n_slots;
  int64_t n_rows;      // of a pass
  int64_t max_blocks;  // of a sequence
};

ForwardPass::Limits PassLimits(const ServedModel::RunnerLimits& limits,
                               const DeviceRunnerOptions& options) {
  const Sizes sizes(limits);
  return {.n_rows = sizes.n_rows,
          .n_logits = sizes.n_slots,
          .n_blocks = limits.n_blocks,
          .kv = options.kv,
          .batch_invariant = options.batch_invariant};
}
TokenChooser::Limits ChooserLimits(const ServedModel::RunnerLimits& limits,
                                   const ModelConfig& config) {
  return {.n_sequences = limits.n_sequences,
          .n_context = limits.n_context,
          .n_rows = Sizes(limits).n_slots,
          .vocab = config.vocab};
}

class DeviceRunner final : public ModelRunner {
 public:
  DeviceRunner(Context* context, const ModelConfig* config, const ServedModel::RunnerLimits& limits,
               ForwardPass pass, TokenChooser chooser, bool use_graphs)
      : context_(*context),
        config_(*config),
        limits_(limits),
        sizes_(limits),
        use_graphs_(use_graphs),
        pass_(std::move(pass)),
        chooser_(std::move(chooser)) {}
  ~DeviceRunner() override { context_.Synchronize().IgnoreError(); }

  absl::Status Prepare();
  bool can_run_ahead() const override { return true; }
  bool can_choose(const Choice& choice) const override { return chooser_.CanChoose(choice); }
  absl::Status Start(const StepBatch& batch) override;
  absl::Status Wait() override;
  int32_t best(size_t index) const override {
    Flight& flight = *flights_[done_];
    return flight.best()[static_cast<size_t>(flight.slots[index])];
  }
  TokenLogprob chosen(size_t index) const override;
  std::span<float> logits(size_t index) override { return LogitsOf(*flights_[done_], index); }
  void Discard(BlockId) override {}  // the pool stays as it is
  int64_t kv_cache_bytes() const override { return pass_.kv_bytes(); }

 private:
  // A step on its way. What the host writes and reads of it is its own, so that one can be prepared
  // while another runs.
  struct Flight {
    Image decode_image, prefill_image;
    DeviceBuffer<int32_t> made;  // [n_slots], the tokens
    PinnedBuffer best_host;      // likewise
    PinnedBuffer logits_host;    // [rows wanted in a step so far, vocab]
    PinnedBuffer choices_host;   // [n_slots] SampleRow
    DeviceBuffer<ops::SampleRow> choices;
    TokenChooser::Logprobs logprobs;  // [n_slots]
    // By DecodeSize, and whether tokens are chosen other than as the largest logit's.
    std::map<std::pair<int64_t, bool>, CapturedGraph> graphs;
    ops::Event done;
    bool is_started = false;
    // By sequence of the batch.
    std::vector<size_t> decoding, prefilling;
    std::vector<int64_t> slots;
    std::vector<int64_t> logits_rows;
    std::vector<int32_t> n_top_logprobs;  // that its token has; −1: none

    ops::SampleRow& choice(int64_t slot) {
      return reinterpret_cast<ops::SampleRow*>(choices_host.span().data())[slot];
    }
    int32_t* best() { return reinterpret_cast<int32_t*>(best_host.span().data()); }
  };

  absl::Status AllocateFlight(Flight& flight);
  absl::Status PrepareGraphs(Flight& flight);
  absl::Status CheckBatch(const StepBatch& batch) const;
  KvBatchLayout DecodeLayout(int64_t n_sequences) const;
  // Where the step before made the token, or the token.
  int32_t PlaceOrToken(int32_t token) const;
  // Writes what a pass over these sequences of the batch knows of its rows.
  absl::Status Fill(const StepBatch& batch, std::span<const size_t> sequences,
                    const KvBatchLayout& layout, Image& image) const;
  // The tokens of the other step on its way.
  const int32_t* MadeBefore(const Flight& flight) const {
    return flights_[&flight == flights_[0].get() ? 1 : 0]->made.data();
  }
  // How the token of batch.sequences[index] is chosen; true where not as the largest logit's.
  absl::StatusOr<bool> SetChoice(const StepBatch& batch, size_t index, Flight& flight);
  // Logits of rows of `hidden` and their tokens, in slots from `first` on; where they are chosen,
  // by what is sent first.
  absl::Status QueueHead(Flight& flight, const float* hidden, int64_t n, int64_t first,
                         bool chooses);
  // All of a decoding pass, as it is captured.
  absl::Status QueueDecode(Flight& flight, const KvBatchLayout& layout, bool chooses);
  // Log-probabilities of these sequences' tokens, whose n rows have slots from `first` on.
  absl::Status FetchLogprobs(Flight& flight, std::span<const size_t> sequences, int64_t first,
                             int64_t n);
  absl::Status Queue(const StepBatch& batch, Flight& flight);
  absl::Status Decode(const StepBatch& batch, Flight& flight);
  absl::Status Prefill(const StepBatch& batch, Flight& flight);
  absl::Status FetchLogits(const StepBatch& batch, Flight& flight);
  std::span<float> LogitsOf(Flight& flight, size_t index) const {
    auto* rows = reinterpret_cast<float*>(flight.logits_host.span().data());
    return {rows + flight.logits_rows[index] * config_.vocab, static_cast<size_t>(config_.vocab)};
  }

  Context& context_;
  const ModelConfig& config_;
  const ServedModel::RunnerLimits limits_;
  const Sizes sizes_;
  const bool use_graphs_;
  ForwardPass pass_;
  TokenChooser chooser_;
  DeviceBuffer<float> last_rows_;  // [n_sequences, hidden], of sequences that are prefilled
  const std::array<std::unique_ptr<Flight>, 2> flights_ = {std::make_unique<Flight>(),
                                                           std::make_unique<Flight>()};
  // Of flights_: the next to start, the next to wait for, and the last that was waited for.
  size_t next_ = 0;
  size_t oldest_ = 0;
  size_t done_ = 0;
};

absl::Status DeviceRunner::Prepare() {
  WALSH_ASSIGN_OR_RETURN(last_rows_, DeviceBuffer<float>::Allocate(
                                         limits_.n_sequences * config_.hidden, context_.stream()));
  for (const std::unique_ptr<Flight>& flight : flights_) {
    WALSH_RETURN_IF_ERROR(AllocateFlight(*flight));
  }
  for (const std::unique_ptr<Flight>& flight : flights_) {
    if (use_graphs_) WALSH_RETURN_IF_ERROR(PrepareGraphs(*flight));
  }
  return context_.Synchronize();
}

absl::Status DeviceRunner::AllocateFlight(Flight& flight) {
  const cudaStream_t stream = context_.stream();
  const int64_t image_size = Image::Size(sizes_.LargestLayout());
  WALSH_ASSIGN_OR_RETURN(flight.decode_image, Image::Allocate(image_size, stream));
  WALSH_ASSIGN_OR_RETURN(flight.prefill_image, Image::Allocate(image_size, stream));
  WALSH_ASSIGN_OR_RETURN(flight.made, DeviceBuffer<int32_t>::Allocate(sizes_.n_slots, stream));
  WALSH_ASSIGN_OR_RETURN(flight.best_host, PinnedBuffer::Allocate(flight.made.size_bytes()));
  WALSH_ASSIGN_OR_RETURN(flight.choices,
                         DeviceBuffer<ops::SampleRow>::Allocate(sizes_.n_slots, stream));
  WALSH_ASSIGN_OR_RETURN(flight.choices_host, PinnedBuffer::Allocate(flight.choices.size_bytes()));
  for (int64_t slot = 0; slot < sizes_.n_slots; ++slot) flight.choice(slot) = {};
  WALSH_ASSIGN_OR_RETURN(flight.logprobs, TokenChooser::Logprobs::Allocate(sizes_.n_slots));
  return absl::OkStatus();
}

absl::Status DeviceRunner::PrepareGraphs(Flight& flight) {
  const cudaStream_t stream = context_.stream();
  for (int64_t size = 1; size <= sizes_.n_decode_slots; size = DecodeSize(size + 1)) {
    const KvBatchLayout layout = DecodeLayout(size);
    WALSH_RETURN_IF_ERROR(Fill({}, {}, layout, flight.decode_image));
    // Loads what it launches; graphs that choose are captured when they are first needed.
    for (const bool chooses : {false, size == 1 && can_choose({})}) {
      WALSH_RETURN_IF_ERROR(QueueDecode(flight, layout, chooses));
      // Before the image is filled again.
      WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
    }
    WALSH_ASSIGN_OR_RETURN((flight.graphs[{size, false}]), CapturedGraph::Capture(stream, [&] {
                             return QueueDecode(flight, layout, /*chooses=*/false);
                           }));
  }
  return absl::OkStatus();
}

TokenLogprob DeviceRunner::chosen(size_t index) const {
  TokenLogprob token{.token = best(index)};
  const Flight& flight = *flights_[done_];
  if (const int32_t n_top = flight.n_top_logprobs[index]; n_top >= 0 && token.token >= 0) {
    flight.logprobs.Fill(flight.slots[index], n_top, token);
  }
  return token;
}

KvBatchLayout DeviceRunner::DecodeLayout(int64_t n_sequences) const {
  return {.n_sequences = n_sequences, .n_rows = n_sequences, .max_blocks = sizes_.max_blocks};
}

absl::Status DeviceRunner::CheckBatch(const StepBatch& batch) const {
  const auto n_rows = static_cast<int64_t>(batch.tokens.size());
  const auto n_sequences = static_cast<int64_t>(batch.sequences.size());
  if (n_rows > limits_.n_rows || n_sequences > limits_.n_sequences) {
    return absl::InvalidArgumentError(absl::StrCat("a step of ", n_rows, " rows and ", n_sequences,
                                                   " sequences, the limits are ", limits_.n_rows,
                                                   " and ", limits_.n_sequences));
  }
  const Flight& before = *flights_[1 - next_];
  const size_t n_before = before.is_started ? before.slots.size() : 0;
  for (const int32_t token : batch.tokens) {
    if (token < 0 ? StepBatch::IndexBefore(token) >= n_before : token >= config_.vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", token, " is outside the vocabulary of ", config_.vocab));
    }
  }
  for (const StepBatch::Sequence& sequence : batch.sequences) {
    if (sequence.first_row < 0 || sequence.n_rows < 1 ||
        sequence.first_row + sequence.n_rows > n_rows) {
      return absl::InvalidArgumentError(absl::StrCat("a sequence with rows ", sequence.first_row,
                                                     " to ", sequence.first_row + sequence.n_rows,
                                                     " of a step with ", n_rows));
    }
  }
  return absl::OkStatus();
}

int32_t DeviceRunner::PlaceOrToken(int32_t token) const {
  if (token >= 0) return token;
  return static_cast<int32_t>(-1 - flights_[1 - next_]->slots[StepBatch::IndexBefore(token)]);
}

absl::Status DeviceRunner::Fill(const StepBatch& batch, std::span<const size_t> sequences,
                                const KvBatchLayout& layout, Image& image) const {
  const std::span<int32_t> values = image.values(Image::Size(layout));
  const int64_t n_token_places = AlignedTo(layout.n_rows, ops::kTableAlignment);
  std::fill_n(values.begin(), n_token_places, 0);
  std::vector<ops::KvSequence> of_pass;
  int64_t row = 0;
  for (const size_t index : sequences) {
    const StepBatch::Sequence& sequence = batch.sequences[index];
    of_pass.push_back({.first_row = row,
                       .n_rows = sequence.n_rows,
                       .n_past = sequence.n_past,
                       .table = sequence.blocks});
    std::transform(batch.tokens.begin() + sequence.first_row,
                   batch.tokens.begin() + sequence.first_row + sequence.n_rows,
                   values.begin() + row, [this](int32_t token) { return PlaceOrToken(token); });
    row += sequence.n_rows;
  }
  return layout.Pack(of_pass, limits_.n_blocks,
                     values.subspan(static_cast<size_t>(n_token_places)));
}

absl::StatusOr<bool> DeviceRunner::SetChoice(const StepBatch& batch, size_t index, Flight& flight) {
  const StepBatch::Sequence& sequence = batch.sequences[index];
  ops::SampleRow& row = flight.choice(flight.slots[index]);
  row = {};
  if (sequence.wanted != Wanted::kChosen) return false;
  const int32_t last = batch.tokens[static_cast<size_t>(sequence.first_row + sequence.n_rows - 1)];
  std::optional<int64_t> made_at;
  if (last < 0) made_at = flights_[1 - next_]->slots[StepBatch::IndexBefore(last)];
  WALSH_ASSIGN_OR_RETURN(row, chooser_.RowOf(sequence, made_at));
  flight.n_top_logprobs[index] =
      static_cast<int32_t>(std::min<int64_t>(row.n_top_logprobs, config_.vocab));
  return true;
}

absl::Status DeviceRunner::QueueHead(Flight& flight, const float* hidden, int64_t n, int64_t first,
                                     bool chooses) {
  ops::SampleRowsParams choice = chooser_.Params(first);
  if (chooses) {
    choice.rows = flight.choices.data() + first;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(flight.choices.data() + first, &flight.choice(first),
                                               static_cast<size_t>(n) * sizeof(ops::SampleRow),
                                               cudaMemcpyHostToDevice, context_.stream()));
  }
  choice.made = MadeBefore(flight);
  choice.ids = flight.made.data() + first;
  WALSH_RETURN_IF_ERROR(pass_.Head(hidden, n, first, choice));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(flight.best() + first, choice.ids,
                                             static_cast<size_t>(n) * sizeof(int32_t),
                                             cudaMemcpyDeviceToHost, context_.stream()));
  return absl::OkStatus();
}

absl::Status DeviceRunner::QueueDecode(Flight& flight, const KvBatchLayout& layout, bool chooses) {
  WALSH_RETURN_IF_ERROR(flight.decode_image.Send(layout, context_.stream()));
  WALSH_RETURN_IF_ERROR(
      pass_.Layers(flight.decode_image.Rows(layout, MadeBefore(flight), /*is_decode=*/true)));
  return QueueHead(flight, pass_.hidden(), layout.n_rows, 0, chooses);
}

absl::Status DeviceRunner::FetchLogprobs(Flight& flight, std::span<const size_t> sequences,
                                         int64_t first, int64_t n) {
  const bool has_any = std::any_of(sequences.begin(), sequences.end(),
                                   [&](size_t index) { return flight.n_top_logprobs[index] >= 0; });
  return has_any ? chooser_.Fetch(first, n, flight.logprobs) : absl::OkStatus();
}

absl::Status DeviceRunner::Decode(const StepBatch& batch, Flight& flight) {
  const auto n_sequences = static_cast<int64_t>(flight.decoding.size());
  const int64_t size = DecodeSize(n_sequences);
  const KvBatchLayout layout = DecodeLayout(size);
  WALSH_RETURN_IF_ERROR(Fill(batch, flight.decoding, layout, flight.decode_image));
  bool chooses = false;
  for (int64_t slot = 0; slot < n_sequences; ++slot) {
    const size_t index = flight.decoding[static_cast<size_t>(slot)];
    flight.slots[index] = slot;
    WALSH_ASSIGN_OR_RETURN(const bool is_chosen, SetChoice(batch, index, flight));
    chooses |= is_chosen;
  }
  // Rows of no sequence must not change a list of one that was there before.
  for (int64_t slot = n_sequences; slot < size; ++slot) flight.choice(slot) = {};
  if (use_graphs_) {
    CapturedGraph& graph = flight.graphs[{size, chooses}];
    if (graph.is_empty()) {
      WALSH_ASSIGN_OR_RETURN(graph, CapturedGraph::Capture(context_.stream(), [&] {
                               return QueueDecode(flight, layout, chooses);
                             }));
    }
    WALSH_RETURN_IF_ERROR(graph.Launch(context_.stream()));
  } else {
    WALSH_RETURN_IF_ERROR(QueueDecode(flight, layout, chooses));
  }
  return FetchLogprobs(flight, flight.decoding, 0, n_sequences);
}

absl::Status DeviceRunner::Prefill(const StepBatch& batch, Flight& flight) {
  const cudaStream_t stream = context_.stream();
  KvBatchLayout layout{.n_sequences = static_cast<int64_t>(flight.prefilling.size())};
  for (const size_t index : flight.prefilling) {
    const StepBatch::Sequence& sequence = batch.sequences[index];
    layout.n_rows += sequence.n_rows;
    layout.max_blocks = std::max(layout.max_blocks, static_cast<int64_t>(sequence.blocks.size()));
  }
  layout.max_blocks = AlignedTo(layout.max_blocks, ops::kTableAlignment);
  if (layout.max_blocks > DecodeLayout(1).max_blocks) {
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", layout.max_blocks,
                                                   " blocks, a context has ",
                                                   DecodeLayout(1).max_blocks));
  }
  WALSH_RETURN_IF_ERROR(Fill(batch, flight.prefilling, layout, flight.prefill_image));
  WALSH_RETURN_IF_ERROR(flight.prefill_image.Send(layout, stream));
  WALSH_RETURN_IF_ERROR(
      pass_.Layers(flight.prefill_image.Rows(layout, MadeBefore(flight), /*is_decode=*/false)));

  int64_t row = 0;
  int64_t n_wanted = 0;
  bool chooses = false;
  for (const size_t index : flight.prefilling) {
    const StepBatch::Sequence& sequence = batch.sequences[index];
    row += sequence.n_rows;
    if (sequence.wanted == Wanted::kNothing) continue;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        last_rows_.data() + n_wanted * config_.hidden, pass_.hidden() + (row - 1) * config_.hidden,
        static_cast<size_t>(config_.hidden) * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    flight.slots[index] = sizes_.n_decode_slots + n_wanted++;
    WALSH_ASSIGN_OR_RETURN(const bool is_chosen, SetChoice(batch, index, flight));
    chooses |= is_chosen;
  }
  if (n_wanted == 0) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(
      QueueHead(flight, last_rows_.data(), n_wanted, sizes_.n_decode_slots, chooses));
  return FetchLogprobs(flight, flight.prefilling, sizes_.n_decode_slots, n_wanted);
}

absl::Status DeviceRunner::FetchLogits(const StepBatch& batch, Flight& flight) {
  int64_t n_rows = 0;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    if (batch.sequences[i].wanted == Wanted::kLogits) flight.logits_rows[i] = n_rows++;
  }
  const int64_t row_bytes = config_.vocab * static_cast<int64_t>(sizeof(float));
  if (flight.logits_host.size() < n_rows * row_bytes) {
    flight.logits_host = PinnedBuffer();
    WALSH_ASSIGN_OR_RETURN(flight.logits_host, PinnedBuffer::Allocate(n_rows * row_bytes));
  }
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    if (batch.sequences[i].wanted != Wanted::kLogits) continue;
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(LogitsOf(flight, i).data(), pass_.logits(flight.slots[i]),
                        static_cast<size_t>(row_bytes), cudaMemcpyDeviceToHost, context_.stream()));
  }
  return absl::OkStatus();
}

absl::Status DeviceRunner::Queue(const StepBatch& batch, Flight& flight) {
  if (!flight.decoding.empty()) WALSH_RETURN_IF_ERROR(Decode(batch, flight));
  if (!flight.prefilling.empty()) WALSH_RETURN_IF_ERROR(Prefill(batch, flight));
  WALSH_RETURN_IF_ERROR(FetchLogits(batch, flight));
  return flight.done.Record(context_.stream());
}

absl::Status DeviceRunner::Start(const StepBatch& batch) {
  Flight& flight = *flights_[next_];
  if (flight.is_started) {
    return absl::FailedPreconditionError("two steps are on their way, none was waited for");
  }
  WALSH_RETURN_IF_ERROR(CheckBatch(batch));
  WALSH_RETURN_IF_ERROR(context_.MakeCurrent());
  if (batch.on_layer) batch.on_layer();
  flight.decoding.clear();
  flight.prefilling.clear();
  flight.slots.assign(batch.sequences.size(), 0);
  flight.logits_rows.assign(batch.sequences.size(), 0);
  flight.n_top_logprobs.assign(batch.sequences.size(), -1);
  chooser_.BeginStep();
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    (batch.sequences[i].n_rows == 1 ? flight.decoding : flight.prefilling).push_back(i);
  }
  if (absl::Status status = Queue(batch, flight); !status.ok()) {
    // What was queued reads this flight's memory, which the next step may be written to.
    context_.Synchronize().IgnoreError();
    chooser_.Forget();
    return status;
  }
  flight.is_started = true;
  next_ = 1 - next_;
  return absl::OkStatus();
}

absl::Status DeviceRunner::Wait() {
  Flight& flight = *flights_[oldest_];
  if (!flight.is_started) return absl::FailedPreconditionError("no step is on its way");
  flight.is_started = false;
  done_ = std::exchange(oldest_, 1 - oldest_);
  return flight.done.Wait();
}

}  // namespace

int64_t DeviceRunnerStepBytes(const ModelConfig& config, const DeviceWeights& weights,
                              const ServedModel::RunnerLimits& limits,
                              const DeviceRunnerOptions& options) {
  constexpr int64_t kFlights = 2;
  constexpr auto kId = static_cast<int64_t>(sizeof(int32_t));
  const Sizes sizes(limits);
  const int64_t images = 2 * Image::Size(sizes.LargestLayout()) * kId;
  const int64_t slots = sizes.n_slots * (kId + static_cast<int64_t>(sizeof(ops::SampleRow)));
  const int64_t last_rows =
      limits.n_sequences * config.hidden * static_cast<int64_t>(sizeof(float));
  return ForwardPass::StepBytes(config, weights, PassLimits(limits, options)) +
         TokenChooser::SizeBytes(ChooserLimits(limits, config)) + last_rows +
         kFlights * (images + slots);
}

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeDeviceRunner(
    Context* context, const ModelConfig* config, const DeviceWeights* weights,
    const ServedModel::RunnerLimits& limits, const DeviceRunnerOptions& options) {
  WALSH_RETURN_IF_ERROR(context->MakeCurrent());
  WALSH_ASSIGN_OR_RETURN(
      ForwardPass pass, ForwardPass::Create(context, config, weights, PassLimits(limits, options)));
  WALSH_ASSIGN_OR_RETURN(TokenChooser chooser,
                         TokenChooser::Create(ChooserLimits(limits, *config), context->stream()));
  auto runner = std::make_unique<DeviceRunner>(context, config, limits, std::move(pass),
                                               std::move(chooser), options.use_graphs);
  WALSH_RETURN_IF_ERROR(runner->Prepare());
  return runner;
}

}  // namespace walsh::engine::cuda
