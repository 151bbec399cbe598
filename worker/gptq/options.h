// What the quantizer of one linear is asked to do.
//
// Errors:  INVALID_ARGUMENT  names the option, what is allowed and the value
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace walsh::gptq {

enum class Method { kRtn, kGptq, kGptaq };
enum class ColumnOrder {
  kNatural,
  kGroupAware,  // groups by their largest, columns inside a group by their own diag(H)
  // All columns by diag(H). Groups are those of the natural order, and their grids are chosen
  // before the first step ("static groups"), so that the stored layout is that of the other orders.
  kActOrder,
};

// The values that codes stand for.
enum class Grid {
  kUniform,   // scale · (code − zero)
  kCodebook,  // a table for each group, of four levels; 2 bits only
};
enum class ZeroPoint {
  kInteger,  // a code: 0 is expressed exactly, and a group's range always holds it
  kFloat,    // any half-precision number
};

struct Options {
  Method method = Method::kGptq;
  int bits = 4;  // 2, 3, 4 or 8
  // Divides the input width; the width itself: one group per output channel.
  int64_t group_size = 128;
  bool symmetric = false;
  Grid grid = Grid::kUniform;
  ZeroPoint zero_point = ZeroPoint::kInteger;  // of a uniform grid that is not symmetric
  ColumnOrder column_order = ColumnOrder::kGroupAware;
  double damp = 0.01;    // share of the mean diagonal of H
  bool mse_clip = true;  // norm 2.4, 80 of 100 steps
  // β of worker/gptq/error_propagation.h, GPTQ only; 0: off.
  double error_propagation = 0.5;
  double gptaq_alpha = 0.25;  // α of worker/gptq/asymmetric_calibration.h, GPTAQ only
};

// Whether all grids are chosen before the first column is quantized.
inline bool HasStaticGroups(const Options& options) {
  return options.column_order == ColumnOrder::kActOrder;
}
// Whether linears get an error-propagated target.
inline bool PropagatesError(const Options& options) {
  return options.method == Method::kGptq && options.error_propagation > 0;
}
// Whether the columns' updates make up for the inputs' error. The two are alternatives.
inline bool CorrectsAsymmetry(const Options& options) {
  return options.method == Method::kGptaq && options.gptaq_alpha > 0;
}
// What both of them need: the inputs that the original model gives.
inline bool NeedsOriginalInputs(const Options& options) {
  return PropagatesError(options) || CorrectsAsymmetry(options);
}

// Bits that a linear takes on disk: codes and grids.
int64_t StoredBits(const Options& options, int64_t in, int64_t out);

// That the options are in range, fit together, and the group divides `in` columns.
absl::Status ValidateOptions(const Options& options, int64_t in);

}  // namespace walsh::gptq
