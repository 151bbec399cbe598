// walsh-worker: quantizes models and serves them.
#include <CLI/CLI.hpp>
#include <iostream>

#include "common/command_line.h"
#include "common/device_choice.h"
#include "worker/service/daemon.h"
#include "worker/service/describe.h"
#include "worker/service/job_device.h"
#include "worker/service/options.h"

int main(int argc, char** argv) {
  CLI::App app("walsh worker: quantizes models and serves them", "walsh-worker");
  walsh::service::WorkerOptions options;
  walsh::service::AddWorkerFlags(app, options);
  if (const auto exit_code = walsh::ParseCommandLine(app, argc, argv)) return *exit_code;
  if (const absl::Status status = walsh::service::CheckWorkerOptions(options); !status.ok()) {
    std::cerr << "walsh-worker: " << status.message() << "\n";
    return walsh::kExitUsage;
  }
  const walsh::service::CudaDevices cuda = walsh::service::InstalledCudaDevices();
  if (options.describe) {
    const auto choice = walsh::ParseDeviceChoice(options.device);
    std::cout << walsh::service::DescribeMachine(*choice, cuda) << "\n";
    return walsh::kExitOk;
  }
  return walsh::service::RunUntilSignal(options, cuda);
}
