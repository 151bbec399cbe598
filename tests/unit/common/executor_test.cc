#include "common/executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

namespace walsh {
namespace {

TEST(ExecutorTest, RunsWhatWasPostedBeforeItStops) {
  std::atomic<int> n{0};
  Executor executor({.n_threads = 3, .tasks_max = 1000});
  for (int i = 0; i < 500; ++i) ASSERT_TRUE(executor.Post([&] { ++n; }));
  executor.Stop();
  EXPECT_EQ(n, 500);
  EXPECT_FALSE(executor.Post([] {}));
}

TEST(ExecutorTest, OneThreadKeepsTheOrder) {
  std::vector<int> order;
  Executor executor({.n_threads = 1, .tasks_max = 1000});
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(executor.Post([&order, i] { order.push_back(i); }));
  executor.Stop();
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[i], i);
}

TEST(ExecutorTest, FullRefusesAtOnce) {
  absl::Notification started;
  absl::Notification go;
  Executor executor({.n_threads = 1, .tasks_max = 2});
  ASSERT_TRUE(executor.Post([&] {
    started.Notify();
    go.WaitForNotification();
  }));
  started.WaitForNotification();
  EXPECT_TRUE(executor.Post([] {}));
  EXPECT_TRUE(executor.Post([] {}));
  EXPECT_FALSE(executor.Post([] {}));
  go.Notify();
}

TEST(ExecutorTest, TimersRunInTheirOrderAndNotBefore) {
  Executor executor({.n_threads = 1, .tasks_max = 10});
  std::vector<int> order;
  absl::Notification done;
  const absl::Time start = absl::Now();
  executor.PostAfter(absl::Milliseconds(60), [&] {
    order.push_back(2);
    done.Notify();
  });
  executor.PostAfter(absl::Milliseconds(20), [&] { order.push_back(1); });
  done.WaitForNotification();
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(59));
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(ExecutorTest, StopDropsTimersAndDoesNotWaitForThem) {
  std::atomic<bool> ran{false};
  const absl::Time start = absl::Now();
  {
    Executor executor({});
    executor.PostAfter(absl::Hours(1), [&] { ran = true; });
  }
  EXPECT_LT(absl::Now() - start, absl::Minutes(1));
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace walsh
