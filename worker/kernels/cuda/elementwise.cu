// Norm, rotary embedding, activation, embedding, losses and conversions: everything whose bound is
// memory.
#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(bf16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 FromFloat<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ int64_t GlobalIndex() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
unsigned BlocksFor(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

template <typename Out>
__global__ void RmsNormKernel(int64_t dim, const float* x, const float* weight, float eps, Out* y) {
  __shared__ float scratch[kWarps];
  const float* row = x + blockIdx.x * dim;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) sum = fmaf(row[i], row[i], sum);
  sum = BlockReduce<Sum>(sum, scratch);
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(dim) + eps);
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    const float normed = row[i] * scale * (weight == nullptr ? 1.0f : weight[i]);
    y[blockIdx.x * dim + i] = FromFloat<Out>(normed);
  }
}

template <typename T>
__global__ void RopeKernel(int64_t n_pairs, int64_t n_heads, int64_t half, int64_t window,
                           const float* inverse_frequencies, T* x) {
  const int64_t index = GlobalIndex();
  if (index >= n_pairs) return;
  const int64_t i = index % half;
  const int64_t head_row = index / half;  // token · n_heads + head
  const int64_t token = head_row / n_heads;
  // The angle is taken in double's range reduction: positions reach tens of thousands.
  const auto angle = static_cast<float>(token % window) * inverse_frequencies[i];
  float sine;
  float cosine;
  sincosf(angle, &sine, &cosine);
  T* head = x + head_row * 2 * half;
  const float a = ToFloat(head[i]);
  const float b = ToFloat(head[i + half]);
  head[i] = FromFloat<T>(a * cosine - b * sine);
  head[i + half] = FromFloat<T>(b * cosine + a * sine);
}

template <typename T>
__global__ void SiluMultiplyKernel(int64_t n, const T* gate, const T* up, T* y) {
  const int64_t i = GlobalIndex();
  if (i >= n) return;
  const float g = ToFloat(gate[i]);
  y[i] = FromFloat<T>(g / (1.0f + expf(-g)) * ToFloat(up[i]));
}

template <typename T>
__global__ void GeluMultiplyKernel(int64_t n, const T* gate, const T* up, T* y) {
  const int64_t i = GlobalIndex();
  if (i >= n) return;
  const float g = ToFloat(gate[i]);
  constexpr float kSqrtTwoOverPi = 0.7978845608f;
  const float inner = kSqrtTwoOverPi * (g + 0.044715f * g * g * g);
  y[i] = FromFloat<T>(0.5f * g * (1.0f + tanhf(inner)) * ToFloat(up[i]));
}

template <typename T>
__global__ void EmbedKernel(int64_t dim, const int32_t* ids, const T* embedding, float* hidden) {
  const int64_t token = blockIdx.x;
  const T* row = embedding + static_cast<int64_t>(ids[token]) * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) hidden[token * dim + i] = ToFloat(row[i]);
}

// log Σ exp over a row by the whole block.
__device__ double LogSumExp(const float* row, int64_t n, float* float_scratch,
                            double* double_scratch) {
  float largest = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) largest = fmaxf(largest, row[i]);
  largest = BlockReduce<Max>(largest, float_scratch);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    sum += static_cast<double>(expf(row[i] - largest));
  }
  return static_cast<double>(largest) + log(BlockReduce<Sum>(sum, double_scratch));
}

__global__ void CrossEntropyKernel(int64_t vocab, const float* logits, const int32_t* targets,
                                   double* loss) {
  __shared__ float float_scratch[kWarps];
  __shared__ double double_scratch[kWarps];
  const float* row = logits + blockIdx.x * vocab;
  const double normalizer = LogSumExp(row, vocab, float_scratch, double_scratch);
  if (threadIdx.x == 0) {
    loss[blockIdx.x] = normalizer - static_cast<double>(row[targets[blockIdx.x]]);
  }
}

struct Candidate {
  float value;
  int32_t index;
};
struct Best {
  __device__ Candidate operator()(Candidate a, Candidate b) const {
    if (a.value != b.value) return a.value > b.value ? a : b;
    return a.index < b.index ? a : b;
  }
};
__device__ int32_t ArgMax(const float* row, int64_t n, Candidate* scratch) {
  Candidate best{-INFINITY, 0};
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    best = Best()(best, {row[i], static_cast<int32_t>(i)});
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    best = Best()(
        best, {__shfl_xor_sync(~0u, best.value, offset), __shfl_xor_sync(~0u, best.index, offset)});
  }
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) best = Best()(best, scratch[i]);
  __syncthreads();
  return best.index;
}

__global__ void KlDivergenceKernel(int64_t vocab, const float* reference, const float* logits,
                                   double* kl, int32_t* top1) {
  __shared__ float float_scratch[kWarps];
  __shared__ double double_scratch[kWarps];
  __shared__ Candidate candidates[kWarps];
  const float* p = reference + blockIdx.x * vocab;
  const float* q = logits + blockIdx.x * vocab;
  const double log_p = LogSumExp(p, vocab, float_scratch, double_scratch);
  const double log_q = LogSumExp(q, vocab, float_scratch, double_scratch);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    const double lp = static_cast<double>(p[i]) - log_p;
    const double lq = static_cast<double>(q[i]) - log_q;
    sum += exp(lp) * (lp - lq);
  }
  sum = BlockReduce<Sum>(sum, double_scratch);
  const bool agree = ArgMax(p, vocab, candidates) == ArgMax(q, vocab, candidates);
  if (threadIdx.x == 0) {
    kl[blockIdx.x] = sum;
    top1[blockIdx.x] = agree ? 1 : 0;
  }
}

template <typename From, typename To>
__global__ void ConvertKernel(int64_t n, const From* from, To* to) {
  const int64_t i = GlobalIndex();
  if (i < n) to[i] = FromFloat<To>(ToFloat(from[i]));
}

// A difference of two bf16 that float cannot hold is within 2^-15 of the larger, a bf16, far
// from the middle between two bf16: rounding it twice is rounding it once.
__global__ void SubtractKernel(int64_t n, const bf16* a, const bf16* b, bf16* y) {
  const int64_t i = GlobalIndex();
  if (i < n) y[i] = FromFloat<bf16>(ToFloat(a[i]) - ToFloat(b[i]));
}

template <typename T>
__global__ void AddBiasKernel(int64_t dim, const float* bias, T* x) {
  T* row = x + blockIdx.x * dim;
  for (int64_t i = threadIdx.x; i < dim; i += kThreads) {
    row[i] = FromFloat<T>(ToFloat(row[i]) + bias[i]);
  }
}

// Copies the blocks below the diagonal (column-major: row > column) to the other side.
__global__ void MirrorKernel(int64_t dim, float* h) {
  __shared__ float tile[kWarpSize][kWarpSize + 1];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kWarpSize;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * kWarpSize;
  if (col0 < row0) return;  // row-major: the computed part is on and above the diagonal
  for (int k = threadIdx.y; k < kWarpSize; k += blockDim.y) {
    if (row0 + k < dim && col0 + threadIdx.x < dim) {
      tile[k][threadIdx.x] = h[(row0 + k) * dim + col0 + threadIdx.x];
    }
  }
  __syncthreads();
  for (int k = threadIdx.y; k < kWarpSize; k += blockDim.y) {
    const int64_t row = col0 + k;
    const int64_t col = row0 + threadIdx.x;
    if (row < dim && col < dim && row > col) h[row * dim + col] = tile[threadIdx.x][k];
  }
}

__global__ void DiagonalKernel(int64_t dim, const float* h, float* diagonal) {
  const int64_t i = GlobalIndex();
  if (i < dim) diagonal[i] = h[i * dim + i];
}

}  // namespace

absl::Status CheckKernelImage() {
  cudaFuncAttributes attributes{};
  return CudaStatus(cudaFuncGetAttributes(&attributes, DiagonalKernel),
                    "this build has no code for the device");
}

absl::Status Diagonal(Context& context, int64_t dim, const float* h, float* diagonal) {
  if (dim == 0) return absl::OkStatus();
  DiagonalKernel<<<BlocksFor(dim), kThreads, 0, context.stream()>>>(dim, h, diagonal);
  return LaunchStatus("Diagonal", context.stream());
}

absl::Status MirrorGram(Context& context, int64_t dim, float* h) {
  if (dim == 0) return absl::OkStatus();
  const auto tiles = static_cast<unsigned>((dim + kWarpSize - 1) / kWarpSize);
  MirrorKernel<<<dim3(tiles, tiles), dim3(kWarpSize, 8), 0, context.stream()>>>(dim, h);
  return LaunchStatus("MirrorGram", context.stream());
}

absl::Status Subtract(Context& context, int64_t n, const bf16* a, const bf16* b, bf16* y) {
  if (n == 0) return absl::OkStatus();
  SubtractKernel<<<BlocksFor(n), kThreads, 0, context.stream()>>>(n, a, b, y);
  return LaunchStatus("Subtract", context.stream());
}

template <typename T>
absl::Status AddBias(Context& context, int64_t n_tokens, int64_t dim, const float* bias, T* x) {
  if (n_tokens == 0 || dim == 0) return absl::OkStatus();
  AddBiasKernel<T>
      <<<static_cast<unsigned>(n_tokens), kThreads, 0, context.stream()>>>(dim, bias, x);
  return LaunchStatus("AddBias", context.stream());
}

template <typename Out>
absl::Status RmsNorm(Context& context, int64_t n_tokens, int64_t dim, const float* x,
                     const float* weight, float eps, Out* y) {
  if (n_tokens == 0) return absl::OkStatus();
  RmsNormKernel<Out>
      <<<static_cast<unsigned>(n_tokens), kThreads, 0, context.stream()>>>(dim, x, weight, eps, y);
  return LaunchStatus("RmsNorm", context.stream());
}

template <typename T>
absl::Status Rope(Context& context, int64_t n_tokens, int64_t n_heads, int64_t head_dim,
                  int64_t window, const float* inverse_frequencies, T* x) {
  if (head_dim % 2 != 0 || window <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim: ", head_dim, " must be even, window: ", window, " positive"));
  }
  const int64_t n_pairs = n_tokens * n_heads * head_dim / 2;
  if (n_pairs == 0) return absl::OkStatus();
  RopeKernel<T><<<BlocksFor(n_pairs), kThreads, 0, context.stream()>>>(
      n_pairs, n_heads, head_dim / 2, window, inverse_frequencies, x);
  return LaunchStatus("Rope", context.stream());
}

template <typename T>
absl::Status SiluMultiply(Context& context, int64_t n, const T* gate, const T* up, T* y) {
  if (n == 0) return absl::OkStatus();
  SiluMultiplyKernel<T><<<BlocksFor(n), kThreads, 0, context.stream()>>>(n, gate, up, y);
  return LaunchStatus("SiluMultiply", context.stream());
}

template <typename T>
absl::Status GeluMultiply(Context& context, int64_t n, const T* gate, const T* up, T* y) {
  if (n == 0) return absl::OkStatus();
  GeluMultiplyKernel<T><<<BlocksFor(n), kThreads, 0, context.stream()>>>(n, gate, up, y);
  return LaunchStatus("GeluMultiply", context.stream());
}

template <typename T>
absl::Status Embed(Context& context, int64_t n_tokens, int64_t dim, const int32_t* ids,
                   const T* embedding, float* hidden) {
  if (n_tokens == 0) return absl::OkStatus();
  EmbedKernel<T><<<static_cast<unsigned>(n_tokens), kThreads, 0, context.stream()>>>(
      dim, ids, embedding, hidden);
  return LaunchStatus("Embed", context.stream());
}

absl::Status CrossEntropy(Context& context, int64_t n_tokens, int64_t vocab, const float* logits,
                          const int32_t* targets, double* loss) {
  if (n_tokens == 0) return absl::OkStatus();
  CrossEntropyKernel<<<static_cast<unsigned>(n_tokens), kThreads, 0, context.stream()>>>(
      vocab, logits, targets, loss);
  return LaunchStatus("CrossEntropy", context.stream());
}

absl::Status KlDivergence(Context& context, int64_t n_tokens, int64_t vocab, const float* reference,
                          const float* logits, double* kl, int32_t* top1) {
  if (n_tokens == 0) return absl::OkStatus();
  KlDivergenceKernel<<<static_cast<unsigned>(n_tokens), kThreads, 0, context.stream()>>>(
      vocab, reference, logits, kl, top1);
  return LaunchStatus("KlDivergence", context.stream());
}

template <typename From, typename To>
absl::Status Convert(Context& context, int64_t n, const From* from, To* to) {
  if (n == 0) return absl::OkStatus();
  ConvertKernel<From, To><<<BlocksFor(n), kThreads, 0, context.stream()>>>(n, from, to);
  return LaunchStatus("Convert", context.stream());
}

template absl::Status AddBias<bf16>(Context&, int64_t, int64_t, const float*, bf16*);
template absl::Status AddBias<float>(Context&, int64_t, int64_t, const float*, float*);
template absl::Status RmsNorm<bf16>(Context&, int64_t, int64_t, const float*, const float*, float,
                                    bf16*);
template absl::Status RmsNorm<float>(Context&, int64_t, int64_t, const float*, const float*, float,
                                     float*);
template absl::Status Rope<bf16>(Context&, int64_t, int64_t, int64_t, int64_t, const float*, bf16*);
template absl::Status Rope<float>(Context&, int64_t, int64_t, int64_t, int64_t, const float*,
                                  float*);
template absl::Status SiluMultiply<bf16>(Context&, int64_t, const bf16*, const bf16*, bf16*);
template absl::Status SiluMultiply<float>(Context&, int64_t, const float*, const float*, float*);
template absl::Status GeluMultiply<bf16>(Context&, int64_t, const bf16*, const bf16*, bf16*);
template absl::Status GeluMultiply<float>(Context&, int64_t, const float*, const float*, float*);
template absl::Status Embed<bf16>(Context&, int64_t, int64_t, const int32_t*, const bf16*, float*);
template absl::Status Embed<float>(Context&, int64_t, int64_t, const int32_t*, const float*,
                                   float*);
template absl::Status Convert<float, bf16>(Context&, int64_t, const float*, bf16*);
template absl::Status Convert<bf16, float>(Context&, int64_t, const bf16*, float*);

}  // namespace walsh::kernels::cuda
