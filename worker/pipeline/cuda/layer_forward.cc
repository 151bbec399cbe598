#include "worker/pipeline/cuda/layer_forward.h"

#include <algorithm>
#include <utility>

#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"

namespace walsh::pipeline::cuda {
namespace {

namespace ops = kernels::cuda;

// y[n, out] = x[n, in] · Wᵀ, in the precision of the activations.
absl::Status Product(Context& context, int64_t n, int64_t in, int64_t out, const bf16* x,
                     const bf16* weights, bf16* y) {
  return ops::Gemm(context,
                   ops::GemmParams<bf16>{
                       .n_tokens = n, .in = in, .out = out, .x = x, .weights = weights, .y = y});
}
absl::Status Product(Context& context, int64_t n, int64_t in, int64_t out, const float* x,
                     const float* weights, float* y) {
  return ops::GemmFp32(context,
                       {.n_tokens = n, .in = in, .out = out, .x = x, .weights = weights, .y = y});
}

// y += x · Wᵀ, in float.
absl::Status AddProduct(Context& context, int64_t n, int64_t in, int64_t out, const bf16* x,
                        const bf16* weights, float* y) {
  return ops::Gemm(context, ops::GemmParams<float>{.n_tokens = n,
                                                   .in = in,
                                                   .out = out,
                                                   .x = x,
                                                   .weights = weights,
                                                   .y = y,
                                                   .accumulate = true});
}
absl::Status AddProduct(Context& context, int64_t n, int64_t in, int64_t out, const float* x,
                        const float* weights, float* y) {
  return ops::GemmFp32(context, {.n_tokens = n,
                                 .in = in,
                                 .out = out,
                                 .x = x,
                                 .weights = weights,
                                 .y = y,
                                 .accumulate = true});
}

template <typename T>
absl::Status AddBiasIfAny(Context& context, int64_t n, int64_t dim, const float* bias, T* x) {
  return bias == nullptr ? absl::OkStatus() : ops::AddBias<T>(context, n, dim, bias, x);
}

// One of the linears that lie behind each other from `row` on: y = x · Wᵀ + b.
template <typename T>
absl::Status ReadPart(Context& context, int64_t n, int64_t in, const T* weights, const float* bias,
                      int64_t row, int64_t width, const T* x, T* y) {
  WALSH_RETURN_IF_ERROR(Product(context, n, in, width, x, weights + row * in, y));
  return AddBiasIfAny(context, n, width, bias == nullptr ? nullptr : bias + row, y);
}

int64_t WideWidth(const LayerShape& s) { return std::max(s.intermediate, s.q_width()); }
int64_t NarrowWidth(const LayerShape& s) { return std::max(s.intermediate, 2 * s.kv_width()); }

}  // namespace

LayerShape LayerShape::Of(const ModelConfig& config) {
  return {.hidden = config.hidden,
          .intermediate = config.intermediate,
          .n_heads = config.n_heads,
          .n_kv_heads = config.n_kv_heads,
          .head_dim = config.head_dim,
          .rms_norm_eps = static_cast<float>(config.rms_norm_eps)};
}

template <typename T>
absl::StatusOr<LayerForward<T>> LayerForward<T>::Create(Context* context, const LayerShape& shape,
                                                        std::span<const float> frequencies,
                                                        int64_t window, int64_t max_tokens) {
  const cudaStream_t stream = context->stream();
  LayerForward forward;
  forward.context_ = context;
  forward.shape_ = shape;
  forward.window_ = window;
  forward.max_tokens_ = max_tokens;
  WALSH_ASSIGN_OR_RETURN(
      forward.frequencies_,
      DeviceBuffer<float>::Allocate(static_cast<int64_t>(frequencies.size()), stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(forward.frequencies_.data(), frequencies.data(),
                                             frequencies.size_bytes(), cudaMemcpyHostToDevice,
                                             stream));
  WALSH_ASSIGN_OR_RETURN(forward.normed_,
                         DeviceBuffer<T>::Allocate(max_tokens * shape.hidden, stream));
  WALSH_ASSIGN_OR_RETURN(forward.wide_,
                         DeviceBuffer<T>::Allocate(max_tokens * WideWidth(shape), stream));
  WALSH_ASSIGN_OR_RETURN(forward.narrow_,
                         DeviceBuffer<T>::Allocate(max_tokens * NarrowWidth(shape), stream));
  // The caller's frequencies may go before an asynchronous copy has read them.
  WALSH_RETURN_IF_ERROR(context->Synchronize());
  return forward;
}

template <typename T>
int64_t LayerForward<T>::ScratchBytes(const LayerShape& shape, int64_t max_tokens) {
  return max_tokens * static_cast<int64_t>(sizeof(T)) *
         (shape.hidden + 2 * WideWidth(shape) + NarrowWidth(shape));
}

template <typename T>
absl::StatusOr<const T*> LayerForward<T>::Norm(const float* weight, const float* hidden,
                                               int64_t n_tokens) {
  WALSH_RETURN_IF_ERROR(ops::RmsNorm<T>(*context_, n_tokens, shape_.hidden, hidden, weight,
                                        shape_.rms_norm_eps, normed_.data()));
  return static_cast<const T*>(normed_.data());
}

template <typename T>
absl::StatusOr<const T*> LayerForward<T>::AttentionInput(const LayerTensors<T>& layer,
                                                         const float* hidden, int64_t n_tokens) {
  return Norm(layer.input_norm, hidden, n_tokens);
}

template <typename T>
absl::Status LayerForward<T>::Project(const LayerTensors<T>& layer, const float* hidden,
                                      int64_t n_tokens) {
  WALSH_ASSIGN_OR_RETURN(const T* normed, AttentionInput(layer, hidden, n_tokens));
  const int64_t q_width = shape_.q_width();
  const int64_t kv_width = shape_.kv_width();
  const struct {
    int64_t width;
    T* y;
    int64_t n_heads;  // 0: not rotated by position
  } parts[] = {{q_width, wide_.data(), shape_.n_heads},
               {kv_width, narrow_.data(), shape_.n_kv_heads},
               {kv_width, narrow_.data() + n_tokens * kv_width, 0}};
  int64_t row = 0;
  for (const auto& part : parts) {
    WALSH_RETURN_IF_ERROR(ReadPart(*context_, n_tokens, shape_.hidden, layer.qkv, layer.qkv_bias,
                                   row, part.width, normed, part.y));
    if (part.n_heads > 0) {
      WALSH_RETURN_IF_ERROR(ops::Rope<T>(*context_, n_tokens, part.n_heads, shape_.head_dim,
                                         window_, frequencies_.data(), part.y));
    }
    row += part.width;
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status LayerForward<T>::Attend(int64_t n_tokens, T* attended) {
  return ops::WindowAttention(
      *context_, ops::WindowAttentionParams<T>{.n_windows = n_tokens / window_,
                                               .window = window_,
                                               .n_heads = shape_.n_heads,
                                               .n_kv_heads = shape_.n_kv_heads,
                                               .head_dim = shape_.head_dim,
                                               .q = wide_.data(),
                                               .k = narrow_.data(),
                                               .v = narrow_.data() + n_tokens * shape_.kv_width(),
                                               .y = attended});
}

template <typename T>
absl::Status LayerForward<T>::AttentionOutput(const LayerTensors<T>& layer, const T* attended,
                                              int64_t n_tokens, float* hidden) {
  WALSH_RETURN_IF_ERROR(
      AddProduct(*context_, n_tokens, shape_.q_width(), shape_.hidden, attended, layer.o, hidden));
  return AddBiasIfAny(*context_, n_tokens, shape_.hidden, layer.o_bias, hidden);
}

template <typename T>
absl::StatusOr<const T*> LayerForward<T>::MlpInput(const LayerTensors<T>& layer,
                                                   const float* hidden, int64_t n_tokens) {
  return Norm(layer.post_attention_norm, hidden, n_tokens);
}

template <typename T>
absl::Status LayerForward<T>::MlpActivation(const LayerTensors<T>& layer, const float* hidden,
                                            int64_t n_tokens, T* activation) {
  WALSH_ASSIGN_OR_RETURN(const T* normed, MlpInput(layer, hidden, n_tokens));
  const int64_t width = shape_.intermediate;
  int64_t row = 0;
  for (T* y : {wide_.data(), narrow_.data()}) {
    WALSH_RETURN_IF_ERROR(ReadPart(*context_, n_tokens, shape_.hidden, layer.gate_up,
                                   layer.gate_up_bias, row, width, normed, y));
    row += width;
  }
  return ops::SiluMultiply<T>(*context_, n_tokens * width, wide_.data(), narrow_.data(),
                              activation);
}

template <typename T>
absl::Status LayerForward<T>::MlpOutput(const LayerTensors<T>& layer, const T* activation,
                                        int64_t n_tokens, float* hidden) {
  WALSH_RETURN_IF_ERROR(AddProduct(*context_, n_tokens, shape_.intermediate, shape_.hidden,
                                   activation, layer.down, hidden));
  return AddBiasIfAny(*context_, n_tokens, shape_.hidden, layer.down_bias, hidden);
}

template <typename T>
absl::Status LayerForward<T>::Layer(const LayerTensors<T>& layer, int64_t n_tokens, float* hidden) {
  if (activated_.size() == 0) {
    WALSH_ASSIGN_OR_RETURN(
        activated_, DeviceBuffer<T>::Allocate(max_tokens_ * WideWidth(shape_), context_->stream()));
  }
  const int64_t batch = max_tokens_ / window_ * window_;
  for (int64_t first = 0; first < n_tokens; first += batch) {
    const int64_t n = std::min(batch, n_tokens - first);
    float* rows = hidden + first * shape_.hidden;
    T* activated = activated_.data();
    WALSH_RETURN_IF_ERROR(Project(layer, rows, n));
    WALSH_RETURN_IF_ERROR(Attend(n, activated));
    WALSH_RETURN_IF_ERROR(AttentionOutput(layer, activated, n, rows));
    WALSH_RETURN_IF_ERROR(MlpActivation(layer, rows, n, activated));
    WALSH_RETURN_IF_ERROR(MlpOutput(layer, activated, n, rows));
  }
  return absl::OkStatus();
}

template class LayerForward<bf16>;
template class LayerForward<float>;

}  // namespace walsh::pipeline::cuda
