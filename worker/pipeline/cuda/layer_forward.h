// One decoder layer on the device, as the steps between which calibration looks in.
//
// The steps are those of worker/model/decoder_layer.h. Activations are T: bf16 in calibration and
// evaluation, float in the rotation's gate; the residual stream is float in both. Windows of equal
// length follow one another and do not see each other.
//
// Shapes:  hidden [n_tokens, hidden]; n_tokens = n_windows · window
// Errors:  RESOURCE_EXHAUSTED; INVALID_ARGUMENT for a head width that attention does not take
// Memory:  ScratchBytes
// Threads: used by one thread; asynchronous on the context's stream
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/io/model_config.h"
#include "worker/kernels/cuda/context.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/forward.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::bf16;
using kernels::cuda::Context;
using kernels::cuda::DeviceBuffer;

// Tokens that go through a layer at once, in whole windows: enough to fill a device, and scratch of
// a few GB for a 7B model.
inline constexpr int64_t kForwardTokens = 32768;

struct LayerShape {
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t n_heads = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  float rms_norm_eps = 1e-5f;
  int64_t q_width() const { return n_heads * head_dim; }
  int64_t kv_width() const { return n_kv_heads * head_dim; }
  int64_t qkv_rows() const { return q_width() + 2 * kv_width(); }
  static LayerShape Of(const ModelConfig& config);
};

// The weights of one layer on the device, row-major [out, in]; those of linears with one input lie
// behind each other. Biases and norms may be null: none, and ones.
template <typename T>
struct LayerTensors {
  const float* input_norm = nullptr;           // [hidden]
  const float* post_attention_norm = nullptr;  // [hidden]
  const T* qkv = nullptr;                      // [q_width + 2 · kv_width, hidden]
  const T* o = nullptr;                        // [hidden, q_width]
  const T* gate_up = nullptr;                  // [2 · intermediate, hidden]
  const T* down = nullptr;                     // [hidden, intermediate]
  const float* qkv_bias = nullptr;
  const float* o_bias = nullptr;
  const float* gate_up_bias = nullptr;
  const float* down_bias = nullptr;
};

// Their owner; empty biases: none, empty norms: ones.
template <typename T>
struct DeviceLayer {
  DeviceBuffer<T> qkv, o, gate_up, down;
  DeviceBuffer<float> qkv_bias, o_bias, gate_up_bias, down_bias;
  DeviceBuffer<float> input_norm, post_attention_norm;

  LayerTensors<T> tensors() const {
    return {.input_norm = input_norm.data(),
            .post_attention_norm = post_attention_norm.data(),
            .qkv = qkv.data(),
            .o = o.data(),
            .gate_up = gate_up.data(),
            .down = down.data(),
            .qkv_bias = qkv_bias.data(),
            .o_bias = o_bias.data(),
            .gate_up_bias = gate_up_bias.data(),
            .down_bias = down_bias.data()};
  }
};

template <typename T>
class LayerForward {
 public:
  // For up to `max_tokens` at once.
  static absl::StatusOr<LayerForward> Create(Context* context, const LayerShape& shape,
                                             std::span<const float> rope_inverse_frequencies,
                                             int64_t window, int64_t max_tokens);

  // The input of q, k and v; valid until the next step.
  absl::StatusOr<const T*> AttentionInput(const LayerTensors<T>& layer, const float* hidden,
                                          int64_t n_tokens);
  // q, k, v of those inputs, rotated by position; they stay inside.
  absl::Status Project(const LayerTensors<T>& layer, const float* hidden, int64_t n_tokens);
  // Attention of what Project left: `attended` [n_tokens, q_width].
  absl::Status Attend(int64_t n_tokens, T* attended);
  // hidden += o(attended)
  absl::Status AttentionOutput(const LayerTensors<T>& layer, const T* attended, int64_t n_tokens,
                               float* hidden);
  // The input of gate and up.
  absl::StatusOr<const T*> MlpInput(const LayerTensors<T>& layer, const float* hidden,
                                    int64_t n_tokens);
  // `activation` [n_tokens, intermediate]
  absl::Status MlpActivation(const LayerTensors<T>& layer, const float* hidden, int64_t n_tokens,
                             T* activation);
  // hidden += down(activation)
  absl::Status MlpOutput(const LayerTensors<T>& layer, const T* activation, int64_t n_tokens,
                         float* hidden);

  // All steps, some windows at a time.
  absl::Status Layer(const LayerTensors<T>& layer, int64_t n_tokens, float* hidden);

  static int64_t ScratchBytes(const LayerShape& shape, int64_t max_tokens);

 private:
  absl::StatusOr<const T*> Norm(const float* weight, const float* hidden, int64_t n_tokens);

  Context* context_ = nullptr;
  LayerShape shape_;
  int64_t window_ = 0;
  int64_t max_tokens_ = 0;
  DeviceBuffer<float> frequencies_;
  DeviceBuffer<T> normed_;     // [max_tokens, hidden]
  DeviceBuffer<T> wide_;       // [max_tokens, max(intermediate, q_width)]: q, gate
  DeviceBuffer<T> narrow_;     // [max_tokens, max(intermediate, 2 · kv_width)]: k and v, up
  DeviceBuffer<T> activated_;  // [max_tokens, max(intermediate, q_width)], made when Layer needs it
};

}  // namespace walsh::pipeline::cuda
