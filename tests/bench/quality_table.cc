// The quality table of docs/quality.md: perplexity and layer error by rotation and bits.
//
//   quality_table MODEL --calibration FILE --evaluation FILE --bits 4,2
//       --rotations none,hadamard,walsh,local-hadamard,gsr --threads 16
//
// Runs the whole job in this process for each combination, on the CPU or with --device cuda:N on a
// GPU, evaluation included. All see the same windows, so differences are paired: Δ is the mean over
// windows of the difference of their losses in nats per token, ± its standard error. Prints
// Markdown, each row when it is known; name `none` first, since the rows after it are compared with
// it.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "common/command_line.h"
#include "common/device_choice.h"
#include "common/status_macros.h"
#include "tests/bench/work_directory.h"
#include "worker/evaluate/perplexity.h"
#include "worker/kernels/kernels.h"
#include "worker/pipeline/backend.h"
#include "worker/pipeline/cuda/cuda_backend.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::bench {
namespace {

struct Flags {
  std::string model, calibration, evaluation, work_directory;
  std::vector<int> bits = {4, 2};
  std::vector<std::string> rotations = {"none", "hadamard", "walsh", "local-hadamard", "gsr"};
  std::string method = "gptq", device = "cpu";
  int64_t group = 0;
  int64_t windows = 128, length = 2048, evaluation_windows = 20, evaluation_length = 2048;
  bool symmetric = false, natural_order = false, act_order = false, no_clip = false, signs = false;
  bool codebook = false, float_zero = false;
  double gptaq_alpha = gptq::Options().gptaq_alpha;
  double error_propagation = gptq::Options().error_propagation;
  uint64_t seed = 0;
  int threads = ThreadPool::HardwareThreads();
};

struct Row {
  int bits = 0;
  std::string rotation;
  std::vector<double> losses;
  double error = 0;  // geometric mean of the linears' relative errors
  double seconds = 0;
  pipeline::JobReport report;
};

struct Paired {
  double mean = 0, standard_error = 0;
};

Paired Difference(const std::vector<double>& a, const std::vector<double>& b) {
  const auto n = static_cast<double>(a.size());
  Paired d;
  for (size_t i = 0; i < a.size(); ++i) d.mean += (a[i] - b[i]) / n;
  double squares = 0;
  for (size_t i = 0; i < a.size(); ++i) squares += std::pow(a[i] - b[i] - d.mean, 2);
  d.standard_error = n > 1 ? std::sqrt(squares / (n - 1) / n) : 0;
  return d;
}

double Perplexity(const std::vector<double>& losses) {
  return evaluate::WindowLosses{losses, 0}.Perplexity();
}

absl::StatusOr<Row> RunOne(const Flags& flags, int bits, const std::string& rotation,
                           pipeline::Backend& backend, ThreadPool& pool) {
  pipeline::JobSpec spec;
  spec.job_name = "quality";
  spec.model_name = "quality";
  spec.source_path = flags.model;
  spec.calibration_path = flags.calibration;
  spec.n_calibration_windows = flags.windows;
  spec.sequence_length = flags.length;
  spec.quantizer.bits = bits;
  spec.quantizer.group_size = flags.group;
  spec.quantizer.symmetric = flags.symmetric;
  spec.quantizer.error_propagation = flags.error_propagation;
  spec.quantizer.mse_clip = !flags.no_clip;
  spec.quantizer.gptaq_alpha = flags.gptaq_alpha;
  spec.quantizer.method = flags.method == "rtn"     ? gptq::Method::kRtn
                          : flags.method == "gptaq" ? gptq::Method::kGptaq
                                                    : gptq::Method::kGptq;
  spec.quantizer.column_order = flags.natural_order ? gptq::ColumnOrder::kNatural
                                : flags.act_order   ? gptq::ColumnOrder::kActOrder
                                                    : gptq::ColumnOrder::kGroupAware;
  if (flags.codebook && bits == 2) spec.quantizer.grid = gptq::Grid::kCodebook;
  if (flags.float_zero) spec.quantizer.zero_point = gptq::ZeroPoint::kFloat;
  WALSH_ASSIGN_OR_RETURN(spec.rotation, rotate::ParseKind(rotation));
  spec.rotation_signs = flags.signs && spec.rotation != rotate::Kind::kNone;
  spec.seed = flags.seed;
  spec.evaluation_path = flags.evaluation;
  spec.n_evaluation_windows = flags.evaluation_windows;
  spec.evaluation_length = flags.evaluation_length;
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<WorkDirectory> work,
                         WorkDirectory::Create(flags.work_directory));
  spec.output_directory = *work / "artifact";

  Row row;
  row.bits = bits;
  row.rotation = rotation;
  const auto start = std::chrono::steady_clock::now();
  WALSH_ASSIGN_OR_RETURN(row.report, pipeline::RunJob(spec, backend, pool, {}));
  row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() -
                row.report.stage_seconds[static_cast<int>(pipeline::Stage::kEvaluating)];
  for (const pipeline::LinearReport& linear : row.report.linears) {
    row.error += std::log(linear.relative_error) / static_cast<double>(row.report.linears.size());
  }
  row.error = std::exp(row.error);

  row.losses = row.report.window_losses_after;
  std::fprintf(stderr, "%d bits, %s: perplexity %.4f, E %.5f, %.1f s\n", bits, rotation.c_str(),
               Perplexity(row.losses), row.error, row.seconds);
  return row;
}

void PrintHeading(const Flags& flags, const pipeline::JobReport& report) {
  std::printf(
      "Source %s; %s, error propagation %g, group %ld; calibrated on %ld windows of %ld tokens, "
      "fingerprint "
      "%.12s; evaluated on %ld windows of %ld tokens; on %s, kernels of the CPU %s; %d "
      "threads.\n\n",
      report.source_format.c_str(), flags.method.c_str(),
      flags.method == "gptq" ? flags.error_propagation : 0.0, static_cast<long>(report.group_size),
      static_cast<long>(report.calibration_windows),
      static_cast<long>(report.calibration_tokens / report.calibration_windows),
      report.calibration_fingerprint.c_str(), static_cast<long>(report.window_losses_before.size()),
      static_cast<long>(flags.evaluation_length), flags.device.c_str(),
      kernels::DescribeCpuBackend().c_str(), flags.threads);
  std::printf(
      "| bits | rotation | bits a weight | perplexity | Δ to the original, nat | Δ to none, "
      "nat | E, geometric mean | seconds |\n|---|---|---|---|---|---|---|---|\n");
  std::printf("| 16 | – | 16 | %.3f | – | – | – | – |\n", Perplexity(report.window_losses_before));
}

// `none` is the row without rotation of the same bits, or null.
void PrintRow(const Row& row, const Row* none) {
  const Paired to_baseline = Difference(row.losses, row.report.window_losses_before);
  std::string to_none = "–";
  if (none != nullptr) {
    const Paired d = Difference(row.losses, none->losses);
    to_none = absl::StrFormat("%+.4f ± %.4f", d.mean, d.standard_error);
  }
  std::printf("| %d | %s | %.3f | %.3f | %+.4f ± %.4f | %s | %.5f | %.0f |\n", row.bits,
              row.rotation.c_str(), row.report.bits_per_weight, Perplexity(row.losses),
              to_baseline.mean, to_baseline.standard_error, to_none.c_str(), row.error,
              row.seconds);
  std::fflush(stdout);  // a run that is cut off keeps what it has
}

absl::Status Run(const Flags& flags) {
  ThreadPool pool(flags.threads);
  std::unique_ptr<pipeline::Backend> backend = pipeline::MakeCpuBackend();
  WALSH_ASSIGN_OR_RETURN(const DeviceChoice device, ParseDeviceChoice(flags.device));
  if (device.kind == DeviceChoice::Kind::kCuda) {
    WALSH_ASSIGN_OR_RETURN(backend, pipeline::MakeCudaBackend(device.cuda_device));
  }
  bool has_heading = false;
  for (int bits : flags.bits) {
    std::optional<Row> none;
    for (const std::string& rotation : flags.rotations) {
      WALSH_ASSIGN_OR_RETURN(Row row, RunOne(flags, bits, rotation, *backend, pool));
      if (!has_heading) PrintHeading(flags, row.report);
      has_heading = true;
      PrintRow(row, none ? &*none : nullptr);
      if (rotation == "none") none = std::move(row);
    }
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Perplexity and layer error by rotation and bits, as a Markdown table");
  app.add_option("model", flags.model, "HF directory or .gguf file");
  app.add_option("--calibration", flags.calibration, "Calibration text");
  app.add_option("--evaluation", flags.evaluation, "Evaluation text");
  app.add_option("--device", flags.device, "cpu or cuda:N");
  app.add_option("--bits", flags.bits)->delimiter(',');
  app.add_option("--rotations", flags.rotations)->delimiter(',');
  app.add_option("--method", flags.method)->check(CLI::IsMember({"gptq", "gptaq", "rtn"}));
  app.add_option("--gptaq-alpha", flags.gptaq_alpha, "α of GPTAQ");
  app.add_flag("--act-order", flags.act_order);
  app.add_flag("--codebook", flags.codebook, "At 2 bits");
  app.add_flag("--float-zero", flags.float_zero);
  app.add_option("--group", flags.group, "0: auto; -1: per channel");
  app.add_option("--windows", flags.windows, "Calibration windows");
  app.add_option("--length", flags.length, "Tokens of a calibration window");
  app.add_option("--eval-windows", flags.evaluation_windows);
  app.add_option("--eval-length", flags.evaluation_length);
  app.add_flag("--symmetric", flags.symmetric);
  app.add_flag("--natural-order", flags.natural_order);
  app.add_flag("--no-clip", flags.no_clip);
  app.add_flag("--signs", flags.signs, "Seeded random signs");
  app.add_option("--error-propagation", flags.error_propagation, "β of the target; 0: off");
  app.add_option("--seed", flags.seed);
  app.add_option("--threads", flags.threads);
  app.add_option("--work-dir", flags.work_directory, "Where artifacts are written for a while");
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  if (flags.model.empty() || flags.calibration.empty() || flags.evaluation.empty()) {
    std::printf("skipped: name a model, --calibration and --evaluation (docs/quality.md)\n");
    return kExitOk;
  }
  if (const absl::Status status = Run(flags); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return kExitFailed;
  }
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
