// Butterflies of many vectors at once in shared memory.
//
// A CTA takes a tile of vectors of length `block`, as doubles one below the other. A thread does up
// to three steps of the butterflies on eight values in registers before it writes them back, so
// that a local block of 128 passes shared memory three times; a tile of small blocks is small
// enough for many CTAs a multiprocessor.
#include <algorithm>
#include <bit>
#include <climits>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/rotate.h"

namespace walsh::kernels::cuda {
namespace {

// Doubles of a tile that leave room for many CTAs a multiprocessor.
constexpr int64_t kTileElements = 2048;
// Adjacent columns of a tile of columns: 32 bytes, the least that memory moves.
constexpr int64_t kColumnsMin = 8;
constexpr int kThreads = 256;
// Of a CTA whose tile leaves room for no second one.
constexpr int kThreadsLarge = 512;
constexpr int64_t kSharedSmall = 64 << 10;

// Of each eight doubles a ninth is skipped, so that threads that read eight in a row, or every
// eighth, meet in different banks.
__host__ __device__ constexpr unsigned Padded(unsigned i) { return i + i / 8; }
// Odd, so that threads that write one element of adjacent vectors do too.
constexpr int64_t VectorStride(int64_t block) {
  return static_cast<int64_t>(Padded(static_cast<unsigned>(block))) | 1;
}

struct RotateArguments {
  float* x = nullptr;
  int64_t n_vectors = 0;  // that lie beside each other: all if they are rows, else the columns
  int64_t n_tiles = 0;    // of these
  unsigned width = 0;
  unsigned block = 0;
  unsigned log2_sylvester = 0;
  unsigned log2_tile = 0;  // a tile has 2^log2_tile vectors
  unsigned vector_stride = 0;
  double normalizer = 1;
  const float* scale = nullptr;        // [width] or null
  const double* signs = nullptr;       // [width] or null
  const int32_t* row_order = nullptr;  // [block] or null
};

// Bit j of element i: entry (j, i) of the core is −1.
template <int kOrder>
struct CoreSigns {
  static constexpr int kCore = kOrder;
  uint64_t negative[kOrder] = {};
};
// In its place where the core is 1.
struct NoCore {
  static constexpr int kCore = 1;
};

// `kSteps` steps of the butterflies over `n_elements` of all vectors, with distances of
// 2^log2_half and twice and four times that.
template <int kSteps, bool kHasCore>
__device__ __forceinline__ void Butterflies(double* tile, unsigned n_vectors, unsigned log2_half,
                                            const RotateArguments& args) {
  constexpr unsigned kRadix = 1u << kSteps;
  const unsigned half = 1u << log2_half;
  const unsigned n_groups = args.block / kRadix;
  for (unsigned g = threadIdx.x; g < n_vectors * n_groups; g += blockDim.x) {
    // Without a core the block is 2^log2_sylvester.
    const unsigned vector = kHasCore ? g / n_groups : g >> (args.log2_sylvester - kSteps);
    const unsigned group = g - vector * n_groups;
    const unsigned low = group & (half - 1);
    const unsigned first = ((group >> log2_half) << (log2_half + kSteps)) + low;
    double* data = tile + vector * args.vector_stride;
    double v[kRadix];
#pragma unroll
    for (unsigned k = 0; k < kRadix; ++k) v[k] = data[Padded(first + k * half)];
#pragma unroll
    for (unsigned distance = 1; distance < kRadix; distance *= 2) {
#pragma unroll
      for (unsigned k = 0; k < kRadix; ++k) {
        if ((k & distance) != 0) continue;
        const double a = v[k];
        const double b = v[k + distance];
        v[k] = a + b;
        v[k + distance] = a - b;
      }
    }
#pragma unroll
    for (unsigned k = 0; k < kRadix; ++k) data[Padded(first + k * half)] = v[k];
  }
  __syncthreads();
}

// Sums over the core, a thread a column of it: in place, as its values fit registers.
template <int kCore>
__device__ __forceinline__ void MultiplyCore(double* tile, unsigned n_vectors,
                                             const RotateArguments& args,
                                             const CoreSigns<kCore>& signs) {
  const unsigned sylvester = 1u << args.log2_sylvester;
  for (unsigned c = threadIdx.x; c < n_vectors * sylvester; c += blockDim.x) {
    double* data = tile + (c >> args.log2_sylvester) * args.vector_stride;
    const unsigned a = c & (sylvester - 1);
    double in[kCore];
#pragma unroll
    for (int j = 0; j < kCore; ++j) in[j] = data[Padded(j * sylvester + a)];
#pragma unroll 1
    for (int i = 0; i < kCore; ++i) {
      const uint64_t negative = signs.negative[i];
      double sum = 0.0;
#pragma unroll
      for (int j = 0; j < kCore; ++j) sum += ((negative >> j) & 1) != 0 ? -in[j] : in[j];
      data[Padded(i * sylvester + a)] = sum;
    }
  }
  __syncthreads();
}

// Threads run along rows in global memory: over a vector's elements, or over vectors if these are
// columns. Core is NoCore or a CoreSigns.
template <bool kColumns, typename Core>
__global__ void __launch_bounds__(kThreadsLarge)
    RotateKernel(const RotateArguments args, const Core core) {
  constexpr bool kHasCore = Core::kCore > 1;
  extern __shared__ double tile[];
  const int64_t tile_index = blockIdx.x % args.n_tiles;
  const int64_t row_of_tiles = blockIdx.x / args.n_tiles;  // 0 if vectors are rows
  const int64_t first_vector = tile_index << args.log2_tile;
  const auto n_vectors =
      static_cast<unsigned>(min(int64_t{1} << args.log2_tile, args.n_vectors - first_vector));
  // Where element 0 of vector 0 lies, and which element of a piece it is.
  const int64_t first_row = row_of_tiles * args.block;
  float* origin =
      args.x + (kColumns ? first_row * args.n_vectors + first_vector : first_vector * args.block);
  const auto first_position =
      static_cast<unsigned>((kColumns ? first_row : first_vector * args.block) % args.width);

  struct Element {
    unsigned vector;
    unsigned index;
    unsigned position;  // in the piece
    float* x;
  };
  const auto element = [&](unsigned e) {
    Element at;
    if (kColumns) {
      at.vector = e & ((1u << args.log2_tile) - 1);
      at.index = e >> args.log2_tile;
      at.position = first_position + at.index;
      at.x = origin + at.index * args.n_vectors + at.vector;
    } else {
      at.vector = kHasCore ? e / args.block : e >> args.log2_sylvester;
      at.index = e - at.vector * args.block;
      at.position = first_position + e;
      if (at.position >= args.width) at.position %= args.width;
      at.x = origin + e;
    }
    return at;
  };
  const unsigned n_elements = args.block * (kColumns ? 1u << args.log2_tile : n_vectors);

#pragma unroll 4
  for (unsigned e = threadIdx.x; e < n_elements; e += blockDim.x) {
    const Element at = element(e);
    if (kColumns && at.vector >= n_vectors) continue;
    double value = *at.x;
    if (args.scale != nullptr) value *= static_cast<double>(args.scale[at.position]);
    if (args.signs != nullptr) value *= args.signs[at.position];
    const unsigned index =
        args.row_order == nullptr ? at.index : static_cast<unsigned>(args.row_order[at.index]);
    tile[at.vector * args.vector_stride + Padded(index)] = value;
  }
  __syncthreads();

  unsigned step = 0;
  for (; step + 3 <= args.log2_sylvester; step += 3) {
    Butterflies<3, kHasCore>(tile, n_vectors, step, args);
  }
  if (args.log2_sylvester - step == 2) Butterflies<2, kHasCore>(tile, n_vectors, step, args);
  if (args.log2_sylvester - step == 1) Butterflies<1, kHasCore>(tile, n_vectors, step, args);
  if constexpr (kHasCore) MultiplyCore(tile, n_vectors, args, core);

#pragma unroll 4
  for (unsigned e = threadIdx.x; e < n_elements; e += blockDim.x) {
    const Element at = element(e);
    if (kColumns && at.vector >= n_vectors) continue;
    *at.x = static_cast<float>(tile[at.vector * args.vector_stride + Padded(at.index)] *
                               args.normalizer);
  }
}

int64_t TileBytes(int64_t vectors, int64_t block) {
  return vectors * VectorStride(block) * static_cast<int64_t>(sizeof(double));
}

// Vectors a tile, a power of two; 0 where not even one fits.
int64_t TileVectors(int64_t block, int64_t vectors_min, int64_t shared_max) {
  int64_t vectors = std::max<int64_t>(kTileElements / block, vectors_min);
  vectors = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(vectors)));
  while (vectors > 0 && TileBytes(vectors, block) > shared_max) vectors /= 2;
  return vectors;
}

template <bool kColumns, typename Core>
absl::Status Launch(RotateArguments args, const Core& core, int64_t rows_of_tiles, int64_t tile,
                    int64_t shared_max, cudaStream_t stream) {
  args.log2_tile = static_cast<unsigned>(std::countr_zero(static_cast<uint64_t>(tile)));
  args.n_tiles = (args.n_vectors + tile - 1) / tile;
  const int64_t n_ctas = rows_of_tiles * args.n_tiles;
  if (n_ctas > INT_MAX) {
    return absl::InvalidArgumentError(
        absl::StrCat("a rotation takes ", n_ctas, " blocks of threads, at most ", INT_MAX));
  }
  const int64_t bytes = TileBytes(tile, args.block);
  const int threads = bytes > kSharedSmall ? kThreadsLarge : kThreads;
  // All that there is, so that calls of several threads do not undo each other's.
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(RotateKernel<kColumns, Core>,
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(shared_max)));
  RotateKernel<kColumns, Core><<<static_cast<unsigned>(n_ctas), static_cast<unsigned>(threads),
                                 static_cast<size_t>(bytes), stream>>>(args, core);
  return LaunchStatus(kColumns ? "RotateColumns" : "RotateRows", stream);
}

absl::Status CheckTables(const DeviceRotation::Tables& t) {
  if (t.width <= 0 || t.width > INT_MAX || t.block <= 0 || t.width % t.block != 0) {
    return absl::InvalidArgumentError(absl::StrCat("a rotation of width ", t.width,
                                                   " in blocks of ", t.block,
                                                   ": the block must divide the width"));
  }
  if (!DeviceRotation::HasCore(t.core)) {
    return absl::InvalidArgumentError(absl::StrCat("a rotation's core of ", t.core, ", must be ",
                                                   absl::StrJoin(DeviceRotation::kCores, ", ")));
  }
  if (t.block % t.core != 0 || !std::has_single_bit(static_cast<uint64_t>(t.block / t.core))) {
    return absl::InvalidArgumentError(absl::StrCat("a rotation's block of ", t.block,
                                                   " is not its core of ", t.core,
                                                   " times a power of two"));
  }
  if (t.core > 1 && static_cast<int64_t>(t.core_matrix.size()) != t.core * t.core) {
    return absl::InvalidArgumentError(
        absl::StrCat("a rotation's core of ", t.core, " has ", t.core_matrix.size(), " entries"));
  }
  if (!t.signs.empty() && static_cast<int64_t>(t.signs.size()) != t.width) {
    return absl::InvalidArgumentError(
        absl::StrCat(t.signs.size(), " signs for a rotation of width ", t.width));
  }
  if (t.row_order.empty()) return absl::OkStatus();
  // The kernel writes where the order says.
  std::vector<bool> is_there(static_cast<size_t>(t.block));
  for (const int32_t row : t.row_order) {
    if (row < 0 || row >= t.block) {
      return absl::InvalidArgumentError(
          absl::StrCat("row ", row, " in the order of a rotation's block of ", t.block));
    }
    is_there[static_cast<size_t>(row)] = true;
  }
  if (static_cast<int64_t>(t.row_order.size()) != t.block ||
      std::find(is_there.begin(), is_there.end(), false) != is_there.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the row order of a rotation's block of ", t.block, " is no permutation"));
  }
  return absl::OkStatus();
}

template <typename T>
absl::StatusOr<DeviceBuffer<T>> Upload(std::span<const T> host, cudaStream_t stream) {
  if (host.empty()) return DeviceBuffer<T>();
  WALSH_ASSIGN_OR_RETURN(auto buffer,
                         DeviceBuffer<T>::Allocate(static_cast<int64_t>(host.size()), stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(buffer.data(), host.data(), host.size_bytes(),
                                             cudaMemcpyHostToDevice, stream));
  return buffer;
}

}  // namespace

bool DeviceRotation::HasCore(int64_t core) {
  return std::find(std::begin(kCores), std::end(kCores), core) != std::end(kCores);
}

absl::StatusOr<DeviceRotation> DeviceRotation::Create(Context& context, const Tables& tables) {
  WALSH_RETURN_IF_ERROR(CheckTables(tables));
  DeviceRotation r;
  r.width_ = tables.width;
  r.block_ = tables.block;
  r.core_ = tables.core;
  r.normalizer_ = tables.normalizer;
  if (tables.core > 1) {
    for (int64_t i = 0; i < tables.core; ++i) {
      for (int64_t j = 0; j < tables.core; ++j) {
        const bool is_negative = tables.core_matrix[static_cast<size_t>(j * tables.core + i)] < 0;
        r.core_signs_[i] |= static_cast<uint64_t>(is_negative) << j;
      }
    }
  }
  WALSH_ASSIGN_OR_RETURN(r.row_order_, Upload(tables.row_order, context.stream()));
  WALSH_ASSIGN_OR_RETURN(r.signs_, Upload(tables.signs, context.stream()));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context.stream()));
  return r;
}

absl::Status DeviceRotation::Rotate(Context& context, bool columns, int64_t rows, int64_t cols,
                                    const float* scale, float* x) const {
  const int64_t rotated = columns ? rows : cols;
  if (rows < 0 || cols < 0 || rotated % width_ != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a rotation of width ", width_, " for the ", columns ? "columns" : "rows",
                     " of a matrix [", rows, ", ", cols, "]: it must divide their length"));
  }
  if (rows == 0 || cols == 0) return absl::OkStatus();
  const auto shared_max = static_cast<int64_t>(context.properties().sharedMemPerBlockOptin);
  const int64_t tile = TileVectors(block_, columns ? kColumnsMin : 1, shared_max);
  if (tile == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a rotation of width ", width_, " in blocks of ", block_, " needs ", TileBytes(1, block_),
        " bytes of shared memory, a block of threads of this device has ", shared_max));
  }
  const RotateArguments args{
      .x = x,
      .n_vectors = columns ? cols : rows * (cols / block_),
      .width = static_cast<unsigned>(width_),
      .block = static_cast<unsigned>(block_),
      .log2_sylvester =
          static_cast<unsigned>(std::countr_zero(static_cast<uint64_t>(block_ / core_))),
      .vector_stride = static_cast<unsigned>(VectorStride(block_)),
      .normalizer = normalizer_,
      .scale = scale,
      .signs = signs_.data(),
      .row_order = row_order_.data(),
  };
  const int64_t rows_of_tiles = columns ? rows / block_ : 1;
  const cudaStream_t stream = context.stream();
  const auto launch = [&](const auto& core) {
    return columns ? Launch<true>(args, core, rows_of_tiles, tile, shared_max, stream)
                   : Launch<false>(args, core, rows_of_tiles, tile, shared_max, stream);
  };
  const auto launch_core = [&]<int kCore>(CoreSigns<kCore> signs) {
    std::copy_n(core_signs_, kCore, signs.negative);
    return launch(signs);
  };
  switch (core_) {
    case 12:
      return launch_core(CoreSigns<12>());
    case 20:
      return launch_core(CoreSigns<20>());
    case 28:
      return launch_core(CoreSigns<28>());
    case 36:
      return launch_core(CoreSigns<36>());
    default:
      return launch(NoCore());
  }
}

absl::Status DeviceRotation::RotateRows(Context& context, int64_t rows, int64_t cols,
                                        const float* scale, float* x) const {
  return Rotate(context, /*columns=*/false, rows, cols, scale, x);
}

absl::Status DeviceRotation::RotateColumns(Context& context, int64_t rows, int64_t cols,
                                           float* x) const {
  return Rotate(context, /*columns=*/true, rows, cols, nullptr, x);
}

}  // namespace walsh::kernels::cuda
