#include "tests/bench/inputs.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/version.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::bench {
namespace {

std::string Env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The folder that `./run` fills.
std::string CacheDir() {
  if (const std::string cache = Env("WALSH_CACHE_DIR"); !cache.empty()) return cache;
  const std::string xdg = Env("XDG_CACHE_HOME");
  return (xdg.empty() ? Env("HOME") + "/.cache" : xdg) + "/walsh";
}

std::string FirstOf(const char* variable, const std::string& in_cache) {
  const std::string named = Env(variable);
  const std::string path = named.empty() ? CacheDir() + "/" + in_cache : named;
  std::error_code error;
  return std::filesystem::exists(path, error) ? path : "";
}

std::string CpuName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown CPU";
}

}  // namespace

std::string FindSource() {
  return FirstOf("WALSH_SMOLLM2", "models/SmolLM2-135M-Instruct.Q4_1.gguf");
}

std::string FindArtifact() { return FirstOf("WALSH_BENCH_MODEL", "bench-smollm2-4bit"); }

int DefaultThreads() {
  const std::string text = Env("WALSH_BENCH_THREADS");
  return text.empty() ? ThreadPool::HardwareThreads() : std::atoi(text.c_str());
}

std::string DescribeRun(int n_threads) {
  return absl::StrCat(CpuName(), ", ", ThreadPool::HardwareThreads(), " CPUs; ", n_threads,
                      " threads, ", kernels::DescribeCpuBackend(), "; revision ",
                      std::string(Revision()));
}

std::string DescribeLoad() {
  double averages[1] = {};
  return getloadavg(averages, 1) == 1 ? absl::StrFormat("%.2f", averages[0]) : "unknown";
}

}  // namespace walsh::bench
