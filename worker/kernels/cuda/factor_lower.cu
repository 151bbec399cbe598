// Blocked Cholesky factorization that leaves the inverses of its diagonal blocks.
//
// One CTA factorizes a diagonal block of 128 and inverts it in the same pass; the rows below it are
// solved with its factor in place; what lies to their right is updated by products. The columns of
// a panel of 512 are updated after each block, those beyond it once a panel, so that the trailing
// matrix is read and written n / 512 times.
//
// Bound: arithmetic: n³/3 flop in fp32; for small n the chain of n / 128 diagonal blocks.
#include <algorithm>

#include "common/status_macros.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/triangular.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int64_t kPanel = 4 * kFactorBlock;
// cuBLAS is column-major: a row-major matrix is its transpose there, and a lower one upper.
constexpr cublasFillMode_t kOurLower = CUBLAS_FILL_MODE_UPPER;

// Columns of a block, and rows of a diagonal one, are dealt to kSide threads: position
// part · kSide + side is part `part` of thread `side`. Registers are then named by constants, and
// all threads have work until the end.
constexpr int kSide = 16;
constexpr int kParts = kFactorBlock / kSide;
static_assert(kParts == 8, "LoadLine reads two vectors of four");

// A line is kFactorBlock values, one a position, in the order in which LoadLine's vectors of
// adjacent threads are adjacent.
__host__ __device__ constexpr int LinePlace(int part, int side) {
  return (part / 4 * kSide + side) * 4 + part % 4;
}
// The values at one thread's positions, times `factor`.
__device__ __forceinline__ void LoadLine(const float* line, int side, float factor,
                                         float (&values)[kParts]) {
#pragma unroll
  for (int part = 0; part < kParts; part += 4) {
    const float4 four = *reinterpret_cast<const float4*>(line + LinePlace(part, side));
    values[part] = four.x * factor;
    values[part + 1] = four.y * factor;
    values[part + 2] = four.z * factor;
    values[part + 3] = four.w * factor;
  }
}

// What step `part` · kSide + `index` of FactorBlock needs: the column of that number from the
// diagonal down, and left of the diagonal the row.
__device__ __forceinline__ void WriteLine(const float (&tile)[kParts][kParts], int part, int index,
                                          int row, int col, float* line) {
  if (col == index) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i > part || (i == part && row >= index)) line[LinePlace(i, row)] = tile[i][part];
    }
  }
  if (row == index) {
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      if (j < part || (j == part && col < index)) line[LinePlace(j, col)] = tile[part][j];
    }
  }
}

// The diagonal block at `first` ← the inverse of its Cholesky factor L, zeros above the diagonal. A
// last block that is smaller is continued by the identity. Line p of `factor` becomes column p of
// L below the diagonal, with 1 / L[p, p] on it.
//
// Gauss-Jordan elimination of [A | I]: where column p is eliminated from A, column p of L⁻¹ begins
// and takes its place. Step p divides row p by the root of its diagonal element, and subtracts its
// multiple by L[i, p] from each row i below; that is one instruction an element on both sides.
__global__ void __launch_bounds__(kSide* kSide)
    FactorBlock(int64_t n, int64_t first, float* a, float* factor) {
  __shared__ __align__(16) float lines[2][kFactorBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kSide;
  const int col = thread % kSide;
  const int size = static_cast<int>(min(static_cast<int64_t>(kFactorBlock), n - first));
  float* block = a + first * (n + 1);
  float tile[kParts][kParts];  // of which [i][j] with j ≤ i are used
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const int r = i * kSide + row;
      const int c = j * kSide + col;
      tile[i][j] = r == c ? 1.0f : 0.0f;
      if (r < size && c <= r) tile[i][j] = block[r * n + c];
    }
  }
  WriteLine(tile, 0, 0, row, col, lines[0]);
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll 1
    for (int index = 0; index < kSide; ++index) {
      const float* line = lines[index % 2];
      const int pivot = LinePlace(part, index);
      const float inverse_root = rsqrtf(line[pivot]);
      float below[kParts];  // L[i, p] of this thread's rows
      float along[kParts];  // row p of L⁻¹, then L[j, p] of this thread's columns
      LoadLine(line, row, inverse_root, below);
      LoadLine(line, col, inverse_root, along);
      if (col == index) along[part] = inverse_root;
      if (thread < kFactorBlock) {
        factor[(part * kSide + index) * kFactorBlock + thread] =
            thread == pivot ? inverse_root : line[thread] * inverse_root;
      }
#pragma unroll
      for (int i = part; i < kParts; ++i) {
        const bool is_below = i > part || row > index;
        const bool is_pivot = i == part && row == index;
        if (is_pivot) {
#pragma unroll
          for (int j = 0; j <= i; ++j) tile[i][j] = along[j];
        }
        if (is_below) {
          if (col == index) tile[i][part] = 0.0f;
#pragma unroll
          for (int j = 0; j <= i; ++j) tile[i][j] = fmaf(-below[i], along[j], tile[i][j]);
        }
      }
      float* next_line = lines[1 - index % 2];
      if (index + 1 < kSide) {
        WriteLine(tile, part, index + 1, row, col, next_line);
      } else if (part + 1 < kParts) {
        WriteLine(tile, part + 1, 0, row, col, next_line);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const int r = i * kSide + row;
      const int c = j * kSide + col;
      if (r < size && c < size) block[r * n + c] = j <= i && c <= r ? tile[i][j] : 0.0f;
    }
  }
}

constexpr int kSolveThreads = 128;
constexpr int kSolveRows = 4;  // of a thread, in steps of kSolveThreads / kSide
constexpr int kRowsPerCta = kSolveThreads / kSide * kSolveRows;
constexpr int kFactorBytes = kFactorBlock * kFactorBlock * static_cast<int>(sizeof(float));

// B ← B L⁻ᵀ for the `n_rows` rows of B [n_rows, kFactorBlock] with row stride n, L in the lines of
// `factor`.
__global__ void __launch_bounds__(kSolveThreads)
    SolveBelow(int64_t n, int64_t n_rows, const float* factor, float* b) {
  extern __shared__ __align__(16) float lines[];  // [kFactorBlock, kFactorBlock]
  const int side = static_cast<int>(threadIdx.x) % kSide;
  const int64_t first_row =
      static_cast<int64_t>(blockIdx.x) * kRowsPerCta + static_cast<int>(threadIdx.x) / kSide;
  float x[kSolveRows][kParts];
#pragma unroll
  for (int r = 0; r < kSolveRows; ++r) {
    const int64_t row = first_row + r * (kSolveThreads / kSide);
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      x[r][j] = row < n_rows ? b[row * n + j * kSide + side] : 0.0f;
    }
  }
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < kFactorBlock * kFactorBlock / 4;
       i += kSolveThreads) {
    reinterpret_cast<float4*>(lines)[i] = reinterpret_cast<const float4*>(factor)[i];
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll 1
    for (int index = 0; index < kSide; ++index) {
      const float* line = lines + (part * kSide + index) * kFactorBlock;
      const float inverse = line[LinePlace(part, index)];
      float l[kParts];
      LoadLine(line, side, 1.0f, l);
#pragma unroll
      for (int r = 0; r < kSolveRows; ++r) {
        const float solved = __shfl_sync(~0u, x[r][part], index, kSide) * inverse;
        if (side == index) x[r][part] = solved;
        if (side > index) x[r][part] = fmaf(-solved, l[part], x[r][part]);
#pragma unroll
        for (int j = part + 1; j < kParts; ++j) x[r][j] = fmaf(-solved, l[j], x[r][j]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSolveRows; ++r) {
    const int64_t row = first_row + r * (kSolveThreads / kSide);
    if (row >= n_rows) break;
#pragma unroll
    for (int j = 0; j < kParts; ++j) b[row * n + j * kSide + side] = x[r][j];
  }
}

// Columns [first, end) of L, the inverses of its diagonal blocks in their places; updates the
// columns of the panel and no others. `factor` has room for a block.
absl::Status FactorPanel(cublasHandle_t blas, cudaStream_t stream, int64_t n, int64_t first,
                         int64_t end, float* a, float* factor) {
  const float minus_one = -1.0f;
  const float one = 1.0f;
  const auto ld = static_cast<int>(n);
  for (int64_t k = first; k < end; k += kFactorBlock) {
    FactorBlock<<<1, kSide * kSide, 0, stream>>>(n, k, a, factor);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("FactorBlock", stream);
    const int64_t next = k + kFactorBlock;
    if (next >= n) break;
    float* below = a + next * n + k;
    SolveBelow<<<static_cast<unsigned>((n - next + kRowsPerCta - 1) / kRowsPerCta), kSolveThreads,
                 kFactorBytes, stream>>>(n, n - next, factor, below);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("SolveBelow", stream);
    if (next >= end) break;
    // The panel's columns that follow, less the product of what was solved with its first rows.
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasSgemm(
        blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(end - next), static_cast<int>(n - next),
        kFactorBlock, &minus_one, below, ld, below, ld, &one, a + next * (n + 1), ld));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status FactorLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, float* a) {
  WALSH_CUDA_RETURN_IF_ERROR(
      cudaFuncSetAttribute(SolveBelow, cudaFuncAttributeMaxDynamicSharedMemorySize, kFactorBytes));
  WALSH_ASSIGN_OR_RETURN(auto factor,
                         DeviceBuffer<float>::Allocate(kFactorBlock * kFactorBlock, stream));
  const float minus_one = -1.0f;
  const float one = 1.0f;
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t end = std::min(first + kPanel, n);
    WALSH_RETURN_IF_ERROR(FactorPanel(blas, stream, n, first, end, a, factor.data()));
    if (end == n) break;
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasSsyrk(blas, kOurLower, CUBLAS_OP_T,
                                             static_cast<int>(n - end), static_cast<int>(kPanel),
                                             &minus_one, a + end * n + first, static_cast<int>(n),
                                             &one, a + end * (n + 1), static_cast<int>(n)));
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
