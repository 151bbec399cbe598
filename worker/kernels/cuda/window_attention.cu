// Causal attention over calibration windows: FlashAttention-2's loop with mma.sync.
//
// Source:  Dao 2023, "FlashAttention-2" (arXiv 2307.08691), algorithm 1.
// A CTA takes 64 queries of one head, a warp 16 of them; keys and values pass through shared memory
// 64 at a time. Scores live in registers only: the accumulator fragment of Q Kᵀ is at once the
// operand fragment of P V. Keys beyond the diagonal block are not visited.
//
// Bound: tensor cores, 4 · window² / 2 · head_dim flop a head and window.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kQueries = 64;  // of a CTA
constexpr int kKeys = 64;     // of a step
constexpr int kAttentionThreads = 128;
constexpr int kPad = 8;  // bf16 of padding a row: ldmatrix then meets no bank twice
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ unsigned SharedAddress(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void LoadMatrix4(unsigned (&r)[4], const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p)));
}
__device__ __forceinline__ void LoadMatrix4Transposed(unsigned (&r)[4], const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p)));
}
// d[16, 8] += a[16, 16] · b[16, 8]
__device__ __forceinline__ void Mma(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ void CopyAsync16(bf16* to, const bf16* from, bool valid) {
  // A source size of 0 fills the 16 bytes with zeros.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(valid ? 16 : 0));
}

// Rows [first, first + 64) of one head's keys, values or queries to shared memory, zeros past the
// end.
template <int kDim>
__device__ __forceinline__ void LoadTile(bf16* tile, const bf16* base, int64_t stride, int first,
                                         int n_rows) {
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < kKeys * kPieces; i += kAttentionThreads) {
    const int r = i / kPieces;
    const int piece = i % kPieces;
    const bool valid = first + r < n_rows;
    const int row = valid ? first + r : 0;
    CopyAsync16(tile + r * (kDim + kPad) + piece * 8, base + row * stride + piece * 8, valid);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads)
    AttentionKernel(const WindowAttentionParams<bf16> p, float scale) {
  constexpr int kStride = kDim + kPad;
  extern __shared__ __align__(16) unsigned char shared[];
  bf16* q_tile = reinterpret_cast<bf16*>(shared);
  bf16* k_tile = q_tile + kQueries * kStride;  // two stages
  bf16* v_tile = k_tile + 2 * kKeys * kStride;

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int window = static_cast<int>(p.window);
  // Long rows of work first: the last query block has the most keys.
  const int query0 = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kQueries;
  const int64_t head = blockIdx.y;
  const int64_t kv_head = head / (p.n_heads / p.n_kv_heads);
  const int64_t q_stride = p.n_heads * kDim;
  const int64_t kv_stride = p.n_kv_heads * kDim;
  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * window;
  const bf16* q = p.q + row0 * q_stride + head * kDim;
  const bf16* k = p.k + row0 * kv_stride + kv_head * kDim;
  const bf16* v = p.v + row0 * kv_stride + kv_head * kDim;

  const int n_steps = min(query0 + kQueries, window) / kKeys +
                      (min(query0 + kQueries, window) % kKeys != 0 ? 1 : 0);
  LoadTile<kDim>(q_tile, q, q_stride, query0, window);
  LoadTile<kDim>(k_tile, k, kv_stride, 0, window);
  LoadTile<kDim>(v_tile, v, kv_stride, 0, window);
  asm volatile("cp.async.commit_group;");

  float out[kDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};
  const int my_row = query0 + warp * 16 + lane / 4;  // and my_row + 8

  for (int step = 0; step < n_steps; ++step) {
    const int stage = step % 2;
    if (step + 1 < n_steps) {
      LoadTile<kDim>(k_tile + (1 - stage) * kKeys * kStride, k, kv_stride, (step + 1) * kKeys,
                     window);
      LoadTile<kDim>(v_tile + (1 - stage) * kKeys * kStride, v, kv_stride, (step + 1) * kKeys,
                     window);
      asm volatile("cp.async.commit_group;");
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    const bf16* keys = k_tile + stage * kKeys * kStride;
    const bf16* values = v_tile + stage * kKeys * kStride;

    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      unsigned a[4];
      LoadMatrix4(a, q_tile + (warp * 16 + lane % 16) * kStride + d + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        unsigned b[4];
        LoadMatrix4(b, keys + (n + lane % 8 + lane / 16 * 8) * kStride + d + lane / 8 % 2 * 8);
        Mma(score[n / 8], a, b[0], b[1]);
        Mma(score[n / 8 + 1], a, b[2], b[3]);
      }
    }
    const int key0 = step * kKeys;
    const bool masked = key0 + kKeys > query0;  // touches the diagonal or the end
    float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[n][e] *= scale * kLog2E;
        if (masked) {
          const int key = key0 + n * 8 + lane % 4 * 2 + e % 2;
          if (key > my_row + e / 2 * 8) score[n][e] = -INFINITY;
        }
        new_max[e / 2] = fmaxf(new_max[e / 2], score[n][e]);
      }
    }
    float correction[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 1));
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 2));
      correction[h] = exp2f(row_max[h] - new_max[h]);
      row_max[h] = new_max[h];
      row_sum[h] *= correction[h];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[n][e] = exp2f(score[n][e] - new_max[e / 2]);
        row_sum[e / 2] += score[n][e];
      }
    }
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[d][e] *= correction[e / 2];
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      const unsigned a[4] = {PackBf16(score[n / 8][0], score[n / 8][1]),
                             PackBf16(score[n / 8][2], score[n / 8][3]),
                             PackBf16(score[n / 8 + 1][0], score[n / 8 + 1][1]),
                             PackBf16(score[n / 8 + 1][2], score[n / 8 + 1][3])};
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        unsigned b[4];
        LoadMatrix4Transposed(b, values + (n + lane % 16) * kStride + d + lane / 16 * 8);
        Mma(out[d / 8], a, b[0], b[1]);
        Mma(out[d / 8 + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
    row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
    const int row = my_row + h * 8;
    if (row >= window) continue;
    const float inverse = 1.0f / row_sum[h];
    bf16* y = p.y + (row0 + row) * q_stride + head * kDim + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      *reinterpret_cast<unsigned*>(y + d * 8) =
          PackBf16(out[d][h * 2] * inverse, out[d][h * 2 + 1] * inverse);
    }
  }
}

// fp32 form: a warp per query and head, two passes over the keys. For the few tokens of the gate.
__global__ void AttentionFp32Kernel(const WindowAttentionParams<float> p, float scale) {
  extern __shared__ float scores[];  // [window] of this query
  __shared__ float scratch[8];
  const int query = static_cast<int>(blockIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t kv_head = head / (p.n_heads / p.n_kv_heads);
  const int64_t q_stride = p.n_heads * p.head_dim;
  const int64_t kv_stride = p.n_kv_heads * p.head_dim;
  const int64_t row0 = static_cast<int64_t>(blockIdx.z) * p.window;
  const float* q = p.q + (row0 + query) * q_stride + head * p.head_dim;
  const float* k = p.k + row0 * kv_stride + kv_head * p.head_dim;
  const float* v = p.v + row0 * kv_stride + kv_head * p.head_dim;
  float largest = -INFINITY;
  for (int key = threadIdx.x; key <= query; key += blockDim.x) {
    float sum = 0.0f;
    for (int64_t d = 0; d < p.head_dim; ++d) sum = fmaf(q[d], k[key * kv_stride + d], sum);
    scores[key] = sum * scale;
    largest = fmaxf(largest, scores[key]);
  }
  largest = BlockReduce<Max>(largest, scratch);
  float total = 0.0f;
  for (int key = threadIdx.x; key <= query; key += blockDim.x) {
    scores[key] = expf(scores[key] - largest);
    total += scores[key];
  }
  total = BlockReduce<Sum>(total, scratch);
  for (int64_t d = threadIdx.x; d < p.head_dim; d += blockDim.x) {
    float sum = 0.0f;
    for (int key = 0; key <= query; ++key) sum = fmaf(scores[key], v[key * kv_stride + d], sum);
    p.y[(row0 + query) * q_stride + head * p.head_dim + d] = sum / total;
  }
}

template <typename T>
absl::Status Validate(const WindowAttentionParams<T>& p) {
  if (p.n_kv_heads <= 0 || p.n_heads % p.n_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("n_heads: ", p.n_heads, " is not a multiple of n_kv_heads ", p.n_kv_heads));
  }
  return absl::OkStatus();
}

template <int kDim>
absl::Status Launch(Context& context, const WindowAttentionParams<bf16>& p) {
  constexpr int kShared = (kQueries + 4 * kKeys) * (kDim + kPad) * static_cast<int>(sizeof(bf16));
  WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
      AttentionKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const dim3 grid(static_cast<unsigned>((p.window + kQueries - 1) / kQueries),
                  static_cast<unsigned>(p.n_heads), static_cast<unsigned>(p.n_windows));
  AttentionKernel<kDim><<<grid, kAttentionThreads, kShared, context.stream()>>>(
      p, 1.0f / sqrtf(static_cast<float>(kDim)));
  return LaunchStatus("WindowAttention", context.stream());
}

}  // namespace

absl::Status WindowAttention(Context& context, const WindowAttentionParams<bf16>& p) {
  if (absl::Status status = Validate(p); !status.ok()) return status;
  if (p.n_windows == 0 || p.window == 0) return absl::OkStatus();
  switch (p.head_dim) {
    case 16:
      return Launch<16>(context, p);
    case 32:
      return Launch<32>(context, p);
    case 64:
      return Launch<64>(context, p);
    case 128:
      return Launch<128>(context, p);
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("head_dim: ", p.head_dim, ", the CUDA backend takes 16, 32, 64 or 128"));
  }
}

absl::Status WindowAttention(Context& context, const WindowAttentionParams<float>& p) {
  if (absl::Status status = Validate(p); !status.ok()) return status;
  if (p.n_windows == 0 || p.window == 0) return absl::OkStatus();
  const auto shared = static_cast<size_t>(p.window) * sizeof(float);
  if (shared > 48 * 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("window: ", p.window, ", the fp32 form takes at most 12288 tokens"));
  }
  const dim3 grid(static_cast<unsigned>(p.window), static_cast<unsigned>(p.n_heads),
                  static_cast<unsigned>(p.n_windows));
  AttentionFp32Kernel<<<grid, 128, shared, context.stream()>>>(
      p, 1.0f / sqrtf(static_cast<float>(p.head_dim)));
  return LaunchStatus("WindowAttention (fp32)", context.stream());
}

}  // namespace walsh::kernels::cuda
