#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/serving_codes.h"
#include "worker/kernels/cuda/serving_layout.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRun = 32;  // codes that fill `bits` words of the artifact
constexpr int kDenseZero = 128;
constexpr float kDenseCodeMax = 127.0f;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of ServingShape, for kernels.
struct Layout {
  int64_t rows;
  int64_t cols;
  int64_t group_size;
  int64_t row_tiles;
  int64_t block_bytes;
  int64_t blocks_of_grid;
  int grids_in_block;
  bool interleaved;

  // Row of the stacked linears at `place` of the tiles; rows where there is none.
  __device__ int64_t RowAt(int64_t place) const {
    if (!interleaved) return min(place, rows);
    const int64_t row = place / 16 * 8 + place % 8;
    if (row >= rows / 2) return rows;
    return place % 16 < 8 ? row : row + rows / 2;
  }
  // Group of columns of grid i of a block.
  __device__ int64_t GroupOf(int64_t block, int i) const {
    return grids_in_block == 1 ? block / blocks_of_grid : block * grids_in_block + i;
  }
  // Grid of the block that a column of it has.
  __device__ int GridOf(int64_t col) const {
    return static_cast<int>(col % kServingBlockCols) * grids_in_block / kServingBlockCols;
  }
};

Layout LayoutOf(const ServingShape& shape) {
  return {.rows = shape.rows,
          .cols = shape.cols,
          .group_size = shape.group_size,
          .row_tiles = shape.row_tiles(),
          .block_bytes = shape.block_bytes(),
          .blocks_of_grid = shape.blocks_of_grid(),
          .grids_in_block = shape.grids_in_block(),
          .interleaved = shape.order == ServingRows::kInterleaved};
}

struct Linears {
  StoredLinear linear[kServingLinearsMax];
  int n = 0;

  // The linear that has row r of the stacked ones, which is there; r becomes the row in it.
  __device__ const StoredLinear& Find(int64_t& r) const {
    int i = 0;
    while (i + 1 < n && r >= linear[i].rows) r -= linear[i++].rows;
    if (linear[i].row_order != nullptr) r = linear[i].row_order[r];
    return linear[i];
  }
};

// Value i of a run of packed values whose words are load(0), …, load(bits − 1).
template <typename Load>
__device__ __forceinline__ uint32_t PackedValue(int bits, int i, Load&& load) {
  const int word = i * bits / 32;
  const int shift = i * bits % 32;
  uint32_t value = load(word) >> shift;
  if (shift + bits > 32) value |= load(word + 1) << (32 - shift);
  return value & ((1u << bits) - 1u);
}

using BlockCodes = uint8_t[kServingTileRows][kServingBlockCols];

// The first warp writes a block's codes to their places.
template <int kBits>
__device__ void WriteBlock(const BlockCodes& codes, uint8_t* block) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kServingLanes) return;
  uint32_t words[ServingWords(kBits)] = {};
#pragma unroll
  for (int s = 0; s < kServingSteps; ++s) {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = codes[ServingRow(lane, a)][ServingColumn(lane, s, a) + i];
#pragma unroll
        for (int b = 0; b < kBits; ++b) {
          const CodePlace place = PlaceOf(kBits, s, a, i, b);
          words[place.word] |= (code >> b & 1u) << place.position;
        }
      }
    }
  }
#pragma unroll
  for (int w = 0; w < ServingWords(kBits); ++w) {
    *reinterpret_cast<uint32_t*>(block + ServingWordOffset(kBits, lane, w)) = words[w];
  }
}

// A CTA makes a block.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    BuildCodesKernel(const Layout layout, const Linears linears, const int32_t* column_order,
                     uint8_t* out) {
  __shared__ BlockCodes codes;
  const int64_t tile = blockIdx.x % layout.row_tiles;
  const int64_t block = blockIdx.x / layout.row_tiles;
  constexpr int kRuns = kServingBlockCols / kRun;
  if (threadIdx.x < kServingTileRows * kRuns) {
    const int slot = static_cast<int>(threadIdx.x) % kServingTileRows;
    const int run = static_cast<int>(threadIdx.x) / kServingTileRows;
    const int64_t col = block * kServingBlockCols + run * kRun;
    int64_t row = layout.RowAt(tile * kServingTileRows + slot);
    const bool is_there = row < layout.rows && col < layout.cols;
    if (is_there && column_order != nullptr) {
      const StoredLinear& linear = linears.Find(row);
      for (int i = 0; i < kRun; ++i) {
        const int64_t stored = column_order[col + i];
        const uint32_t* words = linear.qweight + stored / kRun * kBits * linear.rows + row;
        codes[slot][run * kRun + i] = static_cast<uint8_t>(PackedValue(
            kBits, static_cast<int>(stored % kRun), [&](int m) { return words[m * linear.rows]; }));
      }
    } else {
      uint32_t words[kBits] = {};
      if (is_there) {
        const StoredLinear& linear = linears.Find(row);
#pragma unroll
        for (int m = 0; m < kBits; ++m) {
          words[m] = linear.qweight[(col / kRun * kBits + m) * linear.rows + row];
        }
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        codes[slot][run * kRun + i] =
            static_cast<uint8_t>(PackedValue(kBits, i, [&](int m) { return words[m]; }));
      }
    }
  }
  __syncthreads();
  WriteBlock<kBits>(codes, out + static_cast<int64_t>(blockIdx.x) * layout.block_bytes);
}

// A thread makes the grid of a row and group in a block.
__global__ void __launch_bounds__(kThreads)
    BuildGridsKernel(const Layout layout, const Linears linears, int bits, int64_t n,
                     int64_t n_groups, uint8_t* blocks) {
  const int64_t at_grid = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at_grid >= n) return;
  const int slot = static_cast<int>(at_grid % kServingTileRows);
  const int i = static_cast<int>(at_grid / kServingTileRows % layout.grids_in_block);
  const int64_t of_matrix = at_grid / kServingTileRows / layout.grids_in_block;  // the block
  const int64_t group = layout.GroupOf(of_matrix / layout.row_tiles, i);
  int64_t row = layout.RowAt(of_matrix % layout.row_tiles * kServingTileRows + slot);
  const bool is_there = row < layout.rows && group < n_groups;
  if (!is_there) row = 0;
  const StoredLinear& linear = linears.Find(row);
  const int64_t at = group * linear.rows + row;
  const int place = i * kServingTileRows + ServingGridPlace(slot);
  auto* out =
      reinterpret_cast<__half*>(blocks + of_matrix * layout.block_bytes + ServingCodeBytes(bits));
  if (linears.linear[0].levels != nullptr) {
    for (int k = 0; k < 4; ++k) {
      out[4 * place + k] = is_there ? linear.levels[4 * at + k] : __half(0.0f);
    }
    return;
  }
  __half scale(0.0f);
  __half zero(0.0f);
  if (is_there) {
    scale = linear.scales[at];
    if (linear.zeros != nullptr) {
      zero = linear.zeros[at];
    } else {
      const uint32_t* words =
          linear.qzeros + (group * (linear.rows / kRun) + row / kRun) * static_cast<int64_t>(bits);
      zero = __uint2half_rn(
          PackedValue(bits, static_cast<int>(row % kRun), [&](int m) { return words[m]; }));
    }
  }
  out[2 * place] = scale;
  out[2 * place + 1] = zero;
}

// A CTA rounds a block; its group is the block.
__global__ void __launch_bounds__(kThreads)
    QuantizeDenseKernel(const Layout layout, const __nv_bfloat16* weights, int64_t* first_bad,
                        uint8_t* blocks) {
  __shared__ BlockCodes codes;
  const int64_t tile = blockIdx.x % layout.row_tiles;
  const int64_t block = blockIdx.x / layout.row_tiles;
  uint8_t* out = blocks + static_cast<int64_t>(blockIdx.x) * layout.block_bytes;
  auto* grid = reinterpret_cast<__half*>(out + ServingCodeBytes(8));
  const int lane = static_cast<int>(threadIdx.x) % kServingLanes;
  const int warp = static_cast<int>(threadIdx.x) / kServingLanes;
  constexpr int kPerLane = kServingBlockCols / kServingLanes;
  for (int slot = warp; slot < kServingTileRows; slot += kThreads / kServingLanes) {
    const int64_t row = tile * kServingTileRows + slot;
    float values[kPerLane];
    float largest = 0;
    for (int k = 0; k < kPerLane; ++k) {
      const int64_t col = block * kServingBlockCols + k * kServingLanes + lane;
      const bool is_there = row < layout.rows && col < layout.cols;
      values[k] = is_there ? __bfloat162float(weights[row * layout.cols + col]) : 0.0f;
      if (!isfinite(values[k])) {
        atomicMin(reinterpret_cast<long long*>(first_bad),
                  static_cast<long long>(row * layout.cols + col));
        values[k] = 0;
      }
      largest = fmaxf(largest, fabsf(values[k]));
    }
    for (int distance = kServingLanes / 2; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    }
    const __half scale = __float2half_rn(largest / kDenseCodeMax);
    const float step = __half2float(scale);
    for (int k = 0; k < kPerLane; ++k) {
      const float rounded = step > 0 ? rintf(values[k] / step) : 0.0f;
      codes[slot][k * kServingLanes + lane] = static_cast<uint8_t>(
          kDenseZero + static_cast<int>(fminf(fmaxf(rounded, -kDenseCodeMax), kDenseCodeMax)));
    }
    if (lane == 0) {
      const int place = ServingGridPlace(slot);
      grid[2 * place] = scale;
      grid[2 * place + 1] = __half(static_cast<float>(kDenseZero));
    }
  }
  __syncthreads();
  WriteBlock<8>(codes, out);
}

// A CTA takes a block; a thread four columns of a row at a time.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    UnpackServingKernel(const Layout layout, bool has_codebook, const uint8_t* blocks,
                        uint8_t* codes, float* weights) {
  const int64_t tile = blockIdx.x % layout.row_tiles;
  const int64_t block = blockIdx.x / layout.row_tiles;
  const uint8_t* words = blocks + static_cast<int64_t>(blockIdx.x) * layout.block_bytes;
  const auto* grids = reinterpret_cast<const __half*>(words + ServingCodeBytes(kBits));
  for (int t = static_cast<int>(threadIdx.x); t < kServingLanes * kServingSteps * 4;
       t += kThreads) {
    const int lane = t % kServingLanes;
    const int s = t / kServingLanes / 4;
    const int a = t / kServingLanes % 4;
    const int slot = ServingRow(lane, a);
    const int64_t row = layout.RowAt(tile * kServingTileRows + slot);
    for (int i = 0; i < 4; ++i) {
      const int64_t col = block * kServingBlockCols + ServingColumn(lane, s, a) + i;
      if (row >= layout.rows || col >= layout.cols) continue;
      int code = 0;
      for (int b = 0; b < kBits; ++b) {
        const CodePlace place = PlaceOf(kBits, s, a, i, b);
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(words + ServingWordOffset(kBits, lane, place.word));
        code |= static_cast<int>(word >> place.position & 1u) << b;
      }
      const int64_t at = row * layout.cols + col;
      if (codes != nullptr) codes[at] = static_cast<uint8_t>(code);
      if (weights == nullptr) continue;
      const int grid = layout.GridOf(col) * kServingTileRows + ServingGridPlace(slot);
      weights[at] =
          has_codebook
              ? __half2float(grids[4 * grid + code])
              : __fmul_rn(__half2float(grids[2 * grid]),
                          __fsub_rn(static_cast<float>(code), __half2float(grids[2 * grid + 1])));
    }
  }
}

// The code of byte i of register a of step s, of the words of a lane.
template <int kBits>
__device__ __forceinline__ uint32_t CodeAt(const uint32_t* words, int s, int a, int i) {
  const CodePlace low = PlaceOf(kBits, s, a, i, 0);
  const CodePlace high = PlaceOf(kBits, s, a, i, kBits - 1);
  if (high.word == low.word && high.position == low.position + kBits - 1) {
    return words[low.word] >> low.position & ((1u << kBits) - 1u);
  }
  uint32_t code = 0;
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    const CodePlace place = PlaceOf(kBits, s, a, i, b);
    code |= (words[place.word] >> place.position & 1u) << b;
  }
  return code;
}

// A warp takes a block, a lane its own words: of each register four columns of a row, and four
// lanes write a sector.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    DequantizeServingKernel(const Layout layout, bool has_codebook, int64_t n_blocks,
                            const uint8_t* blocks, __nv_bfloat16* weights) {
  const int lane = static_cast<int>(threadIdx.x) % kServingLanes;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kServingLanes) + threadIdx.x / kServingLanes;
  if (index >= n_blocks) return;
  const int64_t first_col = index / layout.row_tiles * kServingBlockCols;
  const uint8_t* from = blocks + index * layout.block_bytes;
  const auto* grids = reinterpret_cast<const __half*>(from + ServingCodeBytes(kBits));
  uint32_t words[ServingWords(kBits)];
#pragma unroll
  for (int w = 0; w < ServingWords(kBits); w += 2) {
    const auto pair = *reinterpret_cast<const uint2*>(from + ServingWordOffset(kBits, lane, w));
    words[w] = pair.x;
    words[w + 1] = pair.y;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = ServingRow(lane, half);
    const int64_t row = layout.RowAt(index % layout.row_tiles * kServingTileRows + slot);
    if (row >= layout.rows) continue;
#pragma unroll
    for (int s = 0; s < kServingSteps; ++s) {
#pragma unroll
      for (int a = half; a < 4; a += 2) {
        const int64_t col = first_col + ServingColumn(lane, s, a);
        if (col >= layout.cols) continue;
        const int grid = layout.GridOf(col) * kServingTileRows + ServingGridPlace(slot);
        const float scale = __half2float(grids[2 * grid]);
        const float zero = __half2float(grids[2 * grid + 1]);
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t code = CodeAt<kBits>(words, s, a, i);
          values[i] = has_codebook ? __half2float(grids[4 * grid + code])
                                   : scale * (static_cast<float>(code) - zero);
        }
        const __nv_bfloat162 low = __floats2bfloat162_rn(values[0], values[1]);
        const __nv_bfloat162 high = __floats2bfloat162_rn(values[2], values[3]);
        *reinterpret_cast<uint2*>(weights + row * layout.cols + col) = {
            *reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
      }
    }
  }
}

absl::Status CheckBlocks(int64_t n) {
  constexpr int64_t kGridMax = INT32_MAX;
  if (n <= kGridMax) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a serving matrix of ", n, " blocks, the limit is ", kGridMax));
}

absl::Status ValidateLinears(const ServingMatrix::Source& source) {
  const auto n = static_cast<int64_t>(source.linears.size());
  if (n < 1 || n > kServingLinearsMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(n, " linears in a serving matrix, must be 1 to ", kServingLinearsMax));
  }
  if (source.cols % kRun != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("packed linears of ", source.cols, " columns, must be a multiple of ", kRun));
  }
  if (source.group_size <= 0 || source.cols % source.group_size != 0) {
    return absl::InvalidArgumentError(absl::StrCat("group_size: ", source.group_size,
                                                   " does not divide ", source.cols, " columns"));
  }
  const StoredLinear& first = source.linears[0];
  for (const StoredLinear& linear : source.linears) {
    if (linear.rows <= 0) {
      return absl::InvalidArgumentError(absl::StrCat("a linear of ", linear.rows, " rows"));
    }
    const bool has_codebook = linear.levels != nullptr;
    const bool has_scales = linear.scales != nullptr;
    const int zeros = (linear.qzeros != nullptr ? 1 : 0) + (linear.zeros != nullptr ? 1 : 0);
    if (linear.qweight == nullptr || has_codebook == has_scales || zeros != (has_scales ? 1 : 0)) {
      return absl::InvalidArgumentError(
          "a linear has qweight and either levels, or scales with qzeros or zeros");
    }
    if (has_codebook != (first.levels != nullptr)) {
      return absl::InvalidArgumentError("linears with and without a codebook in one matrix");
    }
    if (linear.qzeros != nullptr && linear.rows % kRun != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("packed zeros of ", linear.rows, " rows, must be a multiple of ", kRun));
    }
  }
  if (source.order == ServingRows::kInterleaved &&
      (n != 2 || first.rows != source.linears[1].rows)) {
    return absl::InvalidArgumentError(
        "interleaved rows are those of two linears of one size, these are " + std::to_string(n) +
        (n == 2 ? " of different sizes" : ""));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t ServingShape::row_tiles() const {
  return order == ServingRows::kInterleaved ? CeilDiv(rows / 2, kServingTileRows / 2)
                                            : CeilDiv(rows, kServingTileRows);
}
int64_t ServingShape::col_blocks() const { return CeilDiv(cols, kServingBlockCols); }
int ServingShape::grids_in_block() const {
  return group_size < kServingBlockCols && group_size != cols
             ? static_cast<int>(kServingBlockCols / group_size)
             : 1;
}
int64_t ServingShape::blocks_of_grid() const { return CeilDiv(group_size, kServingBlockCols); }
int64_t ServingShape::block_bytes() const {
  return ServingBlockBytes(bits, has_codebook, grids_in_block());
}
int64_t ServingShape::PlaceOfRow(int64_t r) const {
  if (order == ServingRows::kStacked) return r;
  const bool second = r >= rows / 2;
  const int64_t i = second ? r - rows / 2 : r;
  return i / 8 * 16 + i % 8 + (second ? 8 : 0);
}

absl::Status ValidateServingShape(const ServingShape& shape) {
  constexpr int64_t kColsMultiple = 8;
  if (shape.rows <= 0 || shape.cols <= 0 || shape.cols % kColsMultiple != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a serving matrix of ", shape.rows, " rows and ", shape.cols,
                     " columns; both must be positive, columns a multiple of ", kColsMultiple));
  }
  if (shape.bits != 2 && shape.bits != 3 && shape.bits != 4 && shape.bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat("bits: ", shape.bits, ", must be 2, 3, 4 or 8"));
  }
  if (shape.has_codebook && shape.bits != 2) {
    return absl::UnimplementedError(
        absl::StrCat("a codebook of ", shape.bits, " bits on the GPU, only one of 2 is served"));
  }
  if (shape.group_size <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("group_size: ", shape.group_size, ", must be positive"));
  }
  const bool fits = shape.group_size == 32 || shape.group_size == 64 ||
                    shape.group_size % kServingBlockCols == 0 || shape.group_size == shape.cols;
  if (!fits) {
    return absl::UnimplementedError(
        absl::StrCat("group_size: ", shape.group_size,
                     " on the GPU; served are 32, 64, multiples of 128 and a whole row"));
  }
  if (shape.order == ServingRows::kInterleaved && shape.rows % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("interleaved rows of two linears: ", shape.rows, ", must be even"));
  }
  return CheckBlocks(shape.row_tiles() * shape.col_blocks());
}

absl::StatusOr<ServingMatrix> ServingMatrix::Allocate(const ServingShape& shape,
                                                      cudaStream_t stream) {
  WALSH_RETURN_IF_ERROR(ValidateServingShape(shape));
  ServingMatrix matrix;
  matrix.shape_ = shape;
  WALSH_ASSIGN_OR_RETURN(matrix.blocks_,
                         DeviceBuffer<uint8_t>::Allocate(
                             shape.row_tiles() * shape.col_blocks() * shape.block_bytes(), stream));
  return matrix;
}

absl::StatusOr<ServingMatrix> ServingMatrix::Build(const Source& source, cudaStream_t stream) {
  WALSH_RETURN_IF_ERROR(ValidateLinears(source));
  ServingShape shape{.cols = source.cols,
                     .bits = source.bits,
                     .group_size = source.group_size,
                     .has_codebook = source.linears[0].levels != nullptr,
                     .has_float_zeros = source.linears[0].zeros != nullptr,
                     .order = source.order};
  Linears linears;
  for (const StoredLinear& linear : source.linears) {
    shape.rows += linear.rows;
    linears.linear[linears.n++] = linear;
  }
  WALSH_ASSIGN_OR_RETURN(ServingMatrix matrix, Allocate(shape, stream));
  const Layout layout = LayoutOf(shape);
  const auto blocks = static_cast<unsigned>(shape.row_tiles() * shape.col_blocks());
  const int32_t* order = source.column_order;
  uint8_t* out = matrix.blocks_.data();
  switch (shape.bits) {
    case 2:
      BuildCodesKernel<2><<<blocks, kThreads, 0, stream>>>(layout, linears, order, out);
      break;
    case 3:
      BuildCodesKernel<3><<<blocks, kThreads, 0, stream>>>(layout, linears, order, out);
      break;
    case 4:
      BuildCodesKernel<4><<<blocks, kThreads, 0, stream>>>(layout, linears, order, out);
      break;
    default:
      BuildCodesKernel<8><<<blocks, kThreads, 0, stream>>>(layout, linears, order, out);
  }
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("BuildCodes", stream);
  const int64_t n =
      shape.row_tiles() * shape.col_blocks() * shape.grids_in_block() * kServingTileRows;
  BuildGridsKernel<<<static_cast<unsigned>(CeilDiv(n, kThreads)), kThreads, 0, stream>>>(
      layout, linears, shape.bits, n, shape.cols / shape.group_size, out);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("BuildGrids", stream);
  return matrix;
}

absl::StatusOr<ServingMatrix> ServingMatrix::Quantize(const Dense& dense, cudaStream_t stream) {
  const ServingShape shape{
      .rows = dense.rows, .cols = dense.cols, .bits = 8, .group_size = kServingBlockCols};
  WALSH_ASSIGN_OR_RETURN(ServingMatrix matrix, Allocate(shape, stream));
  QuantizeDenseKernel<<<static_cast<unsigned>(shape.row_tiles() * shape.col_blocks()), kThreads, 0,
                        stream>>>(LayoutOf(shape), dense.weights, dense.first_bad,
                                  matrix.blocks_.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("QuantizeDense", stream);
  return matrix;
}

absl::Status ServingMatrix::Unpack(uint8_t* codes, float* weights, cudaStream_t stream) const {
  const auto blocks = static_cast<unsigned>(shape_.row_tiles() * shape_.col_blocks());
  const Layout layout = LayoutOf(shape_);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, stream>>>(layout, shape_.has_codebook, blocks_.data(), codes,
                                            weights);
  };
  switch (shape_.bits) {
    case 2:
      launch(UnpackServingKernel<2>);
      break;
    case 3:
      launch(UnpackServingKernel<3>);
      break;
    case 4:
      launch(UnpackServingKernel<4>);
      break;
    default:
      launch(UnpackServingKernel<8>);
  }
  return LaunchStatus("UnpackServing", stream);
}

absl::Status ServingMatrix::Dequantize(__nv_bfloat16* weights, cudaStream_t stream) const {
  constexpr int64_t kWarps = kThreads / kServingLanes;
  const int64_t n_blocks = shape_.row_tiles() * shape_.col_blocks();
  const Layout layout = LayoutOf(shape_);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(CeilDiv(n_blocks, kWarps)), kThreads, 0, stream>>>(
        layout, shape_.has_codebook, n_blocks, blocks_.data(), weights);
  };
  switch (shape_.bits) {
    case 2:
      launch(DequantizeServingKernel<2>);
      break;
    case 3:
      launch(DequantizeServingKernel<3>);
      break;
    case 4:
      launch(DequantizeServingKernel<4>);
      break;
    default:
      launch(DequantizeServingKernel<8>);
  }
  return LaunchStatus("DequantizeServing", stream);
}

}  // namespace walsh::kernels::cuda
