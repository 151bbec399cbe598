#include "worker/pipeline/cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "worker/kernels/cuda/compare.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/forward.h"
#include "worker/kernels/cuda/gptq.h"
#include "worker/kernels/cuda/pinned_pool.h"
#include "worker/kernels/cuda/rotate.h"
#include "worker/kernels/cuda/transfer.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/cuda/artifact_queue.h"
#include "worker/pipeline/cuda/evaluator.h"
#include "worker/pipeline/cuda/layer_forward.h"
#include "worker/pipeline/cuda/layer_quantizer.h"
#include "worker/pipeline/cuda/model_source.h"
#include "worker/pipeline/cuda/stage_clock.h"
#include "worker/pipeline/cuda/staged_download.h"
#include "worker/pipeline/cuda/weight_loader.h"
#include "worker/pipeline/layer_quantizer.h"
#include "worker/pipeline/rotation_gate.h"

namespace walsh::pipeline {
namespace cuda {
namespace {

namespace ops = kernels::cuda;
using kernels::cuda::Download;
using kernels::cuda::Upload;

// Workspaces of cuBLAS, and what the pool loses by rounding.
constexpr int64_t kLibraryBytes = int64_t{512} << 20;
// The largest finite number of half precision, to which scales are clamped.
constexpr uint16_t kHalfMaxBits = 0x7bff;

// Where a job has taken more than half of the device, gives back what a call took when it ends,
// however it ends: pieces that the pool keeps for one step may not be those that the next one
// needs. Smaller jobs keep it until they end, as memory costs time to get.
class BoundMemory {
 public:
  explicit BoundMemory(Context& context) : context_(context) {}
  ~BoundMemory() {
    size_t free = 0;
    size_t total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess && free > total / 2) return;
    // A device that fails here fails the next call, too, which says so.
    context_.ReleaseUnusedMemory().IgnoreError();
  }
  BoundMemory(const BoundMemory&) = delete;
  BoundMemory& operator=(const BoundMemory&) = delete;

 private:
  Context& context_;
};

// Seconds by kind of work; the names are those of walsh/v1/quantization.proto, step_times.
class StepTimes {
 public:
  // Rounding of differences can leave less than nothing.
  void Add(const char* name, double seconds) {
    if (seconds > 0) steps_.push_back({name, seconds});
  }
  std::vector<StepTime> Take() { return std::exchange(steps_, {}); }

 private:
  std::vector<StepTime> steps_;
};

// That its kernels do what the quantizer is asked to do.
absl::Status CheckQuantizer(const ResolvedJob& job) {
  const gptq::Options& options = job.quantizer;
  const auto unimplemented = [](const char* what) {
    return absl::UnimplementedError(
        absl::StrCat(what, ": the CUDA backend does not do it; a worker with --device cpu does"));
  };
  if (options.grid == gptq::Grid::kCodebook) return unimplemented("grid CODEBOOK");
  if (options.zero_point == gptq::ZeroPoint::kFloat) return unimplemented("zero point FLOAT_ZERO");
  return absl::OkStatus();
}

// The quantization of one job.
class QuantizeRun {
 public:
  QuantizeRun(Context& context, PinnedPool& pinned, const JobInputs& inputs,
              const calibrate::TokenWindows& windows, ArtifactWriter& writer, Progress& progress,
              JobReport& report, StepTimes& steps)
      : context_(context),
        pinned_(pinned),
        inputs_(inputs),
        config_(inputs.checkpoint.config()),
        shape_(LayerShape::Of(config_)),
        windows_(windows),
        queue_(writer, [&progress] { return progress.Within(0); }),
        progress_(progress),
        report_(report),
        steps_(steps) {}

  static LayerQuantizerOptions Options(const ResolvedJob& job, int64_t n_windows, int64_t window) {
    return {.gptq = job.quantizer,
            .group_size = job.group_size,
            .n_windows = n_windows,
            .window = window,
            .windows_at_once = std::max<int64_t>(1, kForwardTokens / window)};
  }

  absl::Status Run() {
    WALSH_ASSIGN_OR_RETURN(loader_, WeightLoader::Create(&context_, &pinned_, inputs_.checkpoint,
                                                         inputs_.job.r1, inputs_.job.r2));
    WALSH_ASSIGN_OR_RETURN(
        quantizer_, LayerQuantizer::Create(&context_, shape_,
                                           Options(inputs_.job, windows_.count(), windows_.length),
                                           RopeInverseFrequencies(config_), &progress_));
    WALSH_RETURN_IF_ERROR(Embedding());
    const double work =
        QuantizationWork(config_, inputs_.job.quantizer, windows_.count() * windows_.length) /
        static_cast<double>(config_.n_layers);
    for (int64_t l = 0; l < config_.n_layers; ++l) {
      WALSH_RETURN_IF_ERROR(Layer(l));
      WALSH_RETURN_IF_ERROR(progress_.Advance(work));
      progress_.LayerDone();
      // Early, so that its hundreds of megabytes are written while the device has layers to do, and
      // not beside the embedding's, so that both do not wait in memory.
      if (l == 0) WALSH_RETURN_IF_ERROR(Head());
    }
    WALSH_RETURN_IF_ERROR(clock().Finish());
    const LayerTimes times = quantizer_->times();
    quantizer_.reset();
    const double waited_between = queue_.seconds_waited();
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kPacking, -1));
    WALSH_RETURN_IF_ERROR(queue_.Finish());
    ReportTimes(times, waited_between);
    return absl::OkStatus();
  }

 private:
  StageClock& clock() { return quantizer_->clock(); }

  // `waited_between`: seconds that the layers waited for the artifact's files.
  void ReportTimes(const LayerTimes& times, double waited_between) {
    report_.forward_seconds = (times.forward_ms + times.attention_ms) / 1e3;
    report_.original_forward_seconds = times.original_ms / 1e3;
    const double read_wait = loader_->seconds_waited();
    steps_.Add("read_wait", read_wait);
    // The stream waits for what the host waits for.
    steps_.Add("fold_rotate", fold_ms_ / 1e3 - read_wait);
    steps_.Add("forward", times.forward_ms / 1e3);
    steps_.Add("attention", times.attention_ms / 1e3);
    steps_.Add("original_flow", times.original_ms / 1e3);
    steps_.Add("hessian", times.hessian_ms / 1e3);
    steps_.Add("cross", times.cross_ms / 1e3);
    steps_.Add("factorization", times.factor_ms / 1e3);
    steps_.Add("error_propagation", times.propagate_ms / 1e3);
    steps_.Add("asymmetric_calibration", times.correct_ms / 1e3);
    steps_.Add("columns", times.columns_ms / 1e3);
    steps_.Add("report", times.report_ms / 1e3);
    steps_.Add("pack", pack_ms_ / 1e3 - waited_between);
    steps_.Add("other", times.other_ms / 1e3);
    steps_.Add("write_wait", queue_.seconds_waited());
  }

  absl::Status Embedding() {
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kRotating, -1, "embedding"));
    WALSH_RETURN_IF_ERROR(clock().Enter(&fold_ms_));
    WALSH_ASSIGN_OR_RETURN(DeviceBuffer<float> embedding, loader_->Embedding());
    WALSH_RETURN_IF_ERROR(loader_->RotateEmbedding(embedding));
    WALSH_RETURN_IF_ERROR(loader_->CheckFinite());
    const auto n = static_cast<int64_t>(windows_.ids.size());
    WALSH_ASSIGN_OR_RETURN(const auto ids, Upload<int32_t>(context_, windows_.ids));
    WALSH_RETURN_IF_ERROR(ops::Embed<float>(context_, n, config_.hidden, ids.data(),
                                            embedding.data(), quantizer_->hidden()));
    return WriteBf16(std::string(kEmbeddingTensor), config_.vocab, embedding);
  }

  absl::Status Layer(int64_t index) {
    WALSH_RETURN_IF_ERROR(progress_.Pass(Stage::kCalibrating, index));
    progress_.Charge(Stage::kRotating);
    WALSH_RETURN_IF_ERROR(clock().Enter(&fold_ms_));
    WALSH_ASSIGN_OR_RETURN(DeviceLayer<float> layer, loader_->Layer(index));
    WALSH_RETURN_IF_ERROR(loader_->Rotate(layer));
    WALSH_RETURN_IF_ERROR(loader_->CheckFinite());
    WALSH_RETURN_IF_ERROR(ReadBiases(layer));
    progress_.Charge(Stage::kCalibrating);
    WALSH_RETURN_IF_ERROR(quantizer_->QuantizeLayer(
        absl::StrCat("layers.", index), layer,
        inputs_.job.bits.empty() ? LayerQuantizer::Bits()
                                 : inputs_.job.bits[static_cast<size_t>(index)],
        /*is_last=*/index + 1 == config_.n_layers,
        [&](LayerQuantizer::Step step) {
          const Stage stage =
              step == LayerQuantizer::Step::kQuantizing ? Stage::kQuantizing : Stage::kCalibrating;
          return progress_.Pass(stage, index);
        },
        [&](QuantizedSet set) { return WriteSet(index, set); }));
    progress_.Charge(Stage::kPacking);
    WALSH_RETURN_IF_ERROR(
        WriteNorm(LayerTensor(index, "input_layernorm.weight"), layer.input_norm));
    return WriteNorm(LayerTensor(index, "post_attention_layernorm.weight"),
                     layer.post_attention_norm);
  }

  // A layer's biases in the order of its linears; empty: none.
  absl::Status ReadBiases(const DeviceLayer<float>& layer) {
    for (const auto& [set, bias] :
         {std::pair(LinearSet::kQkv, &layer.qkv_bias), std::pair(LinearSet::kO, &layer.o_bias),
          std::pair(LinearSet::kGateUp, &layer.gate_up_bias),
          std::pair(LinearSet::kDown, &layer.down_bias)}) {
      WALSH_ASSIGN_OR_RETURN(biases_[static_cast<size_t>(set)],
                             (Download<float>(context_, bias->data(), bias->size())));
    }
    return absl::OkStatus();
  }

  // A linear of a set.
  struct Part {
    LinearShape shape;
    int bits = 0;
  };
  // In the order of their rows.
  std::vector<Part> PartsOf(int64_t layer, LinearSet set) const {
    constexpr size_t kFirst[kLinearSets + 1] = {0, 3, 4, 6, 7};  // q, k, v; o; gate, up; down
    const std::vector<LinearShape> shapes = LinearShapes(config_);
    std::vector<Part> parts;
    for (size_t i = kFirst[static_cast<size_t>(set)]; i < kFirst[static_cast<size_t>(set) + 1];
         ++i) {
      parts.push_back({shapes[i], inputs_.job.OptionsFor(layer, i, shapes[i].in).bits});
    }
    return parts;
  }

  absl::Status WriteSet(int64_t index, const QuantizedSet& set) {
    progress_.Charge(Stage::kPacking);
    WALSH_RETURN_IF_ERROR(clock().Enter(&pack_ms_));
    const std::vector<Part> parts = PartsOf(index, set.set);
    std::vector<PackedTensors> packed;
    WALSH_RETURN_IF_ERROR(Pack(set, parts, packed));
    int64_t first_row = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const LinearShape& part = parts[i].shape;
      ReportLinear(index, part.name, set, first_row, packed[i]);
      const std::string name = LayerTensor(index, part.name);
      const auto n_bytes = static_cast<int64_t>(
          sizeof(uint32_t) * (packed[i].qweight.size() + packed[i].qzeros.size()) +
          sizeof(uint16_t) * packed[i].scales.size());
      WALSH_RETURN_IF_ERROR(
          queue_.Push(n_bytes, [name, linear = std::move(packed[i])](ArtifactWriter& writer) {
            return writer.WritePacked(name, linear);
          }));
      const std::vector<float>& biases = biases_[static_cast<size_t>(set.set)];
      if (!biases.empty()) {
        WALSH_RETURN_IF_ERROR(WriteRow(
            name + ".bias", {biases.begin() + first_row, biases.begin() + first_row + part.out}));
      }
      first_row += part.out;
    }
    return absl::OkStatus();
  }

  // The linears of a set as the artifact has them, all in one copy to the host.
  absl::Status Pack(const QuantizedSet& set, const std::vector<Part>& parts,
                    std::vector<PackedTensors>& packed) {
    struct OnDevice {
      DeviceBuffer<uint32_t> qweight, qzeros;
      DeviceBuffer<__half> scales;
    };
    const cudaStream_t stream = context_.stream();
    const int64_t groups = set.cols / set.group_size;
    std::vector<OnDevice> on_device(parts.size());
    packed.resize(parts.size());
    std::vector<DownloadPart> downloads;
    int64_t first_row = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const int64_t rows = parts[i].shape.out;
      const int bits = parts[i].bits;
      auto& [qweight, qzeros, scales] = on_device[i];
      WALSH_ASSIGN_OR_RETURN(qweight,
                             DeviceBuffer<uint32_t>::Allocate(set.cols / 32 * bits * rows, stream));
      WALSH_ASSIGN_OR_RETURN(qzeros,
                             DeviceBuffer<uint32_t>::Allocate(groups * rows / 32 * bits, stream));
      WALSH_ASSIGN_OR_RETURN(scales, DeviceBuffer<__half>::Allocate(groups * rows, stream));
      WALSH_RETURN_IF_ERROR(ops::Pack({.rows = rows,
                                       .cols = set.cols,
                                       .bits = bits,
                                       .group_size = set.group_size,
                                       .codes = set.codes.data() + first_row * set.cols,
                                       .scales = set.scales.data() + first_row * groups,
                                       .zeros = set.zeros.data() + first_row * groups,
                                       .qweight = qweight.data(),
                                       .qzeros = qzeros.data(),
                                       .half_scales = scales.data(),
                                       .stream = stream}));
      PackedTensors& linear = packed[i];
      linear.rows = rows;
      linear.cols = set.cols;
      linear.bits = bits;
      linear.group_size = set.group_size;
      linear.qweight.resize(static_cast<size_t>(qweight.size()));
      linear.qzeros.resize(static_cast<size_t>(qzeros.size()));
      linear.scales.resize(static_cast<size_t>(scales.size()));
      downloads.push_back({qweight.data(), linear.qweight.data(), qweight.size_bytes()});
      downloads.push_back({qzeros.data(), linear.qzeros.data(), qzeros.size_bytes()});
      downloads.push_back({scales.data(), linear.scales.data(), scales.size_bytes()});
      first_row += rows;
    }
    return Fetch(downloads);
  }

  void ReportLinear(int64_t index, std::string_view name, const QuantizedSet& set,
                    int64_t first_row, const PackedTensors& packed) {
    LinearReport linear;
    linear.name = absl::StrCat("layers.", index, ".", std::string(name));
    linear.layer = index;
    linear.bits = packed.bits;
    double error = 0, output = 0;
    for (int64_t row = first_row; row < first_row + packed.rows; ++row) {
      error += set.row_error[static_cast<size_t>(row)];
      output += set.row_output[static_cast<size_t>(row)];
    }
    // Rounding can leave a tiny negative form where H has no full rank.
    error = std::max(error, 0.0);
    linear.relative_error = error == 0 ? 0 : (output == 0 ? 1 : error / std::abs(output));
    linear.damp = set.damp;
    linear.dead_columns = set.dead_columns;
    linear.fallback = set.fallback;
    if (!set.fallback.empty()) {
      report_.warnings.push_back(
          absl::StrCat(linear.name, " was rounded to nearest: ", set.fallback));
    }
    const auto clamped = std::count(packed.scales.begin(), packed.scales.end(), kHalfMaxBits);
    if (clamped > 0) {
      report_.warnings.push_back(absl::StrCat(linear.name, ": ", clamped,
                                              " groups exceed the range of half-precision scales "
                                              "and were clamped"));
    }
    progress_.LinearDone(linear);
    report_.linears.push_back(std::move(linear));
  }

  absl::Status WriteRow(const std::string& name, std::vector<float> values) {
    Matrix row(1, static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), row.data());
    return queue_.Push(row.size() * 4,
                       [name, row = std::make_shared<Matrix>(std::move(row))](
                           ArtifactWriter& writer) { return writer.WriteDense(name, *row, true); });
  }

  absl::Status WriteNorm(const std::string& name, const DeviceBuffer<float>& norm) {
    if (norm.size() == 0) {
      return WriteRow(name, std::vector<float>(static_cast<size_t>(config_.hidden), 1.0f));
    }
    WALSH_ASSIGN_OR_RETURN(std::vector<float> values,
                           (Download<float>(context_, norm.data(), norm.size())));
    return WriteRow(name, std::move(values));
  }

  absl::Status WriteBf16(const std::string& name, int64_t rows, const DeviceBuffer<float>& values) {
    WALSH_RETURN_IF_ERROR(clock().Enter(&pack_ms_));
    WALSH_ASSIGN_OR_RETURN(const auto rounded, ToBf16(context_, values));
    Bf16Matrix matrix;
    matrix.rows = rows;
    matrix.cols = values.size() / rows;
    matrix.values.resize(static_cast<size_t>(rounded.size()));
    WALSH_RETURN_IF_ERROR(Fetch({{rounded.data(), matrix.values.data(), rounded.size_bytes()}}));
    return queue_.Push(rounded.size_bytes(),
                       [name, matrix = std::move(matrix)](ArtifactWriter& writer) {
                         return writer.WriteBf16(name, matrix, /*one_dimensional=*/false);
                       });
  }

  absl::Status Head() {
    progress_.Charge(Stage::kRotating);
    WALSH_RETURN_IF_ERROR(clock().Enter(&fold_ms_));
    WALSH_ASSIGN_OR_RETURN(DeviceBuffer<float> norm, loader_->FinalNorm());
    WALSH_ASSIGN_OR_RETURN(DeviceBuffer<float> head, loader_->Head());
    WALSH_RETURN_IF_ERROR(loader_->RotateHead(norm, head));
    WALSH_RETURN_IF_ERROR(loader_->CheckFinite());
    if (loader_->is_rotated()) norm.Reset();
    progress_.Charge(Stage::kPacking);
    WALSH_RETURN_IF_ERROR(WriteNorm(std::string(kFinalNormTensor), norm));
    return WriteBf16(std::string(kLmHeadTensor), config_.vocab, head);
  }

  absl::Status Fetch(const std::vector<DownloadPart>& downloads) {
    return DownloadStaged(context_, pinned_, inputs_.pool, downloads);
  }

  Context& context_;
  PinnedPool& pinned_;
  const JobInputs& inputs_;
  const ModelConfig& config_;
  const LayerShape shape_;
  const calibrate::TokenWindows& windows_;
  ArtifactQueue queue_;
  Progress& progress_;
  JobReport& report_;
  StepTimes& steps_;
  double fold_ms_ = 0;  // on the stream, as LayerTimes
  double pack_ms_ = 0;
  std::unique_ptr<WeightLoader> loader_;
  std::unique_ptr<LayerQuantizer> quantizer_;
  std::vector<float> biases_[kLinearSets];  // of the running layer
};

absl::Status NotOnDevice(const ModelConfig& config, const std::string& feature) {
  return absl::UnimplementedError(absl::StrCat(config.architecture,
                                               ": the CUDA backend does not have ", feature,
                                               "; a worker with --device cpu does"));
}

// What makes a family differ from Llama in the forward pass. Windows of up to `longest` tokens are
// run: no sliding window that is longer makes a difference.
absl::Status CheckFamily(const ModelConfig& config, int64_t longest) {
  if (config.has_qk_norm) return NotOnDevice(config, "norms of q and k");
  if (config.has_output_norms) return NotOnDevice(config, "norms behind attention and MLP");
  if (config.activation != MlpActivation::kSilu) return NotOnDevice(config, "GELU");
  if (config.embedding_scale != 1) return NotOnDevice(config, "scaled embeddings");
  if (config.query_pre_attention_scalar != 0) {
    return NotOnDevice(config, "a scale of attention scores other than by the head width");
  }
  if (config.sliding_rope_theta != 0 && !config.sliding_layers.empty()) {
    return NotOnDevice(config, "a RoPE base of sliding layers");
  }
  if (config.sliding_window > 0 && config.sliding_window < longest) {
    return NotOnDevice(config, absl::StrCat("sliding-window attention (a window of ",
                                            config.sliding_window, ", sequences of ", longest,
                                            "; up to ", config.sliding_window, " it would do)"));
  }
  return absl::OkStatus();
}

class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Context> context, int64_t usable_bytes)
      : context_(std::move(context)), usable_bytes_(usable_bytes) {}

  std::string name() const override { return absl::StrCat("cuda:", context_->device()); }
  MemoryNeeds Needs(const JobSpec& spec, const ModelConfig& config,
                    const ResolvedJob& job) const override {
    return {.host_bytes = HostBytes(spec, config, job),
            .device_bytes = DeviceBytes(spec, config, job)};
  }

  absl::StatusOr<DeviceMemory> memory() const override {
    WALSH_RETURN_IF_ERROR(context_->MakeCurrent());
    size_t free = 0;
    size_t total = 0;
    WALSH_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free, &total));
    return DeviceMemory{usable_bytes_, static_cast<int64_t>(free)};
  }

  absl::Status Settle() override {
    WALSH_RETURN_IF_ERROR(context_->MakeCurrent());
    return context_->Synchronize();
  }

  JobUse EndJob() override {
    // A device that fails here fails the next job, too, which says so.
    context_->MakeCurrent().IgnoreError();
    context_->ReleaseUnusedMemory().IgnoreError();
    pinned_.Clear();
    JobUse use = {.peak_device_bytes = ops::DeviceMemoryUse().bytes_peak, .steps = steps_.Take()};
    ops::ResetDeviceMemoryPeak();
    return use;
  }

  absl::Status CheckSupported(const ModelConfig& config, const ResolvedJob& job) const override {
    WALSH_RETURN_IF_ERROR(
        CheckFamily(config, std::max(job.sequence_length, job.evaluation_length)));
    WALSH_RETURN_IF_ERROR(CheckQuantizer(job));
    constexpr int64_t kHeadDims[] = {16, 32, 64, 128};
    if (std::find(std::begin(kHeadDims), std::end(kHeadDims), config.head_dim) ==
        std::end(kHeadDims)) {
      return absl::UnimplementedError(
          absl::StrCat("head_dim ", config.head_dim,
                       ": attention on the CUDA backend takes 16, 32, 64 or 128; a worker with "
                       "--device cpu takes it"));
    }
    // Rows of a set are a dimension of some kernels' grids, and so are the columns of a Hessian.
    const LayerShape shape = LayerShape::Of(config);
    const int64_t widest = std::max({shape.qkv_rows(), shape.hidden, 2 * shape.intermediate});
    if (widest > kGridMax) {
      return absl::UnimplementedError(
          absl::StrCat("a width of ", widest,
                       " (of q, k and v together, of gate and up together, or of the "
                       "residual stream): the CUDA backend takes at most ",
                       kGridMax));
    }
    if (!job.online.empty()) {
      return absl::UnimplementedError(absl::StrCat(
          "online transforms (", OnlineTransformsJson(job.online).dump(),
          "): the CUDA backend has none in this version; a worker with --device cpu takes them"));
    }
    if (job.r1.is_identity() && !job.r2.is_identity()) {
      return absl::UnimplementedError(
          "a rotation of heads (R2) without one of the residual stream: the CUDA backend does not "
          "do it; a worker with --device cpu does");
    }
    // Heads have the sizes above: only the residual stream's rotation can have another core.
    const int64_t core = job.r1.is_identity() ? 1 : job.r1.parts().core;
    if (!ops::DeviceRotation::HasCore(core)) {
      return absl::UnimplementedError(
          absl::StrCat("a global rotation of width ", config.hidden, " = ", core,
                       " · 2^k: the CUDA backend takes m · 2^k with m of ",
                       absl::StrJoin(ops::DeviceRotation::kCores, ", "),
                       "; use rotation gsr, or a worker with --device cpu"));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<double> CheckRotation(const JobInputs& inputs,
                                       const calibrate::TokenWindows& windows,
                                       Progress& progress) override;

  absl::Status Quantize(const JobInputs& inputs, const calibrate::TokenWindows& windows,
                        ArtifactWriter& writer, Progress& progress, JobReport& report) override {
    WALSH_RETURN_IF_ERROR(context_->MakeCurrent());
    const BoundMemory bound(*context_);
    return QuantizeRun(*context_, pinned_, inputs, windows, writer, progress, report, steps_).Run();
  }

  absl::StatusOr<Quality> Evaluate(const JobInputs& inputs, const ArtifactReader& artifact,
                                   const calibrate::TokenWindows& windows,
                                   const evaluate::ScoredFrom& scored_from,
                                   Progress& progress) override {
    WALSH_RETURN_IF_ERROR(context_->MakeCurrent());
    const BoundMemory bound(*context_);
    const ModelConfig& config = inputs.checkpoint.config();
    const double work =
        static_cast<double>(windows.count() * windows.length) * ModelFlopsPerToken(config);
    const auto show = [&](double fraction) { return progress.Within(fraction * work); };
    Evaluator evaluator(context_.get(), config, windows);
    Evaluator::Outcome before, after;
    StageClock clock(context_->stream(), &progress);
    double before_ms = 0, after_ms = 0, compare_ms = 0;
    WALSH_RETURN_IF_ERROR(progress.Enter(Stage::kEvaluating, -1, "original"));
    WALSH_RETURN_IF_ERROR(clock.Enter(&before_ms));
    {
      WALSH_ASSIGN_OR_RETURN(
          const rotate::Rotation none,
          rotate::Rotation::Create(config.hidden, {.kind = rotate::Kind::kNone}));
      WALSH_ASSIGN_OR_RETURN(
          const std::unique_ptr<WeightLoader> loader,
          WeightLoader::Create(context_.get(), &pinned_, inputs.checkpoint, none, none));
      const std::unique_ptr<ModelSource> original =
          MakeCheckpointSource(context_.get(), loader.get());
      WALSH_ASSIGN_OR_RETURN(before, evaluator.Forward(*original, show));
    }
    WALSH_RETURN_IF_ERROR(progress.Advance(work));
    WALSH_RETURN_IF_ERROR(progress.Enter(Stage::kEvaluating, -1, "quantized"));
    WALSH_RETURN_IF_ERROR(clock.Enter(&after_ms));
    {
      WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<ModelSource> quantized,
                             MakeArtifactSource(context_.get(), &pinned_, artifact));
      WALSH_ASSIGN_OR_RETURN(after, evaluator.Forward(*quantized, show));
    }
    WALSH_RETURN_IF_ERROR(clock.Enter(&compare_ms));
    WALSH_ASSIGN_OR_RETURN(
        Quality quality, evaluator.Compare(before, after, scored_from, [&] { return show(1.0); }));
    WALSH_RETURN_IF_ERROR(clock.Finish());
    steps_.Add("evaluate_original", before_ms / 1e3);
    steps_.Add("evaluate_stored", after_ms / 1e3);
    steps_.Add("evaluate_logits", compare_ms / 1e3);
    WALSH_RETURN_IF_ERROR(progress.Advance(work));
    return quality;
  }

 private:
  static int64_t DeviceBytes(const JobSpec& spec, const ModelConfig& config,
                             const ResolvedJob& job) {
    const LayerShape shape = LayerShape::Of(config);
    const int64_t vocabulary = WeightLoader::VocabularyBytes(config);
    const int64_t layer = WeightLoader::LayerBytes(shape);
    // Either a layer in floats, or embedding or head, being rounded to half of that.
    int64_t peak =
        LayerQuantizer::BytesNeeded(
            shape, QuantizeRun::Options(job, spec.n_calibration_windows, job.sequence_length)) +
        std::max(layer, vocabulary + vocabulary / 2);
    if (spec.rotation != rotate::Kind::kNone) {
      peak = std::max(peak, LayerForward<float>::ScratchBytes(shape, kGateTokensMax) +
                                kGateTokensMax * kFloat * (3 * config.hidden + 2 * config.vocab) +
                                std::max(layer, vocabulary));
    }
    if (spec.evaluate) {
      // A layer is there in floats and, as it is rounded, in half of that.
      peak = std::max(peak, layer + layer / 2 +
                                Evaluator::EvaluationBytes(
                                    config, job.n_evaluation_windows * job.evaluation_length,
                                    job.evaluation_length));
    }
    return peak + WeightLoader::StoredBytes(shape) + kLibraryBytes;
  }

  // The texts and the model that writes them are gone before anything is read for the device.
  static int64_t HostBytes(const JobSpec& spec, const ModelConfig& config, const ResolvedJob& job) {
    const LayerShape shape = LayerShape::Of(config);
    const int64_t widest = std::max({shape.hidden, shape.q_width(), shape.intermediate});
    // Embedding or head that waits for room in the queue.
    const int64_t vocabulary = config.vocab * config.hidden * (kFloat / 2);
    // A Hessian that float does not factorize: its floats, a copy in double, the factor.
    const int64_t factorizing = 4 * widest * widest * kFloat;
    const int64_t working = ArtifactQueue::kBytesMax + WeightLoader::HostBytes(shape) +
                            std::max(vocabulary, factorizing);
    return std::max(PreparationMemoryNeeded(spec, config, job),
                    ProcessMemory(spec, job) + std::max(working, TaskMemoryNeeded(config, job)));
  }

  static constexpr int64_t kFloat = sizeof(float);
  static constexpr int64_t kGridMax = 65535;
  const std::unique_ptr<Context> context_;
  const int64_t usable_bytes_;
  // Of the running job.
  PinnedPool pinned_;
  StepTimes steps_;
};

// Both models side by side in floats, without TF32: a layer is used as it is, then rotated and used
// again.
absl::StatusOr<double> CudaBackend::CheckRotation(const JobInputs& inputs,
                                                  const calibrate::TokenWindows& windows,
                                                  Progress& progress) {
  WALSH_RETURN_IF_ERROR(context_->MakeCurrent());
  const BoundMemory bound(*context_);
  const ModelConfig& config = inputs.checkpoint.config();
  const LayerShape shape = LayerShape::Of(config);
  const cudaStream_t stream = context_->stream();
  const auto n = static_cast<int64_t>(windows.ids.size());
  const double work_per_layer = ReadWork(config) / static_cast<double>(config.n_layers);
  StageClock clock(stream, &progress);
  double gate_ms = 0;
  WALSH_RETURN_IF_ERROR(clock.Enter(&gate_ms));
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<WeightLoader> loader,
                         WeightLoader::Create(context_.get(), &pinned_, inputs.checkpoint,
                                              inputs.job.r1, inputs.job.r2));
  WALSH_ASSIGN_OR_RETURN(
      auto forward, LayerForward<float>::Create(context_.get(), shape,
                                                RopeInverseFrequencies(config), windows.length, n));
  DeviceBuffer<float> hidden[2];  // original, rotated
  WALSH_ASSIGN_OR_RETURN(hidden[0], loader->Embedded(windows.ids));
  WALSH_ASSIGN_OR_RETURN(hidden[1], DeviceBuffer<float>::Allocate(n * config.hidden, stream));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(hidden[1].data(), hidden[0].data(),
                                             static_cast<size_t>(hidden[0].size_bytes()),
                                             cudaMemcpyDeviceToDevice, stream));
  WALSH_RETURN_IF_ERROR(loader->RotateEmbedding(hidden[1]));
  for (int64_t l = 0; l < config.n_layers; ++l) {
    WALSH_ASSIGN_OR_RETURN(DeviceLayer<float> layer, loader->Layer(l));
    WALSH_RETURN_IF_ERROR(forward.Layer(layer.tensors(), n, hidden[0].data()));
    WALSH_RETURN_IF_ERROR(loader->Rotate(layer));
    WALSH_RETURN_IF_ERROR(forward.Layer(layer.tensors(), n, hidden[1].data()));
    WALSH_RETURN_IF_ERROR(progress.Advance(work_per_layer));
  }
  WALSH_ASSIGN_OR_RETURN(const DeviceBuffer<float> norm, loader->FinalNorm());
  WALSH_ASSIGN_OR_RETURN(DeviceBuffer<float> head, loader->Head());
  WALSH_ASSIGN_OR_RETURN(auto normed, DeviceBuffer<float>::Allocate(n * config.hidden, stream));
  DeviceBuffer<float> logits[2];
  for (const int which : {0, 1}) {
    if (which == 1) WALSH_RETURN_IF_ERROR(loader->RotateHead(norm, head));
    WALSH_RETURN_IF_ERROR(ops::RmsNorm<float>(*context_, n, config.hidden, hidden[which].data(),
                                              which == 0 ? norm.data() : nullptr,
                                              shape.rms_norm_eps, normed.data()));
    WALSH_ASSIGN_OR_RETURN(logits[which], DeviceBuffer<float>::Allocate(n * config.vocab, stream));
    WALSH_RETURN_IF_ERROR(ops::GemmFp32(*context_, {.n_tokens = n,
                                                    .in = config.hidden,
                                                    .out = config.vocab,
                                                    .x = normed.data(),
                                                    .weights = head.data(),
                                                    .y = logits[which].data()}));
  }
  WALSH_RETURN_IF_ERROR(loader->CheckFinite());
  WALSH_ASSIGN_OR_RETURN(
      const ops::Difference found,
      ops::Compare(*context_, n * config.vocab, logits[0].data(), logits[1].data()));
  WALSH_RETURN_IF_ERROR(clock.Finish());
  steps_.Add("gate", gate_ms / 1e3);
  if (found.first_bad < 0) return JudgeDifference(found.largest, found.difference);
  float values[2] = {};
  for (const int which : {0, 1}) {
    WALSH_ASSIGN_OR_RETURN(const std::vector<float> value,
                           (Download<float>(*context_, logits[which].data() + found.first_bad, 1)));
    values[which] = value[0];
  }
  return NotFiniteLogit(found.first_bad / config.vocab, found.first_bad % config.vocab, values[0],
                        values[1]);
}

}  // namespace
}  // namespace cuda

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int device) {
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<kernels::cuda::Context> context,
                         kernels::cuda::Context::Create(device));
  size_t free = 0;
  size_t total = 0;
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemGetInfo(&free, &total));
  return std::make_unique<cuda::CudaBackend>(std::move(context), static_cast<int64_t>(free));
}

}  // namespace walsh::pipeline
