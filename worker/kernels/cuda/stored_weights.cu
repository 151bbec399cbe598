// Stored scalars to floats, and packed codes to bf16.
//
// Bound: device memory; each byte is read and written once, 16 at a time.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/stored_weights.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kVectorBytes = 16;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// Elements of 16 bytes, or of whatever is left at the end.
template <typename T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T values[kSize];
};

// A thread takes one vector's worth of elements. kAligned: x and y are, to 16 bytes.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    ConvertStoredKernel(int64_t n, const T* x, float* y, int64_t first_index, int64_t* first_bad) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (first >= n) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kSize), n - first));
  float values[kSize];
  if (kAligned && count == kSize) {
    const auto loaded = *reinterpret_cast<const Vector<T>*>(x + first);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = ToFloat(loaded.values[i]);
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      *reinterpret_cast<float4*>(y + first + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = i < count ? ToFloat(x[first + i]) : 0.0f;
      if (i < count) y[first + i] = values[i];
    }
  }
  int bad = kSize;
#pragma unroll
  for (int i = kSize - 1; i >= 0; --i) {
    if (!isfinite(values[i])) bad = i;
  }
  if (bad < kSize) {
    atomicMin(reinterpret_cast<long long*>(first_bad),
              static_cast<long long>(first_index + first + bad));
  }
}

template <typename T>
absl::Status ConvertStoredAs(const ConvertStoredParams& p) {
  const auto x_address = reinterpret_cast<uintptr_t>(p.x);
  const auto y_address = reinterpret_cast<uintptr_t>(p.y);
  if (x_address % sizeof(T) != 0 || y_address % sizeof(float) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("ConvertStored: values of ", sizeof(T), " bytes at an address that is ",
                     x_address % sizeof(T), " bytes off, floats at one that is ",
                     y_address % sizeof(float), " bytes off"));
  }
  constexpr int64_t kPerBlock = int64_t{kThreads} * Vector<T>::kSize;
  const auto blocks = static_cast<unsigned>((p.n + kPerBlock - 1) / kPerBlock);
  const auto* values = static_cast<const T*>(p.x);
  if (x_address % kVectorBytes == 0 && y_address % kVectorBytes == 0) {
    ConvertStoredKernel<T, true>
        <<<blocks, kThreads, 0, p.stream>>>(p.n, values, p.y, p.first, p.first_bad);
  } else {
    ConvertStoredKernel<T, false>
        <<<blocks, kThreads, 0, p.stream>>>(p.n, values, p.y, p.first, p.first_bad);
  }
  return LaunchStatus("ConvertStored", p.stream);
}

// 32 codes are kBits words.
constexpr int kRun = 32;
// A CTA takes 32 rows of four runs; its warps a run each, their lanes a row each.
constexpr int kTileRuns = 4;
constexpr int kTileCols = kTileRuns * kRun;
constexpr int kTileThreads = kTileRuns * kRun;
constexpr int kPerVector = Vector<__nv_bfloat16>::kSize;
// One vector more a row, so that the lanes' vectors lie in different banks.
constexpr int kTileVectors = kTileCols / kPerVector + 1;

// Value i of a run whose words are load(0), …, load(kBits − 1).
template <int kBits, typename Load>
__device__ __forceinline__ int UnpackValue(int i, Load&& load) {
  const int word = i * kBits / 32;
  const int shift = i * kBits % 32;
  uint32_t value = load(word) >> shift;
  if (shift + kBits > 32) value |= load(word + 1) << (32 - shift);
  return static_cast<int>(value & ((1u << kBits) - 1u));
}

template <int kBits>
__global__ void __launch_bounds__(kTileThreads)
    UnpackKernel(const UnpackParams p, int64_t col_tiles) {
  __shared__ Vector<__nv_bfloat16> tile[kRun][kTileVectors];
  const int64_t first_row = blockIdx.x / col_tiles * kRun;
  const int64_t first_col = blockIdx.x % col_tiles * kTileCols;
  const int lane = static_cast<int>(threadIdx.x) % kRun;
  const int warp = static_cast<int>(threadIdx.x) / kRun;
  const int64_t row = first_row + lane;
  const int64_t run_col = first_col + warp * kRun;
  if (run_col < p.cols) {
    uint32_t words[kBits];
#pragma unroll
    for (int m = 0; m < kBits; ++m)
      words[m] = p.qweight[(run_col / kRun * kBits + m) * p.rows + row];
    const auto zero_of = [&](int64_t group) {
      const uint32_t* zeros = p.qzeros + (group * (p.rows / kRun) + first_row / kRun) * kBits;
      return UnpackValue<kBits>(lane, [&](int m) { return zeros[m]; });
    };
    int64_t group = run_col / p.group_size;
    int64_t group_end = (group + 1) * p.group_size;
    float scale = __half2float(p.scales[group * p.rows + row]);
    int zero = zero_of(group);
#pragma unroll
    for (int v = 0; v < kRun / kPerVector; ++v) {
      Vector<__nv_bfloat16> out;
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) {
        const int i = v * kPerVector + k;
        if (run_col + i == group_end) {
          ++group;
          group_end += p.group_size;
          scale = __half2float(p.scales[group * p.rows + row]);
          zero = zero_of(group);
        }
        const int code = UnpackValue<kBits>(i, [&](int m) { return words[m]; });
        out.values[k] = __float2bfloat16_rn(scale * static_cast<float>(code - zero));
      }
      tile[lane][warp * (kRun / kPerVector) + v] = out;
    }
  }
  __syncthreads();
  // Adjacent threads write adjacent vectors of a row.
  const int n_vectors =
      static_cast<int>(min(static_cast<int64_t>(kTileCols), p.cols - first_col)) / kPerVector;
  for (int i = static_cast<int>(threadIdx.x); i < kRun * n_vectors; i += kTileThreads) {
    const int r = i / n_vectors;
    const int v = i % n_vectors;
    *reinterpret_cast<Vector<__nv_bfloat16>*>(p.y + (first_row + r) * p.cols + first_col +
                                              v * kPerVector) = tile[r][v];
  }
}

template <int kBits>
absl::Status UnpackAs(const UnpackParams& p) {
  const int64_t col_tiles = (p.cols + kTileCols - 1) / kTileCols;
  UnpackKernel<kBits>
      <<<static_cast<unsigned>(p.rows / kRun * col_tiles), kTileThreads, 0, p.stream>>>(p,
                                                                                        col_tiles);
  return LaunchStatus("Unpack", p.stream);
}

}  // namespace

absl::Status ConvertStored(const ConvertStoredParams& p) {
  if (p.n < 0) return absl::InvalidArgumentError(absl::StrCat("ConvertStored: ", p.n, " values"));
  if (p.n == 0) return absl::OkStatus();
  switch (p.type) {
    case ScalarType::kF32:
      return ConvertStoredAs<float>(p);
    case ScalarType::kF16:
      return ConvertStoredAs<__half>(p);
    case ScalarType::kBf16:
      return ConvertStoredAs<__nv_bfloat16>(p);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("ConvertStored: scalar type ", static_cast<int>(p.type), " is unknown"));
}

absl::Status Unpack(const UnpackParams& p) {
  if (p.rows < 0 || p.cols < 0 || p.rows % kRun != 0 || p.cols % kRun != 0) {
    return absl::InvalidArgumentError(absl::StrCat("Unpack: ", p.rows, " rows and ", p.cols,
                                                   " columns, both must be multiples of ", kRun));
  }
  if (p.group_size <= 0 || p.cols % p.group_size != 0) {
    return absl::InvalidArgumentError(absl::StrCat("Unpack: group_size: ", p.group_size,
                                                   " does not divide ", p.cols, " columns"));
  }
  if (const uintptr_t rest = reinterpret_cast<uintptr_t>(p.y) % kVectorBytes; rest != 0) {
    return absl::InvalidArgumentError(absl::StrCat("Unpack: y must be aligned to ", kVectorBytes,
                                                   " bytes, is ", rest, " bytes off"));
  }
  const bool is_empty = p.rows == 0 || p.cols == 0;
  switch (p.bits) {
    case 2:
      return is_empty ? absl::OkStatus() : UnpackAs<2>(p);
    case 3:
      return is_empty ? absl::OkStatus() : UnpackAs<3>(p);
    case 4:
      return is_empty ? absl::OkStatus() : UnpackAs<4>(p);
    case 8:
      return is_empty ? absl::OkStatus() : UnpackAs<8>(p);
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("Unpack: bits: ", p.bits, ", must be 2, 3, 4 or 8"));
  }
}

}  // namespace walsh::kernels::cuda
