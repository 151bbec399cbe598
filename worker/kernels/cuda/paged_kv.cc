#include "worker/kernels/cuda/paged_kv.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::kernels::cuda {
namespace {

// Places are multiples of 16 bytes.
int64_t Aligned(int64_t n) { return (n + kTableAlignment - 1) / kTableAlignment * kTableAlignment; }

absl::Status CheckSequence(const KvSequence& s, size_t index, const KvBatchLayout& layout,
                           int64_t n_blocks) {
  if (s.n_rows < 0 || s.n_past < 0 || s.first_row < 0 || s.first_row + s.n_rows > layout.n_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence ", index, ": rows ", s.first_row, " to ", s.first_row + s.n_rows,
                     " after ", s.n_past, " tokens, a batch has ", layout.n_rows, " rows"));
  }
  const auto n_table = static_cast<int64_t>(s.table.size());
  if (n_table > layout.max_blocks) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", index, ": table of ", n_table,
                                                   " blocks, the limit is ", layout.max_blocks));
  }
  if (s.n_rows > 0 && n_table * kPoolBlockTokens < s.n_past + s.n_rows) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", index, ": table of ", n_table,
                                                   " blocks of ", kPoolBlockTokens, " for ",
                                                   s.n_past + s.n_rows, " tokens"));
  }
  for (const int32_t block : s.table) {
    if (block < 0 || block >= n_blocks) {
      return absl::InvalidArgumentError(
          absl::StrCat("sequence ", index, ": block ", block, ", the pool has ", n_blocks));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckKvForm(const KvForm& form, int64_t head_dim) {
  if (!form.is_quantized()) return absl::OkStatus();
  if (form.bits != 8 && form.bits != 4) {
    return absl::UnimplementedError(
        absl::StrCat("a KV cache of ", form.bits, " bits, kernels take 16, 8 and 4"));
  }
  constexpr std::array<int64_t, 5> kHeadDims = {32, 64, 96, 128, 256};
  if (std::find(kHeadDims.begin(), kHeadDims.end(), head_dim) == kHeadDims.end()) {
    return absl::UnimplementedError(absl::StrCat("a KV cache of ", form.bits,
                                                 " bits with heads of ", head_dim,
                                                 ", it takes 32, 64, 96, 128 and 256"));
  }
  const int64_t group = form.group_size;
  if (group == KvForm::kHead) return absl::OkStatus();
  if ((group != 32 && group != 64 && group != 128) || head_dim / 2 % group != 0) {
    return absl::UnimplementedError(
        absl::StrCat("a KV cache in groups of ", group, " with heads of ", head_dim,
                     ", a group is a head, or 32, 64 or 128 values that divide half of it"));
  }
  return absl::OkStatus();
}

KvBatch KvBatch::Sequences(int64_t first, int64_t n) const {
  KvBatch part = *this;
  part.n_sequences = n;
  part.first_row += first;
  part.n_sequence_rows += first;
  part.n_past += first;
  part.tables += first * max_blocks;
  return part;
}

int64_t KvBatchLayout::size() const {
  return n_sequences * max_blocks + 3 * Aligned(n_sequences) + Aligned(n_rows);
}

KvBatch KvBatchLayout::View(const int32_t* data) const {
  KvBatch batch{.n_sequences = n_sequences, .n_rows = n_rows, .max_blocks = max_blocks};
  batch.tables = data;
  batch.first_row = data + n_sequences * max_blocks;
  batch.n_sequence_rows = batch.first_row + Aligned(n_sequences);
  batch.n_past = batch.n_sequence_rows + Aligned(n_sequences);
  batch.sequence_of_row = batch.n_past + Aligned(n_sequences);
  return batch;
}

absl::Status KvBatchLayout::Pack(std::span<const KvSequence> sequences, int64_t n_blocks,
                                 std::span<int32_t> to) const {
  if (max_blocks % kTableAlignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_blocks: ", max_blocks, ", must be a multiple of ", kTableAlignment));
  }
  if (static_cast<int64_t>(to.size()) != size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch's image of ", to.size(), " int32, it takes ", size()));
  }
  if (static_cast<int64_t>(sequences.size()) > n_sequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch of ", sequences.size(), " sequences, the limit is ", n_sequences));
  }
  const KvBatch places = View(to.data());
  const auto at = [&](const int32_t* place) { return to.begin() + (place - to.data()); };
  std::fill(to.begin(), to.end(), 0);
  std::fill_n(at(places.sequence_of_row), n_rows, -1);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const KvSequence& s = sequences[i];
    WALSH_RETURN_IF_ERROR(CheckSequence(s, i, *this, n_blocks));
    const auto index = static_cast<int64_t>(i);
    at(places.first_row)[index] = static_cast<int32_t>(s.first_row);
    at(places.n_sequence_rows)[index] = static_cast<int32_t>(s.n_rows);
    at(places.n_past)[index] = static_cast<int32_t>(s.n_past);
    std::copy(s.table.begin(), s.table.end(), at(places.tables) + index * max_blocks);
    for (int64_t row = s.first_row; row < s.first_row + s.n_rows; ++row) {
      int32_t& owner = at(places.sequence_of_row)[row];
      if (owner >= 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("row ", row, " is of sequences ", owner, " and ", index));
      }
      owner = static_cast<int32_t>(index);
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
