// Runs an operation as reference, on the CPU with 1, 2 and 3 threads, and with every instruction
// set that this machine has and Highway compiles for.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <vector>

#include "hwy/highway.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"
#include "worker/kernels/kernels.h"

namespace walsh::kernels {

// Restricts Highway's dispatch to one target while it lives.
class HighwayTarget {
 public:
  explicit HighwayTarget(int64_t target) { hwy::GetChosenTarget().Update(target); }
  ~HighwayTarget() { hwy::GetChosenTarget().Update(hwy::SupportedTargets()); }
  HighwayTarget(const HighwayTarget&) = delete;
  HighwayTarget& operator=(const HighwayTarget&) = delete;
};

// `run` fills `y` on the given stream; `y` holds `initial` when it starts. Expects the CPU's result
// to be close to the reference and to have the same bits with any number of threads. Returns it.
inline std::vector<float> ExpectLikeReference(
    const std::vector<float>& initial,
    const std::function<absl::Status(const Stream& stream, float* y)>& run,
    const testing::CompareLimits& limits = {}) {
  std::vector<float> expected = initial;
  EXPECT_OK(run({.backend = Backend::kRef}, expected.data()));
  std::vector<float> alone = initial;
  EXPECT_OK(run({.backend = Backend::kCpu}, alone.data()));
  EXPECT_THAT(testing::CompareTensors(alone, expected, limits), testing::IsClose());
  for (const int n_threads : {2, 3}) {
    ThreadPool pool(n_threads);
    std::vector<float> together = initial;
    EXPECT_OK(run({.backend = Backend::kCpu, .pool = &pool}, together.data()));
    // Bit for bit, NaN included; empty vectors have no address to compare.
    EXPECT_TRUE(alone.empty() ||
                std::memcmp(alone.data(), together.data(), alone.size() * sizeof(float)) == 0)
        << "with " << n_threads << " threads";
  }
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const HighwayTarget only(target);
    std::vector<float> y = initial;
    EXPECT_OK(run({.backend = Backend::kCpu}, y.data()));
    EXPECT_THAT(testing::CompareTensors(y, expected, limits), testing::IsClose())
        << hwy::TargetName(target);
  }
  return alone;
}

// Twice the widest vector, then primes and the widths of real models.
inline std::vector<int64_t> TestSizes() {
  std::vector<int64_t> sizes;
  for (int64_t n = 0; n <= 32; ++n) sizes.push_back(n);
  for (const int64_t n : {61, 127, 128, 131, 172, 384, 576, 1009, 1536}) sizes.push_back(n);
  return sizes;
}

}  // namespace walsh::kernels
