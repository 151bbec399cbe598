// A linear whose inputs are no longer those of the original model.
#pragma once

#include <cstdint>
#include <random>

#include "worker/tensor/matrix.h"

namespace walsh::gptq::drifted {

inline constexpr int64_t kIn = 64, kOut = 24, kTokens = 400;

// A linear, the inputs that it has and those that the original model had.
struct Problem {
  Matrix weights{kOut, kIn};
  Matrix x{kTokens, kIn};
  Matrix x_original{kTokens, kIn};
  Matrix hessian{kIn, kIn};
  Matrix cross{kIn, kIn};
};

inline Problem MakeProblem(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p;
  for (float& w : p.weights.span()) w = 0.1f * normal(random);
  for (int64_t t = 0; t < kTokens; ++t) {
    float shared = 0;
    for (int64_t i = 0; i < kIn; ++i) {
      shared = 0.7f * shared + normal(random);
      p.x_original(t, i) = shared;
      // Quantized layers shrink what they pass on, and add noise.
      p.x(t, i) = 0.9f * shared + 0.3f * normal(random);
    }
  }
  for (int64_t i = 0; i < kIn; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      double h = 0, c = 0;
      for (int64_t t = 0; t < kTokens; ++t) {
        h += double{p.x(t, i)} * p.x(t, j);
        c += double{p.x(t, i)} * (double{p.x_original(t, j)} - p.x(t, j));
      }
      p.hessian(i, j) = static_cast<float>(h);
      p.cross(i, j) = static_cast<float>(c);
    }
  }
  return p;
}

// Σ ‖W x_original − V x‖²
inline double OutputError(const Problem& p, const Matrix& v) {
  double sum = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t o = 0; o < kOut; ++o) {
      double difference = 0;
      for (int64_t i = 0; i < kIn; ++i) {
        difference += double{p.weights(o, i)} * p.x_original(t, i) - double{v(o, i)} * p.x(t, i);
      }
      sum += difference * difference;
    }
  }
  return sum;
}

}  // namespace walsh::gptq::drifted
