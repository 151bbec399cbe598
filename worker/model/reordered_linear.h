// A linear whose columns are not in the order of its inputs: act-order of imported checkpoints.
//
// Gathers each token's inputs, then applies the linear: exact, at the price of one copy of the
// inputs.
//
// Threads: Apply is safe from several threads on distinct outputs.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "worker/model/linear.h"

namespace walsh {

class ReorderedLinear : public Linear {
 public:
  // Column c of `linear` multiplies input order[c]; a permutation of its columns.
  ReorderedLinear(std::unique_ptr<Linear> linear, std::vector<int32_t> order)
      : linear_(std::move(linear)), order_(std::move(order)) {}
  int64_t in() const override { return linear_->in(); }
  int64_t out() const override { return linear_->out(); }
  absl::Status Apply(const float* x, int64_t n_tokens, float* y,
                     const kernels::Stream& stream) const override;
  int64_t size_bytes() const override {
    return linear_->size_bytes() + static_cast<int64_t>(order_.size() * sizeof(int32_t));
  }

 private:
  const std::unique_ptr<Linear> linear_;
  const std::vector<int32_t> order_;
};

}  // namespace walsh
