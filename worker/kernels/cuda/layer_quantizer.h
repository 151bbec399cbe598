// One decoder layer after another through calibration and GPTQ, on one device.
//
// True-sequential in one forward: each linear's inputs are taken over all calibration windows, the
// linear is quantized, and its quantized output feeds the next, so that every linear runs once. q,
// k and v share one input, Hessian and call, and so do gate and up. Only one layer's weights are on
// the device; what stays between layers is the residual stream.
//
// Source:  GPTQ (arXiv 2210.17323); QuaRot (arXiv 2404.00456) for the order of sublayers.
// Shapes:  n_tokens = n_windows · window; residual stream [n_tokens, hidden] fp32
// Errors:  RESOURCE_EXHAUSTED (bytes needed and free), DATA_LOSS for non-finite activations; a
// Hessian
//          that no damping makes positive definite falls back to round-to-nearest and says so
// Memory:  MemoryNeeded
// Threads: used by one thread
#pragma once

#include <cuda_bf16.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"

namespace walsh::kernels::cuda {

struct LayerShape {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  float rms_norm_eps = 1e-5f;
  int64_t q_width() const { return n_heads * head_dim; }
  int64_t kv_width() const { return n_kv_heads * head_dim; }
};

struct LayerQuantizerOptions {
  int bits = 4;
  int64_t group_size = 128;  // −1: one group per output channel
  bool symmetric = false;
  bool mse_clip = true;
  bool gptq = true;  // false: round to nearest
  // Shares of the mean diagonal of the Hessian, tried in order.
  std::vector<double> damping_ladder = {0.01, 0.1};
  // Processing order of the columns from the Hessian's diagonal; null: natural order.
  std::function<std::vector<int32_t>(std::span<const float> diagonal, int64_t group_size)>
      column_order;
  int64_t n_windows = 0;
  int64_t window = 0;
  // Windows that go through the layer at once; bounds the scratch.
  int64_t windows_at_once = 16;
};

// The linears that share an input, in the order of quantization.
enum class LinearSet { kQkv, kO, kGateUp, kDown };
inline constexpr int kLinearSets = 4;

// Rotated, norms folded in, fp32; row-major [out, in].
struct LayerWeights {
  const float* qkv = nullptr;      // [q_width + 2 · kv_width, hidden]
  const float* o = nullptr;        // [hidden, q_width]
  const float* gate_up = nullptr;  // [2 · intermediate, hidden]
  const float* down = nullptr;     // [hidden, intermediate]
};

// A set's integers on the device, with its report.
struct QuantizedSet {
  LinearSet set = LinearSet::kQkv;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 0;
  DeviceBuffer<uint8_t> codes;  // [rows, cols]
  DeviceBuffer<float> scales;   // [rows, groups]
  DeviceBuffer<uint8_t> zeros;  // [rows, groups]
  // Per row, on the host: tr-forms over the calibration inputs, so that the caller can sum them by
  // linear.
  std::vector<double> row_error;   // Δw H Δwᵀ
  std::vector<double> row_output;  // w H wᵀ
  double damp = 0;
  int64_t dead_columns = 0;
  std::string fallback;
};

// Device milliseconds of the last layer by kind of work.
struct LayerTimes {
  double forward_ms = 0;
  double attention_ms = 0;
  double hessian_ms = 0;
  double factor_ms = 0;   // order, Cholesky, triangular inverse
  double columns_ms = 0;  // GPTQ's loop with the clip search and trailing updates
  double report_ms = 0;   // error forms
  double other_ms = 0;
};

class LayerQuantizer {
 public:
  static absl::StatusOr<std::unique_ptr<LayerQuantizer>> Create(
      Context* context, const LayerShape& shape, const LayerQuantizerOptions& options,
      std::span<const float> rope_inverse_frequencies);
  virtual ~LayerQuantizer() = default;

  // The residual stream, [n_tokens, hidden]; the caller fills it with embeddings.
  virtual float* hidden() = 0;
  // Quantizes the next layer and moves the residual stream behind it. `emit` is called once a set,
  // as soon as its integers are there.
  virtual absl::Status QuantizeLayer(const LayerWeights& weights,
                                     const std::function<absl::Status(QuantizedSet)>& emit) = 0;
  virtual const LayerTimes& times() const = 0;

  // Upper bound of the device bytes for this shape: residual stream, kept activations, Hessian and
  // factor, one layer's weights.
  static int64_t MemoryNeeded(const LayerShape& shape, const LayerQuantizerOptions& options);
};

}  // namespace walsh::kernels::cuda
