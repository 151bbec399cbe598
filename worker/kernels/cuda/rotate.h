// Rotations of weights on the device, for folding.
//
// x ← x · R for pieces of a matrix's rows, or Rᵀ · X for pieces of its columns, with
// R = diag(scale) · H and H = the rows of H_core ⊗ H_2^k in a given order. Everything is computed
// in double, in the order of worker/rotate/rotation.cc, and rounded once: the same bits as on the
// CPU.
//
// Source:  GSR (arXiv 2505.03810); QuaRot (arXiv 2404.00456) section 4
// Bound:   memory: each element is read and written once
// Errors:  INVALID_ARGUMENT     sizes do not fit; a core other than 1 and 36
//          FAILED_PRECONDITION  a piece does not fit the device's shared memory: width, limit named
// Threads: asynchronous on the context's stream; allocates nothing
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"

namespace walsh::kernels::cuda {

// The tables of one rotation on the device.
class DeviceRotation {
 public:
  // The one core that there is besides 1: see worker/rotate/walsh_matrix.h.
  static constexpr int kCore = 36;
  // Bit j of element i: entry (j, i) of the core is −1.
  struct CoreSigns {
    uint64_t negative[kCore] = {};
  };

  struct Tables {
    int64_t width = 0;  // of a piece; a multiple of block
    int64_t block = 0;  // order of H = core · 2^k
    int64_t core = 1;
    std::span<const int8_t> core_matrix;  // [core, core]; empty when core is 1
    std::span<const int32_t> row_order;   // [block] or empty
    std::span<const double> signs;        // [width] or empty
    double normalizer = 1;
  };
  // Copies the tables; synchronizes the context's stream.
  static absl::StatusOr<DeviceRotation> Create(Context& context, const Tables& tables);

  int64_t width() const { return width_; }

  // Each of the cols / width pieces of each row ← diag(scale), then · R; `scale` [width] on the
  // device (a norm's weights) or null.
  absl::Status RotateRows(Context& context, int64_t rows, int64_t cols, const float* scale,
                          float* x) const;
  // Rᵀ · B for each of the rows / width blocks B of `width` rows.
  absl::Status RotateColumns(Context& context, int64_t rows, int64_t cols, float* x) const;

 private:
  absl::Status Rotate(Context& context, bool columns, int64_t rows, int64_t cols,
                      const float* scale, float* x) const;

  int64_t width_ = 0;
  int64_t block_ = 0;
  int64_t core_ = 1;
  double normalizer_ = 1;
  CoreSigns core_signs_;
  DeviceBuffer<int32_t> row_order_;  // empty: natural
  DeviceBuffer<double> signs_;       // empty: none
};

}  // namespace walsh::kernels::cuda
