// Codes to the bit-packed tensors of the artifact, and to bf16 for the forward pass.
//
// Bound: device memory; each code is read once per output.
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/gptq.h"

namespace walsh::kernels::cuda {
namespace {

// 32 values of `bits` bits are `bits` words, a little-endian stream of bits: word m holds bits
// [32 m, 32 m + 32) of it.
template <int kBits, typename Load>
__device__ __forceinline__ void PackWords(Load&& load, uint32_t (&words)[kBits]) {
#pragma unroll
  for (int m = 0; m < kBits; ++m) words[m] = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t code = load(i);
    const int bit = i * kBits;
    words[bit / 32] |= code << (bit % 32);
    if (bit % 32 + kBits > 32) words[bit / 32 + 1] |= code >> (32 - bit % 32);
  }
}

// Threads of a warp take adjacent rows, so that the words are written in one piece.
template <int kBits>
__global__ void PackWeights(const uint8_t* codes, int64_t rows, int64_t cols, uint32_t* qweight) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t chunk = blockIdx.y;  // of 32 columns
  if (row >= rows) return;
  uint32_t words[kBits];
  const uint8_t* source = codes + row * cols + chunk * 32;
  PackWords<kBits>([&](int i) { return static_cast<uint32_t>(source[i]); }, words);
#pragma unroll
  for (int m = 0; m < kBits; ++m) qweight[(chunk * kBits + m) * rows + row] = words[m];
}

template <int kBits>
__global__ void PackZeros(const uint8_t* zeros, int64_t rows, int64_t groups, uint32_t* qzeros) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // of 32 rows
  const int64_t group = blockIdx.y;
  if (chunk >= rows / 32) return;
  uint32_t words[kBits];
  PackWords<kBits>(
      [&](int i) { return static_cast<uint32_t>(zeros[(chunk * 32 + i) * groups + group]); },
      words);
#pragma unroll
  for (int m = 0; m < kBits; ++m) {
    qzeros[group * (rows / 32 * kBits) + chunk * kBits + m] = words[m];
  }
}

__global__ void TransposeScales(const float* scales, int64_t rows, int64_t groups, __half* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t group = blockIdx.y;
  if (row < rows) out[group * rows + row] = __float2half_rn(scales[row * groups + group]);
}

__global__ void Dequantize(const uint8_t* codes, const float* scales, const uint8_t* zeros,
                           int64_t rows, int64_t cols, int64_t group_size, __nv_bfloat16* out) {
  const int64_t row = blockIdx.y;
  const int64_t groups = cols / group_size;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; c < cols;
       c += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t group = row * groups + c / group_size;
    const int delta = static_cast<int>(codes[row * cols + c]) - static_cast<int>(zeros[group]);
    out[row * cols + c] = __float2bfloat16_rn(scales[group] * static_cast<float>(delta));
  }
}

template <int kBits>
absl::Status PackIntegers(const PackParams& p) {
  constexpr int kThreads = 128;
  const auto row_blocks = static_cast<unsigned>((p.rows + kThreads - 1) / kThreads);
  if (p.qweight != nullptr) {
    PackWeights<kBits>
        <<<dim3(row_blocks, static_cast<unsigned>(p.cols / 32)), kThreads, 0, p.stream>>>(
            p.codes, p.rows, p.cols, p.qweight);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("PackWeights", p.stream);
  }
  if (p.qzeros != nullptr) {
    const auto chunk_blocks = static_cast<unsigned>((p.rows / 32 + kThreads - 1) / kThreads);
    const auto groups = static_cast<unsigned>(p.cols / p.group_size);
    PackZeros<kBits><<<dim3(chunk_blocks, groups), kThreads, 0, p.stream>>>(
        p.zeros, p.rows, p.cols / p.group_size, p.qzeros);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("PackZeros", p.stream);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Pack(const PackParams& p) {
  if (p.rows == 0 || p.cols == 0) return absl::OkStatus();
  if (p.group_size <= 0 || p.cols % p.group_size != 0 || p.cols % 32 != 0) {
    return absl::InvalidArgumentError(absl::StrCat("group_size: ", p.group_size,
                                                   " does not divide ", p.cols,
                                                   " columns, or these are no multiple of 32"));
  }
  if (p.qzeros != nullptr && p.rows % 32 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows: ", p.rows, " is not a multiple of 32; zeros cannot be packed"));
  }
  switch (p.bits) {
    case 2:
      WALSH_RETURN_IF_ERROR(PackIntegers<2>(p));
      break;
    case 3:
      WALSH_RETURN_IF_ERROR(PackIntegers<3>(p));
      break;
    case 4:
      WALSH_RETURN_IF_ERROR(PackIntegers<4>(p));
      break;
    case 8:
      WALSH_RETURN_IF_ERROR(PackIntegers<8>(p));
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("bits: ", p.bits, ", must be 2, 3, 4 or 8"));
  }
  const int64_t groups = p.cols / p.group_size;
  if (p.half_scales != nullptr) {
    TransposeScales<<<dim3(static_cast<unsigned>((p.rows + 127) / 128),
                           static_cast<unsigned>(groups)),
                      128, 0, p.stream>>>(p.scales, p.rows, groups, p.half_scales);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("TransposeScales", p.stream);
  }
  if (p.dequantized != nullptr) {
    const auto column_blocks = static_cast<unsigned>((p.cols + 255) / 256);
    Dequantize<<<dim3(column_blocks, static_cast<unsigned>(p.rows)), 256, 0, p.stream>>>(
        p.codes, p.scales, p.zeros, p.rows, p.cols, p.group_size, p.dequantized);
    WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("Dequantize", p.stream);
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
