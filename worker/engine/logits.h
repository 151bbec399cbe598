// Passes over a row of logits, a vocabulary long: with AVX and the like, since they lie between one
// step of the model and the next.
#pragma once

#include <cstdint>
#include <span>

namespace walsh::engine {

// Position of the largest value, the first of equal ones; −1 when there is none above −infinity.
// NaN anywhere gives −1, since a NaN is never a token's score but a fault upstream.
int64_t ArgMax(std::span<const float> values);

inline constexpr int64_t kWeightsBlock = 1024;

struct ExpWeightsParams {
  std::span<const float> logits;  // no NaN, no +infinity
  float max_logit = 0;            // the largest
  double temperature = 1;         // above 0
  float floor = 0;                // logits below it weigh nothing
  float* weights = nullptr;       // [logits.size()] exp((logit − max) / temperature)
  double* sums = nullptr;         // of each kWeightsBlock weights, in double
};
void ExpWeights(const ExpWeightsParams& p);

}  // namespace walsh::engine
