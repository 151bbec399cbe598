#include "worker/model/linear.h"

#include <array>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

const float* BiasOrNull(const std::vector<float>& bias) {
  return bias.empty() ? nullptr : bias.data();
}

}  // namespace

absl::Status DenseLinear::Apply(const float* x, int64_t n_tokens, float* y,
                                const kernels::Stream& stream) const {
  return kernels::Matmul({.n_tokens = n_tokens,
                          .in = in(),
                          .out = out(),
                          .x = x,
                          .x_stride = in(),
                          .weights = weights_.data(),
                          .bias = BiasOrNull(bias_),
                          .y = y,
                          .y_stride = out()},
                         stream);
}

kernels::PackedMatmulParams PackedLinear::Params(const float* x, int64_t n_tokens, float* y) const {
  return {.n_tokens = n_tokens,
          .x = x,
          .x_stride = in(),
          .weights = &weights_,
          .bias = BiasOrNull(bias_),
          .y = y,
          .y_stride = out()};
}

absl::Status PackedLinear::Apply(const float* x, int64_t n_tokens, float* y,
                                 const kernels::Stream& stream) const {
  return kernels::PackedMatmul(Params(x, n_tokens, y), stream);
}

absl::Status ApplyTogether(std::span<const LinearOutput> linears, const float* x, int64_t n_tokens,
                           const kernels::Stream& stream) {
  std::array<kernels::PackedMatmulParams, kLinearsTogetherMax> params;
  WALSH_CHECK_LE(linears.size(), params.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    const auto* packed = dynamic_cast<const PackedLinear*>(linears[i].linear);
    if (packed == nullptr) {
      for (const LinearOutput& each : linears) {
        WALSH_RETURN_IF_ERROR(each.linear->Apply(x, n_tokens, each.y, stream));
      }
      return absl::OkStatus();
    }
    params[i] = packed->Params(x, n_tokens, linears[i].y);
  }
  return kernels::PackedMatmulBatch({params.data(), linears.size()}, stream);
}

}  // namespace walsh
