#include "worker/pipeline/layer_quantizer.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/evaluate/perplexity.h"
#include "worker/gptq/quantize_linear.h"
#include "worker/pipeline/rotated_source.h"

namespace walsh::pipeline {
namespace {

// What choosing grids and codes for one weight takes, in operations of a matrix product.
constexpr double kWorkPerWeight = 5000;

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

// Factor, trailing updates, error measurement, grids and codes.
double LinearWork(int64_t in, int64_t out) {
  return 5 * Squared(in) * static_cast<double>(out) +
         kWorkPerWeight * static_cast<double>(in) * static_cast<double>(out);
}

Matrix ToRow(const std::vector<float>& values) {
  Matrix row(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), row.data());
  return row;
}

Matrix Ones(int64_t n) {
  Matrix row(1, n);
  std::fill_n(row.data(), n, 1.0f);
  return row;
}

}  // namespace

double QuantizationWork(const ModelConfig& config, int64_t n_tokens) {
  const double tokens = static_cast<double>(n_tokens);
  double work = tokens * LayerFlopsPerToken(config);
  work += tokens *
          (2 * Squared(config.hidden) + Squared(config.q_width()) + Squared(config.intermediate));
  for (const LinearShape& shape : LinearShapes(config)) work += LinearWork(shape.in, shape.out);
  return work * static_cast<double>(config.n_layers);
}

LayerQuantizer::LayerQuantizer(const ResolvedJob& job, evaluate::LayerSource& source,
                               const calibrate::TokenWindows& windows, ArtifactWriter& writer,
                               ThreadPool& pool, Progress& progress)
    : job_(job),
      source_(source),
      windows_(windows),
      writer_(writer),
      pool_(pool),
      progress_(progress),
      context_(ForwardContext::Create(source.config(), {kernels::Backend::kCpu, &pool})) {}

absl::Status LayerQuantizer::Run(JobReport& report) {
  const ModelConfig& config = source_.config();
  const int64_t n_tokens = windows_.count() * windows_.length;
  WALSH_RETURN_IF_ERROR(WriteEmbedding());

  const int64_t batch_rows = evaluate::WindowsPerBatch(windows_.length) * windows_.length;
  scratch_.Reserve(config, batch_rows);
  positions_.resize(static_cast<size_t>(batch_rows));
  for (size_t i = 0; i < positions_.size(); ++i) {
    positions_[i] = static_cast<int32_t>(static_cast<int64_t>(i) % windows_.length);
  }
  kept_.resize(static_cast<size_t>(KeptBytes(config, n_tokens)) / sizeof(float));

  for (int64_t l = 0; l < config.n_layers; ++l) {
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, l));
    progress_.Charge(Stage::kRotating);
    WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, source_.Layer(l));
    quantized_.clear();
    WALSH_RETURN_IF_ERROR(QuantizeAttention(l, layer, report));
    WALSH_RETURN_IF_ERROR(QuantizeMlp(l, layer, report));
    WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kPacking, l));
    WALSH_RETURN_IF_ERROR(WriteLayer(l, layer));
    progress_.LayerDone();
  }
  hidden_ = Matrix();
  kept_ = {};
  WALSH_RETURN_IF_ERROR(WriteHead());
  report.forward_seconds = forward_seconds_;
  return absl::OkStatus();
}

absl::Status LayerQuantizer::QuantizeAttention(int64_t index, DecoderLayer& layer,
                                               JobReport& report) {
  const ModelConfig& config = source_.config();
  const ForwardShares shares = Shares(config);

  progress_.Charge(Stage::kCalibrating);
  Matrix hessian(config.hidden, config.hidden);
  const Step add_inputs = [&](const Batch& b) -> absl::Status {
    WALSH_RETURN_IF_ERROR(AttentionInput(context_, layer, hidden_.row(b.first_row), b.n_rows,
                                         scratch_.normed.data()));
    return AddToHessian(scratch_.normed.data(), b.n_rows, hessian);
  };
  WALSH_RETURN_IF_ERROR(ForEachBatch(0, 0, add_inputs));
  WALSH_RETURN_IF_ERROR(Quantize(index,
                                 {{"self_attn.q_proj", &layer.q_proj},
                                  {"self_attn.k_proj", &layer.k_proj},
                                  {"self_attn.v_proj", &layer.v_proj}},
                                 std::move(hessian), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  hessian = Matrix(config.q_width(), config.q_width());
  const Step attend = [&](const Batch& b) -> absl::Status {
    float* attended = b.kept != nullptr ? b.kept : scratch_.attended.data();
    WALSH_RETURN_IF_ERROR(Timed([&] { return Attended(layer, b, attended); }));
    return AddToHessian(attended, b.n_rows, hessian);
  };
  WALSH_RETURN_IF_ERROR(ForEachBatch(config.q_width(), shares.qkv, attend));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"self_attn.o_proj", &layer.o_proj}}, std::move(hessian), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  return ForEachBatch(config.q_width(), shares.o, [&](const Batch& b) -> absl::Status {
    const float* attended = b.kept;
    if (attended == nullptr) {
      WALSH_RETURN_IF_ERROR(Attended(layer, b, scratch_.attended.data()));
      attended = scratch_.attended.data();
    }
    return Timed([&] {
      return AttentionOutput(context_, layer, attended, b.n_rows, hidden_.row(b.first_row),
                             scratch_.out.data());
    });
  });
}

absl::Status LayerQuantizer::QuantizeMlp(int64_t index, DecoderLayer& layer, JobReport& report) {
  const ModelConfig& config = source_.config();
  const ForwardShares shares = Shares(config);

  Matrix hessian(config.hidden, config.hidden);
  const Step add_inputs = [&](const Batch& b) -> absl::Status {
    WALSH_RETURN_IF_ERROR(
        MlpInput(context_, layer, hidden_.row(b.first_row), b.n_rows, scratch_.normed.data()));
    return AddToHessian(scratch_.normed.data(), b.n_rows, hessian);
  };
  WALSH_RETURN_IF_ERROR(ForEachBatch(0, 0, add_inputs));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"mlp.gate_proj", &layer.gate_proj}, {"mlp.up_proj", &layer.up_proj}},
               std::move(hessian), report));

  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  hessian = Matrix(config.intermediate, config.intermediate);
  const Step activate = [&](const Batch& b) -> absl::Status {
    float* activation = b.kept != nullptr ? b.kept : scratch_.gate.data();
    WALSH_RETURN_IF_ERROR(Timed([&] { return Activation(layer, b, activation); }));
    return AddToHessian(activation, b.n_rows, hessian);
  };
  WALSH_RETURN_IF_ERROR(ForEachBatch(config.intermediate, shares.gate_up, activate));
  WALSH_RETURN_IF_ERROR(
      Quantize(index, {{"mlp.down_proj", &layer.down_proj}}, std::move(hessian), report));

  // Nothing reads what the last layer puts out.
  if (index + 1 == config.n_layers) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kCalibrating, index));
  return ForEachBatch(config.intermediate, shares.down, [&](const Batch& b) -> absl::Status {
    const float* activation = b.kept;
    if (activation == nullptr) {
      WALSH_RETURN_IF_ERROR(Activation(layer, b, scratch_.gate.data()));
      activation = scratch_.gate.data();
    }
    return Timed([&] {
      return MlpOutput(context_, layer, activation, b.n_rows, hidden_.row(b.first_row),
                       scratch_.out.data());
    });
  });
}

absl::Status LayerQuantizer::Attended(const DecoderLayer& layer, const Batch& batch,
                                      float* attended) {
  WALSH_RETURN_IF_ERROR(AttentionInput(context_, layer, hidden_.row(batch.first_row), batch.n_rows,
                                       scratch_.normed.data()));
  WALSH_RETURN_IF_ERROR(Project(context_, layer, scratch_.normed.data(),
                                std::span(positions_).first(static_cast<size_t>(batch.n_rows)),
                                scratch_.q.data(), scratch_.k.data(), scratch_.v.data()));
  std::vector<SequenceSlice> sequences;
  for (int64_t row = 0; row < batch.n_rows; row += windows_.length) {
    sequences.push_back({row, windows_.length, 0, scratch_.k.row(row), scratch_.v.row(row)});
  }
  return Attend(context_, scratch_.q.data(), sequences, attended);
}

absl::Status LayerQuantizer::Activation(const DecoderLayer& layer, const Batch& batch,
                                        float* activation) {
  WALSH_RETURN_IF_ERROR(MlpInput(context_, layer, hidden_.row(batch.first_row), batch.n_rows,
                                 scratch_.normed.data()));
  return MlpActivation(context_, layer, scratch_.normed.data(), batch.n_rows, activation,
                       scratch_.up.data());
}

absl::Status LayerQuantizer::Timed(const std::function<absl::Status()>& forward) {
  const auto start = std::chrono::steady_clock::now();
  absl::Status status = forward();
  forward_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return status;
}

absl::Status LayerQuantizer::ForEachBatch(int64_t kept_width, double work_share, const Step& step) {
  const int64_t n_rows = hidden_.rows();
  const int64_t batch_rows = evaluate::WindowsPerBatch(windows_.length) * windows_.length;
  const double work_per_row = work_share * LayerFlopsPerToken(source_.config());
  for (int64_t first = 0; first < n_rows; first += batch_rows) {
    Batch batch{first, std::min(batch_rows, n_rows - first), nullptr};
    const int64_t kept_end = (first + batch.n_rows) * kept_width;
    if (kept_width > 0 && kept_end <= static_cast<int64_t>(kept_.size())) {
      batch.kept = kept_.data() + first * kept_width;
    }
    WALSH_RETURN_IF_ERROR(step(batch));
    WALSH_RETURN_IF_ERROR(progress_.Advance(work_per_row * static_cast<double>(batch.n_rows)));
  }
  return absl::OkStatus();
}

absl::Status LayerQuantizer::AddToHessian(const float* x, int64_t n_rows, Matrix& hessian) {
  const int64_t dim = hessian.rows();
  WALSH_RETURN_IF_ERROR(
      kernels::Gram({.n_tokens = n_rows, .dim = dim, .x = x, .x_stride = dim, .h = hessian.data()},
                    context_.stream));
  return progress_.Advance(Squared(dim) * static_cast<double>(n_rows));
}

absl::Status LayerQuantizer::Quantize(int64_t layer_index, const std::vector<Part>& parts,
                                      Matrix hessian, JobReport& report) {
  WALSH_RETURN_IF_ERROR(progress_.Enter(Stage::kQuantizing, layer_index));
  const auto name_of = [&](const Part& part) {
    return absl::StrCat("layers.", layer_index, ".", std::string(part.suffix));
  };
  const gptq::Options options = job_.OptionsFor(hessian.rows());
  const KeepGoing keep_going = [this] { return progress_.Advance(0); };
  WALSH_ASSIGN_OR_RETURN(
      const gptq::HessianFactor factor,
      gptq::FactorizeHessian(std::move(hessian), options, name_of(parts.front()), keep_going));
  for (const Part& part : parts) {
    const std::string name = name_of(part);
    DenseLinear& linear = Dense(*part.linear);
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
    WALSH_RETURN_IF_ERROR(progress_.Advance(LinearWork(linear.in(), linear.out())));
    linear.weights() = std::move(result.dequantized);
    quantized_.push_back(std::move(result.matrix));
  }
  return absl::OkStatus();
}

absl::Status LayerQuantizer::WriteEmbedding() {
  progress_.Charge(Stage::kRotating);
  WALSH_ASSIGN_OR_RETURN(const Matrix embedding, source_.Embedding());
  hidden_ = evaluate::Embed(embedding, windows_.ids);
  progress_.Charge(Stage::kPacking);
  return writer_.WriteDense(kEmbeddingTensor, embedding, /*one_dimensional=*/false);
}

absl::Status LayerQuantizer::WriteLayer(int64_t index, const DecoderLayer& layer) {
  const std::array<const Linear*, 7> linears = {
      layer.q_proj.get(),    layer.k_proj.get(),  layer.v_proj.get(),   layer.o_proj.get(),
      layer.gate_proj.get(), layer.up_proj.get(), layer.down_proj.get()};
  const std::vector<LinearShape> shapes = LinearShapes(source_.config());
  for (size_t i = 0; i < shapes.size(); ++i) {
    const std::string name = LayerTensor(index, shapes[i].suffix);
    WALSH_RETURN_IF_ERROR(writer_.WriteQuantized(name, quantized_[i]));
    const std::vector<float>& bias = dynamic_cast<const DenseLinear&>(*linears[i]).bias();
    if (bias.empty()) continue;
    WALSH_RETURN_IF_ERROR(writer_.WriteDense(name + ".bias", ToRow(bias), true));
  }
  quantized_.clear();
  const auto norm = [&](const std::vector<float>& weights) {
    return weights.empty() ? Ones(source_.config().hidden) : ToRow(weights);
  };
  WALSH_RETURN_IF_ERROR(writer_.WriteDense(LayerTensor(index, "input_layernorm.weight"),
                                           norm(layer.input_norm), true));
  return writer_.WriteDense(LayerTensor(index, "post_attention_layernorm.weight"),
                            norm(layer.post_attention_norm), true);
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
