#include <cmath>
#include <cstring>
#include <limits>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/round_activations.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#include "worker/kernels/cpu/packed_matmul.h"
#include "worker/kernels/cpu/tiles.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

void RoundBlock(const float* HWY_RESTRICT x, int8_t* HWY_RESTRICT codes, float* scale, float* sum) {
  const hn::CappedTag<float, 16> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  // Magnitudes compared as integers: a value that is not finite is larger than every finite one.
  auto max_bits = hn::Zero(di);
  for (int64_t i = 0; i < kBlockCols; i += lanes) {
    max_bits = hn::Max(max_bits, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
  }
  const float highest = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, max_bits)));
  if (!(highest >= 0x1p-100f && highest <= std::numeric_limits<float>::max())) {
    std::memset(codes, 0, static_cast<size_t>(kBlockCols));
    *scale = highest < 0x1p-100f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    *sum = *scale;
    return;
  }
  const auto inverse = hn::Set(d, 127.0f / highest);
  auto sums = hn::Zero(di);
  for (int64_t i = 0; i < kBlockCols; i += lanes) {
    const auto code = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
    sums = hn::Add(sums, code);
    hn::StoreU(hn::DemoteTo(d8, code), d8, codes + i);
  }
  *scale = highest / 127.0f;
  *sum = *scale * static_cast<float>(hn::GetLane(hn::SumOfLanes(di, sums)));
}

void RoundWholeRow(const float* x, int64_t cols, int8_t* codes, float* scales, float* sums) {
  int64_t block = 0;
  for (; (block + 1) * kBlockCols <= cols; ++block) {
    RoundBlock(x + block * kBlockCols, codes + block * kBlockCols, scales + block, sums + block);
  }
  if (const int64_t rest = cols - block * kBlockCols; rest > 0) {
    float padded[kBlockCols] = {};
    std::memcpy(padded, x + block * kBlockCols, static_cast<size_t>(rest) * sizeof(float));
    RoundBlock(padded, codes + block * kBlockCols, scales + block, sums + block);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {

HWY_EXPORT(RoundWholeRow);

void RoundRow(const float* x, int64_t cols, int8_t* codes, float* scales, float* sums) {
  HWY_DYNAMIC_DISPATCH(RoundWholeRow)(x, cols, codes, scales, sums);
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
