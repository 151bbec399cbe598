#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/dependent_launch.cuh"
#include "worker/kernels/cuda/reduce.cuh"
#include "worker/kernels/cuda/row_peak.cuh"
#include "worker/kernels/cuda/token_rows.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEmbedThreads = 128;
constexpr int kEmbedAtOnce = 8;  // bf16 of 16 bytes
constexpr int kAtOnce = 4;       // floats of 16 bytes
// Logits of a CTA: as many loads of a thread at once as hide the latency.
constexpr int kLoads = 8;
constexpr int64_t kSlice = int64_t{kThreads} * kAtOnce * kLoads;
constexpr int64_t kGridYMax = 65535;

__global__ void __launch_bounds__(kEmbedThreads) EmbedRowsKernel(const EmbedRowsParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kEmbedThreads + threadIdx.x;
  if (i * kEmbedAtOnce >= p.dim) return;
  int64_t id = p.ids[blockIdx.y];
  if (id < 0 && p.made != nullptr) id = p.made[-1 - id];
  float values[kEmbedAtOnce];
  if (id >= 0 && id < p.vocab) {
    const uint4 bits = *(reinterpret_cast<const uint4*>(p.table + id * p.dim) + i);
    const unsigned words[kEmbedAtOnce / 2] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < kEmbedAtOnce / 2; ++k) {
      values[2 * k] = p.scale * __uint_as_float(words[k] << 16);
      values[2 * k + 1] = p.scale * __uint_as_float(words[k] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (float& value : values) value = NAN;
  }
  float4* to = reinterpret_cast<float4*>(p.hidden + blockIdx.y * p.dim) + 2 * i;
  to[0] = {values[0], values[1], values[2], values[3]};
  to[1] = {values[4], values[5], values[6], values[7]};
}

// A CTA takes a row.
__global__ void __launch_bounds__(kThreads) AddNormedRowsKernel(const AddNormedRowsParams p) {
  __shared__ float scratch[kThreads / kWarpSize];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t row = blockIdx.x * p.dim;
  const auto* x = reinterpret_cast<const float4*>(p.x + row);
  const auto* weight = reinterpret_cast<const float4*>(p.weight);
  auto* hidden = reinterpret_cast<float4*>(p.hidden + row);
  const int64_t n = p.dim / kAtOnce;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float4 v = x[i];
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  sum = BlockReduce<Sum>(sum, scratch);
  const float factor = rsqrtf(sum / static_cast<float>(p.dim) + p.eps);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float4 v = x[i];
    const float4 w = weight[i];
    float4 h = hidden[i];
    h.x += v.x * factor * w.x;
    h.y += v.y * factor * w.y;
    h.z += v.z * factor * w.z;
    h.w += v.w * factor * w.w;
    hidden[i] = h;
  }
}

__global__ void __launch_bounds__(kThreads) ArgMaxKernel(const ArgMaxParams p, int64_t stride) {
  __shared__ PeakKey scratch[kThreads / kWarpSize];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const float* logits = p.logits + blockIdx.y * stride;
  const int64_t first = blockIdx.x * kSlice + static_cast<int64_t>(threadIdx.x) * kAtOnce;
  constexpr int64_t kStep = int64_t{kThreads} * kAtOnce;
  float4 values[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int64_t at = first + k * kStep;
    values[k] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    if (at + kAtOnce <= p.vocab) {
      values[k] = *reinterpret_cast<const float4*>(logits + at);
    } else if (at < p.vocab) {
      values[k].x = logits[at];
      if (at + 1 < p.vocab) values[k].y = logits[at + 1];
      if (at + 2 < p.vocab) values[k].z = logits[at + 2];
    }
  }
  Peak peak;
#pragma unroll
  for (int k = 0; k < kLoads; ++k) {
    const int64_t at = first + k * kStep;
    peak.See(values[k].x, at);
    peak.See(values[k].y, at + 1);
    peak.See(values[k].z, at + 2);
    peak.See(values[k].w, at + 3);
  }
  const PeakKey key = BlockReduce<Max>(peak.Key(), scratch);
  if (threadIdx.x != 0) return;
  PeakKey* best = p.workspace + 2 * blockIdx.y;
  unsigned long long* n_done = best + 1;
  atomicMax(best, key);
  __threadfence();
  if (atomicAdd(n_done, 1ull) != gridDim.x - 1) return;
  __threadfence();
  const PeakKey of_row = atomicExch(best, kNoPeak);
  p.ids[blockIdx.y] = isinf(PeakValue(of_row)) ? -1 : PeakPosition(of_row);
  *n_done = 0;
}

absl::Status CheckRowCount(const char* name, int64_t n_rows) {
  if (n_rows >= 0 && n_rows <= kGridYMax) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": ", n_rows, " rows, the limit is ", kGridYMax));
}

bool IsAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

absl::Status EmbedRows(const EmbedRowsParams& p) {
  WALSH_RETURN_IF_ERROR(CheckRowCount("EmbedRows", p.n_rows));
  if (p.dim < 0 || p.dim % kEmbedAtOnce != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("EmbedRows: dim ", p.dim, ", must be a multiple of ", kEmbedAtOnce));
  }
  if (!IsAligned(p.table) || !IsAligned(p.hidden)) {
    return absl::InvalidArgumentError(
        "EmbedRows: table and hidden must begin at multiples of 16 bytes");
  }
  if (p.n_rows == 0 || p.dim == 0) return absl::OkStatus();
  constexpr int64_t kColumns = int64_t{kEmbedThreads} * kEmbedAtOnce;
  return LaunchKernel("EmbedRows", EmbedRowsKernel,
                      {.grid = dim3(static_cast<unsigned>((p.dim + kColumns - 1) / kColumns),
                                    static_cast<unsigned>(p.n_rows)),
                       .threads = kEmbedThreads,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      p);
}

absl::Status AddNormedRows(const AddNormedRowsParams& p) {
  WALSH_RETURN_IF_ERROR(CheckRowCount("AddNormedRows", p.n_rows));
  if (p.dim <= 0 || p.dim % kAtOnce != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("AddNormedRows: dim ", p.dim, ", must be a positive multiple of ", kAtOnce));
  }
  if (!IsAligned(p.x) || !IsAligned(p.weight) || !IsAligned(p.hidden)) {
    return absl::InvalidArgumentError(
        "AddNormedRows: x, weight and hidden must begin at multiples of 16 bytes");
  }
  if (p.n_rows == 0) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(PrepareOnce<AddNormedRowsKernel>());
  return LaunchKernel("AddNormedRows", AddNormedRowsKernel,
                      {.grid = dim3(static_cast<unsigned>(p.n_rows)),
                       .threads = kThreads,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      p);
}

absl::Status ArgMax(const ArgMaxParams& p) {
  WALSH_RETURN_IF_ERROR(CheckRowCount("ArgMax", p.n_rows));
  const int64_t stride = p.stride == 0 ? p.vocab : p.stride;
  if (p.vocab <= 0 || p.vocab > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(absl::StrCat("ArgMax: a vocabulary of ", p.vocab));
  }
  if (stride < p.vocab || (stride % kAtOnce != 0 && p.n_rows > 1) || !IsAligned(p.logits)) {
    return absl::InvalidArgumentError(absl::StrCat("ArgMax: rows of ", p.vocab, " logits, ", stride,
                                                   " apart, must begin at multiples of 16 bytes"));
  }
  if (p.n_rows == 0) return absl::OkStatus();
  return LaunchKernel("ArgMax", ArgMaxKernel,
                      {.grid = dim3(static_cast<unsigned>((p.vocab + kSlice - 1) / kSlice),
                                    static_cast<unsigned>(p.n_rows)),
                       .threads = kThreads,
                       .overlap_previous = p.overlap_previous,
                       .stream = p.stream},
                      p, stride);
}

}  // namespace walsh::kernels::cuda
