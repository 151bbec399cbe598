#include "tests/testing/test_data.h"

#include <cstdlib>
#include <filesystem>

#include "common/check.h"

namespace walsh::testing {
namespace {

std::string Env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string IfExists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error) ? path : "";
}

}  // namespace

std::string TestDataDir() {
  if (const std::string dir = Env("WALSH_TEST_DATA"); !dir.empty()) return IfExists(dir);
  const std::string source = Env("WALSH_SOURCE_DIR");
  return source.empty() ? "" : IfExists(source + "/../shared/data");
}

std::string TestData(const std::string& relative) {
  const std::string dir = TestDataDir();
  return dir.empty() ? "" : IfExists(dir + "/" + relative);
}

std::string CacheDir() {
  if (const std::string cache = Env("WALSH_CACHE_DIR"); !cache.empty()) return cache;
  const std::string xdg = Env("XDG_CACHE_HOME");
  return (xdg.empty() ? Env("HOME") + "/.cache" : xdg) + "/walsh";
}

std::string SmolLm2Path() {
  if (const std::string path = Env("WALSH_SMOLLM2"); !path.empty()) return IfExists(path);
  return IfExists(CacheDir() + "/models/SmolLM2-135M-Instruct.Q4_1.gguf");
}

bool DataIsRequired() { return Env("WALSH_REQUIRE_DATA") == "1"; }

TempDir::TempDir() {
  const std::string base = std::filesystem::temp_directory_path().string();
  std::string pattern = base + "/walsh-test-XXXXXX";
  WALSH_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

}  // namespace walsh::testing
