// What the quantizer of one linear is asked to do.
//
// Errors:  INVALID_ARGUMENT  names the option, what is allowed and the value
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::gptq {

enum class Method { kRtn, kGptq };
enum class ColumnOrder { kNatural, kGroupAware };

struct Options {
  Method method = Method::kGptq;
  int bits = 4;  // 2, 3, 4 or 8
  // Divides the input width; the width itself: one group per output channel.
  int64_t group_size = 128;
  bool symmetric = false;
  ColumnOrder column_order = ColumnOrder::kGroupAware;
  double damp = 0.01;    // share of the mean diagonal of H
  bool mse_clip = true;  // norm 2.4, 80 of 100 steps
  // β of worker/gptq/error_propagation.h, GPTQ only; 0: off.
  double error_propagation = 0.5;
};

// Whether linears get an error-propagated target, which needs the original model's inputs.
inline bool PropagatesError(const Options& options) {
  return options.method == Method::kGptq && options.error_propagation > 0;
}

// That the options are in range and the group divides `in` columns.
absl::Status ValidateOptions(const Options& options, int64_t in);

}  // namespace walsh::gptq
