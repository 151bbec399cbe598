// How far two results of one computation are apart.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {

struct Difference {
  double largest = 0;      // max |a[i]|
  double difference = 0;   // max |a[i] − b[i]|
  int64_t first_bad = -1;  // least index where a or b is not finite; −1: none
};

// Over n values. The maxima leave out what is not finite.
//
// Bound:   memory
// Errors:  INVALID_ARGUMENT a negative n; RESOURCE_EXHAUSTED
// Threads: waits for the context's stream
absl::StatusOr<Difference> Compare(Context& context, int64_t n, const float* a, const float* b);

}  // namespace walsh::kernels::cuda
