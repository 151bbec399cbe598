#include "worker/engine/cuda/device_runner.h"

#include <algorithm>
#include <array>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/engine/cuda/captured_graph.h"
#include "worker/engine/cuda/forward_pass.h"
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

constexpr int64_t kDrawVocabMax = int64_t{1} << 20;  // of SampleRows

// How the token of a sequence is chosen; true where it is drawn.
bool SetDraw(const StepBatch::Sequence& sequence, ops::SampleRow& row) {
  row = {};
  if (sequence.wanted != Wanted::kDrawn) return false;
  row.temperature = sequence.draw.temperature;
  row.top_p = sequence.draw.top_p;
  row.min_p = sequence.draw.min_p;
  row.top_k = sequence.draw.top_k;
  row.seed = sequence.draw.seed;
  row.position = sequence.draw.position;
  return true;
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
  ForwardPass::Rows Rows(const KvBatchLayout& layout, bool is_decode) const {
    return {.n = layout.n_rows,
            .tokens = device.data(),
            .kv = layout.View(device.data() + AlignedTo(layout.n_rows, ops::kTableAlignment)),
            .is_decode = is_decode};
  }
};

class DeviceRunner final : public ModelRunner {
 public:
  DeviceRunner(Context* context, const ModelConfig* config, const ServedModel::RunnerLimits& limits,
               ForwardPass pass, bool use_graphs)
      : context_(*context),
        config_(*config),
        limits_(limits),
        use_graphs_(use_graphs),
        pass_(std::move(pass)) {}
  ~DeviceRunner() override { context_.Synchronize().IgnoreError(); }

  absl::Status Prepare();
  bool can_run_ahead() const override { return true; }
  bool can_draw() const override { return config_.vocab <= kDrawVocabMax; }
  absl::Status Start(const StepBatch& batch) override;
  absl::Status Wait() override;
  int32_t best(size_t index) const override {
    Flight& flight = *flights_[done_];
    return flight.best()[static_cast<size_t>(flight.slots[index])];
  }
  std::span<float> logits(size_t index) override { return LogitsOf(*flights_[done_], index); }
  void Discard(BlockId) override {}  // the pool stays as it is
  int64_t kv_cache_bytes() const override { return pass_.kv_bytes(); }

 private:
  // A step on its way. What the host writes and reads of it is its own, so that one can be prepared
  // while another runs.
  struct Flight {
    Image decode_image, prefill_image;
    PinnedBuffer best_host;    // [n_slots]
    PinnedBuffer logits_host;  // [rows wanted in a step so far, vocab]
    PinnedBuffer draws_host;   // [n_slots] SampleRow
    DeviceBuffer<ops::SampleRow> draws;
    // By DecodeSize, and whether tokens are drawn.
    std::map<std::pair<int64_t, bool>, CapturedGraph> graphs;
    ops::Event done;
    bool is_started = false;
    // By sequence of the batch.
    std::vector<size_t> decoding, prefilling;
    std::vector<int64_t> slots;
    std::vector<int64_t> logits_rows;

    ops::SampleRow& draw(int64_t slot) {
      return reinterpret_cast<ops::SampleRow*>(draws_host.span().data())[slot];
    }
    int32_t* best() { return reinterpret_cast<int32_t*>(best_host.span().data()); }
  };

  absl::Status PrepareFlight(Flight& flight, const KvBatchLayout& largest);
  absl::Status CheckBatch(const StepBatch& batch) const;
  KvBatchLayout DecodeLayout(int64_t n_sequences) const;
  // Where the step before made the token, or the token.
  int32_t PlaceOrToken(int32_t token) const;
  // Writes what a pass over these sequences of the batch knows of its rows.
  absl::Status Fill(const StepBatch& batch, std::span<const size_t> sequences,
                    const KvBatchLayout& layout, Image& image) const;
  // Where the tokens of sequences are drawn: sends how, from `first` on. Null: nowhere.
  absl::StatusOr<const ops::SampleRow*> SendDraws(Flight& flight, bool draws, int64_t first,
                                                  int64_t n);
  // All of a decoding pass, as it is captured.
  absl::Status QueueDecode(Flight& flight, const KvBatchLayout& layout, bool draws);
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
  const bool use_graphs_;
  ForwardPass pass_;
  DeviceBuffer<float> last_rows_;  // [n_sequences, hidden], of sequences that are prefilled
  // Places of logits and best tokens: first those of the largest decoding pass.
  int64_t n_decode_slots_ = 0;
  int64_t n_slots_ = 0;
  const std::array<std::unique_ptr<Flight>, 2> flights_ = {std::make_unique<Flight>(),
                                                           std::make_unique<Flight>()};
  // Of flights_: the next to start, the next to wait for, and the last that was waited for.
  size_t next_ = 0;
  size_t oldest_ = 0;
  size_t done_ = 0;
};

absl::Status DeviceRunner::Prepare() {
  const cudaStream_t stream = context_.stream();
  n_decode_slots_ = DecodeSize(limits_.n_sequences);
  n_slots_ = n_decode_slots_ + limits_.n_sequences;
  const KvBatchLayout largest{.n_sequences = n_decode_slots_,
                              .n_rows = std::max(limits_.n_rows, n_decode_slots_),
                              .max_blocks = DecodeLayout(1).max_blocks};
  WALSH_ASSIGN_OR_RETURN(
      last_rows_, DeviceBuffer<float>::Allocate(limits_.n_sequences * config_.hidden, stream));
  for (const std::unique_ptr<Flight>& flight : flights_) {
    WALSH_RETURN_IF_ERROR(PrepareFlight(*flight, largest));
  }
  return context_.Synchronize();
}

absl::Status DeviceRunner::PrepareFlight(Flight& flight, const KvBatchLayout& largest) {
  const cudaStream_t stream = context_.stream();
  WALSH_ASSIGN_OR_RETURN(flight.decode_image, Image::Allocate(Image::Size(largest), stream));
  WALSH_ASSIGN_OR_RETURN(flight.prefill_image, Image::Allocate(Image::Size(largest), stream));
  WALSH_ASSIGN_OR_RETURN(flight.best_host,
                         PinnedBuffer::Allocate(n_slots_ * static_cast<int64_t>(sizeof(int32_t))));
  WALSH_ASSIGN_OR_RETURN(
      flight.draws_host,
      PinnedBuffer::Allocate(n_slots_ * static_cast<int64_t>(sizeof(ops::SampleRow))));
  for (int64_t slot = 0; slot < n_slots_; ++slot) flight.draw(slot) = {};
  WALSH_ASSIGN_OR_RETURN(flight.draws, DeviceBuffer<ops::SampleRow>::Allocate(n_slots_, stream));
  if (!use_graphs_) return absl::OkStatus();
  for (int64_t size = 1; size <= n_decode_slots_; size = DecodeSize(size + 1)) {
    const KvBatchLayout layout = DecodeLayout(size);
    WALSH_RETURN_IF_ERROR(Fill({}, {}, layout, flight.decode_image));
    // Loads what it launches; graphs that draw are captured when they are first needed.
    for (const bool draws : {false, size == 1 && can_draw()}) {
      WALSH_RETURN_IF_ERROR(QueueDecode(flight, layout, draws));
      // Before the image is filled again.
      WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
    }
    WALSH_ASSIGN_OR_RETURN((flight.graphs[{size, false}]), CapturedGraph::Capture(stream, [&] {
                             return QueueDecode(flight, layout, /*draws=*/false);
                           }));
  }
  return absl::OkStatus();
}

KvBatchLayout DeviceRunner::DecodeLayout(int64_t n_sequences) const {
  return {.n_sequences = n_sequences,
          .n_rows = n_sequences,
          .max_blocks = AlignedTo(KvBlocks(limits_.n_context), ops::kTableAlignment)};
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

absl::StatusOr<const ops::SampleRow*> DeviceRunner::SendDraws(Flight& flight, bool draws,
                                                              int64_t first, int64_t n) {
  if (!draws) return nullptr;
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(flight.draws.data() + first, &flight.draw(first),
                                             static_cast<size_t>(n) * sizeof(ops::SampleRow),
                                             cudaMemcpyHostToDevice, context_.stream()));
  return flight.draws.data() + first;
}

absl::Status DeviceRunner::QueueDecode(Flight& flight, const KvBatchLayout& layout, bool draws) {
  WALSH_RETURN_IF_ERROR(flight.decode_image.Send(layout, context_.stream()));
  WALSH_ASSIGN_OR_RETURN(const ops::SampleRow* rows, SendDraws(flight, draws, 0, layout.n_rows));
  WALSH_RETURN_IF_ERROR(pass_.Layers(flight.decode_image.Rows(layout, /*is_decode=*/true)));
  WALSH_RETURN_IF_ERROR(pass_.Head(pass_.hidden(), layout.n_rows, 0, rows));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(flight.best(), pass_.best(),
                                             static_cast<size_t>(layout.n_rows) * sizeof(int32_t),
                                             cudaMemcpyDeviceToHost, context_.stream()));
  return absl::OkStatus();
}

absl::Status DeviceRunner::Decode(const StepBatch& batch, Flight& flight) {
  const int64_t size = DecodeSize(static_cast<int64_t>(flight.decoding.size()));
  const KvBatchLayout layout = DecodeLayout(size);
  WALSH_RETURN_IF_ERROR(Fill(batch, flight.decoding, layout, flight.decode_image));
  bool draws = false;
  for (size_t i = 0; i < flight.decoding.size(); ++i) {
    const auto slot = static_cast<int64_t>(i);
    flight.slots[flight.decoding[i]] = slot;
    draws |= SetDraw(batch.sequences[flight.decoding[i]], flight.draw(slot));
  }
  if (!use_graphs_) return QueueDecode(flight, layout, draws);
  CapturedGraph& graph = flight.graphs[{size, draws}];
  if (graph.is_empty()) {
    WALSH_ASSIGN_OR_RETURN(graph, CapturedGraph::Capture(context_.stream(), [&] {
                             return QueueDecode(flight, layout, draws);
                           }));
  }
  return graph.Launch(context_.stream());
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
  WALSH_RETURN_IF_ERROR(pass_.Layers(flight.prefill_image.Rows(layout, /*is_decode=*/false)));

  int64_t row = 0;
  int64_t n_wanted = 0;
  bool draws = false;
  for (const size_t index : flight.prefilling) {
    const StepBatch::Sequence& sequence = batch.sequences[index];
    row += sequence.n_rows;
    if (sequence.wanted == Wanted::kNothing) continue;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        last_rows_.data() + n_wanted * config_.hidden, pass_.hidden() + (row - 1) * config_.hidden,
        static_cast<size_t>(config_.hidden) * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    flight.slots[index] = n_decode_slots_ + n_wanted++;
    draws |= SetDraw(sequence, flight.draw(flight.slots[index]));
  }
  if (n_wanted == 0) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(const ops::SampleRow* rows,
                         SendDraws(flight, draws, n_decode_slots_, n_wanted));
  WALSH_RETURN_IF_ERROR(pass_.Head(last_rows_.data(), n_wanted, n_decode_slots_, rows));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
      flight.best() + n_decode_slots_, pass_.best() + n_decode_slots_,
      static_cast<size_t>(n_wanted) * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
  return absl::OkStatus();
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
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    (batch.sequences[i].n_rows == 1 ? flight.decoding : flight.prefilling).push_back(i);
  }
  if (absl::Status status = Queue(batch, flight); !status.ok()) {
    // What was queued reads this flight's memory, which the next step may be written to.
    context_.Synchronize().IgnoreError();
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

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeDeviceRunner(
    Context* context, const ModelConfig* config, const DeviceWeights* weights,
    const ServedModel::RunnerLimits& limits, const DeviceRunnerOptions& options) {
  WALSH_RETURN_IF_ERROR(context->MakeCurrent());
  const int64_t n_decode = DecodeSize(limits.n_sequences);
  WALSH_ASSIGN_OR_RETURN(ForwardPass pass,
                         ForwardPass::Create(context, config, weights,
                                             {.n_rows = std::max(limits.n_rows, n_decode),
                                              .n_logits = n_decode + limits.n_sequences,
                                              .n_blocks = limits.n_blocks,
                                              .batch_invariant = options.batch_invariant}));
  auto runner =
      std::make_unique<DeviceRunner>(context, config, limits, std::move(pass), options.use_graphs);
  WALSH_RETURN_IF_ERROR(runner->Prepare());
  return runner;
}

}  // namespace walsh::engine::cuda
