// The machine's read bandwidth, measured in turns with what is compared with it.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <vector>

#include "worker/kernels/cpu/weight_memory.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::bench {

// Seconds of a clock that suits the pool: with one thread its CPU time, which other processes
// disturb least; with several the wall's.
inline double ClockSeconds(const ThreadPool& pool) {
  if (pool.n_threads() == 1) {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Adds up 64-bit words, 1 MiB a tile, of memory that no cache holds and that is laid out as that of
// packed weights.
class ReadBandwidth {
 public:
  ReadBandwidth() : n_tiles_(SizeBytes() / kTileBytes), bytes_(static_cast<size_t>(SizeBytes())) {
    // Pages that nobody wrote to are all one page of zeros, which every cache holds.
    std::memset(bytes_.data(), 1, static_cast<size_t>(SizeBytes()));
  }

  // Twice the last cache, between 256 MiB and 2 GiB.
  static int64_t SizeBytes() {
    constexpr int64_t kLeast = int64_t{256} << 20;
    constexpr int64_t kMost = int64_t{2} << 30;
    const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);  // 0 or -1 where it cannot be told
    return std::clamp(2 * cache / kTileBytes * kTileBytes, kLeast, kMost);
  }

  // Bytes per second of one pass.
  double Measure(ThreadPool& pool) {
    const double start = ClockSeconds(pool);
    pool.ParallelFor(n_tiles_, [&](int64_t tile) { ReadTile(tile); });
    return static_cast<double>(n_tiles_ * kTileBytes) / (ClockSeconds(pool) - start);
  }

 private:
  static constexpr int64_t kTileBytes = 1 << 20;

  void ReadTile(int64_t tile) {
    const auto* words = reinterpret_cast<const uint64_t*>(bytes_.data() + tile * kTileBytes);
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < kTileBytes / 8; i += 8) {
      for (int64_t j = 0; j < 8; ++j) sums[j] += words[i + j];
    }
    for (const uint64_t sum : sums) sink_ = sink_ + sum;
  }

  const int64_t n_tiles_;
  kernels::cpu::AlignedBytes bytes_;
  volatile uint64_t sink_ = 0;
};

}  // namespace walsh::bench
