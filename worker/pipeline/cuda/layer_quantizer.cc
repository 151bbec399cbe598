#include "worker/pipeline/cuda/layer_quantizer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/gptq/hessian.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/row_forms.h"
#include "worker/kernels/cuda/transfer.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::Download;
using kernels::cuda::Upload;
namespace {

namespace ops = kernels::cuda;

// Batches that the device may have before it: under a second of a 7B layer's on an H200.
constexpr int kBatchesQueued = 16;

int64_t SetRows(const LayerShape& s, LinearSet set) {
  switch (set) {
    case LinearSet::kQkv:
      return s.qkv_rows();
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
const char* SetName(LinearSet set) {
  switch (set) {
    case LinearSet::kQkv:
      return "self_attn.q_proj";
    case LinearSet::kO:
      return "self_attn.o_proj";
    case LinearSet::kGateUp:
      return "mlp.gate_proj";
    case LinearSet::kDown:
      return "mlp.down_proj";
  }
  return "";
}
int64_t WidestInput(const LayerShape& s) {
  return std::max({s.hidden, s.q_width(), s.intermediate});
}
int64_t LargestSet(const LayerShape& s) {
  int64_t largest = 0;
  for (int i = 0; i < kLinearSets; ++i) {
    const auto set = static_cast<LinearSet>(i);
    largest = std::max(largest, SetRows(s, set) * SetCols(s, set));
  }
  return largest;
}

// Adjacent rows of a set that have the same bits.
struct RowRange {
  int64_t first = 0;
  int64_t count = 0;
  int bits = 0;
};

// What the linears of a set share; `u` is empty for round-to-nearest.
struct Factor {
  DeviceBuffer<float> u;
  DeviceBuffer<int32_t> perm;
  DeviceBuffer<int32_t> static_groups;  // empty where a group's grid is chosen at its first column
  DeviceBuffer<uint8_t> dead;
  double damp = 0;
  int64_t dead_columns = 0;
  std::string fallback;
};

class LayerQuantizerImpl final : public LayerQuantizer {
 public:
  LayerQuantizerImpl(Context* context, const LayerShape& shape, LayerQuantizerOptions options,
                     Progress* progress)
      : context_(*context),
        shape_(shape),
        options_(std::move(options)),
        follows_original_(gptq::NeedsOriginalInputs(options_.gptq)),
        clock_(context->stream(), progress) {}

  absl::Status Allocate(std::span<const float> frequencies) {
    const cudaStream_t stream = context_.stream();
    const int64_t n = n_tokens();
    const int64_t batch = BatchTokens();
    const int64_t widest = WidestInput(shape_);
    WALSH_ASSIGN_OR_RETURN(forward_, LayerForward<bf16>::Create(&context_, shape_, frequencies,
                                                                options_.window, batch));
    WALSH_ASSIGN_OR_RETURN(hidden_, DeviceBuffer<float>::Allocate(n * shape_.hidden, stream));
    // Attention outputs, later the MLP's activations: never both.
    WALSH_ASSIGN_OR_RETURN(kept_, DeviceBuffer<bf16>::Allocate(
                                      n * std::max(shape_.intermediate, shape_.q_width()), stream));
    WALSH_ASSIGN_OR_RETURN(hessian_, DeviceBuffer<float>::Allocate(widest * widest, stream));
    if (follows_original_) {
      WALSH_ASSIGN_OR_RETURN(original_hidden_,
                             DeviceBuffer<float>::Allocate(n * shape_.hidden, stream));
      WALSH_ASSIGN_OR_RETURN(original_inputs_,
                             DeviceBuffer<bf16>::Allocate(batch * widest, stream));
      WALSH_ASSIGN_OR_RETURN(cross_, DeviceBuffer<float>::Allocate(widest * widest, stream));
    }
    return context_.Synchronize();
  }

  float* hidden() override { return hidden_.data(); }
  const LayerTimes& times() const override { return times_; }
  StageClock& clock() override { return clock_; }

  absl::Status QuantizeLayer(std::string_view name, DeviceLayer<float>& layer, Bits bits,
                             bool is_last, const OnStep& on_step, const Emit& emit) override {
    name_ = std::string(name);
    bits_ = bits;
    on_step_ = &on_step;
    emit_ = &emit;
    const LayerTensors<float> floats = layer.tensors();
    // Of the layer's own biases and norms, with weights as they become known.
    rounded_ = {.input_norm = floats.input_norm,
                .post_attention_norm = floats.post_attention_norm,
                .qkv_bias = floats.qkv_bias,
                .o_bias = floats.o_bias,
                .gate_up_bias = floats.gate_up_bias,
                .down_bias = floats.down_bias};
    original_ = rounded_;
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.other_ms));
    if (follows_original_) WALSH_RETURN_IF_ERROR(StartOriginalFlow());

    WALSH_RETURN_IF_ERROR(CollectAttentionInputs());
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kQkv, layer.qkv));
    WALSH_RETURN_IF_ERROR(CollectAttended(layer.o.data()));
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kO, layer.o));
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
    WALSH_RETURN_IF_ERROR(
        forward_.AttentionOutput(rounded_, kept_.data(), n_tokens(), hidden_.data()));
    WALSH_RETURN_IF_ERROR(CollectMlpInputs());
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kGateUp, layer.gate_up));
    WALSH_RETURN_IF_ERROR(CollectActivations(layer.down.data(), is_last));
    WALSH_RETURN_IF_ERROR(QuantizeSet(LinearSet::kDown, layer.down));
    if (!is_last) {
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_RETURN_IF_ERROR(forward_.MlpOutput(rounded_, kept_.data(), n_tokens(), hidden_.data()));
    }
    return clock_.Finish();
  }

 private:
  int64_t n_tokens() const { return options_.n_windows * options_.window; }
  int64_t BatchTokens() const {
    return std::min(options_.windows_at_once, options_.n_windows) * options_.window;
  }

  // fn(first token, tokens) over the batches. Waits for the device from time to time, so that what
  // is asked and shown is of work that has been done.
  absl::Status ForEachBatch(const std::function<absl::Status(int64_t, int64_t)>& fn) {
    int n_queued = 0;
    for (int64_t first = 0; first < n_tokens(); first += BatchTokens()) {
      WALSH_RETURN_IF_ERROR(fn(first, std::min(BatchTokens(), n_tokens() - first)));
      if (++n_queued % kBatchesQueued != 0) continue;
      WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.stream()));
      WALSH_RETURN_IF_ERROR((*on_step_)(Step::kCalibrating));
    }
    return absl::OkStatus();
  }

  // Before the first layer both flows are the embeddings.
  absl::Status StartOriginalFlow() {
    if (original_has_started_) return absl::OkStatus();
    original_has_started_ = true;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(original_hidden_.data(), hidden_.data(),
                                               static_cast<size_t>(hidden_.size_bytes()),
                                               cudaMemcpyDeviceToDevice, context_.stream()));
    return absl::OkStatus();
  }

  absl::Status ClearSums(LinearSet set) {
    const int64_t dim = SetCols(shape_, set);
    const auto n_bytes = static_cast<size_t>(dim * dim) * sizeof(float);
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.other_ms));
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(hessian_.data(), 0, n_bytes, context_.stream()));
    if (!follows_original_) return absl::OkStatus();
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(cross_.data(), 0, n_bytes, context_.stream()));
    return absl::OkStatus();
  }

  // Adds inputs of a set to its sums: x of the rounded flow, and what the original flow left in
  // `original_inputs_`, which is used up.
  absl::Status AddToSums(LinearSet set, const bf16* x, int64_t n) {
    const int64_t dim = SetCols(shape_, set);
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.hessian_ms));
    WALSH_RETURN_IF_ERROR(
        ops::AccumulateGram(context_, {.n_tokens = n, .dim = dim, .x = x, .h = hessian_.data()}));
    if (!follows_original_) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.cross_ms));
    bf16* difference = original_inputs_.data();
    WALSH_RETURN_IF_ERROR(ops::Subtract(context_, n * dim, difference, x, difference));
    return ops::AccumulateCrossGram(
        context_, {.n_tokens = n, .dim = dim, .x = x, .y = difference, .c = cross_.data()});
  }

  // Copies inputs of the original flow from a step's own buffer.
  absl::Status KeepOriginal(const bf16* x, int64_t n_elements) {
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(original_inputs_.data(), x,
                                               static_cast<size_t>(n_elements) * sizeof(bf16),
                                               cudaMemcpyDeviceToDevice, context_.stream()));
    return absl::OkStatus();
  }

  absl::Status CollectAttentionInputs() {
    WALSH_RETURN_IF_ERROR(ClearSums(LinearSet::kQkv));
    return ForEachBatch([&](int64_t first, int64_t n) -> absl::Status {
      if (follows_original_) {
        WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.original_ms));
        WALSH_ASSIGN_OR_RETURN(
            const bf16* x,
            forward_.AttentionInput(original_, original_hidden_.data() + first * shape_.hidden, n));
        WALSH_RETURN_IF_ERROR(KeepOriginal(x, n * shape_.hidden));
      }
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_ASSIGN_OR_RETURN(
          const bf16* x,
          forward_.AttentionInput(rounded_, hidden_.data() + first * shape_.hidden, n));
      return AddToSums(LinearSet::kQkv, x, n);
    });
  }

  // Also moves the original flow behind its attention, whose `o` is not to be changed yet.
  absl::Status CollectAttended(const float* o) {
    WALSH_RETURN_IF_ERROR(ClearSums(LinearSet::kO));
    if (follows_original_) WALSH_RETURN_IF_ERROR(KeepOriginalWeights(LinearSet::kO, o));
    return ForEachBatch([&](int64_t first, int64_t n) -> absl::Status {
      if (follows_original_) {
        WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.original_ms));
        float* rows = original_hidden_.data() + first * shape_.hidden;
        bf16* attended = original_inputs_.data();
        WALSH_RETURN_IF_ERROR(forward_.Project(original_, rows, n));
        WALSH_RETURN_IF_ERROR(forward_.Attend(n, attended));
        WALSH_RETURN_IF_ERROR(forward_.AttentionOutput(original_, attended, n, rows));
      }
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      bf16* attended = kept_.data() + first * shape_.q_width();
      WALSH_RETURN_IF_ERROR(forward_.Project(rounded_, hidden_.data() + first * shape_.hidden, n));
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.attention_ms));
      WALSH_RETURN_IF_ERROR(forward_.Attend(n, attended));
      return AddToSums(LinearSet::kO, attended, n);
    });
  }

  absl::Status CollectMlpInputs() {
    WALSH_RETURN_IF_ERROR(ClearSums(LinearSet::kGateUp));
    return ForEachBatch([&](int64_t first, int64_t n) -> absl::Status {
      if (follows_original_) {
        WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.original_ms));
        WALSH_ASSIGN_OR_RETURN(
            const bf16* x,
            forward_.MlpInput(original_, original_hidden_.data() + first * shape_.hidden, n));
        WALSH_RETURN_IF_ERROR(KeepOriginal(x, n * shape_.hidden));
      }
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      WALSH_ASSIGN_OR_RETURN(
          const bf16* x, forward_.MlpInput(rounded_, hidden_.data() + first * shape_.hidden, n));
      return AddToSums(LinearSet::kGateUp, x, n);
    });
  }

  absl::Status CollectActivations(const float* down, bool is_last) {
    WALSH_RETURN_IF_ERROR(ClearSums(LinearSet::kDown));
    if (follows_original_) WALSH_RETURN_IF_ERROR(KeepOriginalWeights(LinearSet::kDown, down));
    return ForEachBatch([&](int64_t first, int64_t n) -> absl::Status {
      if (follows_original_) {
        WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.original_ms));
        float* rows = original_hidden_.data() + first * shape_.hidden;
        bf16* activation = original_inputs_.data();
        WALSH_RETURN_IF_ERROR(forward_.MlpActivation(original_, rows, n, activation));
        if (!is_last) {
          WALSH_RETURN_IF_ERROR(forward_.MlpOutput(original_, activation, n, rows));
        }
      }
      WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.forward_ms));
      bf16* activation = kept_.data() + first * shape_.intermediate;
      WALSH_RETURN_IF_ERROR(
          forward_.MlpActivation(rounded_, hidden_.data() + first * shape_.hidden, n, activation));
      return AddToSums(LinearSet::kDown, activation, n);
    });
  }

  // The form of the original flow's weights in which its products are computed.
  absl::Status KeepOriginalWeights(LinearSet set, const float* weights) {
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.original_ms));
    const int64_t size = SetRows(shape_, set) * SetCols(shape_, set);
    const bool is_output = set == LinearSet::kO || set == LinearSet::kDown;
    DeviceBuffer<bf16>& kept = is_output ? original_output_weights_ : original_input_weights_;
    kept.Reset();
    WALSH_ASSIGN_OR_RETURN(kept, DeviceBuffer<bf16>::Allocate(size, context_.stream()));
    WALSH_RETURN_IF_ERROR((ops::Convert<float, bf16>(context_, size, weights, kept.data())));
    Weights(original_, set) = kept.data();
    return absl::OkStatus();
  }

  static const bf16*& Weights(LayerTensors<bf16>& tensors, LinearSet set) {
    switch (set) {
      case LinearSet::kQkv:
        return tensors.qkv;
      case LinearSet::kO:
        return tensors.o;
      case LinearSet::kGateUp:
        return tensors.gate_up;
      case LinearSet::kDown:
        break;
    }
    return tensors.down;
  }

  // Completes the Hessian and waits for all that it is made of.
  absl::StatusOr<std::vector<float>> HessianDiagonal(LinearSet set) {
    const int64_t dim = SetCols(shape_, set);
    const cudaStream_t stream = context_.stream();
    WALSH_RETURN_IF_ERROR(ops::MirrorGram(context_, dim, hessian_.data()));
    WALSH_ASSIGN_OR_RETURN(auto in_a_row, DeviceBuffer<float>::Allocate(dim, stream));
    WALSH_RETURN_IF_ERROR(ops::Diagonal(context_, dim, hessian_.data(), in_a_row.data()));
    WALSH_ASSIGN_OR_RETURN(std::vector<float> diagonal,
                           Download<float>(context_, in_a_row.data(), dim));
    for (size_t i = 0; i < diagonal.size(); ++i) {
      if (std::isfinite(diagonal[i])) continue;
      return absl::DataLossError(
          absl::StrCat(Name(set), ": input ", i, " is not finite in calibration"));
    }
    return diagonal;
  }

  std::vector<RowRange> RowRanges(LinearSet set) const {
    if (bits_.empty()) return {{0, SetRows(shape_, set), options_.gptq.bits}};
    std::vector<std::pair<int64_t, int>> linears;  // rows, bits
    switch (set) {
      case LinearSet::kQkv:
        linears = {{shape_.q_width(), bits_[0]},
                   {shape_.kv_width(), bits_[1]},
                   {shape_.kv_width(), bits_[2]}};
        break;
      case LinearSet::kO:
        linears = {{shape_.hidden, bits_[3]}};
        break;
      case LinearSet::kGateUp:
        linears = {{shape_.intermediate, bits_[4]}, {shape_.intermediate, bits_[5]}};
        break;
      case LinearSet::kDown:
        linears = {{shape_.hidden, bits_[6]}};
        break;
    }
    std::vector<RowRange> ranges;
    int64_t row = 0;
    for (const auto& [rows, bits] : linears) {
      if (!ranges.empty() && ranges.back().bits == bits) {
        ranges.back().count += rows;
      } else {
        ranges.push_back({row, rows, bits});
      }
      row += rows;
    }
    return ranges;
  }

  std::string Name(LinearSet set) const { return absl::StrCat(name_, ".", SetName(set)); }

  // As gptq::FactorizeHessian: a ladder of damping in float, then in double, then none.
  absl::StatusOr<Factor> Factorize(LinearSet set, const gptq::Options& options,
                                   const std::vector<float>& diagonal) {
    const int64_t dim = SetCols(shape_, set);
    Factor factor;
    const std::vector<int32_t> steps = gptq::ColumnSteps(diagonal, options);
    WALSH_ASSIGN_OR_RETURN(factor.perm, Upload<int32_t>(context_, steps));
    if (gptq::HasStaticGroups(options)) {
      WALSH_ASSIGN_OR_RETURN(
          factor.static_groups,
          Upload<int32_t>(context_, gptq::ColumnsByGroup(steps, options.group_size)));
    }
    if (options.method == gptq::Method::kRtn) return factor;
    std::vector<uint8_t> dead(diagonal.size(), 0);
    double sum = 0;
    for (size_t i = 0; i < diagonal.size(); ++i) {
      dead[i] = diagonal[i] == 0.0f ? 1 : 0;
      factor.dead_columns += dead[i];
      sum += static_cast<double>(diagonal[i]);
    }
    if (factor.dead_columns == dim) {
      factor.dead_columns = 0;
      factor.fallback = gptq::NoInputFallback();
      return factor;
    }
    const double mean = sum / static_cast<double>(dim - factor.dead_columns);
    WALSH_ASSIGN_OR_RETURN(factor.dead, Upload<uint8_t>(context_, dead));
    // Of the stream that reads it last; Upload() has synchronized that before `side` writes.
    WALSH_ASSIGN_OR_RETURN(factor.u, DeviceBuffer<float>::Allocate(dim * dim, context_.stream()));
    for (const bool in_double : {false, true}) {
      for (const double damp : gptq::DampingLadder(options.damp)) {
        std::vector<float> add(diagonal.size());
        for (size_t i = 0; i < add.size(); ++i) {
          add[i] = static_cast<float>(dead[i] != 0 ? mean : damp * mean);
        }
        WALSH_ASSIGN_OR_RETURN(auto device_add, Upload<float>(context_, add));
        WALSH_RETURN_IF_ERROR((*on_step_)(Step::kQuantizing));
        factor.damp = damp;
        const absl::Status status = ops::FactorHessian(context_, {.dim = dim,
                                                                  .h = hessian_.data(),
                                                                  .perm = factor.perm.data(),
                                                                  .diagonal_add = device_add.data(),
                                                                  .u = factor.u.data(),
                                                                  .in_double = in_double});
        WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context_.side()));
        if (status.ok()) return factor;
        if (!absl::IsFailedPrecondition(status)) return status;
      }
    }
    factor.u.Reset();
    factor.dead.Reset();
    factor.dead_columns = 0;
    factor.fallback = gptq::NotDefiniteFallback(factor.damp);
    return factor;
  }

  absl::Status QuantizeSet(LinearSet set, DeviceBuffer<float>& weights) {
    const cudaStream_t stream = context_.stream();
    QuantizedSet out;
    out.set = set;
    out.rows = SetRows(shape_, set);
    out.cols = SetCols(shape_, set);
    out.group_size = options_.group_size < 0 ? out.cols : options_.group_size;
    gptq::Options options = options_.gptq;
    options.group_size = out.group_size;
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.factor_ms));
    WALSH_ASSIGN_OR_RETURN(const std::vector<float> diagonal, HessianDiagonal(set));
    WALSH_RETURN_IF_ERROR((*on_step_)(Step::kQuantizing));
    WALSH_ASSIGN_OR_RETURN(const Factor factor, Factorize(set, options, diagonal));
    out.damp = factor.damp;
    out.dead_columns = factor.dead_columns;
    out.fallback = factor.fallback;

    // Those of o and down were kept before the flow went through them.
    if (follows_original_ && (set == LinearSet::kQkv || set == LinearSet::kGateUp)) {
      WALSH_RETURN_IF_ERROR(KeepOriginalWeights(set, weights.data()));
    }
    DeviceBuffer<float> correction;
    if (factor.u.size() > 0) {
      WALSH_RETURN_IF_ERROR(PropagateError(options, factor, out, weights.data()));
      WALSH_ASSIGN_OR_RETURN(correction, Correction(options, factor, out.cols));
    }

    const int64_t groups = out.cols / out.group_size;
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.columns_ms));
    WALSH_ASSIGN_OR_RETURN(out.codes, DeviceBuffer<uint8_t>::Allocate(out.rows * out.cols, stream));
    WALSH_ASSIGN_OR_RETURN(out.scales, DeviceBuffer<float>::Allocate(out.rows * groups, stream));
    WALSH_ASSIGN_OR_RETURN(out.zeros, DeviceBuffer<uint8_t>::Allocate(out.rows * groups, stream));
    WALSH_ASSIGN_OR_RETURN(auto loss, DeviceBuffer<float>::Allocate(out.rows, stream));
    for (const RowRange& range : RowRanges(set)) {
      const int64_t first_group = range.first * groups;
      WALSH_RETURN_IF_ERROR(
          ops::QuantizeColumns(context_, {.rows = range.count,
                                          .cols = out.cols,
                                          .w = weights.data() + range.first * out.cols,
                                          .u = factor.u.data(),
                                          .correction = correction.data(),
                                          .perm = factor.perm.data(),
                                          .static_groups = factor.static_groups.data(),
                                          .dead = factor.dead.data(),
                                          .bits = range.bits,
                                          .group_size = out.group_size,
                                          .symmetric = options.symmetric,
                                          .mse_clip = options.mse_clip,
                                          .codes = out.codes.data() + range.first * out.cols,
                                          .scales = out.scales.data() + first_group,
                                          .zeros = out.zeros.data() + first_group,
                                          .loss = loss.data() + range.first}));
    }
    quantized_.Reset();
    WALSH_ASSIGN_OR_RETURN(quantized_, DeviceBuffer<bf16>::Allocate(out.rows * out.cols, stream));
    WALSH_RETURN_IF_ERROR(ops::Pack({.rows = out.rows,
                                     .cols = out.cols,
                                     .bits = options.bits,
                                     .group_size = out.group_size,
                                     .codes = out.codes.data(),
                                     .scales = out.scales.data(),
                                     .zeros = out.zeros.data(),
                                     .dequantized = quantized_.data(),
                                     .stream = stream}));
    Weights(rounded_, set) = quantized_.data();
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.report_ms));
    WALSH_RETURN_IF_ERROR(CheckUpdates(set, loss));
    WALSH_RETURN_IF_ERROR(Report(weights.data(), out));
    weights.Reset();
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.other_ms));
    WALSH_RETURN_IF_ERROR((*emit_)(std::move(out)));
    return (*on_step_)(Step::kCalibrating);
  }

  // The target in place of the weights, where the options ask for one.
  absl::Status PropagateError(const gptq::Options& options, const Factor& factor,
                              const QuantizedSet& out, float* weights) {
    if (!gptq::PropagatesError(options)) return absl::OkStatus();
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.propagate_ms));
    return ops::PropagateError(context_, {.rows = out.rows,
                                          .cols = out.cols,
                                          .w = weights,
                                          .cross = cross_.data(),
                                          .u = factor.u.data(),
                                          .perm = factor.perm.data(),
                                          .beta = options.error_propagation});
  }

  // GPTAQ's, or an empty one.
  absl::StatusOr<DeviceBuffer<float>> Correction(const gptq::Options& options, const Factor& factor,
                                                 int64_t dim) {
    DeviceBuffer<float> correction;
    if (!gptq::CorrectsAsymmetry(options)) return correction;
    WALSH_RETURN_IF_ERROR(clock_.Enter(&times_.correct_ms));
    WALSH_ASSIGN_OR_RETURN(correction, DeviceBuffer<float>::Allocate(dim * dim, context_.stream()));
    WALSH_RETURN_IF_ERROR(ops::CorrectAsymmetry(context_, {.cols = dim,
                                                           .cross = cross_.data(),
                                                           .u = factor.u.data(),
                                                           .perm = factor.perm.data(),
                                                           .alpha = options.gptaq_alpha,
                                                           .correction = correction.data()}));
    return correction;
  }

  // Codes and grids are always in range: what is not finite shows nowhere else.
  absl::Status CheckUpdates(LinearSet set, const DeviceBuffer<float>& loss) {
    WALSH_ASSIGN_OR_RETURN(const std::vector<float> losses,
                           Download<float>(context_, loss.data(), loss.size()));
    for (size_t row = 0; row < losses.size(); ++row) {
      if (std::isfinite(losses[row])) continue;
      return absl::DataLossError(absl::StrCat(Name(set), ": a weight of output ", row,
                                              " overflowed while it was updated"));
    }
    return absl::OkStatus();
  }

  absl::Status Report(const float* weights, QuantizedSet& out) {
    WALSH_ASSIGN_OR_RETURN(ops::RowForms forms,
                           ops::ComputeRowForms(context_, {.rows = out.rows,
                                                           .cols = out.cols,
                                                           .group_size = out.group_size,
                                                           .w = weights,
                                                           .h = hessian_.data(),
                                                           .codes = out.codes.data(),
                                                           .scales = out.scales.data(),
                                                           .zeros = out.zeros.data()}));
    out.row_error = std::move(forms.error);
    out.row_output = std::move(forms.output);
    // Codes are always in range, so that a weight that error propagation has made infinite would
    // show nowhere else.
    for (size_t row = 0; row < out.row_error.size(); ++row) {
      if (std::isfinite(out.row_error[row]) && std::isfinite(out.row_output[row])) continue;
      return absl::DataLossError(absl::StrCat(Name(out.set), ": the error of output ", row,
                                              " is not finite after calibration"));
    }
    return absl::OkStatus();
  }

  Context& context_;
  const LayerShape shape_;
  const LayerQuantizerOptions options_;
  const bool follows_original_;
  StageClock clock_;
  LayerTimes times_;

  LayerForward<bf16> forward_;
  // The rounded flow: every linear that has had its turn is quantized.
  DeviceBuffer<float> hidden_;
  DeviceBuffer<bf16> kept_;
  DeviceBuffer<bf16> quantized_;  // the last set's weights, as its outputs are computed
  LayerTensors<bf16> rounded_;
  // The original flow; empty where its inputs are not needed.
  DeviceBuffer<float> original_hidden_;
  DeviceBuffer<bf16> original_inputs_;  // of a batch; then their difference to the rounded ones
  DeviceBuffer<bf16> original_input_weights_;   // of qkv, or of gate_up
  DeviceBuffer<bf16> original_output_weights_;  // of o, or of down
  LayerTensors<bf16> original_;
  bool original_has_started_ = false;

  DeviceBuffer<float> hessian_;
  DeviceBuffer<float> cross_;  // Σ x (x_original − x)ᵀ

  // Of the running call.
  std::string name_;
  Bits bits_;
  const OnStep* on_step_ = nullptr;
  const Emit* emit_ = nullptr;
};

absl::Status Validate(const LayerShape& shape, const LayerQuantizerOptions& options) {
  if (options.n_windows <= 0 || options.window <= 0 || options.windows_at_once <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("n_windows ", options.n_windows, ", window ",
                                                   options.window, " and windows_at_once ",
                                                   options.windows_at_once, " must be positive"));
  }
  for (int i = 0; i < kLinearSets; ++i) {
    const int64_t cols = SetCols(shape, static_cast<LinearSet>(i));
    if (cols <= 0 || (options.group_size > 0 && cols % options.group_size != 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("group_size: ", options.group_size, " does not divide ", cols, " columns"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t LayerQuantizer::BytesNeeded(const LayerShape& s, const LayerQuantizerOptions& o) {
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kBf16 = sizeof(bf16);
  const int64_t n = o.n_windows * o.window;
  const int64_t batch = std::min(o.windows_at_once, o.n_windows) * o.window;
  const int64_t widest = WidestInput(s);
  const int64_t largest = LargestSet(s);
  int64_t bytes = n * (kFloat * s.hidden + kBf16 * std::max(s.intermediate, s.q_width())) +
                  LayerForward<bf16>::ScratchBytes(s, batch);
  bytes += 2 * widest * widest * kFloat;  // Hessian, factor
  bytes += largest * kBf16;               // the last set's weights
  // A factor that is made in double and its scratch; after that a working copy with the errors of a
  // block, codes, the forms' two products, and this set's weights.
  bytes += std::max(widest * widest * int64_t{sizeof(double)} * 5 / 4,
                    largest * (3 * kFloat + 1 + kBf16));
  if (gptq::NeedsOriginalInputs(o.gptq)) {
    // The second residual stream, a batch's inputs, the sums with their low parts or with the
    // correction, the weights.
    bytes += n * kFloat * s.hidden + batch * widest * kBf16 + 2 * widest * widest * kFloat +
             2 * largest * kBf16;
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<LayerQuantizer>> LayerQuantizer::Create(
    Context* context, const LayerShape& shape, const LayerQuantizerOptions& options,
    std::span<const float> rope_inverse_frequencies, Progress* progress) {
  WALSH_RETURN_IF_ERROR(Validate(shape, options));
  auto quantizer = std::make_unique<LayerQuantizerImpl>(context, shape, options, progress);
  WALSH_RETURN_IF_ERROR(quantizer->Allocate(rope_inverse_frequencies));
  return quantizer;
}

}  // namespace walsh::pipeline::cuda
