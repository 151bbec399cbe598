#include "worker/pipeline/layer_quantizer.h"

#include <algorithm>
#include <chrono>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/evaluate/perplexity.h"
#include "worker/gptq/asymmetric_calibration.h"
#include "worker/gptq/error_propagation.h"
#include "worker/gptq/quantize_linear.h"
#include "worker/pipeline/rotated_source.h"

namespace walsh::pipeline {
namespace {

// What choosing grids and codes for one weight takes, in operations of a matrix product.
constexpr double kWorkPerWeight = 5000;

// A piece of an element-wise loop: long enough to be worth a thread's turn.
constexpr int64_t kPieceFloats = int64_t{1} << 16;

// Shares of a layer's forward.
struct ForwardShares {
  double qkv, o, gate_up, down;
};
ForwardShares Shares(const ModelConfig& config) {
  const std::vector<LinearShape> shapes = LinearShapes(config);
  const auto size = [&](size_t i) { return static_cast<double>(shapes[i].in * shapes[i].out); };
  const double total = LayerFlopsPerToken(config) / 2;
  return {(size(0) + size(1) + size(2)) / total, size(3) / total, (size(4) + size(5)) / total,
          size(6) / total};
}

double Squared(int64_t n) { return static_cast<double>(n) * static_cast<double>(n); }

// What linears with the same inputs share, beside the factor that LinearWork counts: GPTAQ's two
// products, of which half and a third are done.
double SharedWork(int64_t in, const gptq::Options& options) {
  return CorrectsAsymmetry(options) ? 5.0 / 3 * Squared(in) * static_cast<double>(in) : 0.0;
}

// Factor, trailing updates, error measurement, grids and codes; the target's two products and a
// half, or GPTAQ's trailing updates.
double LinearWork(int64_t in, int64_t out, const gptq::Options& options) {
  const double products = PropagatesError(options) ? 10 : CorrectsAsymmetry(options) ? 6 : 5;
  return products * Squared(in) * static_cast<double>(out) +
         kWorkPerWeight * static_cast<double>(in) * static_cast<double>(out);
}

Matrix ToRow(const std::vector<float>& values) {
  Matrix row(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), row.data());
  return row;
}

DecoderLayer CopyDense(const ModelConfig& config, const DecoderLayer& layer) {
  DecoderLayer copy;
  copy.is_sliding = layer.is_sliding;
  copy.online = layer.online;
  for (const LayerNorm& norm : LayerNorms(config)) copy.*norm.weights = layer.*norm.weights;
  for (const LayerLinear& linear : kLayerLinears) {
    const DenseLinear& dense = Dense(layer.*linear.linear);
    copy.*linear.linear = std::make_unique<DenseLinear>(dense.weights().Copy(), dense.bias());
  }
  return copy;
}

Matrix Ones(int64_t n) {
  Matrix row(1, n);
  std::fill_n(row.data(), n, 1.0f);
  return row;
}

}  // namespace

double QuantizationWork(const ModelConfig& config, const gptq::Options& options, int64_t n_tokens) {
  const double tokens = static_cast<double>(n_tokens);
  const bool follows_original = NeedsOriginalInputs(options);
  double work = tokens * LayerFlopsPerToken(config) * (follows_original ? 2 : 1);
  work += tokens *
          (2 * Squared(config.hidden) + Squared(config.q_width()) + Squared(config.intermediate)) *
          (follows_original ? 3 : 1);
  for (const int64_t in : {config.hidden, config.q_width(), config.hidden, config.intermediate}) {
    work += SharedWork(in, options);
  }
  for (const LinearShape& shape : LinearShapes(config)) {
    work += LinearWork(shape.in, shape.out, options);
  }
  return work * static_cast<double>(config.n_layers);
}

LayerQuantizer::LayerQuantizer(const JobInputs& inputs, evaluate::LayerSource& source,
                               const calibrate::TokenWindows& windows, ArtifactWriter& writer,
                               Progress& progress)
    : job_(inputs.job),
      source_(source),
      windows_(windows),
      writer_(writer),
      pool_(inputs.pool),
      progress_(progress),
      saved_(inputs.saved),
      follows_original_(NeedsOriginalInputs(job_.quantizer)),
      context_(ForwardContext::Create(source.config(), {kernels::Backend::kCpu, &pool_})) {}

absl::Status LayerQuantizer::Run(JobReport& report) {
  const ModelConfig& config = source_.config();
  const int64_t n_tokens = windows_.count() * windows_.length;
  WALSH_ASSIGN_OR_RETURN(online_, OnlineForward::Create(job_.online, config));
  WALSH_RETURN_IF_ERROR(WriteEmbedding());

  batch_rows_ = std::min(evaluate::WindowsPerBatch(windows_.length) * windows_.length, n_tokens);
  scratch_.Reserve(config, batch_rows_);
  positions_.resize(static_cast<size_t>(batch_rows_));
  for (size_t i = 0; i < positions_.size(); ++i) {
    positions_[i] = static_cast<int32_t>(static_cast<int64_t>(i) % windows_.length);
  }
  const auto n_kept = static_cast<size_t>(KeptBytes(config, n_tokens)) / sizeof(float);
  for (Flow* flow : Flows()) flow->kept.resize(n_kept);
  if (follows_original_) {
    original_.hidden = rounded_.hidden.Copy();
    difference_.resize(static_cast<size_t>(
        batch_rows_ * std::max({config.hidden, config.q_width(), config.intermediate})));
  }

  WALSH_ASSIGN_OR_RETURN(const int64_t first_layer, Resume(report));
  for (int64_t l = first_layer; l < config.n_layers; ++l) {
    WALSH_RETURN_IF_ERROR(
        progress_.Enter(Stage::kCalibrating, l, saved_ != nullptr ? saved_->TakeNotice() : ""));
    progress_.Charge(Stage::kRotating);
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, source_.Layer(l));
    const DecoderLayer original = follows_original_ ? CopyDense(config, layer) : DecoderLayer();
    layer.online = online_;
    rounded_.layer = &layer;
    original_.layer = &original;
    quantized_.clear();
    WALSH_RETURN_IF_ERROR(QuantizeAttention(l, layer, report));
    WALSH_RETURN_IF_ERROR(QuantizeMlp(l, layer, report));
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kPacking, l));
    WALSH_RETURN_IF_ERROR(WriteAndKeepLayer(l, layer, report));
    progress_.LayerDone();
  }
  report.forward_seconds = rounded_.seconds;
  report.original_forward_seconds = original_.seconds;
  rounded_ = {};
  original_ = {};
  return WriteHead();
}

absl::Status LayerQuantizer::QuantizeAttention(int64_t index, DecoderLayer& layer,
                                               JobReport& report) {
  const ModelConfig& config = source_.config();
  const ForwardShares shares = Shares(config);

  progress_.Charge(Stage::kCalibrating);
  WALSH_ASSIGN_OR_RETURN(InputStatistics inputs,
                         Collect(&LayerQuantizer::AttentionInputs, config.hidden, 0));
  WALSH_RETURN_IF_ERROR(Quantize(index,
                                 {{"self_attn.q_proj", &layer.q_proj},
                                  {"self_attn.k_proj", &layer.k_proj},
                                  {"self_attn.v_proj", &layer.v_proj}},
                                 std::move(inputs), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  WALSH_ASSIGN_OR_RETURN(inputs, Collect(&LayerQuantizer::Attended, config.q_width(), shares.qkv));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"self_attn.o_proj", &layer.o_proj}}, std::move(inputs), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  return ForEachBatch(shares.o, [&](const Batch& b) -> absl::Status {
    for (Flow* flow : Flows()) {
      const float* attended = Kept(*flow, b, config.q_width());
      if (attended == nullptr) {
        WALSH_ASSIGN_OR_RETURN(attended, Attended(*flow, b));
      }
      WALSH_RETURN_IF_ERROR(Timed(*flow, [&] {
        return AttentionOutput(context_, *flow->layer, attended, b.n_rows,
                               flow->hidden.row(b.first_row), scratch_.out.data());
      }));
    }
    return absl::OkStatus();
  });
}

absl::Status LayerQuantizer::QuantizeMlp(int64_t index, DecoderLayer& layer, JobReport& report) {
  const ModelConfig& config = source_.config();
  const ForwardShares shares = Shares(config);

  WALSH_ASSIGN_OR_RETURN(InputStatistics inputs,
                         Collect(&LayerQuantizer::MlpInputs, config.hidden, 0));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"mlp.gate_proj", &layer.gate_proj}, {"mlp.up_proj", &layer.up_proj}},
               std::move(inputs), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  WALSH_ASSIGN_OR_RETURN(
      inputs, Collect(&LayerQuantizer::Activations, config.intermediate, shares.gate_up));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"mlp.down_proj", &layer.down_proj}}, std::move(inputs), report));

  // Nothing reads what the last layer puts out.
  if (index + 1 == config.n_layers) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  return ForEachBatch(shares.down, [&](const Batch& b) -> absl::Status {
    for (Flow* flow : Flows()) {
      const float* activations = Kept(*flow, b, config.intermediate);
      if (activations == nullptr) {
        WALSH_ASSIGN_OR_RETURN(activations, Activations(*flow, b));
      }
      WALSH_RETURN_IF_ERROR(Timed(*flow, [&] {
        return MlpOutput(context_, *flow->layer, activations, b.n_rows,
                         flow->hidden.row(b.first_row), scratch_.out.data());
      }));
    }
    return absl::OkStatus();
  });
}

absl::StatusOr<const float*> LayerQuantizer::AttentionInputs(Flow& flow, const Batch& batch) {
  WALSH_RETURN_IF_ERROR(AttentionInput(context_, *flow.layer, flow.hidden.row(batch.first_row),
                                       batch.n_rows, scratch_.normed.data()));
  return scratch_.normed.data();
}

absl::StatusOr<const float*> LayerQuantizer::Attended(Flow& flow, const Batch& batch) {
  WALSH_ASSIGN_OR_RETURN(const float* normed, AttentionInputs(flow, batch));
  WALSH_RETURN_IF_ERROR(Project(context_, *flow.layer, normed,
                                std::span(positions_).first(static_cast<size_t>(batch.n_rows)),
                                scratch_.q.data(), scratch_.k.data(), scratch_.v.data()));
  std::vector<SequenceSlice> sequences;
  for (int64_t row = 0; row < batch.n_rows; row += windows_.length) {
    sequences.push_back({row, windows_.length, 0, scratch_.k.row(row), scratch_.v.row(row)});
  }
  float* kept = Kept(flow, batch, source_.config().q_width());
  float* attended = kept != nullptr ? kept : scratch_.attended.data();
  WALSH_RETURN_IF_ERROR(Attend(context_, *flow.layer, scratch_.q.data(), sequences, attended));
  return attended;
}

absl::StatusOr<const float*> LayerQuantizer::MlpInputs(Flow& flow, const Batch& batch) {
  WALSH_RETURN_IF_ERROR(MlpInput(context_, *flow.layer, flow.hidden.row(batch.first_row),
                                 batch.n_rows, scratch_.normed.data()));
  return scratch_.normed.data();
}

absl::StatusOr<const float*> LayerQuantizer::Activations(Flow& flow, const Batch& batch) {
  WALSH_ASSIGN_OR_RETURN(const float* normed, MlpInputs(flow, batch));
  float* kept = Kept(flow, batch, source_.config().intermediate);
  float* activations = kept != nullptr ? kept : scratch_.gate.data();
  WALSH_RETURN_IF_ERROR(
      MlpActivation(context_, *flow.layer, normed, batch.n_rows, activations, scratch_.up.data()));
  return activations;
}

float* LayerQuantizer::Kept(Flow& flow, const Batch& batch, int64_t width) const {
  const int64_t end = (batch.first_row + batch.n_rows) * width;
  if (end > static_cast<int64_t>(flow.kept.size())) return nullptr;
  return flow.kept.data() + batch.first_row * width;
}

std::span<LayerQuantizer::Flow* const> LayerQuantizer::Flows() const {
  return std::span(flows_).first(follows_original_ ? 2 : 1);
}

absl::Status LayerQuantizer::Timed(Flow& flow, const std::function<absl::Status()>& forward) {
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = forward();
  flow.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return status;
}

void LayerQuantizer::ForEachPiece(int64_t n, const std::function<void(int64_t, int64_t)>& piece) {
  pool_.ParallelFor((n + kPieceFloats - 1) / kPieceFloats, [&](int64_t i) {
    piece(i * kPieceFloats, std::min(n, (i + 1) * kPieceFloats));
  });
}

absl::Status LayerQuantizer::ForEachBatch(double work_share, const Step& step) {
  const int64_t n_rows = rounded_.hidden.rows();
  const double work_per_row =
      work_share * LayerFlopsPerToken(source_.config()) * static_cast<double>(Flows().size());
  for (int64_t first = 0; first < n_rows; first += batch_rows_) {
    const Batch batch{first, std::min(batch_rows_, n_rows - first)};
    WALSH_RETURN_IF_ERROR(step(batch));
    WALSH_RETURN_IF_ERROR(progress_.Advance(work_per_row * static_cast<double>(batch.n_rows)));
  }
  return absl::OkStatus();
}

absl::StatusOr<LayerQuantizer::InputStatistics> LayerQuantizer::Collect(Inputs inputs, int64_t dim,
                                                                        double work_share) {
  InputStatistics sums{Matrix(dim, dim), follows_original_ ? Matrix(dim, dim) : Matrix()};
  const auto run = [&](Flow& flow, const Batch& b, const float*& x) {
    return [&] {
      WALSH_ASSIGN_OR_RETURN(x, (this->*inputs)(flow, b));
      return absl::OkStatus();
    };
  };
  const Step step = [&](const Batch& b) -> absl::Status {
    // What only prepares a forward pass is done again by it, and not counted here.
    const auto timed = [&](Flow& flow, const std::function<absl::Status()>& forward) {
      return work_share > 0 ? Timed(flow, forward) : forward();
    };
    const float* x = nullptr;
    const int64_t size = b.n_rows * dim;
    if (follows_original_) {
      WALSH_RETURN_IF_ERROR(timed(original_, run(original_, b, x)));
      ForEachPiece(size, [&](int64_t first, int64_t end) {
        std::copy(x + first, x + end, difference_.data() + first);
      });
    }
    WALSH_RETURN_IF_ERROR(timed(rounded_, run(rounded_, b, x)));
    WALSH_RETURN_IF_ERROR(kernels::Gram(
        {.n_tokens = b.n_rows, .dim = dim, .x = x, .x_stride = dim, .h = sums.hessian.data()},
        context_.stream));
    double work = Squared(dim);
    if (follows_original_) {
      ForEachPiece(size, [&](int64_t first, int64_t end) {
        float* difference = difference_.data();
        for (int64_t i = first; i < end; ++i) difference[i] -= x[i];
      });
      WALSH_RETURN_IF_ERROR(kernels::CrossGram({.n_tokens = b.n_rows,
                                                .dim = dim,
                                                .x = x,
                                                .x_stride = dim,
                                                .y = difference_.data(),
                                                .y_stride = dim,
                                                .c = sums.cross.data()},
                                               context_.stream));
      work *= 3;
    }
    return progress_.Advance(work * static_cast<double>(b.n_rows));
  };
  WALSH_RETURN_IF_ERROR(ForEachBatch(work_share, step));
  return sums;
}

absl::Status LayerQuantizer::Quantize(int64_t layer_index, const std::vector<Part>& parts,
                                      InputStatistics inputs, JobReport& report) {
  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kQuantizing, layer_index));
  const auto name_of = [&](const Part& part) {
    return absl::StrCat("layers.", layer_index, ".", std::string(part.name));
  };
  const int64_t in = inputs.hessian.rows();
  const gptq::Options shared = job_.OptionsFor(in);
  const KeepGoing keep_going = [this] { return progress_.Advance(0); };
  WALSH_ASSIGN_OR_RETURN(gptq::HessianFactor factor,
                         gptq::FactorizeHessian(std::move(inputs.hessian), shared,
                                                name_of(parts.front()), keep_going));
  if (CorrectsAsymmetry(shared)) {
    WALSH_RETURN_IF_ERROR(gptq::AddAsymmetricCalibration(inputs.cross, shared.gptaq_alpha,
                                                         context_.stream, factor, keep_going));
    WALSH_RETURN_IF_ERROR(progress_.Advance(SharedWork(in, shared)));
  }
  for (const Part& part : parts) {
    const std::string name = name_of(part);
    const gptq::Options options = job_.OptionsFor(layer_index, quantized_.size(), in);
    DenseLinear& linear = Dense(*part.linear);
    if (PropagatesError(options)) {
      WALSH_RETURN_IF_ERROR(gptq::PropagateError(inputs.cross, factor, options.error_propagation,
                                                 context_.stream, linear.weights(), keep_going));
    }
    WALSH_ASSIGN_OR_RETURN(
        gptq::QuantizedLinear result,
        gptq::QuantizeLinear(name, linear.weights(), factor, options, pool_, keep_going));
    LinearReport linear_report;
    linear_report.name = name;
    linear_report.layer = layer_index;
    linear_report.bits = options.bits;
    linear_report.relative_error = result.relative_error;
    linear_report.damp = factor.damp;
    linear_report.dead_columns = factor.dead_columns;
    linear_report.fallback = factor.fallback;
    if (!factor.fallback.empty()) {
      report.warnings.push_back(absl::StrCat(name, " was rounded to nearest: ", factor.fallback));
    }
    if (result.clamped_groups > 0) {
      report.warnings.push_back(absl::StrCat(name, ": ", result.clamped_groups,
                                             " groups exceed the range of half-precision scales "
                                             "and were clamped"));
    }
    progress_.LinearDone(linear_report);
    report.linears.push_back(std::move(linear_report));
    WALSH_RETURN_IF_ERROR(progress_.Advance(LinearWork(linear.in(), linear.out(), options)));
    linear.weights() = std::move(result.dequantized);
    quantized_.push_back(std::move(result.matrix));
  }
  return absl::OkStatus();
}

absl::Status LayerQuantizer::WriteEmbedding() {
  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kRotating, -1, "embedding"));
  WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source_.Embedding());
  rounded_.hidden = evaluate::Embed(source_.config(), embedding, windows_.ids);
  progress_.Charge(Stage::kPacking);
  return writer_.WriteDense(kEmbeddingTensor, embedding, /*one_dimensional=*/false);
}

absl::Status LayerQuantizer::WriteLayer(int64_t index, const DecoderLayer& layer) {
  for (size_t i = 0; i < kLayerLinears.size(); ++i) {
    const std::string name = LayerTensor(index, kLayerLinears[i].name);
    WALSH_RETURN_IF_ERROR(writer_.WriteQuantized(name, quantized_[i]));
    const std::vector<float>& bias = Dense(layer.*kLayerLinears[i].linear).bias();
    if (bias.empty()) continue;
    WALSH_RETURN_IF_ERROR(writer_.WriteDense(name + ".bias", ToRow(bias), true));
  }
  quantized_.clear();
  for (const LayerNorm& norm : LayerNorms(source_.config())) {
    const std::vector<float>& weights = layer.*norm.weights;
    WALSH_RETURN_IF_ERROR(writer_.WriteDense(
        LayerTensor(index, norm.name), weights.empty() ? Ones(norm.width) : ToRow(weights), true));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> LayerQuantizer::Resume(JobReport& report) {
  if (saved_ == nullptr) return 0;
  const int64_t n_done = saved_->n_layers();
  const int64_t n_layers = source_.config().n_layers;
  std::vector<Matrix*> activations;
  if (n_done < n_layers) {
    for (Flow* flow : Flows()) activations.push_back(&flow->hidden);
  }
  WALSH_RETURN_IF_ERROR(saved_->Restore(writer_, activations, report));
  const double work =
      QuantizationWork(source_.config(), job_.quantizer, windows_.count() * windows_.length);
  progress_.Resume(work * static_cast<double>(n_done) / static_cast<double>(n_layers), n_done);
  progress_.set_keeps_layers(saved_->is_kept());
  return n_done;
}

absl::Status LayerQuantizer::WriteAndKeepLayer(int64_t index, const DecoderLayer& layer,
                                               const JobReport& report) {
  if (saved_ == nullptr || !saved_->is_kept()) return WriteLayer(index, layer);
  RecordedTensors tensors;
  writer_.Record(&tensors);
  const absl::Status written = WriteLayer(index, layer);
  writer_.Record(nullptr);
  WALSH_RETURN_IF_ERROR(written);
  std::vector<const Matrix*> activations;
  if (index + 1 < source_.config().n_layers) {
    for (const Flow* flow : Flows()) activations.push_back(&flow->hidden);
  }
  WALSH_RETURN_IF_ERROR(saved_->KeepLayer(std::move(tensors), activations, report,
                                          job_.disk_bytes - writer_.bytes_written()));
  progress_.set_keeps_layers(saved_->is_kept());
  return absl::OkStatus();
}

absl::Status LayerQuantizer::WriteHead() {
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> norm, source_.FinalNorm());
  WALSH_RETURN_IF_ERROR(writer_.WriteDense(
      kFinalNormTensor, norm.empty() ? Ones(source_.config().hidden) : ToRow(norm), true));
  progress_.Charge(Stage::kRotating);
  WALSH_ASSIGN_OR_RETURN(const Matrix head, source_.Head());
  progress_.Charge(Stage::kPacking);
  return writer_.WriteDense(kLmHeadTensor, head, /*one_dimensional=*/false);
}

}  // namespace walsh::pipeline
