// Compares tensors by three limits at once, and random tensors to compare.
//
//   EXPECT_THAT(CompareTensors(actual, expected, {.nmse = 1e-10}), IsClose());
//
// A failure prints the worst index, both values, every figure beside its limit, and the seed.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

namespace walsh::testing {

struct CompareLimits {
  double max_abs = 1e-4;
  double max_rel = 1e-3;
  // Differences from smaller expected values are compared with this instead of the value.
  double rel_floor = 1e-1;
  double nmse = 1e-10;  // Σ (actual − expected)² / Σ expected²
};

struct Comparison {
  bool close = false;
  double max_abs = 0;
  double max_rel = 0;
  double nmse = 0;
  std::string report;
};

// Values that are not finite are never close. Equal sizes are required.
Comparison CompareTensors(std::span<const float> actual, std::span<const float> expected,
                          const CompareLimits& limits = {});

MATCHER(IsClose, "is within its limits") {
  *result_listener << arg.report;
  return arg.close;
}

// WALSH_SEED, else 1: what every random test of this process starts from. Printed by a failed
// comparison.
uint64_t TestSeed();

// Normal values. `stream` tells the tensors of one test apart.
std::vector<float> RandomFloats(int64_t n, uint64_t stream, float deviation = 1.0f);
// Every value NaN: what an output is filled with before the operation that must write it.
std::vector<float> PoisonedFloats(int64_t n);

}  // namespace walsh::testing
