#include "worker/engine/cuda/token_chooser.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::engine::cuda {
namespace {

namespace ops = kernels::cuda;

// A request's stop tokens and the ends of a model.
constexpr size_t kExcludedMax = 256;
static_assert(ops::kNotFinite == kNotFinite && ops::kNoTokenLeft == kNoTokenLeft);

template <typename T>
absl::Status CopyToDevice(std::span<const T> from, T* to, cudaStream_t stream) {
  // Of memory that is not locked, the call returns when it has been read.
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(to, from.data(), from.size_bytes(), cudaMemcpyHostToDevice, stream));
  return absl::OkStatus();
}

template <typename T>
absl::Status CopyToHost(const T* from, std::span<T> to, cudaStream_t stream) {
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream));
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<std::span<T>> AllocatePinned(int64_t n, ops::PinnedBuffer& memory) {
  WALSH_ASSIGN_OR_RETURN(memory, ops::PinnedBuffer::Allocate(n * static_cast<int64_t>(sizeof(T))));
  return std::span<T>(reinterpret_cast<T*>(memory.span().data()), static_cast<size_t>(n));
}

}  // namespace

absl::StatusOr<TokenChooser> TokenChooser::Create(const Limits& limits, cudaStream_t stream) {
  TokenChooser chooser(limits, stream);
  WALSH_RETURN_IF_ERROR(chooser.Allocate());
  return chooser;
}

int64_t TokenChooser::n_seen_max() const { return std::min(limits_.n_context, limits_.vocab); }

template <typename Visit>
void TokenChooser::ForEachBuffer(Visit&& visit) {
  visit(seen_, limits_.n_sequences * n_seen_max());
  visit(seen_logits_, limits_.n_sequences * n_seen_max());
  visit(excluded_, limits_.n_sequences * static_cast<int64_t>(kExcludedMax));
  visit(logprobs_, limits_.n_rows);
  visit(top_ids_, limits_.n_rows * ops::kTopLogprobsMax);
  visit(top_logprobs_, limits_.n_rows * ops::kTopLogprobsMax);
}

int64_t TokenChooser::SizeBytes(const Limits& limits) {
  ops::BufferBytes bytes;
  TokenChooser(limits, nullptr).ForEachBuffer(bytes);
  return bytes.bytes();
}

absl::Status TokenChooser::Allocate() {
  histories_.resize(static_cast<size_t>(limits_.n_sequences));
  absl::Status status;
  ForEachBuffer([&]<typename T>(DeviceBuffer<T>& buffer, int64_t n) {
    if (!status.ok()) return;
    absl::StatusOr<DeviceBuffer<T>> allocated = DeviceBuffer<T>::Allocate(n, stream_);
    status = allocated.status();
    if (allocated.ok()) buffer = *std::move(allocated);
  });
  return status;
}

bool TokenChooser::CanChoose(const Choice& choice) const {
  return limits_.vocab <= ops::kSampleVocabMax && choice.excluded.size() <= kExcludedMax &&
         choice.n_top_logprobs <= ops::kTopLogprobsMax &&
         static_cast<int64_t>(choice.seen.size()) <= n_seen_max();
}

absl::StatusOr<ops::SampleRow> TokenChooser::RowOf(const StepBatch::Sequence& sequence,
                                                   std::optional<int64_t> made_at) {
  const Choice& choice = sequence.choice;
  if (!CanChoose(choice)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a choice among ", limits_.vocab, " tokens with ", choice.seen.size(),
                     " seen, ", choice.excluded.size(), " excluded and ", choice.n_top_logprobs,
                     " log-probabilities, the limits are ", ops::kSampleVocabMax, ", ",
                     n_seen_max(), ", ", kExcludedMax, " and ", ops::kTopLogprobsMax));
  }
  ops::SampleRow row{.temperature = choice.temperature,
                     .top_p = choice.top_p,
                     .min_p = choice.min_p,
                     .repetition_penalty = choice.repetition_penalty,
                     .presence_penalty = choice.presence_penalty,
                     .frequency_penalty = choice.frequency_penalty,
                     .seed = choice.seed,
                     .position = choice.position,
                     .top_k = choice.top_k,
                     .n_top_logprobs = choice.n_top_logprobs};
  if (!choice.has_penalties() && choice.excluded.empty()) return row;
  const int64_t place = PlaceOf(sequence.id);
  if (choice.has_penalties()) WALSH_RETURN_IF_ERROR(SetSeen(choice, made_at, place, row));
  if (!choice.excluded.empty()) WALSH_RETURN_IF_ERROR(SetExcluded(choice, place, row));
  return row;
}

int64_t TokenChooser::PlaceOf(uint64_t id) {
  auto found = std::find_if(histories_.begin(), histories_.end(), [id](const History& history) {
    return history.is_used && history.id == id;
  });
  if (found == histories_.end()) {
    // Never one of this step, which has no more sequences than there are places.
    found = std::min_element(histories_.begin(), histories_.end(),
                             [](const History& a, const History& b) { return a.step < b.step; });
    *found = {.is_used = true, .id = id};
  }
  found->step = step_;
  return found - histories_.begin();
}

absl::Status TokenChooser::SetSeen(const Choice& choice, std::optional<int64_t> made_at,
                                   int64_t place, ops::SampleRow& row) {
  if (choice.n_counted + (made_at ? 1 : 0) != choice.position ||
      (choice.n_counted > 0 && choice.last_counted >= choice.seen.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("a choice of token ", choice.position, " of the output with ",
                     choice.n_counted, " counted in ", choice.seen.size(), ", the last at ",
                     choice.last_counted, ", and ", made_at ? "one" : "none", " on its way"));
  }
  History& history = histories_[static_cast<size_t>(place)];
  row.first_seen = place * n_seen_max();
  row.n_seen = static_cast<int32_t>(choice.seen.size());
  if (made_at) row.uncounted = static_cast<int32_t>(*made_at);
  if (history.has_seen && history.n_counted + 1 == choice.n_counted) {
    const SeenToken& last = choice.seen[choice.last_counted];
    row.changed_seen = static_cast<int32_t>(choice.last_counted);
    row.changed = {.token = last.token, .n_output = last.n_output};
  } else if (!history.has_seen || history.n_counted != choice.n_counted) {
    std::vector<ops::SeenToken> seen;
    seen.reserve(choice.seen.size());
    for (const auto& [token, n_output] : choice.seen) seen.push_back({token, n_output});
    WALSH_RETURN_IF_ERROR(
        CopyToDevice<ops::SeenToken>(seen, seen_.data() + row.first_seen, stream_));
  }
  history.has_seen = true;
  history.n_counted = choice.n_counted;
  return absl::OkStatus();
}

absl::Status TokenChooser::SetExcluded(const Choice& choice, int64_t place, ops::SampleRow& row) {
  History& history = histories_[static_cast<size_t>(place)];
  row.first_excluded = static_cast<int32_t>(place * static_cast<int64_t>(kExcludedMax));
  row.n_excluded = static_cast<int32_t>(choice.excluded.size());
  if (history.has_excluded) return absl::OkStatus();
  history.has_excluded = true;
  return CopyToDevice<int32_t>(choice.excluded, excluded_.data() + row.first_excluded, stream_);
}

ops::SampleRowsParams TokenChooser::Params(int64_t first) {
  return {.seen = seen_.data(),
          .excluded = excluded_.data(),
          .seen_logits = seen_logits_.data(),
          .logprobs = logprobs_.data() + first,
          .top_ids = top_ids_.data() + first * ops::kTopLogprobsMax,
          .top_logprobs = top_logprobs_.data() + first * ops::kTopLogprobsMax};
}

absl::StatusOr<TokenChooser::Logprobs> TokenChooser::Logprobs::Allocate(int64_t n_rows) {
  Logprobs logprobs;
  logprobs.n_rows_ = n_rows;
  WALSH_ASSIGN_OR_RETURN(
      logprobs.values_,
      AllocatePinned<float>(n_rows * (1 + ops::kTopLogprobsMax), logprobs.values_memory_));
  WALSH_ASSIGN_OR_RETURN(logprobs.top_ids_, AllocatePinned<int32_t>(n_rows * ops::kTopLogprobsMax,
                                                                    logprobs.top_ids_memory_));
  return logprobs;
}

void TokenChooser::Logprobs::Fill(int64_t row, int32_t n_top, TokenLogprob& token) const {
  token.logprob = values_[static_cast<size_t>(row)];
  token.top.clear();
  for (int64_t i = row * ops::kTopLogprobsMax; n_top > 0; ++i, --n_top) {
    token.top.emplace_back(top_ids_[static_cast<size_t>(i)],
                           values_[static_cast<size_t>(n_rows_ + i)]);
  }
}

absl::Status TokenChooser::Fetch(int64_t first, int64_t n, Logprobs& logprobs) const {
  const int64_t first_top = first * ops::kTopLogprobsMax;
  const auto n_top = static_cast<size_t>(n * ops::kTopLogprobsMax);
  WALSH_RETURN_IF_ERROR(CopyToHost(
      logprobs_.data() + first,
      logprobs.values_.subspan(static_cast<size_t>(first), static_cast<size_t>(n)), stream_));
  WALSH_RETURN_IF_ERROR(CopyToHost(top_ids_.data() + first_top,
                                   logprobs.top_ids_.subspan(static_cast<size_t>(first_top), n_top),
                                   stream_));
  return CopyToHost(
      top_logprobs_.data() + first_top,
      logprobs.values_.subspan(static_cast<size_t>(logprobs.n_rows_ + first_top), n_top), stream_);
}

}  // namespace walsh::engine::cuda
