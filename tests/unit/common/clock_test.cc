#include "common/clock.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace walsh {
namespace {

TEST(ManualClockTest, AdvanceMovesBothTimes) {
  ManualClock clock(absl::FromUnixSeconds(100));
  clock.Advance(absl::Seconds(5));
  EXPECT_EQ(clock.Now(), absl::FromUnixSeconds(105));
  EXPECT_EQ(clock.Monotonic(), absl::Seconds(5));
}

TEST(ManualClockTest, AWallJumpLeavesMonotonicTimeAlone) {
  ManualClock clock;
  clock.Advance(absl::Seconds(1));
  clock.JumpWallTime(-absl::Hours(24));
  EXPECT_EQ(clock.Now(), absl::FromUnixSeconds(1'000'000'000 - 86'400 + 1));
  EXPECT_EQ(clock.Monotonic(), absl::Seconds(1));
}

TEST(ManualClockTest, ThreadsAddUp) {
  ManualClock clock;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&clock] {
      for (int k = 0; k < 1000; ++k) clock.Advance(absl::Milliseconds(1));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(clock.Monotonic(), absl::Seconds(4));
}

TEST(RealClockTest, MonotonicTimeNeverGoesBack) {
  absl::Duration last = Clock::Real()->Monotonic();
  for (int i = 0; i < 1000; ++i) {
    const absl::Duration now = Clock::Real()->Monotonic();
    ASSERT_GE(now, last);
    last = now;
  }
}

}  // namespace
}  // namespace walsh
