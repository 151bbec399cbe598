// The sequential columns of GPTQ: one fused kernel per 128-column block, a warp per row.
//
// Bound: instruction issue. Per row and block 128 steps of one shuffle, one rounding and up to four
// FMAs a lane, plus 80 clip steps over 4 weights a lane (two special-function operations each); the
// block of U (64 KB) is read once per 16 rows. Bytes are negligible beside the trailing GEMM.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/group_grid.cuh"

namespace walsh::kernels::cuda {
namespace {

constexpr int kRowsPerCta = 16;
constexpr int kLanes = kWarpSize;
constexpr int kGridWarps = 8;                  // of WideGroupGrid
constexpr int kPerLane = kGptqBlock / kLanes;  // columns of a block that a lane holds

struct BlockArgs {
  int64_t rows;
  int64_t cols;
  int64_t first_col;
  int n_cols;  // of this block, a multiple of 32
  float* w;    // [rows, cols], columns in `perm` order, updated by earlier blocks
  const float* u;
  const int32_t* perm;
  int64_t group_size;
  float max_code;
  bool symmetric;
  bool mse_clip;
  uint8_t* codes;
  float* scales;
  uint8_t* zeros;
  float* error;  // [rows, kGptqBlock]: err of each column of the block
  float* loss;
};

__global__ void GatherColumns(const float* w, const int32_t* perm, const uint8_t* dead,
                              int64_t rows, int64_t cols, float* out) {
  const int64_t row = blockIdx.y;
  for (int64_t c = blockIdx.x * blockDim.x + threadIdx.x; c < cols; c += gridDim.x * blockDim.x) {
    const int32_t source = perm[c];
    const bool is_dead = dead != nullptr && dead[source] != 0;
    out[row * cols + c] = is_dead ? 0.0f : w[row * cols + source];
  }
}

// Grids of groups that are wider than a block, at the group's first column. One CTA per row; the
// row's part of the group lies in shared memory.
__global__ void WideGroupGrid(const float* w, const int32_t* perm, int64_t cols, int64_t first_col,
                              int64_t group_size, float max_code, bool symmetric, bool mse_clip,
                              float* scales, uint8_t* zeros) {
  extern __shared__ float values[];
  __shared__ float scratch[kGridWarps];
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(group_size);
  float low = 0.0f;
  float high = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float v = w[row * cols + first_col + i];
    values[i] = v;
    low = fminf(low, v);
    high = fmaxf(high, v);
  }
  low = BlockReduce<Min>(low, scratch);
  high = BlockReduce<Max>(high, scratch);
  const GroupGrid best =
      SearchGrid(low, high, max_code, symmetric, mse_clip, [&](const GroupGrid& grid) {
        float error = 0.0f;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
          error += ScaledError(values[i], grid, max_code);
        }
        return BlockReduce<Sum>(error, scratch);
      });
  if (threadIdx.x == 0) {
    const int64_t group = row * (cols / group_size) + perm[first_col] / group_size;
    scales[group] = best.scale;
    zeros[group] = static_cast<uint8_t>(best.zero);
  }
}

// kGroup: 32, 64 or 128: grids are taken inside, from the block's updated weights; 0: wider groups,
// whose grids are there already.
template <int kGroup, bool kFeedback>
__global__ void __launch_bounds__(kRowsPerCta* kLanes) QuantizeBlock(const BlockArgs args) {
  extern __shared__ float u_block[];  // [kGptqBlock, kGptqBlock], zero below the diagonal
  if constexpr (kFeedback) {
    for (int i = threadIdx.x; i < kGptqBlock * kGptqBlock; i += blockDim.x) {
      const int r = i / kGptqBlock;
      const int c = i % kGptqBlock;
      float value = 0.0f;
      if (c >= r && c < args.n_cols) {
        value = args.u[(args.first_col + r) * args.cols + args.first_col + c];
      }
      u_block[i] = value;
    }
    __syncthreads();
  }
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerCta + threadIdx.x / kLanes;
  if (row >= args.rows) return;

  float w[kPerLane];
  float error[kPerLane];
  float code[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int c = k * kLanes + lane;
    w[k] = c < args.n_cols ? args.w[row * args.cols + args.first_col + c] : 0.0f;
    error[k] = 0.0f;
    code[k] = 0.0f;
  }
  const int64_t groups = args.cols / args.group_size;
  GroupGrid grid;
  if constexpr (kGroup == 0) {
    const int64_t group = args.perm[args.first_col] / args.group_size;
    grid.scale = args.scales[row * groups + group];
    grid.inverse_scale = 1.0f / grid.scale;
    grid.zero = args.zeros[row * groups + group];
  }
  float loss = 0.0f;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    if (k * kLanes >= args.n_cols) break;
    if constexpr (kGroup != 0) {
      constexpr int kGroupRegisters = kGroup / kLanes;
      if (k % kGroupRegisters == 0) {
        grid = WarpGroupGrid<kGroupRegisters>(w + k, args.max_code, args.symmetric, args.mse_clip);
        if (lane == 0) {
          const int64_t group = args.perm[args.first_col + k * kLanes] / args.group_size;
          args.scales[row * groups + group] = grid.scale;
          args.zeros[row * groups + group] = static_cast<uint8_t>(grid.zero);
        }
      }
    }
    if constexpr (!kFeedback) {
      code[k] = QuantizeToCode(w[k], grid, args.max_code);
    } else {
      for (int l = 0; l < kLanes; ++l) {
        const int i = k * kLanes + l;
        const float wi = __shfl_sync(~0u, w[k], l);
        const float ci = QuantizeToCode(wi, grid, args.max_code);
        const float err = (wi - DequantizeCode(ci, grid)) / u_block[i * kGptqBlock + i];
        loss += err * err;
        if (lane == l) {
          code[k] = ci;
          error[k] = err;
        }
#pragma unroll
        for (int kk = k; kk < kPerLane; ++kk) {
          w[kk] = fmaf(-err, u_block[i * kGptqBlock + kk * kLanes + lane], w[kk]);
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int c = k * kLanes + lane;
    if (c < args.n_cols) {
      args.codes[row * args.cols + args.perm[args.first_col + c]] = static_cast<uint8_t>(code[k]);
    }
    if constexpr (kFeedback) args.error[row * kGptqBlock + c] = error[k];
  }
  if (kFeedback && lane == 0 && args.loss != nullptr) args.loss[row] += loss;
}

template <bool kFeedback>
absl::Status LaunchBlock(const BlockArgs& args, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((args.rows + kRowsPerCta - 1) / kRowsPerCta);
  constexpr int kThreads = kRowsPerCta * kLanes;
  constexpr int kShared = kFeedback ? kGptqBlock * kGptqBlock * static_cast<int>(sizeof(float)) : 0;
  const auto launch = [&](auto kernel) -> absl::Status {
    if (kShared > 0) {
      WALSH_CUDA_RETURN_IF_ERROR(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    }
    kernel<<<grid, kThreads, kShared, stream>>>(args);
    return LaunchStatus("QuantizeBlock", stream);
  };
  switch (args.group_size) {
    case 32:
      return launch(QuantizeBlock<32, kFeedback>);
    case 64:
      return launch(QuantizeBlock<64, kFeedback>);
    case 128:
      return launch(QuantizeBlock<128, kFeedback>);
    default:
      return launch(QuantizeBlock<0, kFeedback>);
  }
}

// Groups whose grids QuantizeBlock takes itself.
bool FitsBlock(int64_t group_size) {
  return group_size == 32 || group_size == 64 || group_size == kGptqBlock;
}

absl::Status Validate(const QuantizeColumnsParams& p) {
  if (p.cols % kLanes != 0) {
    return absl::InvalidArgumentError(absl::StrCat("cols: ", p.cols, " is not a multiple of 32"));
  }
  if (p.bits != 2 && p.bits != 3 && p.bits != 4 && p.bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat("bits: ", p.bits, ", must be 2, 3, 4 or 8"));
  }
  const int64_t g = p.group_size;
  const bool fits = FitsBlock(g) || (g > 0 && g % kGptqBlock == 0) || g == p.cols;
  if (!fits || p.cols % g != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("group_size: ", g, " does not fit ", p.cols, " columns"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status QuantizeColumns(Context& context, const QuantizeColumnsParams& params) {
  WALSH_RETURN_IF_ERROR(Validate(params));
  if (params.rows == 0 || params.cols == 0) return absl::OkStatus();
  const cudaStream_t stream = context.stream();
  WALSH_ASSIGN_OR_RETURN(auto w, DeviceBuffer<float>::Allocate(params.rows * params.cols, stream));
  WALSH_ASSIGN_OR_RETURN(auto error,
                         DeviceBuffer<float>::Allocate(params.rows * kGptqBlock, stream));
  const dim3 gather_grid(static_cast<unsigned>(std::min<int64_t>((params.cols + 255) / 256, 64)),
                         static_cast<unsigned>(params.rows));
  GatherColumns<<<gather_grid, 256, 0, stream>>>(params.w, params.perm, params.dead, params.rows,
                                                 params.cols, w.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("GatherColumns", stream);
  if (params.loss != nullptr) {
    WALSH_CUDA_RETURN_IF_ERROR(
        cudaMemsetAsync(params.loss, 0, static_cast<size_t>(params.rows) * sizeof(float), stream));
  }
  const auto max_code = static_cast<float>((1 << params.bits) - 1);
  const bool wide = !FitsBlock(params.group_size);
  for (int64_t c0 = 0; c0 < params.cols; c0 += kGptqBlock) {
    const int64_t n_cols = std::min<int64_t>(kGptqBlock, params.cols - c0);
    if (wide && c0 % params.group_size == 0) {
      // Wide groups are static sets of adjacent positions: `perm` keeps a group together.
      const auto shared = static_cast<size_t>(params.group_size) * sizeof(float);
      WALSH_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(
          WideGroupGrid, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
      WideGroupGrid<<<static_cast<unsigned>(params.rows), kGridWarps * kLanes, shared, stream>>>(
          w.data(), params.perm, params.cols, c0, params.group_size, max_code, params.symmetric,
          params.mse_clip, params.scales, params.zeros);
      WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("WideGroupGrid", stream);
    }
    const BlockArgs args{.rows = params.rows,
                         .cols = params.cols,
                         .first_col = c0,
                         .n_cols = static_cast<int>(n_cols),
                         .w = w.data(),
                         .u = params.u,
                         .perm = params.perm,
                         .group_size = params.group_size,
                         .max_code = max_code,
                         .symmetric = params.symmetric,
                         .mse_clip = params.mse_clip,
                         .codes = params.codes,
                         .scales = params.scales,
                         .zeros = params.zeros,
                         .error = error.data(),
                         .loss = params.loss};
    if (params.u == nullptr) {
      WALSH_RETURN_IF_ERROR(LaunchBlock<false>(args, stream));
      continue;
    }
    WALSH_RETURN_IF_ERROR(LaunchBlock<true>(args, stream));
    const int64_t rest = params.cols - c0 - n_cols;
    if (rest == 0) continue;
    // W[:, c1:] −= error · U[c0:c1, c1:], seen column-major: all three transposed.
    const float minus_one = -1.0f;
    const float one = 1.0f;
    WALSH_CUBLAS_RETURN_IF_ERROR(cublasSgemm(
        context.blas(), CUBLAS_OP_N, CUBLAS_OP_N, static_cast<int>(rest),
        static_cast<int>(params.rows), static_cast<int>(n_cols), &minus_one,
        params.u + c0 * params.cols + c0 + n_cols, static_cast<int>(params.cols), error.data(),
        kGptqBlock, &one, w.data() + c0 + n_cols, static_cast<int>(params.cols)));
  }
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cuda
