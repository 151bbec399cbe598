// Quantization time over the time of the float forward passes that it cannot avoid.
//
//   quantize_bench MODEL --calibration FILE --windows 32 --length 512 --threads 2
//
// Both are taken from one run of the whole job without evaluation: reading, rotating with the
// equivalence gate, Hessians, GPTQ with clip search, packing and writing count as quantization; the
// forward passes are those inside CALIBRATING.
#include <cstdio>
#include <filesystem>
#include <string>

#include "common/command_line.h"
#include "worker/kernels/kernels.h"
#include "worker/pipeline/quantize_job.h"

namespace walsh::bench {
namespace {

int Main(int argc, char** argv) {
  pipeline::JobSpec spec;
  spec.job_name = "bench";
  spec.model_name = "bench";
  spec.quantizer.group_size = 0;
  spec.n_calibration_windows = 32;
  spec.sequence_length = 512;
  spec.evaluate = false;
  int threads = 2;
  std::string work_directory = std::filesystem::temp_directory_path().string();
  CLI::App app("Quantization time over forward time");
  app.add_option("model", spec.source_path, "HF directory or .gguf file")->required();
  app.add_option("--calibration", spec.calibration_path, "Calibration text")->required();
  app.add_option("--windows", spec.n_calibration_windows);
  app.add_option("--length", spec.sequence_length);
  app.add_option("--bits", spec.quantizer.bits);
  app.add_option("--group", spec.quantizer.group_size);
  app.add_option("--threads", threads);
  app.add_option("--work-dir", work_directory);
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;

  spec.output_directory = work_directory + "/walsh-quantize-bench";
  ThreadPool pool(threads);
  const auto report = pipeline::RunJob(spec, pool, {});
  std::filesystem::remove_all(spec.output_directory);
  if (!report.ok()) {
    std::fprintf(stderr, "%s\n", report.status().ToString().c_str());
    return kExitFailed;
  }
  double total = 0;
  for (int stage = 0; stage < pipeline::kStages; ++stage) {
    std::printf("%-12s %8.2f s\n", pipeline::StageName(static_cast<pipeline::Stage>(stage)),
                report->stage_seconds[stage]);
    total += report->stage_seconds[stage];
  }
  std::printf("total        %8.2f s\nforward      %8.2f s\nratio        %8.2f\n", total,
              report->forward_seconds, total / report->forward_seconds);
  std::printf("peak memory  %8.1f MiB\nkernels      %s, %d threads\n",
              static_cast<double>(report->peak_memory_bytes) / (1 << 20),
              kernels::DescribeCpuBackend().c_str(), threads);
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
