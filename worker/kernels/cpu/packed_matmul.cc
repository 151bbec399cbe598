// PackedMatmul: rounds the activations, then walks tiles of rows with the best kernel at hand.
#include "worker/kernels/cpu/packed_matmul.h"

#include <algorithm>
#include <vector>

#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/cpu_features.h"
#include "worker/kernels/cpu/tiles.h"

namespace walsh::kernels::cpu {
namespace {

// Bytes of packed weights that a thread takes at a time: a 32nd of the matrix, but not so little
// that taking it costs (16 KiB are about 1 µs at a core's share of the memory bandwidth), nor so
// much that the last one leaves the other threads waiting.
constexpr int64_t kTileBytesMin = 16384;
constexpr int64_t kTileBytesMax = 131072;
constexpr int64_t kTilesPerMatrix = 32;
// Tokens whose activations stay in the second-level cache while tiles of rows pass by.
constexpr int64_t kTileTokens = 256;

// Grows, never shrinks: a decoding pass asks for the same few kilobytes again and again.
template <typename T>
T* Grow(std::vector<T>& buffer, int64_t n) {
  if (buffer.size() < static_cast<size_t>(n)) buffer.resize(static_cast<size_t>(n));
  return buffer.data();
}

struct ActivationBuffers {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<float> block_sums;
  std::vector<std::vector<float>> group_sums;  // by matrix
};

// One matrix of a batch and the range of the batch's tiles that are its own.
struct Item {
  const PackedMatmulParams* params = nullptr;
  RoundedActivations x;
  int64_t row_tiles_per_tile = 1;
  int64_t n_row_ranges = 0;
  int64_t first_tile = 0;
};

const float* SumGroups(const float* block_sums, int64_t n_tokens, int64_t n_blocks,
                       const PackedMatrix::Storage& storage, std::vector<float>& buffer) {
  if (storage.blocks_per_group == 1) return block_sums;
  float* sums = Grow(buffer, n_tokens * storage.n_groups);
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t g = 0; g < storage.n_groups; ++g) {
      const float* first = block_sums + t * n_blocks + g * storage.blocks_per_group;
      float sum = 0;
      for (int64_t b = 0; b < storage.blocks_per_group; ++b) sum += first[b];
      sums[t * storage.n_groups + g] = sum;
    }
  }
  return sums;
}

int64_t RowTilesPerTile(const PackedMatrix& weights) {
  const PackedMatrix::Storage& storage = weights.storage();
  const int64_t row_tile_bytes =
      std::max<int64_t>(1, storage.n_blocks * BlockBytes(weights.bits()));
  const int64_t bytes =
      std::clamp(storage.n_tiles * row_tile_bytes / kTilesPerMatrix, kTileBytesMin, kTileBytesMax);
  return std::max<int64_t>(1, bytes / row_tile_bytes);
}

// Rows [first_row_tile, …) for tokens [first_token, …) of an item.
void MultiplyRange(const PackedKernel& kernel, const Item& item, int64_t row_range,
                   int64_t first_token, int64_t n_tokens) {
  const PackedMatmulParams& p = *item.params;
  const PackedMatrix::Storage& storage = p.weights->storage();
  const int bits = p.weights->bits();
  const bool expand = bits != 8 && n_tokens >= kernel.expand_tokens_min;
  thread_local AlignedBytes expanded;
  const auto expanded_size = static_cast<size_t>(storage.n_blocks * BlockBytes(8));
  if (expand && expanded.size() < expanded_size) expanded = AlignedBytes(expanded_size);
  PackedTile tile;
  tile.uniform_zero = static_cast<float>(storage.uniform_zero);
  tile.factor = storage.factor;
  tile.n_groups = storage.n_groups;
  tile.blocks_per_group = storage.blocks_per_group;
  tile.x = item.x;
  tile.x.n_tokens = n_tokens;
  tile.x.codes += first_token * item.x.n_blocks * kBlockCols;
  tile.x.scales += first_token * item.x.n_blocks;
  tile.x.group_sums += first_token * storage.n_groups;
  tile.y_stride = p.y_stride;
  const int64_t first = row_range * item.row_tiles_per_tile;
  const int64_t end = std::min(storage.n_tiles, first + item.row_tiles_per_tile);
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = i * kTileRows;
    tile.codes = storage.tile_codes(i, bits);
    if (expand) {
      kernel.expand(tile.codes, bits, storage.n_blocks, expanded.data());
      tile.codes = expanded.data();
    }
    tile.scales = storage.tile_scales(i);
    tile.zeros = storage.tile_zeros(i);
    tile.float_zeros = storage.tile_float_zeros(i);
    tile.levels = storage.tile_levels(i);
    tile.bias = p.bias == nullptr ? nullptr : p.bias + row;
    tile.n_rows = std::min(kTileRows, p.weights->rows() - row);
    tile.y = p.y + first_token * p.y_stride + row;
    if (tile.levels != nullptr) {
      kernel.multiply_levels(tile, expand);
    } else {
      kernel.multiply(tile, bits, expand);
    }
  }
}

}  // namespace

const PackedKernel& BestPackedKernel() {
  static const PackedKernel kernel = [] {
    const CpuFeatures& features = GetCpuFeatures();
    if (features.avx512_vnni) return Avx512VnniPackedKernel();
    if (features.avx2_fma) return Avx2PackedKernel();
    return ScalarPackedKernel();
  }();
  return kernel;
}

absl::Status PackedMatmulWith(const PackedKernel& kernel, std::span<const PackedMatmulParams> items,
                              const Stream& stream) {
  if (items.empty() || items.front().n_tokens == 0) return absl::OkStatus();
  const PackedMatmulParams& shared = items.front();
  const int64_t n_tokens = shared.n_tokens;
  const int64_t cols = shared.weights->cols();
  const int64_t n_blocks = CeilDiv(cols, kBlockCols);

  thread_local ActivationBuffers buffers;
  int8_t* codes = Grow(buffers.codes, n_tokens * n_blocks * kBlockCols);
  float* scales = Grow(buffers.scales, n_tokens * n_blocks);
  float* block_sums = Grow(buffers.block_sums, n_tokens * n_blocks);
  ForEachRowRange(stream, n_tokens, cols, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      RoundRow(shared.x + t * shared.x_stride, cols, codes + t * n_blocks * kBlockCols,
               scales + t * n_blocks, block_sums + t * n_blocks);
    }
  });

  const int64_t n_token_ranges = CeilDiv(n_tokens, kTileTokens);
  std::vector<Item> work(items.size());
  if (buffers.group_sums.size() < items.size()) buffers.group_sums.resize(items.size());
  int64_t n_tiles = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    Item& item = work[i];
    const PackedMatrix::Storage& storage = items[i].weights->storage();
    item.params = &items[i];
    item.x = {n_tokens, n_blocks, codes, scales,
              SumGroups(block_sums, n_tokens, n_blocks, storage, buffers.group_sums[i])};
    item.row_tiles_per_tile = RowTilesPerTile(*items[i].weights);
    item.n_row_ranges = CeilDiv(storage.n_tiles, item.row_tiles_per_tile);
    item.first_tile = n_tiles;
    n_tiles += item.n_row_ranges * n_token_ranges;
  }
  ForEachTile(stream, n_tiles, [&](int64_t tile) {
    size_t i = work.size() - 1;
    while (tile < work[i].first_tile) --i;
    const int64_t local = tile - work[i].first_tile;
    const int64_t first_token = local / work[i].n_row_ranges * kTileTokens;
    MultiplyRange(kernel, work[i], local % work[i].n_row_ranges, first_token,
                  std::min(kTileTokens, n_tokens - first_token));
  });
  return absl::OkStatus();
}

absl::Status PackedMatmulBatch(std::span<const PackedMatmulParams> items, const Stream& stream) {
  return PackedMatmulWith(BestPackedKernel(), items, stream);
}

absl::Status PackedMatmul(const PackedMatmulParams& p, const Stream& stream) {
  return cpu::PackedMatmulBatch({&p, 1}, stream);
}

}  // namespace walsh::kernels::cpu
