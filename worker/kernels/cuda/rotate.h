// Rotations of weights on the device, for folding.
//
// x ← x · R for pieces of a matrix's rows, or Rᵀ · X for pieces of its columns, with
// R = diag(scale) · H and H = the rows of H_core ⊗ H_2^k in a given order. Everything is computed
// in double, in the order of worker/rotate/rotation.cc, and rounded once: the same bits as on the
// CPU.
//
// Source:  GSR (arXiv 2505.03810); QuaRot (arXiv 2404.00456) section 4
// Bound:   memory: each element is read and written once
// Errors:  INVALID_ARGUMENT     sizes do not fit; a core that HasCore() does not know
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
  // 1 and the cores whose columns fit a thread's registers: those of the hidden sizes of published
  // models (576 = 36 · 16, 896 = 28 · 32, 1536 = 12 · 128, 2560 = 20 · 128, …).
  static constexpr int64_t kCores[] = {1, 12, 20, 28, 36};
  static constexpr int kCoreMax = 36;
  static bool HasCore(int64_t core);

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
  uint64_t core_signs_[kCoreMax] = {};  // bit j of element i: entry (j, i) of the core is −1
  DeviceBuffer<int32_t> row_order_;     // empty: natural
  DeviceBuffer<double> signs_;          // empty: none
};

}  // namespace walsh::kernels::cuda
