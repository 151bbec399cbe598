// What this machine can run and why not, for `walsh doctor`.
#pragma once

#include <string>

#include "common/device_choice.h"
#include "worker/service/job_device.h"

namespace walsh::service {

// One JSON object: version, revision, cpu {backend, threads}, memory {total_bytes, free_bytes},
// cuda {available, devices, reason}, jobs_on, generation_on. `devices` are all that the driver
// shows; `available` is whether the chosen one (or, without a choice, device 0) can run jobs, and
// `reason` says why not.
std::string DescribeMachine(const DeviceChoice& choice, const CudaDevices& cuda);
// For people: "cpu (AVX-512 VNNI; OpenBLAS 0.3.21 core SkylakeX, 2 threads)", "cuda:0 NVIDIA H200,
// host cpu (…)".
std::string DescribeDevice(const JobDevice& device, int n_threads);

}  // namespace walsh::service
