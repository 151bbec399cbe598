#include "worker/gptq/tile.h"

// Compiled once per instruction set; the dispatcher picks the best one that the CPU has.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "worker/gptq/tile.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace walsh::gptq::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Lanes are rows, and vectors of more than kTileRows lanes are of no use.
using D = hn::CappedTag<float, kTileRows>;
using V = hn::Vec<D>;

constexpr int kGridSteps = 100;
constexpr int kGridTried = 80;
constexpr float kErrorNorm = 2.4f;
// Float zeros up to this and the codes are finite in half precision.
constexpr float kFloatZeroMax = 32768.0f;

// x^2.4 for x ≥ 0 with a relative error below 1e-6, by exp2(2.4 · log2 x). Results stay inside
// [2^-125, 2^127]: zero counts as the former, which no sum notices.
HWY_INLINE V PowErrorNorm(D d, V x) {
  const hn::RebindToSigned<D> di;
  // x = 2^exponent · m with m in [√½, √2): subtracting √½'s bits carries into the exponent.
  const auto bits = hn::BitCast(di, x);
  const auto sqrt_half = hn::Set(di, 0x3f3504f3);
  const auto exponent = hn::ShiftRight<23>(hn::Sub(bits, sqrt_half));
  const V m = hn::BitCast(d, hn::Sub(bits, hn::ShiftLeft<23>(exponent)));
  const V t = hn::Sub(m, hn::Set(d, 1.0f));
  // log2(1 + t) / t, interpolated at Chebyshev nodes; absolute error 1e-7.
  V log2 = hn::Set(d, -0.14275973435991968f);
  log2 = hn::MulAdd(log2, t, hn::Set(d, 0.23265257882113619f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, -0.2492718220749137f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, 0.2872888823739746f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, -0.36022518246098945f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, 0.48091670800022f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, -0.7213529313629742f));
  log2 = hn::MulAdd(log2, t, hn::Set(d, 1.4426949948930465f));
  log2 = hn::MulAdd(log2, t, hn::ConvertTo(d, exponent));

  const V power = hn::Min(hn::Max(hn::Mul(log2, hn::Set(d, kErrorNorm)), hn::Set(d, -125.0f)),
                          hn::Set(d, 127.0f));
  const V whole = hn::Round(power);
  const V f = hn::Sub(power, whole);
  // exp2(f) on [−½, ½], likewise; relative error 1e-7.
  V exp2 = hn::Set(d, 0.0013390863364671234f);
  exp2 = hn::MulAdd(exp2, f, hn::Set(d, 0.009676031918322054f));
  exp2 = hn::MulAdd(exp2, f, hn::Set(d, 0.05550357114219078f));
  exp2 = hn::MulAdd(exp2, f, hn::Set(d, 0.2402210748530834f));
  exp2 = hn::MulAdd(exp2, f, hn::Set(d, 0.6931471880262288f));
  exp2 = hn::MulAdd(exp2, f, hn::Set(d, 1.0000000754548972f));
  return hn::BitCast(d,
                     hn::Add(hn::BitCast(di, exp2), hn::ShiftLeft<23>(hn::ConvertTo(di, whole))));
}

// Rounds numbers from 0 to half precision's largest to it (nearest, ties to even).
HWY_INLINE V RoundHalf(D d, V scale) {
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, scale);
  const auto odd = hn::And(hn::ShiftRight<13>(bits), hn::Set(du, 1u));
  const auto rounded =
      hn::And(hn::Add(hn::Add(bits, hn::Set(du, 0xfffu)), odd), hn::Set(du, 0xffffe000u));
  // Below 2^-14 half precision is a multiple of 2^-24, which is the unit of the last place at ½.
  const V half = hn::Set(d, 0.5f);
  const V subnormal = hn::Sub(hn::Add(scale, half), half);
  return hn::IfThenElse(hn::Lt(scale, hn::Set(d, 6.103515625e-5f)), subnormal,
                        hn::BitCast(d, rounded));
}

// Rounds to half precision and clamps to its positive finite range.
HWY_INLINE V RoundScale(D d, V scale) {
  return hn::Max(RoundHalf(d, hn::Min(scale, hn::Set(d, kScaleMax))), hn::Set(d, kScaleMin));
}

HWY_INLINE V Clamp(V x, V low, V high) { return hn::Min(hn::Max(x, low), high); }

// A scale and zero are found together, as neither means anything alone: of a range of the weights
// that shrinks towards its middle, rounded to half precision before the codes are computed.
void FindFloatZeroGrid(const GridOptions& options, const float* HWY_RESTRICT weights, int64_t n,
                       TileGrid& grid) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V code_max = hn::Set(d, static_cast<float>((1 << options.bits) - 1));
  const V half = hn::Set(d, 0.5f);
  const V zero_max = hn::Set(d, kFloatZeroMax);
  const int tried = options.mse_clip ? kGridTried : 1;

  for (int64_t row = 0; row < kTileRows; row += lanes) {
    const float* w = weights + row;
    V low = hn::Load(d, w);
    V high = low;
    for (int64_t c = 1; c < n; ++c) {
      const V x = hn::Load(d, w + c * kTileRows);
      low = hn::Min(low, x);
      high = hn::Max(high, x);
    }
    const V middle = hn::MulAdd(half, low, hn::Mul(half, high));
    const V unit = hn::Div(hn::Sub(high, low), code_max);
    // Where the spread is tiny beside the middle: what half precision can tell of the middle, and
    // all that is left of a group of equal weights.
    const V least = hn::Div(hn::Abs(middle), zero_max);

    V best_scale = hn::Zero(d), best_zero = hn::Zero(d), best_error = hn::Zero(d);
    V full_scale_inverse = hn::Zero(d);
    for (int step = 0; step < tried; ++step) {
      const V shrink = hn::Set(d, 1.0f - static_cast<float>(step) / kGridSteps);
      const V scale = RoundScale(d, hn::Max(hn::Mul(unit, shrink), least));
      const V inverse = hn::Div(hn::Set(d, 1.0f), scale);
      const V exact = hn::NegMulAdd(middle, inverse, hn::Mul(half, code_max));
      const V zero =
          hn::CopySign(RoundHalf(d, hn::Min(hn::Abs(exact), hn::Add(zero_max, code_max))), exact);
      if (tried == 1) {
        best_scale = scale;
        best_zero = zero;
        break;
      }
      V error = hn::Zero(d);
      for (int64_t c = 0; c < n; ++c) {
        const V x = hn::MulAdd(hn::Load(d, w + c * kTileRows), inverse, zero);
        const V code = Clamp(hn::Round(x), hn::Zero(d), code_max);
        error = hn::Add(error, PowErrorNorm(d, hn::Abs(hn::Sub(x, code))));
      }
      if (step == 0) {
        best_scale = scale;
        best_zero = zero;
        best_error = error;
        full_scale_inverse = inverse;
        continue;
      }
      error = hn::Mul(error, PowErrorNorm(d, hn::Mul(scale, full_scale_inverse)));
      const auto better = hn::Lt(error, best_error);
      best_scale = hn::IfThenElse(better, scale, best_scale);
      best_zero = hn::IfThenElse(better, zero, best_zero);
      best_error = hn::IfThenElse(better, error, best_error);
    }
    const auto is_zero = hn::And(hn::Eq(low, hn::Zero(d)), hn::Eq(high, hn::Zero(d)));
    best_scale = hn::IfThenElse(is_zero, hn::Set(d, 1.0f), best_scale);
    best_zero = hn::IfThenElse(is_zero, hn::Zero(d), best_zero);
    hn::StoreU(best_scale, d, grid.scales + row);
    hn::StoreU(best_zero, d, grid.zeros + row);
  }
}

void FindGrid(const GridOptions& options, const float* HWY_RESTRICT weights, int64_t n,
              TileGrid& grid) {
  if (options.form == GridForm::kFloatZero) return FindFloatZeroGrid(options, weights, n, grid);
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V code_max = hn::Set(d, static_cast<float>((1 << options.bits) - 1));
  const V middle = hn::Set(d, static_cast<float>(1 << (options.bits - 1)));
  const int tried = options.mse_clip ? kGridTried : 1;

  for (int64_t row = 0; row < kTileRows; row += lanes) {
    const float* w = weights + row;
    V low = hn::Zero(d);
    V high = hn::Zero(d);
    for (int64_t c = 0; c < n; ++c) {
      const V x = hn::Load(d, w + c * kTileRows);
      low = hn::Min(low, x);
      high = hn::Max(high, x);
    }
    if (options.symmetric) {
      high = hn::Max(hn::Neg(low), high);
      low = hn::Neg(high);
    }
    const auto is_zero = hn::Eq(low, high);
    // May overflow for weights near the largest float; RoundScale clamps that, too.
    const V unit = hn::Div(hn::Sub(high, low), code_max);

    V best_scale = hn::Zero(d), best_zero = hn::Zero(d), best_error = hn::Zero(d);
    V full_scale_inverse = hn::Zero(d);
    for (int step = 0; step < tried; ++step) {
      const V shrink = hn::Set(d, 1.0f - static_cast<float>(step) / kGridSteps);
      const V scale = RoundScale(d, hn::Mul(unit, shrink));
      const V inverse = hn::Div(hn::Set(d, 1.0f), scale);
      const V zero = options.symmetric
                         ? middle
                         : Clamp(hn::Round(hn::Neg(hn::Mul(hn::Mul(low, shrink), inverse))),
                                 hn::Zero(d), code_max);
      if (tried == 1) {
        best_scale = scale;
        best_zero = zero;
        break;
      }
      const V code_low = hn::Neg(zero);
      const V code_high = hn::Sub(code_max, zero);
      V error = hn::Zero(d);
      for (int64_t c = 0; c < n; ++c) {
        const V x = hn::Mul(hn::Load(d, w + c * kTileRows), inverse);
        const V code = Clamp(hn::Round(x), code_low, code_high);
        error = hn::Add(error, PowErrorNorm(d, hn::Abs(hn::Sub(x, code))));
      }
      // Errors so far are in units of this step's scale; compare them in units of the first's.
      if (step == 0) {
        best_scale = scale;
        best_zero = zero;
        best_error = error;
        full_scale_inverse = inverse;
        continue;
      }
      error = hn::Mul(error, PowErrorNorm(d, hn::Mul(scale, full_scale_inverse)));
      const auto better = hn::Lt(error, best_error);
      best_scale = hn::IfThenElse(better, scale, best_scale);
      best_zero = hn::IfThenElse(better, zero, best_zero);
      best_error = hn::IfThenElse(better, error, best_error);
    }
    best_scale = hn::IfThenElse(is_zero, hn::Set(d, 1.0f), best_scale);
    hn::StoreU(best_scale, d, grid.scales + row);
    hn::StoreU(best_zero, d, grid.zeros + row);
  }
}

// The code of each row's weight and, in `quantized`, what it stands for.
template <GridForm kForm>
HWY_INLINE V Quantize(D d, const TileGrid& grid, int64_t row, V code_max, V w, V& quantized) {
  if constexpr (kForm == GridForm::kCodebook) {
    // How many of the middles between neighbours the weight is above.
    const V one = hn::Set(d, 1.0f), half = hn::Set(d, 0.5f);
    V level = hn::LoadU(d, grid.levels[0] + row);
    V code = hn::Zero(d);
    quantized = level;
    for (int k = 1; k < kLevels; ++k) {
      const V next = hn::LoadU(d, grid.levels[k] + row);
      const auto above = hn::Gt(w, hn::Mul(half, hn::Add(level, next)));
      code = hn::Add(code, hn::IfThenElseZero(above, one));
      quantized = hn::IfThenElse(above, next, quantized);
      level = next;
    }
    return code;
  } else {
    const V scale = hn::LoadU(d, grid.scales + row);
    const V zero = hn::LoadU(d, grid.zeros + row);
    const V scaled = hn::Div(w, scale);
    const V nearest = kForm == GridForm::kFloatZero ? hn::Round(hn::Add(scaled, zero))
                                                    : hn::Add(hn::Round(scaled), zero);
    const V code = Clamp(nearest, hn::Zero(d), code_max);
    quantized = hn::Mul(scale, hn::Sub(code, zero));
    return code;
  }
}

template <GridForm kForm>
void QuantizeColumnsOf(const QuantizeColumnsParams& p) {
  const D d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const V code_max = hn::Set(d, static_cast<float>((1 << p.bits) - 1));
  float* HWY_RESTRICT weights = p.weights;
  for (int64_t i = p.first; i < p.last; ++i) {
    const float* u_row = p.u == nullptr ? nullptr : p.u + i * p.u_stride;
    for (int64_t row = 0; row < kTileRows; row += lanes) {
      const V w = hn::Load(d, weights + i * kTileRows + row);
      V quantized;
      const V code = Quantize<kForm>(d, *p.grid, row, code_max, w, quantized);
      hn::Store(code, d, p.codes + i * kTileRows + row);
      if (u_row == nullptr) continue;
      const V error = hn::Div(hn::Sub(w, quantized), hn::Set(d, u_row[i]));
      hn::Store(error, d, p.errors + i * kTileRows + row);
      for (int64_t j = i + 1; j < p.n; ++j) {
        float* target = weights + j * kTileRows + row;
        hn::Store(hn::NegMulAdd(error, hn::Set(d, u_row[j]), hn::Load(d, target)), d, target);
      }
      if (p.correction == nullptr) continue;
      const float* correction = p.correction + i * p.u_stride;
      for (int64_t j = i + 1; j < p.n; ++j) {
        float* target = weights + j * kTileRows + row;
        hn::Store(hn::MulAdd(w, hn::Set(d, correction[j]), hn::Load(d, target)), d, target);
      }
    }
  }
}

void QuantizeColumns(const QuantizeColumnsParams& p) {
  switch (p.form) {
    case GridForm::kIntegerZero:
      return QuantizeColumnsOf<GridForm::kIntegerZero>(p);
    case GridForm::kFloatZero:
      return QuantizeColumnsOf<GridForm::kFloatZero>(p);
    case GridForm::kCodebook:
      return QuantizeColumnsOf<GridForm::kCodebook>(p);
  }
}

}  // namespace walsh::gptq::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace walsh::gptq {

HWY_EXPORT(FindGrid);
HWY_EXPORT(QuantizeColumns);

void FindGrid(const GridOptions& options, const float* weights, int64_t n, TileGrid& grid) {
  HWY_DYNAMIC_DISPATCH(FindGrid)(options, weights, n, grid);
}

void QuantizeColumns(const QuantizeColumnsParams& params) {
  HWY_DYNAMIC_DISPATCH(QuantizeColumns)(params);
}

}  // namespace walsh::gptq
#endif
