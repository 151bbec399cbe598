#include "client/terminal/interrupts.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>

#include "absl/synchronization/notification.h"
#include "common/grpc_cancellation.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

// What an action refers to may go when it has been replaced.
TEST(InterruptsTest, ReplacingAnActionWaitsForOneThatRuns) {
  Interrupts interrupts;
  absl::Notification begun;
  std::atomic<bool> is_over = false;
  interrupts.OnNext([&] {
    begun.Notify();
    testing::Pause(absl::Milliseconds(200));
    is_over = true;
  });
  kill(getpid(), SIGINT);
  begun.WaitForNotification();
  interrupts.OnNext(nullptr);
  EXPECT_TRUE(is_over);
}

TEST(InterruptsTest, CancelsWhileTheObjectLives) {
  Interrupts interrupts;
  Cancellation first;
  {
    const Interrupts::Cancels cancels(interrupts, first);
    kill(getpid(), SIGINT);
    EXPECT_TRUE(testing::WaitUntil([&] { return first.cancelled(); }));
  }
  Cancellation second;
  { const Interrupts::Cancels cancels(interrupts, second); }
  absl::Notification ran;
  interrupts.OnNext([&] { ran.Notify(); });
  kill(getpid(), SIGINT);
  ran.WaitForNotification();
  EXPECT_FALSE(second.cancelled());
}

}  // namespace
}  // namespace walsh::client
