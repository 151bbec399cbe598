// The seed of a randomised test: $WALSH_SEED repeats a run, else it is new. Always printed.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <random>

namespace walsh::testing {

inline uint64_t RandomSeed() {
  const char* given = std::getenv("WALSH_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 10) : uint64_t{std::random_device{}()};
  std::cout << "WALSH_SEED=" << seed << "\n";
  return seed;
}

}  // namespace walsh::testing
