#include "worker/gptq/asymmetric_calibration.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::gptq {

absl::Status AddAsymmetricCalibration(const Matrix& cross, double alpha,
                                      const kernels::Stream& stream, HessianFactor& factor,
                                      const KeepGoing& keep_going) {
  const int64_t in = factor.upper.rows();
  if (in == 0) return absl::OkStatus();
  if (cross.rows() != in || cross.cols() != in) {
    return absl::InvalidArgumentError(absl::StrCat("input differences are ", cross.rows(), " x ",
                                                   cross.cols(), " for a factor of width ", in));
  }
  const auto column = [&](int64_t i) { return factor.order[static_cast<size_t>(i)]; };
  // D in the factor's order, replaced by P from above: a row of P needs that row of D only.
  Matrix p(in, in);
  for (int64_t j = 0; j < in; ++j) {
    const float* row = cross.row(column(j));
    for (int64_t i = 0; i < in; ++i) p(i, j) = row[column(i)];
  }
  Matrix right_part(std::min(in, kProductRows), in);
  for (int64_t first = 0; first < in; first += kProductRows) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    const int64_t n_rows = std::min(kProductRows, in - first);
    // Of these rows triu(D Uᵀ, 1), and so P, begins behind column `first`.
    const int64_t width = in - first;
    WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = n_rows,
                                           .in = in,
                                           .out = width,
                                           .x = p.row(first),
                                           .x_stride = in,
                                           .weights = factor.upper.row(first),
                                           .y = right_part.data(),
                                           .y_stride = in},
                                          stream));
    // The product below is subtracted.
    for (int64_t i = 0; i < n_rows; ++i) {
      float* row = right_part.row(i);
      std::fill_n(row, i + 1, 0.0f);
      for (int64_t j = i + 1; j < width; ++j) row[j] *= static_cast<float>(-alpha);
    }
    std::fill_n(p.row(first), n_rows * in, 0.0f);
    WALSH_RETURN_IF_ERROR(kernels::SubtractProduct({.m = n_rows,
                                                    .n = width,
                                                    .k = width,
                                                    .a = right_part.data(),
                                                    .a_stride = in,
                                                    .b = factor.upper.row(first) + first,
                                                    .b_stride = in,
                                                    .c = p.row(first) + first,
                                                    .c_stride = in},
                                                   stream));
  }
  factor.correction = std::move(p);
  return absl::OkStatus();
}

}  // namespace walsh::gptq
