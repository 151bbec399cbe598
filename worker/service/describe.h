// What this machine can run and why not, for `walsh doctor`.
#pragma once

#include <string>

namespace walsh::service {

// One JSON object: version, revision, cpu {backend, threads}, memory {total_bytes, free_bytes},
// cuda {available, reason}.
std::string DescribeMachine();
// For people: "cpu (AVX-512 VNNI; OpenBLAS core SkylakeX, 2 threads)".
std::string DescribeDevice(int n_threads);

}  // namespace walsh::service
