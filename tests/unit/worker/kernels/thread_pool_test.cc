#include "worker/kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

namespace walsh {
namespace {

TEST(ThreadPoolTest, EveryTileRunsOnce) {
  for (const int n_threads : {1, 2, 3, 8}) {
    ThreadPool pool(n_threads);
    EXPECT_EQ(pool.n_threads(), n_threads);
    for (const int64_t n_tiles : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<int> runs(static_cast<size_t>(n_tiles));
      pool.ParallelFor(n_tiles, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
      EXPECT_EQ(runs, std::vector<int>(runs.size(), 1)) << n_threads << " threads";
    }
  }
}

// Short regions in a row are what decoding does; a worker that wakes late must neither run a tile
// of the next region with the last one's function nor be waited for.
TEST(ThreadPoolTest, RegionsFollowOneAnother) {
  ThreadPool pool(4);
  std::vector<int64_t> values(16, 0);
  constexpr int kRegions = 20000;
  for (int region = 0; region < kRegions; ++region) {
    pool.ParallelFor(16,
                     [&values, region](int64_t i) { values[static_cast<size_t>(i)] += region; });
  }
  const int64_t expected = int64_t{kRegions} * (kRegions - 1) / 2;
  EXPECT_EQ(values, std::vector<int64_t>(16, expected));
}

// After a pause the workers sleep and must be woken.
TEST(ThreadPoolTest, WakesSleepingWorkers) {
  ThreadPool pool(2);
  for (int round = 0; round < 3; ++round) {
    // Two tiles that wait for each other need both threads.
    std::atomic<int> arrived{0};
    pool.ParallelFor(2, [&](int64_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived.load(), 2);
    // Long enough for the workers to stop spinning: they spin for some 10^4 cycles.
    volatile int64_t sink = 0;
    for (int64_t i = 0; i < 3'000'000; ++i) sink = sink + i;
  }
}

TEST(ThreadPoolTest, CallersTakeTurns) {
  ThreadPool pool(3);
  std::vector<int64_t> sums(4, 0);
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < sums.size(); ++caller) {
    callers.emplace_back([&pool, &sums, caller] {
      for (int round = 0; round < 200; ++round) {
        std::vector<int64_t> squares(50);
        pool.ParallelFor(50, [&](int64_t i) { squares[static_cast<size_t>(i)] = i * i; });
        sums[caller] += std::accumulate(squares.begin(), squares.end(), int64_t{0});
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sums, std::vector<int64_t>(4, 200 * 40425));
}

// Whichever thread runs out of memory, the caller hears of it when no tile runs any more, and the
// pool is as good as new.
TEST(ThreadPoolTest, WhatATileThrowsReachesTheCaller) {
  for (const int n_threads : {1, 2, 4}) {
    ThreadPool pool(n_threads);
    for (int round = 0; round < 50; ++round) {
      std::atomic<int> n_running{0};
      EXPECT_THROW(pool.ParallelFor(64,
                                    [&](int64_t i) {
                                      n_running.fetch_add(1);
                                      // Any of the threads may be the one.
                                      const bool fails = i >= round;
                                      n_running.fetch_sub(1);
                                      if (fails) throw std::bad_alloc();
                                    }),
                   std::bad_alloc);
      EXPECT_EQ(n_running.load(), 0);
      std::atomic<int> n_run{0};
      pool.ParallelFor(64, [&](int64_t) { n_run.fetch_add(1); });
      EXPECT_EQ(n_run.load(), 64);
    }
  }
}

// Both threads are inside a tile, and only the worker's throws: it must not end the process.
TEST(ThreadPoolTest, AWorkerMayRunOutOfMemory) {
  ThreadPool pool(2);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> arrived{0};
  EXPECT_THROW(pool.ParallelFor(2,
                                [&](int64_t) {
                                  arrived.fetch_add(1);
                                  while (arrived.load() < 2) std::this_thread::yield();
                                  if (std::this_thread::get_id() != caller) throw std::bad_alloc();
                                }),
               std::bad_alloc);
}

TEST(ThreadPoolTest, StartsAndStopsWithoutWork) {
  for (int i = 0; i < 100; ++i) ThreadPool pool(3);
}

TEST(ThreadPoolTest, GrantsAtLeastOneThread) {
  EXPECT_GE(ThreadPool::HardwareThreads(), 1);
  EXPECT_EQ(ThreadPool(0).n_threads(), 1);
}

}  // namespace
}  // namespace walsh
