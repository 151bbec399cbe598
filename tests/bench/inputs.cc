#include "tests/bench/inputs.h"

#include <cstdlib>
#include <filesystem>

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
  // A wrong name is an error for whoever opens it, not a reason to skip.
  if (const std::string named = Env(variable); !named.empty()) return named;
  const std::string path = CacheDir() + "/" + in_cache;
  std::error_code error;
  return std::filesystem::exists(path, error) ? path : "";
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

}  // namespace walsh::bench
