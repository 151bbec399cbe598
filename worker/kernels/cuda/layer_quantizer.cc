#include "worker/kernels/cuda/layer_quantizer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/row_forms.h"

namespace walsh::kernels::cuda {
namespace {

// Events around a piece of work, read once the layer is done so that nothing waits in between.
class StageClock {
 public:
  explicit StageClock(cudaStream_t stream) : stream_(stream) {}
  ~StageClock() { Clear(); }
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;

  // Work queued from here on counts for `total`.
  absl::Status Enter(double* total) {
    cudaEvent_t event = nullptr;
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventCreate(&event));
    marks_.push_back({event, total});
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventRecord(event, stream_));
    return absl::OkStatus();
  }
  absl::Status Finish() {
    double unused = 0;
    WALSH_RETURN_IF_ERROR(Enter(&unused));
    WALSH_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(marks_.back().event));
    for (size_t i = 0; i + 1 < marks_.size(); ++i) {
      float ms = 0;
      WALSH_CUDA_RETURN_IF_ERROR(cudaEventElapsedTime(&ms, marks_[i].event, marks_[i + 1].event));
      *marks_[i].total += ms;
    }
    Clear();
    return absl::OkStatus();
  }

 private:
  struct Mark {
    cudaEvent_t event;
    double* total;
  };
  void Clear() {
    for (const Mark& mark : marks_) cudaEventDestroy(mark.event);
    marks_.clear();
  }
  cudaStream_t stream_;
  std::vector<Mark> marks_;
};

int64_t SetRows(const LayerShape& s, LinearSet set) {
  switch (set) {
    case LinearSet::kQkv:
      return s.q_width() + 2 * s.kv_width();
    case LinearSet::kGateUp:
      return 2 * s.intermediate;
    case LinearSet::kO:
    case LinearSet::kDown:
      return s.hidden;
  }
  return 0;
}
int64_t SetCols(const LayerShape& s, LinearSet set) {
  switch (set) {
    case LinearSet::kO:
      return s.q_width();
    case LinearSet::kDown:
      return s.intermediate;
    case LinearSet::kQkv:
    case LinearSet::kGateUp:
      return s.hidden;
  }
  return 0;
}

class LayerQuantizerImpl : public LayerQuantizer {
 public:
  LayerQuantizerImpl(Context* context, const LayerShape& shape, LayerQuantizerOptions options)
      : context_(*context),
        shape_(shape),
        options_(std::move(options)),
        clock_(context->stream()) {}

  absl::Status Allocate(std::span<const float> inverse_frequencies) {
    const cudaStream_t stream = context_.stream();
    const int64_t n = n_tokens();
    const int64_t batch = options_.windows_at_once * options_.window;
    const int64_t widest = std::max(shape_.hidden, shape_.intermediate);
    const int64_t widest_input = std::max(widest, shape_.q_width());
    const auto half = static_cast<int64_t>(inverse_frequencies.size());
    WALSH_ASSIGN_OR_RETURN(frequencies_, DeviceBuffer<float>::Allocate(half, stream));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(frequencies_.data(), inverse_frequencies.data(),
                                               inverse_frequencies.size_bytes(),
                                               cudaMemcpyHostToDevice, stream));
    WALSH_ASSIGN_OR_RETURN(hidden_, DeviceBuffer<float>::Allocate(n * shape_.hidden, stream));
    // Attention outputs, later the MLP's activations: never both.
    WALSH_ASSIGN_OR_RETURN(kept_, DeviceBuffer<bf16>::Allocate(
                                      n * std::max(shape_.intermediate, shape_.q_width()), stream));
    WALSH_ASSIGN_OR_RETURN(normed_, DeviceBuffer<bf16>::Allocate(batch * shape_.hidden, stream));
    WALSH_ASSIGN_OR_RETURN(scratch_a_,
                           DeviceBuffer<bf16>::Allocate(
                               batch * std::max(shape_.intermediate, shape_.q_width()), stream));
    WALSH_ASSIGN_OR_RETURN(
        scratch_b_, DeviceBuffer<bf16>::Allocate(
                        batch * std::max(shape_.intermediate, 2 * shape_.kv_width()), stream));
    WALSH_ASSIGN_OR_RETURN(hessian_,
                           DeviceBuffer<float>::Allocate(widest_input * widest_input, stream));
    return context_.Synchronize();
  }

  float* hidden() override { return hidden_.data(); }
  const LayerTimes& times() const override { return times_; }

  absl::Status QuantizeLayer(const LayerWeights& weights,
                             const std::function<absl::Status(QuantizedSet)>& emit) override {
    times_ = {};
    WALSH_RETURN_IF_ERROR(CollectNormed(LinearSet::kQkv));
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kQkv, weights.qkv, emit));
    WALSH_RETURN_IF_ERROR(AttendAll());
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kO, weights.o, emit));
    WALSH_RETURN_IF_ERROR(AddToHidden(LinearSet::kO));
    WALSH_RETURN_IF_ERROR(CollectNormed(LinearSet::kGateUp));
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kGateUp, weights.gate_up, emit));
    WALSH_RETURN_IF_ERROR(ActivateAll());
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kDown, weights.down, emit));
    WALSH_RETURN_IF_ERROR(AddToHidden(LinearSet::kDown));
    return clock_.Finish();
  }

 private:
  int64_t n_tokens() const { return options_.n_windows * options_.window; }

  // fn(first token, tokens, windows) over the batches.
  absl::Status ForEachBatch(const std::function<absl::Status(int64_t, int64_t, int64_t)>& fn) {
    for (int64_t w = 0; w < options_.n_windows; w += options_.windows_at_once) {
      const int64_t n_windows = std::min(options_.windows_at_once, options_.n_windows - w);
      WALSH_RETURN_IF_ERROR(fn(w * options_.window, n_windows * options_.window, n_windows));
    }
    return absl::OkStatus();
  }

  absl::Status ClearHessian(LinearSet set) {
    const int64_t dim = SetCols(shape_, set);
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(
        hessian_.data(), 0, static_cast<size_t>(dim * dim) * sizeof(float), context_.stream()));
    return absl::OkStatus();
  }
  absl::Status AddToHessian(LinearSet set, const bf16* x, int64_t n) {
    if (!options_.gptq) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.hessian_ms));
    return AccumulateGram(
        context_, {.n_tokens = n, .dim = SetCols(shape_, set), .x = x, .h = hessian_.data()});
  }
  absl::Status Norm(int64_t first, int64_t n) {
    return RmsNorm<bf16>(context_, n, shape_.hidden, hidden_.data() + first * shape_.hidden,
                         nullptr, shape_.rms_norm_eps, normed_.data());
  }

  absl::Status CollectNormed(LinearSet set) {
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.other_ms));
    WALSH_RETURN_IF_ERROR(ClearHessian(set));
    return ForEachBatch([&](int64_t first, int64_t n, int64_t) -> absl::Status {
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_RETURN_IF_ERROR(Norm(first, n));
      return AddToHessian(set, normed_.data(), n);
    });
  }

  absl::Status Linear(int64_t n, int64_t in, int64_t out, const bf16* x, const bf16* weights,
                      bf16* y) {
    return Gemm(
        context_,
        GemmParams<bf16>{.n_tokens = n, .in = in, .out = out, .x = x, .weights = weights, .y = y});
  }

  absl::Status AttendAll() {
    WALSH_RETURN_IF_ERROR(ClearHessian(LinearSet::kO));
    const int64_t q_width = shape_.q_width();
    const int64_t kv_width = shape_.kv_width();
    return ForEachBatch([&](int64_t first, int64_t n, int64_t n_windows) -> absl::Status {
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_RETURN_IF_ERROR(Norm(first, n));
      bf16* q = scratch_a_.data();
      bf16* k = scratch_b_.data();
      bf16* v = k + n * kv_width;
      const bf16* w = quantized_.data();
      WALSH_RETURN_IF_ERROR(Linear(n, shape_.hidden, q_width, normed_.data(), w, q));
      w += q_width * shape_.hidden;
      WALSH_RETURN_IF_ERROR(Linear(n, shape_.hidden, kv_width, normed_.data(), w, k));
      w += kv_width * shape_.hidden;
      WALSH_RETURN_IF_ERROR(Linear(n, shape_.hidden, kv_width, normed_.data(), w, v));
      WALSH_RETURN_IF_ERROR(Rope<bf16>(context_, n, shape_.n_heads, shape_.head_dim,
                                       options_.window, frequencies_.data(), q));
      WALSH_RETURN_IF_ERROR(Rope<bf16>(context_, n, shape_.n_kv_heads, shape_.head_dim,
                                       options_.window, frequencies_.data(), k));
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.attention_ms));
      bf16* attended = kept_.data() + first * q_width;
      WALSH_RETURN_IF_ERROR(
          WindowAttention(context_, WindowAttentionParams<bf16>{.n_windows = n_windows,
                                                                .window = options_.window,
                                                                .n_heads = shape_.n_heads,
                                                                .n_kv_heads = shape_.n_kv_heads,
                                                                .head_dim = shape_.head_dim,
                                                                .q = q,
                                                                .k = k,
                                                                .v = v,
                                                                .y = attended}));
      return AddToHessian(LinearSet::kO, attended, n);
    });
  }

  absl::Status ActivateAll() {
    WALSH_RETURN_IF_ERROR(ClearHessian(LinearSet::kDown));
    const int64_t width = shape_.intermediate;
    return ForEachBatch([&](int64_t first, int64_t n, int64_t) -> absl::Status {
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_RETURN_IF_ERROR(Norm(first, n));
      bf16* gate = scratch_a_.data();
      bf16* up = scratch_b_.data();
      const bf16* w = quantized_.data();
      WALSH_RETURN_IF_ERROR(Linear(n, shape_.hidden, width, normed_.data(), w, gate));
      WALSH_RETURN_IF_ERROR(
          Linear(n, shape_.hidden, width, normed_.data(), w + width * shape_.hidden, up));
      bf16* activation = kept_.data() + first * width;
      WALSH_RETURN_IF_ERROR(SiluMultiply<bf16>(context_, n * width, gate, up, activation));
      return AddToHessian(LinearSet::kDown, activation, n);
    });
  }

  absl::Status AddToHidden(LinearSet set) {
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
    return Gemm(context_, GemmParams<float>{.n_tokens = n_tokens(),
                                            .in = SetCols(shape_, set),
                                            .out = shape_.hidden,
                                            .x = kept_.data(),
                                            .weights = quantized_.data(),
                                            .y = hidden_.data(),
                                            .accumulate = true});
  }

  // Reads the Hessian's diagonal, fixes order and damping, factorizes. Leaves `u` empty with a
  // fallback.
  struct Factor {
    DeviceBuffer<float> u;
    DeviceBuffer<int32_t> perm;
    DeviceBuffer<uint8_t> dead;
    double damp = 0;
    double damp_absolute = 0;
    int64_t dead_columns = 0;
    std::string fallback;
  };
  template <typename T>
  absl::StatusOr<DeviceBuffer<T>> Upload(const std::vector<T>& host) {
    WALSH_ASSIGN_OR_RETURN(auto buffer, DeviceBuffer<T>::Allocate(static_cast<int64_t>(host.size()),
                                                                  context_.stream()));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(buffer.data(), host.data(), host.size() * sizeof(T),
                                               cudaMemcpyHostToDevice, context_.stream()));
    // `host` may go before a truly asynchronous copy has read it.
    WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.stream()));
    return buffer;
  }

  absl::StatusOr<Factor> Factorize(LinearSet set, int64_t group_size) {
    const int64_t dim = SetCols(shape_, set);
    const cudaStream_t stream = context_.stream();
    Factor factor;
    std::vector<float> diagonal(static_cast<size_t>(dim), 0.0f);
    if (options_.gptq) {
      WALSH_RETURN_IF_ERROR(MirrorGram(context_, dim, hessian_.data()));
      WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpy2DAsync(diagonal.data(), sizeof(float), hessian_.data(),
                                                   static_cast<size_t>(dim + 1) * sizeof(float),
                                                   sizeof(float), diagonal.size(),
                                                   cudaMemcpyDeviceToHost, stream));
      WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(stream));
    }
    double sum = 0;
    std::vector<uint8_t> dead(diagonal.size(), 0);
    for (size_t i = 0; i < diagonal.size(); ++i) {
      if (!std::isfinite(diagonal[i])) {
        return absl::DataLossError(absl::StrCat("input ", i, " of the linear is not finite"));
      }
      dead[i] = options_.gptq && diagonal[i] == 0.0f ? 1 : 0;
      factor.dead_columns += dead[i];
      sum += diagonal[i];
    }
    std::vector<int32_t> order(diagonal.size());
    std::iota(order.begin(), order.end(), 0);
    if (options_.gptq && options_.column_order) order = options_.column_order(diagonal, group_size);
    WALSH_ASSIGN_OR_RETURN(factor.perm, Upload(order));
    if (!options_.gptq) return factor;
    if (factor.dead_columns == dim) {
      factor.dead_columns = 0;
      factor.fallback = "no calibration sample gave this linear an input other than zero";
      return factor;
    }
    WALSH_ASSIGN_OR_RETURN(factor.dead, Upload(dead));
    WALSH_ASSIGN_OR_RETURN(factor.u, DeviceBuffer<float>::Allocate(dim * dim, context_.side()));
    const double mean = sum / static_cast<double>(dim - factor.dead_columns);
    for (const double damp : options_.damping_ladder) {
      std::vector<float> add(diagonal.size());
      for (size_t i = 0; i < add.size(); ++i) {
        add[i] = static_cast<float>(dead[i] != 0 ? mean : damp * mean);
      }
      WALSH_ASSIGN_OR_RETURN(auto device_add, Upload(add));
      factor.damp = damp;
      factor.damp_absolute = damp * mean;
      const absl::Status status = FactorHessian(context_, {.dim = dim,
                                                           .h = hessian_.data(),
                                                           .perm = factor.perm.data(),
                                                           .diagonal_add = device_add.data(),
                                                           .u = factor.u.data()});
      WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.side()));
      if (status.ok()) return factor;
      if (!absl::IsFailedPrecondition(status)) return status;
    }
    factor.u.Reset();
    factor.dead.Reset();
    factor.dead_columns = 0;
    factor.fallback = absl::StrCat("Hessian is not positive definite with damping ", factor.damp);
    return factor;
  }

  absl::Status QuantizeSet(LinearSet set, const float* weights,
                           const std::function<absl::Status(QuantizedSet)>& emit) {
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.factor_ms));
    const cudaStream_t stream = context_.stream();
    QuantizedSet out;
    out.set = set;
    out.rows = SetRows(shape_, set);
    out.cols = SetCols(shape_, set);
    out.group_size = options_.group_size < 0 ? out.cols : options_.group_size;
    const int64_t groups = out.cols / out.group_size;
    WALSH_ASSIGN_OR_RETURN(const Factor factor, Factorize(set, out.group_size));
    out.damp = factor.damp;
    out.dead_columns = factor.dead_columns;
    out.fallback = factor.fallback;

    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.columns_ms));
    WALSH_ASSIGN_OR_RETURN(out.codes, DeviceBuffer<uint8_t>::Allocate(out.rows * out.cols, stream));
    WALSH_ASSIGN_OR_RETURN(out.scales, DeviceBuffer<float>::Allocate(out.rows * groups, stream));
    WALSH_ASSIGN_OR_RETURN(out.zeros, DeviceBuffer<uint8_t>::Allocate(out.rows * groups, stream));
    WALSH_ASSIGN_OR_RETURN(auto loss, DeviceBuffer<float>::Allocate(out.rows, stream));
    WALSH_RETURN_IF_ERROR(QuantizeColumns(context_, {.rows = out.rows,
                                                     .cols = out.cols,
                                                     .w = weights,
                                                     .u = factor.u.data(),
                                                     .perm = factor.perm.data(),
                                                     .dead = factor.dead.data(),
                                                     .bits = options_.bits,
                                                     .group_size = out.group_size,
                                                     .symmetric = options_.symmetric,
                                                     .mse_clip = options_.mse_clip,
                                                     .codes = out.codes.data(),
                                                     .scales = out.scales.data(),
                                                     .zeros = out.zeros.data(),
                                                     .loss = loss.data()}));
    quantized_.Reset();
    WALSH_ASSIGN_OR_RETURN(quantized_, DeviceBuffer<bf16>::Allocate(out.rows * out.cols, stream));
    WALSH_RETURN_IF_ERROR(Pack({.rows = out.rows,
                                .cols = out.cols,
                                .bits = options_.bits,
                                .group_size = out.group_size,
                                .codes = out.codes.data(),
                                .scales = out.scales.data(),
                                .zeros = out.zeros.data(),
                                .dequantized = quantized_.data(),
                                .stream = stream}));
    if (options_.gptq) {
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.report_ms));
      WALSH_RETURN_IF_ERROR(Report(weights, out));
    }
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.other_ms));
    return emit(std::move(out));
  }

  absl::Status Report(const float* weights, QuantizedSet& out) {
    WALSH_ASSIGN_OR_RETURN(RowForms forms, ComputeRowForms(context_, {.rows = out.rows,
                                                                      .cols = out.cols,
                                                                      .group_size = out.group_size,
                                                                      .w = weights,
                                                                      .h = hessian_.data(),
                                                                      .codes = out.codes.data(),
                                                                      .scales = out.scales.data(),
                                                                      .zeros = out.zeros.data()}));
    out.row_error = std::move(forms.error);
    out.row_output = std::move(forms.output);
    return absl::OkStatus();
  }

  Context& context_;
  LayerShape shape_;
  LayerQuantizerOptions options_;
  StageClock clock_;
  LayerTimes times_;
  DeviceBuffer<float> frequencies_;
  DeviceBuffer<float> hidden_;
  DeviceBuffer<bf16> kept_;
  DeviceBuffer<bf16> normed_;
  DeviceBuffer<bf16> scratch_a_;
  DeviceBuffer<bf16> scratch_b_;
  DeviceBuffer<float> hessian_;
  DeviceBuffer<bf16> quantized_;  // the last set's weights, as its outputs are computed
};

absl::Status Validate(const LayerShape& shape, const LayerQuantizerOptions& options) {
  if (options.n_windows <= 0 || options.window <= 0 || options.windows_at_once <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("n_windows ", options.n_windows, ", window ",
                                                   options.window, " and windows_at_once ",
                                                   options.windows_at_once, " must be positive"));
  }
  for (const LinearSet set :
       {LinearSet::kQkv, LinearSet::kO, LinearSet::kGateUp, LinearSet::kDown}) {
    const int64_t cols = SetCols(shape, set);
    if (cols <= 0 || (options.group_size > 0 && cols % options.group_size != 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("group_size: ", options.group_size, " does not divide ", cols, " columns"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t LayerQuantizer::MemoryNeeded(const LayerShape& s, const LayerQuantizerOptions& o) {
  const int64_t n = o.n_windows * o.window;
  const int64_t batch = o.windows_at_once * o.window;
  const int64_t kept = std::max(s.intermediate, s.q_width());
  const int64_t widest = std::max(kept, s.hidden);
  int64_t weights = 0;
  int64_t largest = 0;
  for (int i = 0; i < kLinearSets; ++i) {
    const auto set = static_cast<LinearSet>(i);
    const int64_t size = SetRows(s, set) * SetCols(s, set);
    weights += size;
    largest = std::max(largest, size);
  }
  const int64_t activations =
      n * (4 * s.hidden + 2 * kept) +
      2 * batch * (s.hidden + kept + std::max(s.intermediate, 2 * s.kv_width()));
  // Hessian, factor and its scratch of a quarter; working copy, forms' product, codes and bf16 of a
  // set.
  const int64_t factor = 4 * widest * widest * 9 / 4;
  return activations + factor + 4 * weights + largest * (4 + 4 + 1 + 2);
}

absl::StatusOr<std::unique_ptr<LayerQuantizer>> LayerQuantizer::Create(
    Context* context, const LayerShape& shape, const LayerQuantizerOptions& options,
    std::span<const float> rope_inverse_frequencies) {
  WALSH_RETURN_IF_ERROR(Validate(shape, options));
  auto quantizer = std::make_unique<LayerQuantizerImpl>(context, shape, options);
  WALSH_RETURN_IF_ERROR(quantizer->Allocate(rope_inverse_frequencies));
  return quantizer;
}

}  // namespace walsh::kernels::cuda
