// Products of floats: OpenBLAS over fixed tiles; a few tokens by dot products.
//
// Bound: arithmetic from some dozens of tokens on; below, the bytes of the weights.
#include <cmath>

// clang-format off
// This order matters.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/kernels/cpu/matmul.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// clang-format on

#include "common/status_macros.h"
#include "worker/kernels/cpu/blas.h"
#include "worker/kernels/cpu/tiles.h"
#include "worker/kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace walsh::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

float Dot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t n) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum0 = hn::Zero(d);
  auto sum1 = hn::Zero(d);
  auto sum2 = hn::Zero(d);
  auto sum3 = hn::Zero(d);
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    sum0 = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum0);
    sum1 = hn::MulAdd(hn::LoadU(d, a + i + lanes), hn::LoadU(d, b + i + lanes), sum1);
    sum2 = hn::MulAdd(hn::LoadU(d, a + i + 2 * lanes), hn::LoadU(d, b + i + 2 * lanes), sum2);
    sum3 = hn::MulAdd(hn::LoadU(d, a + i + 3 * lanes), hn::LoadU(d, b + i + 3 * lanes), sum3);
  }
  for (; i + lanes <= n; i += lanes) {
    sum0 = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum0);
  }
  const auto sums = hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
  float sum = hn::GetLane(hn::SumOfLanes(d, sums));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Outputs [first, end) of every token. The weights' row stays in the cache from token to token.
void DotRows(const MatmulParams& p, int64_t first, int64_t end) {
  for (int64_t o = first; o < end; ++o) {
    for (int64_t t = 0; t < p.n_tokens; ++t) {
      float& y = p.y[t * p.y_stride + o];
      const float dot = Dot(p.x + t * p.x_stride, p.weights + o * p.in, p.in);
      const float sum = p.bias == nullptr ? dot : dot + p.bias[o];
      y = p.accumulate ? y + sum : sum;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace walsh::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::kernels::cpu {
namespace {

HWY_EXPORT(DotRows);

// Up to here sgemm would spend more on packing the weights than on multiplying.
constexpr int64_t kDotTokensMax = 4;
// Small enough that two threads share a layer's narrowest linear evenly, large enough that packing
// is a few percent.
constexpr int64_t kTileTokens = 256;
constexpr int64_t kTileOut = 192;

}  // namespace

absl::Status Matmul(const MatmulParams& p, const Stream& stream) {
  if (p.n_tokens <= kDotTokensMax) {
    ForEachRowRange(stream, p.out, p.in, [&](int64_t first, int64_t end) {
      HWY_DYNAMIC_DISPATCH(DotRows)(p, first, end);
    });
    return absl::OkStatus();
  }
  WALSH_ASSIGN_OR_RETURN(const Blas* blas, OpenBlas());
  const int64_t n_token_tiles = CeilDiv(p.n_tokens, kTileTokens);
  ForEachTile(stream, n_token_tiles * CeilDiv(p.out, kTileOut), [&](int64_t tile) {
    const int64_t t0 = tile % n_token_tiles * kTileTokens;
    const int64_t o0 = tile / n_token_tiles * kTileOut;
    const int64_t n_tokens = std::min(kTileTokens, p.n_tokens - t0);
    const int64_t n_out = std::min(kTileOut, p.out - o0);
    float* y = p.y + t0 * p.y_stride + o0;
    blas->sgemm(kRowMajor, kNoTrans, kTrans, static_cast<int>(n_tokens), static_cast<int>(n_out),
                static_cast<int>(p.in), 1.0f, p.x + t0 * p.x_stride, static_cast<int>(p.x_stride),
                p.weights + o0 * p.in, static_cast<int>(std::max<int64_t>(1, p.in)),
                p.accumulate ? 1.0f : 0.0f, y, static_cast<int>(p.y_stride));
    if (p.bias == nullptr) return;
    for (int64_t t = 0; t < n_tokens; ++t) {
      for (int64_t o = 0; o < n_out; ++o) y[t * p.y_stride + o] += p.bias[o0 + o];
    }
  });
  return absl::OkStatus();
}

}  // namespace walsh::kernels::cpu
#endif  // HWY_ONCE
