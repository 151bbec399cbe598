#include "worker/gptq/asymmetric_calibration.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::gptq {

absl::Status AddAsymmetricCalibration(const Matrix& cross, double alpha,
                                      const kernels::Stream& stream, HessianFactor& factor) {
  const int64_t in = factor.upper.rows();
  if (in == 0) return absl::OkStatus();
  if (cross.rows() != in || cross.cols() != in) {
    return absl::InvalidArgumentError(absl::StrCat("input differences are ", cross.rows(), " x ",
                                                   cross.cols(), " for a factor of width ", in));
  }
  const auto column = [&](int64_t i) { return factor.order[static_cast<size_t>(i)]; };
  // D in the factor's order.
  Matrix a(in, in), b(in, in);
  for (int64_t j = 0; j < in; ++j) {
    const float* row = cross.row(column(j));
    for (int64_t i = 0; i < in; ++i) a(i, j) = row[column(i)];
  }
  WALSH_RETURN_IF_ERROR(kernels::Matmul({.n_tokens = in,
                                         .in = in,
                                         .out = in,
                                         .x = a.data(),
                                         .x_stride = in,
                                         .weights = factor.upper.data(),
                                         .y = b.data(),
                                         .y_stride = in},
                                        stream));
  // The product below is subtracted.
  for (int64_t i = 0; i < in; ++i) {
    float* row = b.row(i);
    std::fill_n(row, i + 1, 0.0f);
    for (int64_t j = i + 1; j < in; ++j) row[j] *= static_cast<float>(-alpha);
  }
  std::fill_n(a.data(), a.size(), 0.0f);
  WALSH_RETURN_IF_ERROR(kernels::SubtractProduct({.m = in,
                                                  .n = in,
                                                  .k = in,
                                                  .a = b.data(),
                                                  .a_stride = in,
                                                  .b = factor.upper.data(),
                                                  .b_stride = in,
                                                  .c = a.data(),
                                                  .c_stride = in},
                                                 stream));
  factor.correction = std::move(a);
  return absl::OkStatus();
}

}  // namespace walsh::gptq
