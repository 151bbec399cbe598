#include "worker/gptq/error_propagation.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::gptq {

absl::Status PropagateError(const Matrix& cross, const HessianFactor& factor, double beta,
                            const kernels::Stream& stream, Matrix& weights,
                            const KeepGoing& keep_going) {
  const int64_t out = weights.rows(), in = weights.cols();
  if (factor.upper.rows() == 0) return absl::OkStatus();
  if (cross.rows() != in || cross.cols() != in || factor.upper.rows() != in) {
    return absl::InvalidArgumentError(absl::StrCat("input differences of width ", cross.rows(),
                                                   " and a factor of width ", factor.upper.rows(),
                                                   " for a linear with ", in, " inputs"));
  }
  const auto column = [&](int64_t i) { return factor.order[static_cast<size_t>(i)]; };
  const int64_t panel = std::min(out, kProductRows);
  Matrix a(panel, in), b(panel, in);
  for (int64_t first = 0; first < out; first += kProductRows) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    const int64_t n_rows = std::min(kProductRows, out - first);
    // a = W D, its columns then in the factor's order.
    WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = n_rows,
                                           .in = in,
                                           .out = in,
                                           .x = weights.row(first),
                                           .x_stride = in,
                                           .weights = cross.data(),
                                           .y = a.data(),
                                           .y_stride = in},
                                          stream));
    for (int64_t row = 0; row < n_rows; ++row) {
      for (int64_t i = 0; i < in; ++i) b(row, i) = a(row, column(i));
    }
    // (H + λI)⁻¹ = Uᵀ U.
    WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = n_rows,
                                           .in = in,
                                           .out = in,
                                           .x = b.data(),
                                           .x_stride = in,
                                           .weights = factor.upper.data(),
                                           .y = a.data(),
                                           .y_stride = in},
                                          stream));
    std::fill_n(b.data(), b.size(), 0.0f);
    // A column of U is 0 below its diagonal.
    for (int64_t col = 0; col < in; col += kProductRows) {
      const int64_t n_cols = std::min(kProductRows, in - col);
      WALSH_RETURN_IF_ERROR(kernels::SubtractProduct({.m = n_rows,
                                                      .n = n_cols,
                                                      .k = col + n_cols,
                                                      .a = a.data(),
                                                      .a_stride = in,
                                                      .b = factor.upper.data() + col,
                                                      .b_stride = in,
                                                      .c = b.data() + col,
                                                      .c_stride = in},
                                                     stream));
    }
    for (int64_t row = 0; row < n_rows; ++row) {
      for (int64_t i = 0; i < in; ++i) {
        weights(first + row, column(i)) -= static_cast<float>(beta * b(row, i));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace walsh::gptq
