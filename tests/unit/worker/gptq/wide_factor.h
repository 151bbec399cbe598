// Products with matrices that are wider than the rows that are taken at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>

#include "worker/gptq/hessian.h"
#include "worker/tensor/matrix.h"

namespace walsh::gptq::wide {

inline constexpr int64_t kIn = kProductRows + 64, kOut = kProductRows + 44;

inline void Randomize(Matrix& matrix, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (float& value : matrix.span()) value = normal(random);
}

// A factor that is no Hessian's, with its columns in another order.
inline HessianFactor MakeFactor(std::mt19937& random) {
  HessianFactor factor;
  factor.upper = Matrix(kIn, kIn);
  Randomize(factor.upper, random);
  for (int64_t i = 0; i < kIn; ++i) {
    for (int64_t j = 0; j < i; ++j) factor.upper(i, j) = 0;
  }
  factor.order.resize(kIn);
  std::iota(factor.order.begin(), factor.order.end(), 0);
  std::shuffle(factor.order.begin(), factor.order.end(), random);
  return factor;
}

}  // namespace walsh::gptq::wide
