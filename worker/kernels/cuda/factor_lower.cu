// Blocked Cholesky factorization that leaves the inverses of its diagonal blocks.
//
// One CTA factorizes a diagonal block of 128 (of double: 64) and inverts it in the same pass; the
// rows below it are solved with its factor in place; what lies to their right is updated by
// products. The columns of a panel of four blocks are updated after each block, those beyond it
// once a panel, so that the trailing matrix is read and written n / 512 times (of double: n / 256).
//
// Bound: arithmetic: n³/3 flop; for small n the chain of diagonal blocks.
#include <algorithm>

#include "common/status_macros.h"
#include "worker/kernels/cuda/blas_of_real.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/triangular.h"

namespace walsh::kernels::cuda {
namespace {

template <typename Real>
constexpr int64_t kPanel = 4 * kFactorBlock<Real>;
// cuBLAS is column-major: a row-major matrix is its transpose there, and a lower one upper.
constexpr cublasFillMode_t kOurLower = CUBLAS_FILL_MODE_UPPER;

// Columns of a block, and rows of a diagonal one, are dealt to kSide threads: position
// part · kSide + side is part `part` of thread `side`. Registers are then named by constants, and
// all threads have work until the end.
constexpr int kSide = 16;
template <typename Real>
constexpr int kParts = kFactorBlock<Real> / kSide;

// What one load brings.
template <typename Real>
struct Vector;
template <>
struct Vector<float> {
  using Type = float4;
};
template <>
struct Vector<double> {
  using Type = double2;
};
template <typename Real>
constexpr int kVector = static_cast<int>(sizeof(typename Vector<Real>::Type) / sizeof(Real));
static_assert(kParts<float> % kVector<float> == 0 && kParts<double> % kVector<double> == 0);

// A line is kFactorBlock values, one a position, in the order in which LoadLine's vectors of
// adjacent threads are adjacent.
template <typename Real>
__host__ __device__ constexpr int LinePlace(int part, int side) {
  constexpr int v = kVector<Real>;
  return (part / v * kSide + side) * v + part % v;
}
// The values at one thread's positions, times `factor`.
template <typename Real>
__device__ __forceinline__ void LoadLine(const Real* line, int side, Real factor,
                                         Real (&values)[kParts<Real>]) {
  using VectorType = typename Vector<Real>::Type;
#pragma unroll
  for (int part = 0; part < kParts<Real>; part += kVector<Real>) {
    const VectorType vector =
        *reinterpret_cast<const VectorType*>(line + LinePlace<Real>(part, side));
    if constexpr (kVector<Real> == 4) {
      values[part] = vector.x * factor;
      values[part + 1] = vector.y * factor;
      values[part + 2] = vector.z * factor;
      values[part + 3] = vector.w * factor;
    } else {
      values[part] = vector.x * factor;
      values[part + 1] = vector.y * factor;
    }
  }
}

// What step `part` · kSide + `index` of FactorBlock needs: the column of that number from the
// diagonal down, and left of the diagonal the row.
template <typename Real>
__device__ __forceinline__ void WriteLine(const Real (&tile)[kParts<Real>][kParts<Real>], int part,
                                          int index, int row, int col, Real* line) {
  if (col == index) {
#pragma unroll
    for (int i = 0; i < kParts<Real>; ++i) {
      if (i > part || (i == part && row >= index)) line[LinePlace<Real>(i, row)] = tile[i][part];
    }
  }
  if (row == index) {
#pragma unroll
    for (int j = 0; j < kParts<Real>; ++j) {
      if (j < part || (j == part && col < index)) line[LinePlace<Real>(j, col)] = tile[part][j];
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
template <typename Real>
__global__ void __launch_bounds__(kSide* kSide)
    FactorBlock(int64_t n, int64_t first, Real* a, Real* factor) {
  constexpr int kBlock = kFactorBlock<Real>;
  __shared__ __align__(16) Real lines[2][kBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / kSide;
  const int col = thread % kSide;
  const int size = static_cast<int>(min(static_cast<int64_t>(kBlock), n - first));
  Real* block = a + first * (n + 1);
  Real tile[kParts<Real>][kParts<Real>];  // of which [i][j] with j ≤ i are used
#pragma unroll
  for (int i = 0; i < kParts<Real>; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const int r = i * kSide + row;
      const int c = j * kSide + col;
      tile[i][j] = r == c ? Real{1} : Real{0};
      if (r < size && c <= r) tile[i][j] = block[r * n + c];
    }
  }
  WriteLine<Real>(tile, 0, 0, row, col, lines[0]);
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts<Real>; ++part) {
#pragma unroll 1
    for (int index = 0; index < kSide; ++index) {
      const Real* line = lines[index % 2];
      const int pivot = LinePlace<Real>(part, index);
      const Real inverse_root = rsqrt(line[pivot]);
      Real below[kParts<Real>];  // L[i, p] of this thread's rows
      Real along[kParts<Real>];  // row p of L⁻¹, then L[j, p] of this thread's columns
      LoadLine<Real>(line, row, inverse_root, below);
      LoadLine<Real>(line, col, inverse_root, along);
      if (col == index) along[part] = inverse_root;
      if (thread < kBlock) {
        factor[(part * kSide + index) * kBlock + thread] =
            thread == pivot ? inverse_root : line[thread] * inverse_root;
      }
#pragma unroll
      for (int i = part; i < kParts<Real>; ++i) {
        const bool is_below = i > part || row > index;
        const bool is_pivot = i == part && row == index;
        if (is_pivot) {
#pragma unroll
          for (int j = 0; j <= i; ++j) tile[i][j] = along[j];
        }
        if (is_below) {
          if (col == index) tile[i][part] = 0;
#pragma unroll
          for (int j = 0; j <= i; ++j) tile[i][j] = fma(-below[i], along[j], tile[i][j]);
        }
      }
      Real* next_line = lines[1 - index % 2];
      if (index + 1 < kSide) {
        WriteLine<Real>(tile, part, index + 1, row, col, next_line);
      } else if (part + 1 < kParts<Real>) {
        WriteLine<Real>(tile, part + 1, 0, row, col, next_line);
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kParts<Real>; ++i) {
#pragma unroll
    for (int j = 0; j < kParts<Real>; ++j) {
      const int r = i * kSide + row;
      const int c = j * kSide + col;
      if (r < size && c < size) block[r * n + c] = j <= i && c <= r ? tile[i][j] : Real{0};
    }
  }
}

constexpr int kSolveThreads = 128;
constexpr int kSolveRows = 4;  // of a thread, in steps of kSolveThreads / kSide
constexpr int kRowsPerCta = kSolveThreads / kSide * kSolveRows;
template <typename Real>
constexpr int kFactorBytes = kFactorBlock<Real>* kFactorBlock<Real>* static_cast<int>(sizeof(Real));

// B ← B L⁻ᵀ for the `n_rows` rows of B [n_rows, kFactorBlock] with row stride n, L in the lines of
// `factor`.
template <typename Real>
__global__ void __launch_bounds__(kSolveThreads)
    SolveBelow(int64_t n, int64_t n_rows, const Real* factor, Real* b) {
  constexpr int kBlock = kFactorBlock<Real>;
  extern __shared__ __align__(16) unsigned char shared[];
  Real* lines = reinterpret_cast<Real*>(shared);  // [kBlock, kBlock]
  const int side = static_cast<int>(threadIdx.x) % kSide;
  const int64_t first_row =
      static_cast<int64_t>(blockIdx.x) * kRowsPerCta + static_cast<int>(threadIdx.x) / kSide;
  Real x[kSolveRows][kParts<Real>];
#pragma unroll
  for (int r = 0; r < kSolveRows; ++r) {
    const int64_t row = first_row + r * (kSolveThreads / kSide);
#pragma unroll
    for (int j = 0; j < kParts<Real>; ++j) {
      x[r][j] = row < n_rows ? b[row * n + j * kSide + side] : Real{0};
    }
  }
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < kBlock * kBlock / kVector<Real>;
       i += kSolveThreads) {
    using VectorType = typename Vector<Real>::Type;
    reinterpret_cast<VectorType*>(lines)[i] = reinterpret_cast<const VectorType*>(factor)[i];
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts<Real>; ++part) {
#pragma unroll 1
    for (int index = 0; index < kSide; ++index) {
      const Real* line = lines + (part * kSide + index) * kBlock;
      const Real inverse = line[LinePlace<Real>(part, index)];
      Real l[kParts<Real>];
      LoadLine<Real>(line, side, Real{1}, l);
#pragma unroll
      for (int r = 0; r < kSolveRows; ++r) {
        const Real solved = __shfl_sync(~0u, x[r][part], index, kSide) * inverse;
        if (side == index) x[r][part] = solved;
        if (side > index) x[r][part] = fma(-solved, l[part], x[r][part]);
#pragma unroll
        for (int j = part + 1; j < kParts<Real>; ++j) x[r][j] = fma(-solved, l[j], x[r][j]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSolveRows; ++r) {
    const int64_t row = first_row + r * (kSolveThreads / kSide);
    if (row >= n_rows) break;
#pragma unroll
    for (int j = 0; j < kParts<Real>; ++j) b[row * n + j * kSide + side] = x[r][j];
  }
}

// Columns [first, end) of L, the inverses of its diagonal blocks in their places; updates the
// columns of the panel and no others. `factor` has room for a block.
template <typename Real>
absl::Status FactorPanel(cublasHandle_t blas, cudaStream_t stream, int64_t n, int64_t first,
                         int64_t end, Real* a, Real* factor) {
  constexpr int kBlock = kFactorBlock<Real>;
  const auto ld = static_cast<int>(n);
  for (int64_t k = first; k < end; k += kBlock) {
    FactorBlock<Real><<<1, kSide * kSide, 0, stream>>>(n, k, a, factor);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("FactorBlock", stream);
    const int64_t next = k + kBlock;
    if (next >= n) break;
    Real* below = a + next * n + k;
    SolveBelow<Real><<<static_cast<unsigned>((n - next + kRowsPerCta - 1) / kRowsPerCta),
                       kSolveThreads, kFactorBytes<Real>, stream>>>(n, n - next, factor, below);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("SolveBelow", stream);
    if (next >= end) break;
    // The panel's columns that follow, less the product of what was solved with its first rows.
    WALSH_CUBLAS_RETURN_IF_ERROR(Gemm(blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(end - next),
                                      static_cast<int>(n - next), kBlock, Real{-1}, below, ld,
                                      below, ld, Real{1}, a + next * (n + 1), ld));
  }
  return absl::OkStatus();
}

}  // namespace

template <typename Real>
absl::Status FactorLower(cublasHandle_t blas, cudaStream_t stream, int64_t n, Real* a) {
  constexpr int64_t kBlock = kFactorBlock<Real>;
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      SolveBelow<Real>, cudaFuncAttributeMaxDynamicSharedMemorySize, kFactorBytes<Real>));
  WALSH_ASSIGN_OR_RETURN(auto factor, DeviceBuffer<Real>::Allocate(kBlock * kBlock, stream));
  for (int64_t first = 0; first < n; first += kPanel<Real>) {
    const int64_t end = std::min(first + kPanel<Real>, n);
    WALSH_RETURN_IF_ERROR(FactorPanel<Real>(blas, stream, n, first, end, a, factor.data()));
    if (end == n) break;
    WALSH_CUBLAS_RETURN_IF_ERROR(Syrk(blas, kOurLower, CUBLAS_OP_T, static_cast<int>(n - end),
                                      static_cast<int>(kPanel<Real>), Real{-1}, a + end * n + first,
                                      static_cast<int>(n), Real{1}, a + end * (n + 1),
                                      static_cast<int>(n)));
  }
  return absl::OkStatus();
}

template absl::Status FactorLower<float>(cublasHandle_t, cudaStream_t, int64_t, float*);
template absl::Status FactorLower<double>(cublasHandle_t, cudaStream_t, int64_t, double*);

}  // namespace walsh::kernels::cuda
