// A linear map y = x Wᵀ + b whose storage the model does not know.
//
// Threads: Apply is safe from several threads on distinct outputs.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "worker/kernels/kernels.h"
#include "worker/tensor/matrix.h"

namespace walsh {

class Linear {
 public:
  virtual ~Linear() = default;
  virtual int64_t in() const = 0;
  virtual int64_t out() const = 0;
  // y[n_tokens, out] = x[n_tokens, in] · Wᵀ + b, both contiguous.
  virtual absl::Status Apply(const float* x, int64_t n_tokens, float* y,
                             const kernels::Stream& stream) const = 0;
  virtual int64_t size_bytes() const = 0;
};

class DenseLinear : public Linear {
 public:
  explicit DenseLinear(Matrix weights, std::vector<float> bias = {})
      : weights_(std::move(weights)), bias_(std::move(bias)) {}
  int64_t in() const override { return weights_.cols(); }
  int64_t out() const override { return weights_.rows(); }
  absl::Status Apply(const float* x, int64_t n_tokens, float* y,
                     const kernels::Stream& stream) const override;
  int64_t size_bytes() const override { return weights_.size() * 4; }
  Matrix& weights() { return weights_; }  // [out, in]
  const Matrix& weights() const { return weights_; }
  std::vector<float>& bias() { return bias_; }  // [out] or empty
  const std::vector<float>& bias() const { return bias_; }

 private:
  Matrix weights_;
  std::vector<float> bias_;
};

class PackedLinear : public Linear {
 public:
  explicit PackedLinear(kernels::PackedMatrix weights, std::vector<float> bias = {})
      : weights_(std::move(weights)), bias_(std::move(bias)) {}
  int64_t in() const override { return weights_.cols(); }
  int64_t out() const override { return weights_.rows(); }
  absl::Status Apply(const float* x, int64_t n_tokens, float* y,
                     const kernels::Stream& stream) const override;
  int64_t size_bytes() const override { return weights_.size_bytes(); }
  const kernels::PackedMatrix& weights() const { return weights_; }
  const std::vector<float>& bias() const { return bias_; }
  kernels::PackedMatmulParams Params(const float* x, int64_t n_tokens, float* y) const;

 private:
  kernels::PackedMatrix weights_;
  std::vector<float> bias_;
};

// Several linears on one input: where all are packed, the input is rounded once and all rows share
// one parallel region. Results are those of Apply.
struct LinearOutput {
  const Linear* linear = nullptr;
  float* y = nullptr;  // [n_tokens, linear->out()]
};
inline constexpr size_t kLinearsTogetherMax = 4;
absl::Status ApplyTogether(std::span<const LinearOutput> linears, const float* x, int64_t n_tokens,
                           const kernels::Stream& stream);

}  // namespace walsh
