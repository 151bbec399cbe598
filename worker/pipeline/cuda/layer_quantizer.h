// One decoder layer after another through calibration and GPTQ, on one device.
//
// True-sequential in one forward: each linear's inputs are taken over all calibration windows, the
// linear is quantized, and its quantized output feeds the next, so that every linear runs once. q,
// k and v share one input, Hessian and call, and so do gate and up. Only one layer's weights are on
// the device; what stays between layers is the residual stream.
//
// With error propagation and with GPTAQ the windows run through the original layer as well. Nothing
// of that flow waits for a quantized weight, so that it needs no buffer of sublayer outputs, only a
// residual stream of its own.
//
// Source:  GPTQ (arXiv 2210.17323); QuaRot (arXiv 2404.00456) for the order of sublayers;
//          worker/gptq/error_propagation.h, worker/gptq/asymmetric_calibration.h
// Shapes:  n_tokens = n_windows · window; residual stream [n_tokens, hidden] fp32
// Errors:  RESOURCE_EXHAUSTED (bytes needed and free), DATA_LOSS for non-finite activations; a
//          Hessian that no damping makes positive definite falls back to round-to-nearest and says
//          so
// Memory:  BytesNeeded
// Threads: used by one thread
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/gptq/options.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/pipeline/cuda/stage_clock.h"
#include "worker/pipeline/cuda/weight_loader.h"

namespace walsh::pipeline::cuda {

struct LayerQuantizerOptions {
  gptq::Options gptq;        // but for the group, which follows, and other bits of some linears
  int64_t group_size = 128;  // −1: one group per output channel
  int64_t n_windows = 0;
  int64_t window = 0;
  // Windows that go through the layer at once; bounds the scratch.
  int64_t windows_at_once = 16;
};

// The linears that share an input, in the order of quantization.
enum class LinearSet { kQkv, kO, kGateUp, kDown };
inline constexpr int kLinearSets = 4;

// A set's integers on the device, with its report.
struct QuantizedSet {
  LinearSet set = LinearSet::kQkv;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group_size = 0;
  DeviceBuffer<uint8_t> codes;  // [rows, cols]
  DeviceBuffer<float> scales;   // [rows, groups]
  DeviceBuffer<uint8_t> zeros;  // [rows, groups]
  // Per row, on the host, so that the caller can sum them by linear; with error propagation w is
  // the propagated target.
  std::vector<double> row_error;   // Δw H Δwᵀ
  std::vector<double> row_output;  // w H wᵀ
  double damp = 0;
  int64_t dead_columns = 0;
  std::string fallback;
};

// Device milliseconds by kind of work, of all layers so far.
struct LayerTimes {
  double forward_ms = 0;
  double attention_ms = 0;
  double original_ms = 0;  // both, of the original flow
  double hessian_ms = 0;
  double cross_ms = 0;      // sums of input differences
  double factor_ms = 0;     // order, Cholesky, triangular inverse
  double propagate_ms = 0;  // the error-propagated target
  double correct_ms = 0;    // GPTAQ's correction
  double columns_ms = 0;    // GPTQ's loop with the clip search and trailing updates
  double report_ms = 0;     // error forms
  double other_ms = 0;
};

class LayerQuantizer {
 public:
  // Asked between steps, on the caller's thread: shows what is being done, may stop it.
  enum class Step { kCalibrating, kQuantizing };
  using OnStep = std::function<absl::Status(Step step)>;
  using Emit = std::function<absl::Status(QuantizedSet)>;

  // `progress` as in StageClock.
  static absl::StatusOr<std::unique_ptr<LayerQuantizer>> Create(
      Context* context, const LayerShape& shape, const LayerQuantizerOptions& options,
      std::span<const float> rope_inverse_frequencies, Progress* progress = nullptr);
  virtual ~LayerQuantizer() = default;

  // The residual stream, [n_tokens, hidden]; the caller fills it with embeddings, once, before the
  // first layer.
  virtual float* hidden() = 0;
  // Of a layer's linears in the order of LinearShapes; empty: the options' bits for all.
  using Bits = std::span<const int>;
  // Quantizes the next layer and moves the residual stream behind it (not behind the last one,
  // which nothing reads). `layer` is used up: error propagation moves its weights. `emit` is called
  // once a set, as soon as its integers are there. `name` is the layer's, for messages.
  virtual absl::Status QuantizeLayer(std::string_view name, DeviceLayer<float>& layer, Bits bits,
                                     bool is_last, const OnStep& on_step, const Emit& emit) = 0;
  virtual const LayerTimes& times() const = 0;
  // Runs while `emit` is called, and is finished when QuantizeLayer returns: the caller may enter
  // totals of its own before and in between.
  virtual StageClock& clock() = 0;

  // Upper bound of the device bytes for this shape: residual streams, kept activations, Hessian and
  // factor, what quantizing the largest set takes. A layer's weights are the loader's.
  static int64_t BytesNeeded(const LayerShape& shape, const LayerQuantizerOptions& options);
};

}  // namespace walsh::pipeline::cuda
