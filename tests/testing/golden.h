// Committed expected results under tests/golden, made by scripts beside them.
#pragma once

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

namespace walsh::testing {

// Contents of tests/golden/`relative`; empty when it is not there (run through ctest, or set
// WALSH_SOURCE_DIR).
inline std::string GoldenFile(const std::string& relative) {
  const char* source = std::getenv("WALSH_SOURCE_DIR");
  const std::string root = source == nullptr ? "." : source;
  std::ifstream in(root + "/tests/golden/" + relative, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace walsh::testing
