// W += β W D (H + λI)⁻¹, with the inverse as the product of its triangular factors.
//
// The two products with U take half of a full product's arithmetic each. Where W has many more rows
// than columns, D (H + λI)⁻¹ is formed first and multiplied once.
//
// cuBLAS is column-major: a row-major matrix is its transpose there, and U lower triangular.
//
// Bound: arithmetic: 2 · rows · cols² flop by 3×TF32 and as many, or 2 · cols³, in fp32.
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/tf32x3.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr cublasFillMode_t kOurUpper = CUBLAS_FILL_MODE_LOWER;

unsigned BlocksFor(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

// The elements of a matrix [rows, cols], a thread each; a block stays in one row.
struct Position {
  int64_t row;
  int64_t col;
};
__device__ __forceinline__ Position PositionOf(int64_t cols) {
  const int64_t blocks_a_row = (cols + kThreads - 1) / kThreads;
  return {blockIdx.x / blocks_a_row, blockIdx.x % blocks_a_row * kThreads + threadIdx.x};
}
unsigned BlocksForRows(int64_t rows, int64_t cols) {
  return static_cast<unsigned>(rows) * BlocksFor(cols);
}

// out[:, i] = in[:, perm[i]]
__global__ void GatherColumns(const float* in, const int32_t* perm, int64_t cols, float* out) {
  const auto [row, i] = PositionOf(cols);
  if (i < cols) out[row * cols + i] = in[row * cols + perm[i]];
}

// out[i, :] = in[perm[i], :], or with kScatter out[perm[i], :] = in[i, :]
template <bool kScatter>
__global__ void PermuteRows(const float* in, const int32_t* perm, int64_t cols, float* out) {
  const auto [i, col] = PositionOf(cols);
  if (col >= cols) return;
  const int64_t row = perm[i];
  const int64_t from = kScatter ? i : row;
  const int64_t to = kScatter ? row : i;
  out[to * cols + col] = in[from * cols + col];
}

// w[:, perm[i]] += β · step[:, i], with no `perm` in natural order. Rounded as on the CPU.
__global__ void AddStep(const float* step, const int32_t* perm, double beta, int64_t cols,
                        float* w) {
  const auto [row, i] = PositionOf(cols);
  if (i >= cols) return;
  const int64_t col = perm == nullptr ? i : perm[i];
  w[row * cols + col] += static_cast<float>(beta * static_cast<double>(step[row * cols + i]));
}

// Row-major out = in · Uᵀ if `transposed`, else in · U, for `in` [rows, n].
absl::Status MultiplyByFactor(Context& context, bool transposed, int64_t rows, int64_t n,
                              const float* u, const float* in, float* out) {
  const float one = 1.0f;
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasStrmm(
      context.blas(), CUBLAS_SIDE_LEFT, kOurUpper, transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
      CUBLAS_DIAG_NON_UNIT, static_cast<int>(n), static_cast<int>(rows), &one, u,
      static_cast<int>(n), in, static_cast<int>(n), out, static_cast<int>(n)));
  return absl::OkStatus();
}

// Row-major out = Uᵀ · in if `transposed`, else U · in, for `in` [n, n].
absl::Status MultiplyFactorBy(Context& context, bool transposed, int64_t n, const float* u,
                              const float* in, float* out) {
  const float one = 1.0f;
  const auto size = static_cast<int>(n);
  WALSH_CUBLAS_RETURN_IF_ERROR(cublasStrmm(
      context.blas(), CUBLAS_SIDE_RIGHT, kOurUpper, transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
      CUBLAS_DIAG_NON_UNIT, size, size, &one, u, size, in, size, out, size));
  return absl::OkStatus();
}

absl::Status AddSteps(Context& context, const PropagateErrorParams& p, const float* step,
                      const int32_t* perm) {
  AddStep<<<BlocksForRows(p.rows, p.cols), kThreads, 0, context.stream()>>>(step, perm, p.beta,
                                                                            p.cols, p.w);
  return LaunchStatus("AddStep", context.stream());
}

// y = W · Bᵀ by 3×TF32, for the weights of `p` and `b` [cols, cols], which becomes its high part.
absl::Status MultiplyWeights(Context& context, const PropagateErrorParams& p, float* b,
                             float* b_low, float* y) {
  const cudaStream_t stream = context.stream();
  WALSH_ASSIGN_OR_RETURN(auto high, DeviceBuffer<float>::Allocate(p.rows * p.cols, stream));
  WALSH_ASSIGN_OR_RETURN(auto low, DeviceBuffer<float>::Allocate(p.rows * p.cols, stream));
  WALSH_RETURN_IF_ERROR(SplitTf32(context, p.rows * p.cols, p.w, high.data(), low.data()));
  WALSH_RETURN_IF_ERROR(SplitTf32(context, p.cols * p.cols, b, b, b_low));
  return GemmTf32x3(context, {.n_tokens = p.rows,
                              .in = p.cols,
                              .out = p.cols,
                              .x_high = high.data(),
                              .x_low = low.data(),
                              .weights_high = b,
                              .weights_low = b_low,
                              .y = y});
}

// W D, then times Uᵀ and U in processing order.
absl::Status PropagateByRows(Context& context, const PropagateErrorParams& p) {
  const cudaStream_t stream = context.stream();
  WALSH_ASSIGN_OR_RETURN(auto a, DeviceBuffer<float>::Allocate(p.rows * p.cols, stream));
  {
    WALSH_ASSIGN_OR_RETURN(auto cross_low, DeviceBuffer<float>::Allocate(p.cols * p.cols, stream));
    WALSH_RETURN_IF_ERROR(MultiplyWeights(context, p, p.cross, cross_low.data(), a.data()));
  }
  WALSH_ASSIGN_OR_RETURN(auto b, DeviceBuffer<float>::Allocate(p.rows * p.cols, stream));
  GatherColumns<<<BlocksForRows(p.rows, p.cols), kThreads, 0, stream>>>(a.data(), p.perm, p.cols,
                                                                        b.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherColumns", stream);
  WALSH_RETURN_IF_ERROR(MultiplyByFactor(context, true, p.rows, p.cols, p.u, b.data(), a.data()));
  WALSH_RETURN_IF_ERROR(MultiplyByFactor(context, false, p.rows, p.cols, p.u, a.data(), b.data()));
  return AddSteps(context, p, b.data(), p.perm);
}

// W times D (H + λI)⁻¹, of which the transpose is formed: the inverse is symmetric, and `cross` is
// Dᵀ.
absl::Status PropagateByMatrix(Context& context, const PropagateErrorParams& p) {
  const cudaStream_t stream = context.stream();
  const int64_t n = p.cols;
  const unsigned square_blocks = BlocksForRows(n, n);
  WALSH_ASSIGN_OR_RETURN(auto a, DeviceBuffer<float>::Allocate(n * n, stream));
  WALSH_ASSIGN_OR_RETURN(auto b, DeviceBuffer<float>::Allocate(n * n, stream));
  PermuteRows<false><<<square_blocks, kThreads, 0, stream>>>(p.cross, p.perm, n, a.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherRows", stream);
  WALSH_RETURN_IF_ERROR(MultiplyFactorBy(context, false, n, p.u, a.data(), b.data()));
  WALSH_RETURN_IF_ERROR(MultiplyFactorBy(context, true, n, p.u, b.data(), a.data()));
  PermuteRows<true><<<square_blocks, kThreads, 0, stream>>>(a.data(), p.perm, n, b.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("ScatterRows", stream);
  WALSH_ASSIGN_OR_RETURN(auto step, DeviceBuffer<float>::Allocate(p.rows * n, stream));
  WALSH_RETURN_IF_ERROR(MultiplyWeights(context, p, b.data(), a.data(), step.data()));
  return AddSteps(context, p, step.data(), nullptr);
}

}  // namespace

absl::Status PropagateError(Context& context, const PropagateErrorParams& params) {
  if (params.rows < 0 || params.cols < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("PropagateError: weights [", params.rows, ", ", params.cols, "]"));
  }
  if (params.rows == 0 || params.cols == 0) return absl::OkStatus();
  if (params.rows >= 2 * params.cols) return PropagateByMatrix(context, params);
  return PropagateByRows(context, params);
}

}  // namespace walsh::kernels::cuda
