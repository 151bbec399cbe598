#include "worker/gptq/error_propagation.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::gptq {

absl::Status PropagateError(const Matrix& cross, const HessianFactor& factor, double beta,
                            const kernels::Stream& stream, Matrix& weights) {
  const int64_t out = weights.rows(), in = weights.cols();
  if (factor.upper.rows() == 0) return absl::OkStatus();
  if (cross.rows() != in || cross.cols() != in || factor.upper.rows() != in) {
    return absl::InvalidArgumentError(absl::StrCat("input differences of width ", cross.rows(),
                                                   " and a factor of width ", factor.upper.rows(),
                                                   " for a linear with ", in, " inputs"));
  }
  // a = W D, its columns then in the factor's order.
  Matrix a(out, in), b(out, in);
  WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = out,
                                         .in = in,
                                         .out = in,
                                         .x = weights.data(),
                                         .x_stride = in,
                                         .weights = cross.data(),
                                         .y = a.data(),
                                         .y_stride = in},
                                        stream));
  const auto column = [&](int64_t i) { return factor.order[static_cast<size_t>(i)]; };
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t i = 0; i < in; ++i) b(row, i) = a(row, column(i));
  }
  // (H + λI)⁻¹ = Uᵀ U.
  WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = out,
                                         .in = in,
                                         .out = in,
                                         .x = b.data(),
                                         .x_stride = in,
                                         .weights = factor.upper.data(),
                                         .y = a.data(),
                                         .y_stride = in},
                                        stream));
  std::fill_n(b.data(), b.size(), 0.0f);
  WALSH_RETURN_IF_ERROR(kernels::SubtractProduct({.m = out,
                                                  .n = in,
                                                  .k = in,
                                                  .a = a.data(),
                                                  .a_stride = in,
                                                  .b = factor.upper.data(),
                                                  .b_stride = in,
                                                  .c = b.data(),
                                                  .c_stride = in},
                                                 stream));
  for (int64_t row = 0; row < out; ++row) {
    for (int64_t i = 0; i < in; ++i) {
      weights(row, column(i)) -= static_cast<float>(beta * b(row, i));
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::gptq
