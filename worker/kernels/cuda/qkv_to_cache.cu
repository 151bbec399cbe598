// QkvToCache (worker/kernels/cuda/qkv_to_cache.h): a warp for each head of a row.
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/kv_codes.cuh"
#include "worker/kernels/cuda/paged_attention.cuh"
#include "worker/kernels/cuda/qkv_head.cuh"
#include "worker/kernels/cuda/qkv_to_cache.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPairs = HeadPairsOf(static_cast<int>(kCacheHeadDimMax));

struct QkvArguments {
  KvBatch batch;
  unsigned char* pool;
  int64_t block_bytes;
  int64_t head_bytes;
  int n_heads;
  int n_kv_heads;
  int head_dim;
  int group;   // values of a head that share a grid
  float clip;  // of the grid
  int64_t qkv_stride;
  QkvTransform transform;
  bf16* q;
  int64_t q_stride;
};

// kBits: of the pool.
template <typename In, int kBits>
__global__ void __launch_bounds__(kThreads) QkvToCacheKernel(const QkvArguments p, const In* qkv) {
  WaitForPreviousKernel();
  LetNextKernelStart();
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

  const QkvTransform& transform = p.transform;
  const int half = p.head_dim / 2;
  const int64_t column = static_cast<int64_t>(head) * p.head_dim;
  HeadPairs<kPairs> x = LoadHead<kPairs>(qkv + row * p.qkv_stride + column, half);
  if (transform.bias != nullptr) AddBias(x, LoadHead<kPairs>(transform.bias + column, half));
  const bool is_value = head >= p.n_heads + p.n_kv_heads;
  const float* norm = head < p.n_heads ? transform.q_norm : transform.k_norm;
  if (!is_value && norm != nullptr) {
    NormalizeHead(x, LoadHead<kPairs>(norm, half), p.head_dim, transform.eps);
  }
  if (!is_value) RotateHead(x, RotationAt<kPairs>(position, transform.inverse_frequencies, half));

  if constexpr (kBits != KvForm::kBf16) {
    if (!is_value && transform.heads != HeadTransform::kNone) {
      __shared__ float scratch[kWarps][kCacheHeadDimMax];
      HadamardHead(x, half);
      if (transform.heads == HeadTransform::kWalsh && p.group != p.head_dim) {
        SortBySequency(x, half, scratch[threadIdx.x / kWarpSize]);
      }
    }
  }

  if (head < p.n_heads) {
    StoreHead(p.q + row * p.q_stride + column, x, half);
    return;
  }
  const int kv_head = is_value ? head - p.n_heads - p.n_kv_heads : head - p.n_heads;
  const int64_t block = p.batch.tables[sequence * p.batch.max_blocks + position / kPoolBlockTokens];
  const int token = position % kPoolBlockTokens;
  unsigned char* y =
      p.pool + block * p.block_bytes + (is_value ? p.block_bytes / 2 : 0) + kv_head * p.head_bytes;
  if constexpr (kBits == KvForm::kBf16) {
    StoreHead(reinterpret_cast<bf16*>(y) + token * p.head_dim, x, half);
  } else {
    const int token_bytes = p.head_dim * kBits / 8;
    auto* grids = reinterpret_cast<uint32_t*>(y + kPoolBlockTokens * token_bytes);
    StoreHeadCodes<kBits>(y + token * token_bytes, grids + token * (p.head_dim / p.group), x, half,
                          p.group, p.clip);
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
  WALSH_RETURN_IF_ERROR(CheckTransform("QkvToCache", p.transform, shape));
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
  const QkvArguments arguments{
      .batch = p.batch,
      .pool = static_cast<unsigned char*>(p.pool.data),
      .block_bytes = shape.block_bytes(),
      .head_bytes = shape.head_bytes(),
      .n_heads = static_cast<int>(p.n_heads),
      .n_kv_heads = static_cast<int>(shape.n_kv_heads),
      .head_dim = static_cast<int>(shape.head_dim),
      .group = static_cast<int>(shape.head_dim / shape.form.n_groups(shape.head_dim)),
      .clip = shape.form.clip,
      .qkv_stride = qkv_stride,
      .transform = p.transform,
      .q = p.q,
      .q_stride = q_stride};
  const LaunchShape launch{
      .grid = dim3(static_cast<unsigned>((p.batch.n_rows * n_row_heads + kWarps - 1) / kWarps)),
      .threads = kThreads,
      .overlap_previous = p.overlap_previous,
      .stream = p.stream};
  const auto run = [&]<int kBits>() {
    if (p.qkv_float != nullptr) {
      return LaunchKernel("QkvToCache", QkvToCacheKernel<float, kBits>, launch, arguments,
                          p.qkv_float);
    }
    return LaunchKernel("QkvToCache", QkvToCacheKernel<bf16, kBits>, launch, arguments, p.qkv_bf16);
  };
  switch (shape.form.bits) {
    case 8:
      return run.template operator()<8>();
    case 4:
      return run.template operator()<4>();
    default:
      return run.template operator()<KvForm::kBf16>();
  }
}

}  // namespace walsh::kernels::cuda
