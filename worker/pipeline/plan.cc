#include "worker/pipeline/plan.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/name_pattern.h"
#include "common/status_macros.h"
#include "worker/calibrate/self_text.h"
#include "worker/evaluate/evaluation_memory.h"
#include "worker/evaluate/perplexity.h"
#include "worker/gptq/tile.h"
#include "worker/io/named_file.h"
#include "worker/model/decoder_layer.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/job_texts.h"
#include "worker/pipeline/rotation_gate.h"

namespace walsh::pipeline {
namespace {

constexpr int64_t kGroups[] = {128, 64, 32};
constexpr int64_t kPerChannel = -1;
// Packed formats store 32 codes of any width in whole 32-bit words.
constexpr int64_t kPackingUnit = 32;
constexpr int64_t kMiB = 1 << 20;
// In operations of a matrix product: reading, dequantizing and rotating a weight.
constexpr double kWorkPerWeightRead = 150;
// Code, libraries, allocator: measured on an idle worker.
constexpr int64_t kProcessBytes = 128 * kMiB;

absl::Status CheckRange(std::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(name), " ", value, ": must be from ", low, " to ", high));
}

absl::StatusOr<int64_t> ResolveGroup(int64_t asked, const std::vector<LinearShape>& shapes) {
  const auto divides_all = [&](int64_t group) {
    return std::all_of(shapes.begin(), shapes.end(),
                       [&](const LinearShape& shape) { return shape.in % group == 0; });
  };
  for (const LinearShape& shape : shapes) {
    if (shape.in % kPackingUnit != 0 || shape.out % kPackingUnit != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(std::string(shape.name), " is ", shape.out, " x ", shape.in,
                       ": both must be multiples of ", kPackingUnit, " to be packed"));
    }
  }
  if (asked == kPerChannel) return asked;
  if (asked == 0) {
    for (int64_t group : kGroups) {
      if (divides_all(group)) return group;
    }
  }
  if (std::find(std::begin(kGroups), std::end(kGroups), asked) == std::end(kGroups)) {
    return absl::InvalidArgumentError(
        absl::StrCat("group size ", asked, ": must be 32, 64, 128, or -1 for per channel"));
  }
  for (const LinearShape& shape : shapes) {
    if (shape.in % asked != 0) {
      return absl::InvalidArgumentError(absl::StrCat("group size ", asked, " does not divide the ",
                                                     shape.in, " inputs of ",
                                                     std::string(shape.name)));
    }
  }
  return asked;
}

// R2 stays within the attention: it needs no rotation of the residual stream, and no norm is in its
// way.
absl::Status ResolveHeadRotation(const JobSpec& spec, const ModelConfig& config, ResolvedJob& job) {
  rotate::Kind kind = rotate::Kind::kNone;
  if (spec.head_rotation.value_or(spec.rotation != rotate::Kind::kNone)) {
    const absl::Status exists = rotate::FactorHadamardOrder(config.head_dim).status();
    if (exists.ok()) {
      kind = rotate::Kind::kWalsh;
    } else if (spec.head_rotation.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("attention values are to be rotated by head (R2): no Hadamard matrix of "
                       "order ",
                       config.head_dim, ", the head dimension"));
    } else {
      job.warnings.push_back(
          absl::StrCat("attention values are not rotated (R2): no Hadamard "
                       "matrix of order ",
                       config.head_dim, ", the head dimension"));
    }
  }
  WALSH_ASSIGN_OR_RETURN(job.r2, rotate::Rotation::Create(config.head_dim, {.kind = kind}));
  return absl::OkStatus();
}

absl::Status ResolveRotation(const JobSpec& spec, const ModelConfig& config, ResolvedJob& job) {
  if (spec.rotation != rotate::Kind::kNone && config.has_output_norms) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rotation ", std::string(rotate::KindName(spec.rotation)), ": ", config.architecture,
        " has a norm between each sublayer's output and the residual stream, through which a "
        "rotation cannot be folded; must be none"));
  }
  rotate::Rotation::Options options{spec.rotation, 0, spec.rotation_signs, spec.seed};
  if (rotate::IsLocal(spec.rotation)) {
    options.block = spec.rotation_block;
    if (options.block == 0) {
      WALSH_ASSIGN_OR_RETURN(options.block, rotate::DefaultBlock(config.hidden, job.group_size));
    }
  } else if (spec.rotation_block != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rotation block ", spec.rotation_block, " has no meaning for rotation ",
        std::string(rotate::KindName(spec.rotation)), ": only local-hadamard and gsr have blocks"));
  }
  job.rotation_block = options.block;
  WALSH_ASSIGN_OR_RETURN(job.r1, rotate::Rotation::Create(config.hidden, options));

  return ResolveHeadRotation(spec, config, job);
}

absl::Status ResolveDownRotation(const OnlineSpec& spec, const ModelConfig& config,
                                 ResolvedJob& job) {
  const std::string name(rotate::KindName(spec.down_rotation));
  if (!rotate::IsLocal(spec.down_rotation) && spec.down_block != 0) {
    return absl::InvalidArgumentError(absl::StrCat("online rotation block ", spec.down_block,
                                                   " has no meaning for rotation ", name,
                                                   ": only local-hadamard and gsr have blocks"));
  }
  if (spec.down_rotation == rotate::Kind::kNone) return absl::OkStatus();
  if (!rotate::IsLocal(spec.down_rotation) &&
      !rotate::FactorHadamardOrder(config.intermediate).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("online rotation ", name,
                     " of down_proj's inputs: no Hadamard matrix of order ", config.intermediate,
                     " (docs/rotations.md has those that there are); use online "
                     "rotation gsr, whose blocks fit any width that 16 divides"));
  }
  OnlineTransforms::BlockRotation& rotation = job.online.down_input;
  rotation.sequency =
      spec.down_rotation == rotate::Kind::kWalsh || spec.down_rotation == rotate::Kind::kGsr;
  rotation.block = config.intermediate;
  if (rotate::IsLocal(spec.down_rotation)) {
    rotation.block = spec.down_block;
    if (rotation.block == 0) {
      WALSH_ASSIGN_OR_RETURN(rotation.block,
                             rotate::DefaultBlock(config.intermediate, job.group_size));
    }
    job.online_block = rotation.block;
  }
  // The errors of the rotation that the weights get.
  return rotate::Rotation::Create(config.intermediate,
                                  {spec.down_rotation, job.online_block, false, 0})
      .status();
}

absl::Status ResolveQueryKeyRotation(const JobSpec& spec, const ModelConfig& config,
                                     ResolvedJob& job) {
  const bool is_kv_quantized = job.online.kv_cache.is_on();
  const bool asked = spec.online.query_key.value_or(false);
  if (asked && !is_kv_quantized) {
    return absl::InvalidArgumentError(
        "queries and keys are to be rotated (R3), but the KV cache is not quantized: it would cost "
        "time and change nothing");
  }
  const bool is_rotated = !job.r1.is_identity() || !job.r2.is_identity() ||
                          spec.online.down_rotation != rotate::Kind::kNone;
  if (!asked && (spec.online.query_key.has_value() || !is_kv_quantized || !is_rotated)) {
    return absl::OkStatus();
  }
  const absl::Status exists = rotate::FactorHadamardOrder(config.head_dim).status();
  if (exists.ok()) {
    job.online.query_key = {.block = config.head_dim, .sequency = true};
  } else if (asked) {
    return exists;
  } else {
    job.warnings.push_back(
        absl::StrCat("queries and keys are not rotated (R3): no Hadamard matrix of order ",
                     config.head_dim, ", the head dimension"));
  }
  return absl::OkStatus();
}

// A block spreads an outlier over its own channels only, a global rotation over all. At fewer bits
// of the weights it is open which is better: GSR's table has the local one at W2A4, docs/quality.md
// the global one, with R4 of the same kind.
void WarnOfLocalRotation(const JobSpec& spec, const ModelConfig& config, ResolvedJob& job) {
  constexpr int kFewBits = 4;
  const OnlineTransforms::Rounding& activations = job.online.activations;
  const bool is_whole_row = activations.group_size == OnlineTransforms::kWholeRow;
  if (activations.bits > kFewBits || spec.quantizer.bits < kFewBits ||
      !rotate::IsLocal(spec.rotation) || job.rotation_block == config.hidden ||
      (!is_whole_row && activations.group_size <= job.rotation_block) ||
      !rotate::FactorHadamardOrder(config.hidden).ok()) {
    return;
  }
  job.warnings.push_back(absl::StrCat(
      "activations of ", activations.bits, " bits beneath a rotation in blocks of ",
      job.rotation_block, ": rotation walsh or hadamard spreads outliers over the whole width ",
      config.hidden));
}

absl::Status ResolveOnline(const JobSpec& spec, const ModelConfig& config, ResolvedJob& job) {
  const OnlineSpec& online = spec.online;
  WALSH_RETURN_IF_ERROR(ResolveDownRotation(online, config, job));
  if (online.activation_bits != OnlineTransforms::Rounding::kOff) {
    job.online.activations = {
        .bits = online.activation_bits,
        .group_size =
            online.activation_group == 0 ? OnlineTransforms::kWholeRow : online.activation_group,
        .symmetric = online.activations_symmetric,
        .clip_ratio = online.activation_clip != 0 ? online.activation_clip
                                                  : DefaultActivationClip(online.activation_bits)};
  }
  if (online.kv_bits != OnlineTransforms::Rounding::kOff) {
    job.online.kv_cache = {
        .bits = online.kv_bits,
        .group_size = online.kv_group == 0 ? config.head_dim : online.kv_group,
        .symmetric = false,
        .clip_ratio = online.kv_clip != 0 ? online.kv_clip : DefaultKvClip(online.kv_bits)};
  }
  WarnOfLocalRotation(spec, config, job);
  WALSH_RETURN_IF_ERROR(ResolveQueryKeyRotation(spec, config, job));
  return CheckOnlineTransforms(job.online, config);
}

int64_t LayerWeights(const ModelConfig& config) {
  int64_t n = 0;
  for (const LinearShape& shape : LinearShapes(config)) n += shape.in * shape.out;
  return n;
}

// What a job holds at one time, phase by phase; each function names the objects that make it.
class Memory {
 public:
  Memory(const JobSpec& spec, const ModelConfig& config, const ResolvedJob& job)
      : spec_(spec),
        config_(config),
        job_(job),
        tokens_(spec.n_calibration_windows * job.sequence_length),
        evaluation_tokens_(job.n_evaluation_windows * job.evaluation_length),
        vocabulary_(config.vocab * config.hidden),
        layer_(LayerWeights(config)) {
    for (const LinearShape& shape : LinearShapes(config)) {
      widest_ = std::max(widest_, shape.in);
      largest_ = std::max(largest_, shape.in * shape.out);
    }
  }

  int64_t Peak() const {
    int64_t peak =
        std::max({Embedding(), Calibration(), Evaluation(), TaskMemoryNeeded(config_, job_)});
    if (job_.rotates()) peak = std::max(peak, Gate());
    return std::max(Preparation(), ProcessMemory(spec_, job_) + peak);
  }
  int64_t Preparation() const {
    int64_t peak = Texts() + TokenIds();
    if (spec_.calibration_path.empty()) peak = std::max(peak, SelfText());
    return ProcessMemory(spec_, job_) + peak;
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);
  static constexpr int64_t kId = sizeof(int32_t);
  static constexpr int64_t kCode = sizeof(uint8_t);
  static constexpr int64_t kBf16 = sizeof(uint16_t);

  // A file with the samples in it. Parsed JSON holds a text up to four times: the file, a copy in
  // braces, the document and the samples.
  static int64_t TextBytes(const NamedFile& file, bool joins_rows) {
    std::error_code error;
    const auto size = file.path.empty() ? 0 : std::filesystem::file_size(file.path, error);
    if (error) return 0;  // the job will say so
    // The rows, and what they are joined to: at most two bytes for each.
    if (joins_rows) return static_cast<int64_t>(size) * 3;
    const std::string extension = std::filesystem::path(file.shown()).extension();
    return static_cast<int64_t>(size) * (extension == ".json" ? 4 : extension == ".jsonl" ? 2 : 1);
  }
  int64_t TokenIds() const { return (tokens_ + evaluation_tokens_) * kId; }
  int64_t Texts() const {
    return std::max(
        TextBytes({spec_.calibration_path, spec_.calibration_name}, false),
        TextBytes({spec_.evaluation_path, spec_.evaluation_name}, spec_.evaluation_joins_rows));
  }

  // Rows that go through a layer at once, and the buffers of a forward for them.
  int64_t BatchRows(int64_t length, int64_t tokens) const {
    return std::min(evaluate::WindowsPerBatch(length) * length, std::max(length, tokens));
  }
  int64_t Scratch(int64_t rows) const { return ForwardScratch::SizeBytes(config_, rows); }

  // The embedding and the hidden states that are looked up in it.
  int64_t Embedding() const {
    return (vocabulary_ + std::max(tokens_, evaluation_tokens_) * config_.hidden) * kFloat;
  }

  // Hidden states, kept outputs, buffers, a layer and its codes; and either a Hessian that is
  // factorized in double at worst (what makes GPTAQ's correction takes no more), or the Hessian,
  // its factor, the correction, and four copies and the codes of the largest linear.
  int64_t Calibration() const {
    const int64_t factorizing = widest_ * widest_ * 4 * kFloat;
    const int64_t factors = gptq::CorrectsAsymmetry(job_.quantizer) ? 3 : 2;
    const int64_t quantizing =
        widest_ * widest_ * factors * kFloat + largest_ * (4 * kFloat + kCode);
    const int64_t rows = BatchRows(job_.sequence_length, tokens_);
    const int64_t flow =
        tokens_ * config_.hidden * kFloat + KeptBytes(config_, tokens_) + layer_ * kFloat;
    // The original model's flow, and the difference of the inputs: its sums and a batch of it.
    const int64_t original = gptq::NeedsOriginalInputs(job_.quantizer)
                                 ? flow + (widest_ * widest_ + rows * widest_) * kFloat
                                 : 0;
    return flow + original + Scratch(rows) + layer_ * kCode + Grids() +
           std::max(factorizing, quantizing);
  }

  // A layer's tables of levels; the grids of the largest linear that wait for their steps. Those
  // of uniform grids in other orders are small.
  int64_t Grids() const {
    const int64_t group = job_.group_size == kPerChannel ? kPackingUnit : job_.group_size;
    const bool has_levels = job_.quantizer.grid == gptq::Grid::kCodebook;
    const int64_t levels = has_levels ? layer_ / group * gptq::kLevels * kFloat : 0;
    const int64_t waiting =
        gptq::HasStaticGroups(job_.quantizer)
            ? largest_ / group * static_cast<int64_t>(sizeof(gptq::TileGrid)) / gptq::kTileRows
            : 0;
    return levels + waiting;
  }

  // What waits of the original, its hidden states and head, beside the quantized model's hidden
  // states, buffers, keys and values; and either a layer, dequantized from a linear's packed and
  // unpacked codes, or the head with some rows of both models' logits.
  int64_t Evaluation() const {
    if (evaluation_tokens_ == 0) return 0;
    const int64_t rows = BatchRows(job_.evaluation_length, evaluation_tokens_);
    const int64_t layer =
        rows * 2 * config_.kv_width() * kFloat + layer_ * kFloat + 2 * largest_ * kCode;
    const int64_t head = (vocabulary_ + 2 * evaluate::kLogitRows * config_.vocab) * kFloat;
    const int64_t hidden = evaluation_tokens_ * config_.hidden * kFloat;
    return hidden + vocabulary_ * kFloat + hidden + Scratch(rows) + std::max(layer, head);
  }

  // The head, and the logits of both models.
  int64_t Gate() const { return (vocabulary_ + 2 * kGateTokensMax * config_.vocab) * kFloat; }

  // Weights at 8 bits with a 16-bit scale for every 32, embeddings at 16; and either a matrix that
  // is being packed (a layer of floats, or the head, and the codes of one linear), or the caches
  // and logits.
  int64_t SelfText() const {
    const int64_t packed = layer_ * config_.n_layers + vocabulary_;
    const int64_t loading =
        std::max(layer_ * kFloat + largest_ * kCode, vocabulary_ * (kFloat + kCode));
    const int64_t documents = calibrate::SelfTextBatch(config_, SelfTextTokens(spec_, job_));
    const int64_t document_tokens =
        std::min(calibrate::kSelfDocumentTokensMax, config_.max_position);
    const int64_t generating =
        documents * kFloat *
        (document_tokens * 2 * config_.n_layers * config_.kv_width() + config_.vocab);
    return packed * kCode + packed / 32 * kBf16 + vocabulary_ * kBf16 +
           std::max(loading, generating);
  }

  const JobSpec& spec_;
  const ModelConfig& config_;
  const ResolvedJob& job_;
  const int64_t tokens_, evaluation_tokens_;
  const int64_t vocabulary_;  // weights of the embedding, and of the head
  const int64_t layer_;       // weights of a layer's linears
  int64_t widest_ = 0;        // inputs of a linear
  int64_t largest_ = 0;       // weights of a linear
};

int64_t DiskBytes(const ModelConfig& config, const ResolvedJob& job) {
  int64_t group_index = 0;  // of a layer, in bits
  for (const LinearShape& shape : LinearShapes(config)) group_index += shape.in * 32;
  const int64_t bits = StoredBits(config, job) + group_index * config.n_layers;
  const int64_t dense = 2 * (2 * config.vocab * config.hidden);
  // Tokenizer, configuration, report and headers.
  return bits / 8 + dense + 32 * kMiB;
}

// "layers.3.mlp.down_proj", as reports name a linear.
std::string LinearName(int64_t layer, const LinearShape& shape) {
  return absl::StrCat("layers.", layer, ".", std::string(shape.name));
}

absl::Status CheckBits(std::string_view name, int bits) {
  if (bits == 2 || bits == 3 || bits == 4 || bits == 8) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(name), ": bits ", bits, ": must be 2, 3, 4 or 8"));
}

// The bits of each linear; empty without overrides.
absl::StatusOr<std::vector<std::vector<int>>> ResolveBits(const JobSpec& spec,
                                                          const ModelConfig& config) {
  std::vector<std::vector<int>> bits;
  if (spec.overrides.empty()) return bits;
  const std::vector<LinearShape> shapes = LinearShapes(config);
  bits.assign(static_cast<size_t>(config.n_layers),
              std::vector<int>(shapes.size(), spec.quantizer.bits));
  for (const BitsOverride& entry : spec.overrides) {
    const std::string label = absl::StrCat("override '", entry.pattern, "'");
    WALSH_RETURN_IF_ERROR(CheckBits(label, entry.bits));
    const absl::StatusOr<NamePattern> pattern = NamePattern::Parse(entry.pattern);
    if (!pattern.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(label, ": ", pattern.status().message()));
    }
    bool matches_any = false;
    for (int64_t layer = 0; layer < config.n_layers; ++layer) {
      for (size_t i = 0; i < shapes.size(); ++i) {
        if (!pattern->Matches(LinearName(layer, shapes[i]))) continue;
        bits[static_cast<size_t>(layer)][i] = entry.bits;
        matches_any = true;
      }
    }
    if (!matches_any) {
      return absl::InvalidArgumentError(absl::StrCat(
          label, " matches no linear of the model: their names go from ",
          LinearName(0, shapes.front()), " to ", LinearName(config.n_layers - 1, shapes.back())));
    }
  }
  return bits;
}

}  // namespace

gptq::Options ResolvedJob::OptionsFor(int64_t in) const {
  gptq::Options options = quantizer;
  options.group_size = group_size == kPerChannel ? in : group_size;
  return options;
}

gptq::Options ResolvedJob::OptionsFor(int64_t layer, size_t index, int64_t in) const {
  gptq::Options options = OptionsFor(in);
  if (bits.empty()) return options;
  options.bits = bits[static_cast<size_t>(layer)][index];
  if (options.bits != 2) options.grid = gptq::Grid::kUniform;
  return options;
}

int64_t StoredBits(const ModelConfig& config, const ResolvedJob& job) {
  const std::vector<LinearShape> shapes = LinearShapes(config);
  int64_t bits = 0;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    for (size_t i = 0; i < shapes.size(); ++i) {
      bits += gptq::StoredBits(job.OptionsFor(layer, i, shapes[i].in), shapes[i].in, shapes[i].out);
    }
  }
  return bits;
}

int64_t KeptBytes(const ModelConfig& config, int64_t n_tokens) {
  const int64_t width = std::max(config.q_width(), config.intermediate);
  return std::min(n_tokens * width * static_cast<int64_t>(sizeof(float)), kKeptBytesMax);
}

double LayerFlopsPerToken(const ModelConfig& config) {
  return 2.0 * static_cast<double>(LayerWeights(config));
}

double ModelFlopsPerToken(const ModelConfig& config) {
  return LayerFlopsPerToken(config) * static_cast<double>(config.n_layers) +
         2.0 * static_cast<double>(config.vocab * config.hidden);
}

double ReadWork(const ModelConfig& config) {
  return kWorkPerWeightRead *
         (LayerFlopsPerToken(config) / 2 * static_cast<double>(config.n_layers) +
          2.0 * static_cast<double>(config.vocab * config.hidden));
}

// Memory is planned for so many. A byte of plain text is a token at most, and a row that is joined
// ends with three of them; what chats in JSON are rendered to is not known from their size.
int64_t EvaluationWindows(const JobSpec& spec, const ResolvedJob& job) {
  if (!spec.evaluate) return 0;
  const NamedFile file{spec.evaluation_path, spec.evaluation_name};
  const std::string extension = std::filesystem::path(file.shown()).extension();
  const bool is_json = extension == ".json" || extension == ".jsonl";
  std::error_code error;
  const auto size = file.path.empty() ? 0 : std::filesystem::file_size(file.path, error);
  // Without a file, or with one that cannot be read, which the job will say.
  if (size == 0 || error || (is_json && !spec.evaluation_joins_rows)) {
    return spec.n_evaluation_windows;
  }
  const int64_t tokens = static_cast<int64_t>(size) * (spec.evaluation_joins_rows ? 3 : 1) + 1;
  const int64_t more = std::max<int64_t>(0, tokens - job.evaluation_length);
  return std::min(spec.n_evaluation_windows, 1 + more / job.evaluation_stride);
}

absl::StatusOr<ResolvedJob> Resolve(const JobSpec& spec, const Checkpoint& checkpoint,
                                    const KeepGoing& keep_going) {
  const ModelConfig& config = checkpoint.config();
  ResolvedJob job;
  WALSH_RETURN_IF_ERROR(CheckRange("calibration windows", spec.n_calibration_windows, 1,
                                   limits::kCalibrationSamplesMax));
  WALSH_RETURN_IF_ERROR(CheckRange("sequence length", spec.sequence_length,
                                   limits::kSequenceLengthMin, limits::kSequenceLengthMax));
  if (spec.evaluate) {
    WALSH_RETURN_IF_ERROR(CheckRange("evaluation windows", spec.n_evaluation_windows, 1,
                                     limits::kCalibrationSamplesMax));
    WALSH_RETURN_IF_ERROR(CheckRange("evaluation length", spec.evaluation_length,
                                     limits::kSequenceLengthMin, limits::kSequenceLengthMax));
    WALSH_RETURN_IF_ERROR(
        CheckRange("evaluation stride", spec.evaluation_stride, 0, spec.evaluation_length));
  }
  job.sequence_length = std::min(spec.sequence_length, config.max_position);
  job.evaluation_length = std::min(spec.evaluation_length, config.max_position);
  job.evaluation_stride = spec.evaluation_stride == 0
                              ? job.evaluation_length
                              : std::min(spec.evaluation_stride, job.evaluation_length);
  job.n_evaluation_windows = EvaluationWindows(spec, job);
  if (job.sequence_length < spec.sequence_length) {
    job.warnings.push_back(absl::StrCat("sequence length ", spec.sequence_length,
                                        " reduced to the model's context ", config.max_position));
  }
  if (spec.evaluate && job.evaluation_length < spec.evaluation_length) {
    job.warnings.push_back(absl::StrCat("evaluation length ", spec.evaluation_length,
                                        " reduced to the model's context ", config.max_position));
  }

  const std::vector<LinearShape> shapes = LinearShapes(config);
  WALSH_ASSIGN_OR_RETURN(job.group_size, ResolveGroup(spec.quantizer.group_size, shapes));
  job.quantizer = spec.quantizer;
  WALSH_ASSIGN_OR_RETURN(job.bits, ResolveBits(spec, config));
  int64_t widest = 0;
  for (const LinearShape& shape : shapes) {
    WALSH_RETURN_IF_ERROR(gptq::ValidateOptions(job.OptionsFor(shape.in), shape.in));
    widest = std::max(widest, shape.in);
  }
  if (const int64_t tokens = spec.n_calibration_windows * job.sequence_length; tokens < widest) {
    job.warnings.push_back(absl::StrCat("only ", tokens,
                                        " calibration tokens for linears with up "
                                        "to ",
                                        widest, " inputs: their Hessians are singular"));
  }
  WALSH_RETURN_IF_ERROR(ResolveRotation(spec, config, job));
  WALSH_RETURN_IF_ERROR(ResolveOnline(spec, config, job));
  job.disk_bytes = DiskBytes(config, job);
  if (spec.evaluate) {
    WALSH_ASSIGN_OR_RETURN(job.tasks, evaluate::ReadTasks(spec.tasks, keep_going));
  }
  return job;
}

int64_t HostMemoryNeeded(const JobSpec& spec, const ModelConfig& config, const ResolvedJob& job) {
  return Memory(spec, config, job).Peak();
}

int64_t ProcessMemory(const JobSpec& spec, const ResolvedJob& job) {
  const int64_t tokens = spec.n_calibration_windows * job.sequence_length +
                         job.n_evaluation_windows * job.evaluation_length;
  evaluate::EvaluationShape tasks;
  evaluate::AddTasks(job.tasks, {}, tasks);
  return kProcessBytes + tokens * static_cast<int64_t>(sizeof(int32_t)) + tasks.held_bytes;
}

int64_t TaskMemoryNeeded(const ModelConfig& config, const ResolvedJob& job) {
  evaluate::EvaluationShape shape;
  evaluate::AddTasks(job.tasks, config, shape);
  shape.held_bytes = 0;  // of ProcessMemory
  return evaluate::EvaluationBytes(config, nullptr, shape);
}

int64_t EvaluationTextTokens(const ResolvedJob& job) {
  return job.evaluation_length + (job.n_evaluation_windows - 1) * job.evaluation_stride;
}

int64_t PreparationMemoryNeeded(const JobSpec& spec, const ModelConfig& config,
                                const ResolvedJob& job) {
  return Memory(spec, config, job).Preparation();
}

absl::StatusOr<JobPlan> PlanJob(const JobSpec& spec) { return PlanJob(spec, *MakeCpuBackend()); }

absl::StatusOr<JobPlan> PlanJob(const JobSpec& spec, const Backend& backend) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                         Checkpoint::Open(spec.source_path));
  WALSH_ASSIGN_OR_RETURN(const ResolvedJob job, Resolve(spec, *checkpoint));
  WALSH_RETURN_IF_ERROR(backend.CheckSupported(checkpoint->config(), job));
  const MemoryNeeds needs = backend.Needs(spec, checkpoint->config(), job);
  JobPlan plan;
  plan.architecture = checkpoint->config().architecture;
  plan.layers = checkpoint->config().n_layers;
  plan.group_size = job.group_size;
  plan.rotation_block = job.rotation_block;
  plan.online_block = job.online_block;
  plan.memory_bytes_needed = needs.host_bytes;
  plan.device_memory_bytes_needed = needs.device_bytes;
  plan.disk_bytes_needed = job.disk_bytes;
  plan.warnings = job.warnings;
  return plan;
}

}  // namespace walsh::pipeline
