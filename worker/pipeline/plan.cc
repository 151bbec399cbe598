#include "worker/pipeline/plan.h"

#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/calibrate/self_text.h"

namespace walsh::pipeline {
namespace {

constexpr int64_t kGroups[] = {128, 64, 32};
constexpr int64_t kPerChannel = -1;
// Packed formats store 32 codes of any width in whole 32-bit words.
constexpr int64_t kPackingUnit = 32;
constexpr int64_t kMiB = 1 << 20;
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
          absl::StrCat(std::string(shape.suffix), " is ", shape.out, " x ", shape.in,
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
                                                     std::string(shape.suffix)));
    }
  }
  return asked;
}

absl::Status ResolveRotation(const JobSpec& spec, const ModelConfig& config, ResolvedJob& job) {
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

  rotate::Rotation::Options head{rotate::Kind::kNone, 0, false, 0};
  if (spec.rotation != rotate::Kind::kNone) {
    if (rotate::FactorHadamardOrder(config.head_dim).ok()) {
      head.kind = rotate::Kind::kWalsh;
    } else {
      job.warnings.push_back(
          absl::StrCat("attention values are not rotated (R2): no Hadamard "
                       "matrix of order ",
                       config.head_dim, ", the head dimension"));
    }
  }
  WALSH_ASSIGN_OR_RETURN(job.r2, rotate::Rotation::Create(config.head_dim, head));
  return absl::OkStatus();
}

int64_t LayerWeights(const ModelConfig& config) {
  int64_t n = 0;
  for (const LinearShape& shape : LinearShapes(config)) n += shape.in * shape.out;
  return n;
}

// The largest of what calibration, evaluation and self-written text hold at one time.
int64_t MemoryBytes(const JobSpec& spec, const ModelConfig& config, const ResolvedJob& job) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t embedding = config.vocab * config.hidden * kFloat;
  const int64_t layer = LayerWeights(config) * kFloat;
  int64_t widest = 0, largest = 0;
  for (const LinearShape& shape : LinearShapes(config)) {
    widest = std::max(widest, shape.in);
    largest = std::max(largest, shape.in * shape.out * kFloat);
  }
  const int64_t tokens = spec.n_calibration_windows * job.sequence_length;
  const int64_t eval_tokens = spec.evaluate ? spec.n_evaluation_windows * job.evaluation_length : 0;
  const int64_t batch =
      std::max<int64_t>(2048, job.sequence_length) * kFloat *
      (3 * config.hidden + 2 * config.q_width() + 4 * config.kv_width() + 3 * config.intermediate);
  // Hidden states, one sublayer's outputs, the Hessian with its factor (twice in double at worst),
  // the layer with the working copies of its largest linear.
  const int64_t calibration =
      tokens * kFloat * (config.hidden + std::max(config.q_width(), config.intermediate)) +
      6 * widest * widest * kFloat + layer + 5 * largest + batch;
  const int64_t evaluation = eval_tokens * kFloat * config.hidden + std::max(layer, embedding) +
                             batch + 256 * config.vocab * kFloat;
  int64_t peak = std::max({calibration, evaluation, 2 * embedding});
  if (spec.calibration_path.empty()) {
    const int64_t cache = calibrate::SelfTextBatch(config, tokens) *
                          std::min(calibrate::kSelfDocumentTokensMax, config.max_position) * 2 *
                          config.n_layers * config.kv_width() * kFloat;
    peak = std::max(peak, layer * config.n_layers + 2 * embedding + cache);
  }
  return peak + kProcessBytes;
}

int64_t DiskBytes(const ModelConfig& config, const ResolvedJob& job) {
  int64_t bits = 0;
  for (const LinearShape& shape : LinearShapes(config)) {
    const int64_t groups = shape.in / job.OptionsFor(shape.in).group_size;
    bits += shape.in * shape.out * job.quantizer.bits +
            shape.out * groups * (16 + job.quantizer.bits) + shape.in * 32;
  }
  const int64_t dense = 2 * (2 * config.vocab * config.hidden);
  // Tokenizer, configuration, report and headers.
  return bits / 8 * config.n_layers + dense + 32 * kMiB;
}

}  // namespace

std::vector<LinearShape> LinearShapes(const ModelConfig& config) {
  return {
      {"self_attn.q_proj", config.hidden, config.q_width()},
      {"self_attn.k_proj", config.hidden, config.kv_width()},
      {"self_attn.v_proj", config.hidden, config.kv_width()},
      {"self_attn.o_proj", config.q_width(), config.hidden},
      {"mlp.gate_proj", config.hidden, config.intermediate},
      {"mlp.up_proj", config.hidden, config.intermediate},
      {"mlp.down_proj", config.intermediate, config.hidden},
  };
}

gptq::Options ResolvedJob::OptionsFor(int64_t in) const {
  gptq::Options options = quantizer;
  options.group_size = group_size == kPerChannel ? in : group_size;
  return options;
}

double LayerFlopsPerToken(const ModelConfig& config) {
  return 2.0 * static_cast<double>(LayerWeights(config));
}

absl::StatusOr<ResolvedJob> Resolve(const JobSpec& spec, const Checkpoint& checkpoint) {
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
  }
  job.sequence_length = std::min(spec.sequence_length, config.max_position);
  job.evaluation_length = std::min(spec.evaluation_length, config.max_position);
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
  job.memory_bytes = MemoryBytes(spec, config, job);
  job.disk_bytes = DiskBytes(config, job);
  return job;
}

absl::StatusOr<JobPlan> PlanJob(const JobSpec& spec) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint,
                         Checkpoint::Open(spec.source_path));
  WALSH_ASSIGN_OR_RETURN(const ResolvedJob job, Resolve(spec, *checkpoint));
  JobPlan plan;
  plan.architecture = checkpoint->config().architecture;
  plan.layers = checkpoint->config().n_layers;
  plan.group_size = job.group_size;
  plan.rotation_block = job.rotation_block;
  plan.memory_bytes_needed = job.memory_bytes;
  plan.disk_bytes_needed = job.disk_bytes;
  plan.warnings = job.warnings;
  return plan;
}

}  // namespace walsh::pipeline
