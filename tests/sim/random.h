// The random numbers of one simulation: the same seed gives the same run, on every machine.
#pragma once

#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace walsh::sim {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  // From 0 to n - 1. Not std::uniform_int_distribution, whose numbers are each library's own; the
  // skew of the remainder does not matter here.
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  int Between(int from, int to) { return from + static_cast<int>(Below(to - from + 1)); }
  absl::Duration Between(absl::Duration from, absl::Duration to) {
    return from + absl::Microseconds(Below((to - from) / absl::Microseconds(1) + 1));
  }
  // From 0 to 1.
  double Share() { return static_cast<double>(Below(1 << 20)) / (1 << 20); }
  bool Chance(double probability) { return Share() < probability; }
  template <typename T>
  void Shuffle(std::vector<T>* items) {
    for (int64_t i = std::ssize(*items) - 1; i > 0; --i)
      std::swap((*items)[i], (*items)[Below(i + 1)]);
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace walsh::sim
