// Real models, texts and vectors for tests. They are never committed: a test that needs one skips,
// with the reason, where it is missing. With WALSH_REQUIRE_DATA=1 in the environment it fails
// instead, so that a green run has seen them.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace walsh::testing {

// $WALSH_TEST_DATA, else ../shared/data beside the source tree; empty when there is none.
std::string TestDataDir();
// Path of `relative` inside it, or empty.
std::string TestData(const std::string& relative);
// The folder that `./run` fills: $WALSH_CACHE_DIR, else walsh in the user's cache folder.
std::string CacheDir();
// SmolLM2-135M-Instruct.Q4_1.gguf: $WALSH_SMOLLM2, else the cache folder that `./run` fills; or
// empty.
std::string SmolLm2Path();
// WALSH_REQUIRE_DATA=1 is set.
bool DataIsRequired();

// A fresh directory that is removed when the object goes.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace walsh::testing

// const std::string path = …; in a test: WALSH_REQUIRE_DATA(path, "models/TinyStories-656K");
#define WALSH_REQUIRE_DATA(variable, relative)                       \
  const std::string variable = ::walsh::testing::TestData(relative); \
  WALSH_SKIP_OR_FAIL(variable.empty(), "no test data: " << (relative) << " (set WALSH_TEST_DATA)")

#define WALSH_REQUIRE_SMOLLM2(variable)                         \
  const std::string variable = ::walsh::testing::SmolLm2Path(); \
  WALSH_SKIP_OR_FAIL(variable.empty(), "no SmolLM2-135M-Instruct.Q4_1.gguf (./run fetch-model)")

#define WALSH_SKIP_OR_FAIL(is_missing, what)                              \
  if ((is_missing) && ::walsh::testing::DataIsRequired()) FAIL() << what; \
  if (is_missing) GTEST_SKIP() << what
