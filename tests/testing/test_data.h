// Real models, texts and vectors for tests. They are never committed: a test that needs one skips,
// with the reason, where it is missing.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace walsh::testing {

// $WALSH_TEST_DATA, else ../shared/data beside the source tree; empty when there is none.
std::string TestDataDir();
// Path of `relative` inside it, or empty.
std::string TestData(const std::string& relative);
// SmolLM2-135M-Instruct.Q4_1.gguf: $WALSH_SMOLLM2, else the cache folder that `./run` fills; or
// empty.
std::string SmolLm2Path();
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
  if (variable.empty()) GTEST_SKIP() << "no test data: " << (relative) << " (set WALSH_TEST_DATA)"

#define WALSH_REQUIRE_SMOLLM2(variable)                         \
  const std::string variable = ::walsh::testing::SmolLm2Path(); \
  if (variable.empty()) GTEST_SKIP() << "no SmolLM2-135M-Instruct.Q4_1.gguf (./run fetch-model)"
