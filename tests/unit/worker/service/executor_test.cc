#include "worker/service/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>

#include "tests/testing/wait.h"

namespace walsh::service {
namespace {

using walsh::testing::WaitUntil;

TEST(ExecutorTest, RunsWhatItAcceptsAndRefusesWhatWouldWaitTooLong) {
  std::promise<void> release;
  const std::shared_future<void> released = release.get_future().share();
  std::atomic<int> n_begun = 0;
  std::atomic<int> n_done = 0;
  const auto task = [&] {
    ++n_begun;
    released.wait();
    ++n_done;
  };
  {
    Executor executor(2, 3);
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(executor.Run(task)) << i;
    EXPECT_FALSE(executor.Run(task));
    EXPECT_TRUE(WaitUntil([&] { return n_begun == 2; }));
    EXPECT_FALSE(executor.Run(task));
    release.set_value();
    EXPECT_TRUE(WaitUntil([&] { return n_done == 5; }));
    EXPECT_TRUE(WaitUntil([&] { return executor.Run(task); })) << "there is room again";
  }
  EXPECT_EQ(n_done, 6) << "what was accepted is run before the executor goes";
}

TEST(ExecutorTest, MayHaveNoRoomToWait) {
  std::promise<void> release;
  Executor executor(1, 0);
  EXPECT_TRUE(executor.Run([&] { release.get_future().wait(); }));
  EXPECT_FALSE(executor.Run([] {}));
  release.set_value();
  EXPECT_TRUE(WaitUntil([&] { return executor.Run([] {}); }));
}

}  // namespace
}  // namespace walsh::service
