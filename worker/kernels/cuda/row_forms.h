// Quadratic forms of a linear's rows with its Hessian: what the error report is made of.
//
// output[r] = w_r H w_rᵀ and error[r] = Δw_r H Δw_rᵀ with Δw = w − quantized w. The products run in
// TF32 (a relative error near 1e-3 of a figure that is printed with three digits), the sums in
// double.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {

struct RowFormsParams {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 0;
  const float* w = nullptr;  // [rows, cols]
  const float* h = nullptr;  // [cols, cols], symmetric
  const uint8_t* codes = nullptr;
  const float* scales = nullptr;
  const uint8_t* zeros = nullptr;
};
struct RowForms {
  std::vector<double> error;   // [rows]
  std::vector<double> output;  // [rows]
};
// Synchronizes the context's stream.
absl::StatusOr<RowForms> ComputeRowForms(Context& context, const RowFormsParams& params);

}  // namespace walsh::kernels::cuda
