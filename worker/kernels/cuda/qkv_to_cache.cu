// QkvToCache (worker/kernels/cuda/qkv_to_cache.h): a warp for each head of a row. A lane holds
// pairs of neighbours in either half of the head, so that what is rotated together is in one lane.
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/qkv_to_cache.h"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPairElements = 2;
// Pairs of a lane in half a head.
constexpr int kPairs = static_cast<int>(kCacheHeadDimMax) / 2 / kPairElements / kWarpSize;
constexpr double kHalfTurnsPerRadian = 0.31830988618379067154;  // 1 / π

struct QkvArguments {
  KvBatch batch;
  bf16* pool;
  int64_t block_stride;
  int n_heads;
  int n_kv_heads;
  int head_dim;
  int64_t qkv_stride;
  const float* bias;
  const float* q_norm;
  const float* k_norm;
  float eps;
  const float* inverse_frequencies;
  bf16* q;
  int64_t q_stride;
};

__device__ __forceinline__ float2 LoadPair(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}
__device__ __forceinline__ float2 LoadPair(const bf16* x) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}
__device__ __forceinline__ void StorePair(bf16* y, float2 x) {
  *reinterpret_cast<__nv_bfloat162*>(y) = __floats2bfloat162_rn(x.x, x.y);
}

// a and b, of either half of a head, rotated by the angle.
__device__ __forceinline__ void Rotate(float& a, float& b, int position, float inverse_frequency) {
  const double half_turns =
      static_cast<double>(position) * static_cast<double>(inverse_frequency) * kHalfTurnsPerRadian;
  float sine;
  float cosine;
  sincospif(static_cast<float>(half_turns - 2.0 * rint(half_turns / 2.0)), &sine, &cosine);
  const float first = a;
  const float second = b;
  a = first * cosine - second * sine;
  b = second * cosine + first * sine;
}

template <typename In>
__global__ void __launch_bounds__(kThreads) QkvToCacheKernel(const QkvArguments p, const In* qkv) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int n_row_heads = p.n_heads + 2 * p.n_kv_heads;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t row = index / n_row_heads;
  const int head = static_cast<int>(index - row * n_row_heads);
  if (row >= p.batch.n_rows) return;
  const int sequence = p.batch.sequence_of_row[row];
  if (sequence < 0) return;
  const int position =
      p.batch.n_past[sequence] + static_cast<int>(row) - p.batch.first_row[sequence];

  const int half = p.head_dim / 2;
  float2 low[kPairs];
  float2 high[kPairs];
  const int64_t column = static_cast<int64_t>(head) * p.head_dim;
  const In* x = qkv + row * p.qkv_stride + column;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = (i * kWarpSize + lane) * kPairElements;
    low[i] = high[i] = {0.0f, 0.0f};
    if (at >= half) continue;
    low[i] = LoadPair(x + at);
    high[i] = LoadPair(x + half + at);
    if (p.bias == nullptr) continue;
    const float* bias = p.bias + column;
    low[i] = {low[i].x + bias[at], low[i].y + bias[at + 1]};
    high[i] = {high[i].x + bias[half + at], high[i].y + bias[half + at + 1]};
  }

  const bool is_value = head >= p.n_heads + p.n_kv_heads;
  const float* norm = head < p.n_heads ? p.q_norm : is_value ? nullptr : p.k_norm;
  if (norm != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      sum = fmaf(low[i].x, low[i].x, sum);
      sum = fmaf(low[i].y, low[i].y, sum);
      sum = fmaf(high[i].x, high[i].x, sum);
      sum = fmaf(high[i].y, high[i].y, sum);
    }
    sum = WarpReduce<Sum>(sum);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int at = (i * kWarpSize + lane) * kPairElements;
      if (at >= half) continue;
      low[i] = {low[i].x * scale * norm[at], low[i].y * scale * norm[at + 1]};
      high[i] = {high[i].x * scale * norm[half + at], high[i].y * scale * norm[half + at + 1]};
    }
  }

  bf16* y = p.q + row * p.q_stride + column;
  if (head >= p.n_heads) {
    const int kv_head = is_value ? head - p.n_heads - p.n_kv_heads : head - p.n_heads;
    const int64_t block =
        p.batch.tables[sequence * p.batch.max_blocks + position / kPoolBlockTokens];
    y = p.pool + block * p.block_stride + (is_value ? p.block_stride / 2 : 0) +
        (static_cast<int64_t>(kv_head) * kPoolBlockTokens + position % kPoolBlockTokens) *
            p.head_dim;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int at = (i * kWarpSize + lane) * kPairElements;
    if (at >= half) continue;
    if (!is_value) {
      Rotate(low[i].x, high[i].x, position, p.inverse_frequencies[at]);
      Rotate(low[i].y, high[i].y, position, p.inverse_frequencies[at + 1]);
    }
    StorePair(y + at, low[i]);
    StorePair(y + half + at, high[i]);
  }
}

absl::Status Validate(const QkvToCacheParams& p, int64_t width, int64_t qkv_stride,
                      int64_t q_stride) {
  WALSH_RETURN_IF_ERROR(CheckPool("QkvToCache", p.batch, p.pool));
  const KvPoolShape& shape = p.pool.shape;
  if (shape.head_dim % 4 != 0 || shape.head_dim > kCacheHeadDimMax) {
    return absl::InvalidArgumentError(absl::StrCat("QkvToCache: head_dim ", shape.head_dim,
                                                   ", must be a multiple of 4 and at most ",
                                                   kCacheHeadDimMax));
  }
  if (p.n_heads <= 0 || p.n_heads % shape.n_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "QkvToCache: n_heads ", p.n_heads, " is not a multiple of n_kv_heads ", shape.n_kv_heads));
  }
  if ((p.qkv_float == nullptr) == (p.qkv_bf16 == nullptr)) {
    return absl::InvalidArgumentError("QkvToCache: one of qkv_float and qkv_bf16 must be given");
  }
  const int64_t q_width = p.n_heads * shape.head_dim;
  if (qkv_stride < width || qkv_stride % 2 != 0 || q_stride < q_width || q_stride % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("QkvToCache: strides ", qkv_stride, " and ",
                                                   q_stride,
                                                   " of qkv and q, must be even and at "
                                                   "least ",
                                                   width, " and ", q_width));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status QkvToCache(const QkvToCacheParams& p) {
  const KvPoolShape& shape = p.pool.shape;
  const int64_t n_row_heads = p.n_heads + 2 * shape.n_kv_heads;
  const int64_t width = n_row_heads * shape.head_dim;
  const int64_t qkv_stride = p.qkv_stride == 0 ? width : p.qkv_stride;
  const int64_t q_stride = p.q_stride == 0 ? p.n_heads * shape.head_dim : p.q_stride;
  WALSH_RETURN_IF_ERROR(Validate(p, width, qkv_stride, q_stride));
  if (p.batch.n_rows == 0) return absl::OkStatus();
  const QkvArguments arguments{.batch = p.batch,
                               .pool = p.pool.data,
                               .block_stride = shape.block_stride(),
                               .n_heads = static_cast<int>(p.n_heads),
                               .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                               .head_dim = static_cast<int>(shape.head_dim),
                               .qkv_stride = qkv_stride,
                               .bias = p.bias,
                               .q_norm = p.q_norm,
                               .k_norm = p.k_norm,
                               .eps = p.eps,
                               .inverse_frequencies = p.inverse_frequencies,
                               .q = p.q,
                               .q_stride = q_stride};
  const LaunchShape launch{
      .grid = dim3(static_cast<unsigned>((p.batch.n_rows * n_row_heads + kWarps - 1) / kWarps)),
      .threads = kThreads,
      .overlap_previous = p.overlap_previous,
      .stream = p.stream};
  if (p.qkv_float != nullptr) {
    return LaunchKernel("QkvToCache", QkvToCacheKernel<float>, launch, arguments, p.qkv_float);
  }
  return LaunchKernel("QkvToCache", QkvToCacheKernel<bf16>, launch, arguments, p.qkv_bf16);
}

}  // namespace walsh::kernels::cuda
