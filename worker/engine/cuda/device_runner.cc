#include "worker/engine/cuda/device_runner.h"

#include <algorithm>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/engine/cuda/captured_graph.h"
#include "worker/engine/cuda/forward_pass.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/pinned_buffer.h"

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
               ForwardPass pass)
      : context_(*context), config_(*config), limits_(limits), pass_(std::move(pass)) {}
  ~DeviceRunner() override { context_.Synchronize().IgnoreError(); }

  absl::Status Prepare(bool use_graphs);
  absl::Status Run(const StepBatch& batch) override;
  int32_t best(size_t index) const override {
    return best_host_values()[static_cast<size_t>(slots_[index])];
  }
  std::span<float> logits(size_t index) override {
    auto* rows = reinterpret_cast<float*>(logits_host_.span().data());
    return {rows + logits_rows_[index] * config_.vocab, static_cast<size_t>(config_.vocab)};
  }
  void Discard(BlockId) override {}  // the pool stays as it is
  int64_t kv_cache_bytes() const override { return pass_.kv_bytes(); }

 private:
  absl::Status CheckBatch(const StepBatch& batch) const;
  KvBatchLayout DecodeLayout(int64_t n_sequences) const;
  std::span<int32_t> best_host_values() const {
    return {reinterpret_cast<int32_t*>(best_host_.span().data()), static_cast<size_t>(n_slots_)};
  }
  // Writes what a pass over these sequences of the batch knows of its rows.
  absl::Status Fill(const StepBatch& batch, std::span<const size_t> sequences,
                    const KvBatchLayout& layout, Image& image) const;
  // All of a decoding pass, as it is captured.
  absl::Status QueueDecode(const KvBatchLayout& layout);
  absl::Status Decode(const StepBatch& batch);
  absl::Status Prefill(const StepBatch& batch);
  absl::Status FetchLogits(const StepBatch& batch);

  Context& context_;
  const ModelConfig& config_;
  const ServedModel::RunnerLimits limits_;
  ForwardPass pass_;
  Image decode_image_, prefill_image_;
  DeviceBuffer<float> last_rows_;  // [n_sequences, hidden], of sequences that are prefilled
  std::map<int64_t, CapturedGraph> graphs_;  // by DecodeSize

  // Places of logits and best tokens: first those of the largest decoding pass.
  int64_t n_decode_slots_ = 0;
  int64_t n_slots_ = 0;
  mutable PinnedBuffer best_host_;  // [n_slots]
  PinnedBuffer logits_host_;        // [rows wanted in a step so far, vocab]
  // Of the last step, by sequence of its batch.
  std::vector<size_t> decoding_, prefilling_;
  std::vector<int64_t> slots_;
  std::vector<int64_t> logits_rows_;
};

absl::Status DeviceRunner::Prepare(bool use_graphs) {
  const cudaStream_t stream = context_.stream();
  n_decode_slots_ = DecodeSize(limits_.n_sequences);
  n_slots_ = n_decode_slots_ + limits_.n_sequences;
  const KvBatchLayout largest{.n_sequences = n_decode_slots_,
                              .n_rows = std::max(limits_.n_rows, n_decode_slots_),
                              .max_blocks = DecodeLayout(1).max_blocks};
  WALSH_ASSIGN_OR_RETURN(decode_image_, Image::Allocate(Image::Size(largest), stream));
  WALSH_ASSIGN_OR_RETURN(prefill_image_, Image::Allocate(Image::Size(largest), stream));
  WALSH_ASSIGN_OR_RETURN(
      last_rows_, DeviceBuffer<float>::Allocate(limits_.n_sequences * config_.hidden, stream));
  WALSH_ASSIGN_OR_RETURN(best_host_,
                         PinnedBuffer::Allocate(n_slots_ * static_cast<int64_t>(sizeof(int32_t))));
  if (!use_graphs) return context_.Synchronize();
  for (int64_t size = 1; size <= n_decode_slots_; size = DecodeSize(size + 1)) {
    const KvBatchLayout layout = DecodeLayout(size);
    WALSH_RETURN_IF_ERROR(Fill({}, {}, layout, decode_image_));
    WALSH_RETURN_IF_ERROR(QueueDecode(layout));  // loads what it launches
    WALSH_ASSIGN_OR_RETURN(graphs_[size],
                           CapturedGraph::Capture(stream, [&] { return QueueDecode(layout); }));
  }
  return context_.Synchronize();
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
  for (const int32_t token : batch.tokens) {
    if (token < 0 || token >= config_.vocab) {
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
    std::copy_n(batch.tokens.begin() + sequence.first_row, sequence.n_rows, values.begin() + row);
    row += sequence.n_rows;
  }
  return layout.Pack(of_pass, limits_.n_blocks,
                     values.subspan(static_cast<size_t>(n_token_places)));
}

absl::Status DeviceRunner::QueueDecode(const KvBatchLayout& layout) {
  WALSH_RETURN_IF_ERROR(decode_image_.Send(layout, context_.stream()));
  WALSH_RETURN_IF_ERROR(pass_.Layers(decode_image_.Rows(layout, /*is_decode=*/true)));
  WALSH_RETURN_IF_ERROR(pass_.Head(pass_.hidden(), layout.n_rows, 0));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(best_host_.span().data(), pass_.best(),
                                             static_cast<size_t>(layout.n_rows) * sizeof(int32_t),
                                             cudaMemcpyDeviceToHost, context_.stream()));
  return absl::OkStatus();
}

absl::Status DeviceRunner::Decode(const StepBatch& batch) {
  const int64_t size = DecodeSize(static_cast<int64_t>(decoding_.size()));
  const KvBatchLayout layout = DecodeLayout(size);
  WALSH_RETURN_IF_ERROR(Fill(batch, decoding_, layout, decode_image_));
  for (size_t i = 0; i < decoding_.size(); ++i) slots_[decoding_[i]] = static_cast<int64_t>(i);
  const auto graph = graphs_.find(size);
  return graph == graphs_.end() ? QueueDecode(layout) : graph->second.Launch(context_.stream());
}

absl::Status DeviceRunner::Prefill(const StepBatch& batch) {
  const cudaStream_t stream = context_.stream();
  KvBatchLayout layout{.n_sequences = static_cast<int64_t>(prefilling_.size())};
  for (const size_t index : prefilling_) {
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
  WALSH_RETURN_IF_ERROR(Fill(batch, prefilling_, layout, prefill_image_));
  WALSH_RETURN_IF_ERROR(prefill_image_.Send(layout, stream));
  WALSH_RETURN_IF_ERROR(pass_.Layers(prefill_image_.Rows(layout, /*is_decode=*/false)));

  int64_t row = 0;
  int64_t n_wanted = 0;
  for (const size_t index : prefilling_) {
    const StepBatch::Sequence& sequence = batch.sequences[index];
    row += sequence.n_rows;
    if (sequence.wanted == Wanted::kNothing) continue;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
        last_rows_.data() + n_wanted * config_.hidden, pass_.hidden() + (row - 1) * config_.hidden,
        static_cast<size_t>(config_.hidden) * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    slots_[index] = n_decode_slots_ + n_wanted++;
  }
  if (n_wanted == 0) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(pass_.Head(last_rows_.data(), n_wanted, n_decode_slots_));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(
      &best_host_values()[static_cast<size_t>(n_decode_slots_)], pass_.best() + n_decode_slots_,
      static_cast<size_t>(n_wanted) * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
  return absl::OkStatus();
}

absl::Status DeviceRunner::FetchLogits(const StepBatch& batch) {
  int64_t n_rows = 0;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    if (batch.sequences[i].wanted == Wanted::kLogits) logits_rows_[i] = n_rows++;
  }
  const int64_t row_bytes = config_.vocab * static_cast<int64_t>(sizeof(float));
  if (logits_host_.size() < n_rows * row_bytes) {
    logits_host_ = PinnedBuffer();
    WALSH_ASSIGN_OR_RETURN(logits_host_, PinnedBuffer::Allocate(n_rows * row_bytes));
  }
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    if (batch.sequences[i].wanted != Wanted::kLogits) continue;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(logits(i).data(), pass_.logits(slots_[i]),
                                               static_cast<size_t>(row_bytes),
                                               cudaMemcpyDeviceToHost, context_.stream()));
  }
  return absl::OkStatus();
}

absl::Status DeviceRunner::Run(const StepBatch& batch) {
  WALSH_RETURN_IF_ERROR(CheckBatch(batch));
  WALSH_RETURN_IF_ERROR(context_.MakeCurrent());
  if (batch.on_layer) batch.on_layer();
  decoding_.clear();
  prefilling_.clear();
  slots_.assign(batch.sequences.size(), 0);
  logits_rows_.assign(batch.sequences.size(), 0);
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    (batch.sequences[i].n_rows == 1 ? decoding_ : prefilling_).push_back(i);
  }
  if (!decoding_.empty()) WALSH_RETURN_IF_ERROR(Decode(batch));
  if (!prefilling_.empty()) WALSH_RETURN_IF_ERROR(Prefill(batch));
  WALSH_RETURN_IF_ERROR(FetchLogits(batch));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.stream()));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelRunner>> MakeDeviceRunner(
    Context* context, const ModelConfig* config, const DeviceWeights* weights,
    const ServedModel::RunnerLimits& limits, bool use_graphs) {
  WALSH_RETURN_IF_ERROR(context->MakeCurrent());
  const int64_t n_decode = DecodeSize(limits.n_sequences);
  WALSH_ASSIGN_OR_RETURN(ForwardPass pass,
                         ForwardPass::Create(context, config, weights,
                                             {.n_rows = std::max(limits.n_rows, n_decode),
                                              .n_logits = n_decode + limits.n_sequences,
                                              .n_blocks = limits.n_blocks}));
  auto runner = std::make_unique<DeviceRunner>(context, config, limits, std::move(pass));
  WALSH_RETURN_IF_ERROR(runner->Prepare(use_graphs));
  return runner;
}

}  // namespace walsh::engine::cuda
