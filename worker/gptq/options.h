// What the quantizer of one linear is asked to do.
#pragma once

#include <cstdint>

namespace walsh::gptq {

enum class Method { kRtn, kGptq };
enum class ColumnOrder { kNatural, kGroupAware };

struct Options {
  Method method = Method::kGptq;
  int bits = 4;  // 2, 3, 4 or 8
  int64_t group_size =
      128;  // divides the input width; the width itself: one group per output channel
  bool symmetric = false;
  ColumnOrder column_order = ColumnOrder::kGroupAware;
  double damp = 0.01;    // share of the mean diagonal of H
  bool mse_clip = true;  // norm 2.4, 80 of 100 steps
};

}  // namespace walsh::gptq
