// Quantization time over the time of the float forward passes that it cannot avoid.
//
//   quantize_bench [MODEL] --calibration FILE --windows 32 --length 512 --threads 2
//
// All times are taken from a single run of the whole job without evaluation: reading, rotating with
// the equivalence gate, Hessians, GPTQ with clip search, packing and writing count as quantization.
// Two ratios are printed. The first is over one flow's passes, which no GPTQ can avoid; the target
// of docs/benchmarks.md is about this one. The second is over all passes, with those of the
// original model that error propagation adds. Without a calibration file the model writes the text
// itself, and the time of that does not count. --output keeps the artifact.
#include <chrono>
#include <cstdio>
#include <string>

#include "common/command_line.h"
#include "tests/bench/conditions.h"
#include "tests/bench/inputs.h"
#include "tests/bench/work_directory.h"
#include "worker/kernels/thread_pool.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::bench {
namespace {

// Seconds that the job spends on writing its own calibration text: between entering CALIBRATING
// before the first layer and the next change of stage or layer.
class OwnTextTimer {
 public:
  absl::Status Observe(const pipeline::JobProgress& progress) {
    const auto now = std::chrono::steady_clock::now();
    const bool is_writing = progress.stage == pipeline::Stage::kCalibrating && progress.layer < 0;
    if (was_writing_) seconds_ += std::chrono::duration<double>(now - last_).count();
    was_writing_ = is_writing;
    last_ = now;
    return absl::OkStatus();
  }
  double seconds() const { return seconds_; }

 private:
  bool was_writing_ = false;
  std::chrono::steady_clock::time_point last_;
  double seconds_ = 0;
};

int Main(int argc, char** argv) {
  pipeline::JobSpec spec;
  spec.job_name = "bench";
  spec.model_name = "bench";
  spec.quantizer.group_size = 0;
  spec.n_calibration_windows = 32;
  spec.sequence_length = 512;
  spec.evaluate = false;
  spec.source_path = FindSource();
  int threads = DefaultThreads();
  std::string output;
  std::string work_directory;
  CLI::App app("Quantization time over forward time");
  app.add_option("model", spec.source_path, "HF directory or .gguf file");
  app.add_option("--calibration", spec.calibration_path, "Calibration text");
  app.add_option("--windows", spec.n_calibration_windows);
  app.add_option("--length", spec.sequence_length);
  app.add_option("--bits", spec.quantizer.bits);
  app.add_option("--group", spec.quantizer.group_size);
  app.add_option("--error-propagation", spec.quantizer.error_propagation, "β of the target; 0: off")
      ->capture_default_str();
  app.add_option("--threads", threads);
  app.add_option("--work-dir", work_directory, "Where the artifact is written for a while");
  app.add_option("--output", output, "Keep the artifact as this directory, which must not exist");
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  if (spec.source_path.empty()) {
    std::printf("skipped: no model; name one, or use ./run fetch-model\n");
    return kExitOk;
  }

  const auto work = WorkDirectory::Create(work_directory);
  if (!work.ok()) {
    std::fprintf(stderr, "%s\n", work.status().ToString().c_str());
    return kExitFailed;
  }
  spec.output_directory = output.empty() ? **work / "artifact" : output;
  ThreadPool pool(threads);
  OwnTextTimer own_text;
  const OtherLoad others;
  const auto report = pipeline::RunJob(spec, pool, [&](const pipeline::JobProgress& progress) {
    return own_text.Observe(progress);
  });
  if (!report.ok()) {
    std::fprintf(stderr, "%s\n", report.status().ToString().c_str());
    return kExitFailed;
  }
  double total = -own_text.seconds();
  for (int stage = 0; stage < pipeline::kStages; ++stage) {
    std::printf("%-12s %8.2f s\n", pipeline::StageName(static_cast<pipeline::Stage>(stage)),
                report->stage_seconds[stage]);
    total += report->stage_seconds[stage];
  }
  std::printf("own text     %8.2f s, not in the total\n", own_text.seconds());
  std::printf("total        %8.2f s\n", total);
  const double all_passes = report->forward_seconds + report->original_forward_seconds;
  std::printf("passes       %8.2f s of one flow, ratio %.2f (target: at most 5)\n",
              report->forward_seconds, total / report->forward_seconds);
  std::printf("passes       %8.2f s of all flows, ratio %.2f\n", all_passes, total / all_passes);
  std::printf("peak memory  %8.1f MiB\n%s\nother processes took %.0f %% of the CPUs meanwhile\n",
              static_cast<double>(report->peak_memory_bytes) / (1 << 20),
              DescribeRun(threads).c_str(), 100 * others.Share());
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
