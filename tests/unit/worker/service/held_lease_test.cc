#include "worker/service/held_lease.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/testing/status_matchers.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using walsh::testing::HasCode;
using walsh::testing::StatusIs;

class HeldLeaseTest : public ::testing::Test {
 protected:
  ManualClock clock_;
  HeldLease lease_{"quantizationJobs/j", 7, absl::Seconds(30), &clock_};
};

TEST_F(HeldLeaseTest, StopsFiveSecondsBeforeItsEnd) {
  clock_.Advance(absl::Seconds(25) - absl::Nanoseconds(1));
  EXPECT_OK(lease_.Check());
  clock_.Advance(absl::Nanoseconds(1));
  EXPECT_THAT(lease_.Check(), StatusIs(absl::StatusCode::kAborted, HasSubstr("without a heart")));
}

TEST_F(HeldLeaseTest, ShortLeaseKeepsThreeQuarters) {
  const HeldLease lease("j", 1, absl::Seconds(2), &clock_);
  clock_.Advance(absl::Milliseconds(1499));
  EXPECT_OK(lease.Check());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_THAT(lease.Check(), HasCode(absl::StatusCode::kAborted));
}

TEST_F(HeldLeaseTest, HeartbeatProlongsFromWhenItWasSent) {
  clock_.Advance(absl::Seconds(20));
  lease_.Prolong(/*sent=*/absl::Seconds(10), absl::Seconds(30));
  clock_.Advance(absl::Seconds(14));
  EXPECT_OK(lease_.Check());
  clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(lease_.Check(), HasCode(absl::StatusCode::kAborted));
}

TEST_F(HeldLeaseTest, WallClockDoesNotMatter) {
  clock_.JumpWallTime(absl::Hours(1));
  EXPECT_OK(lease_.Check());
  clock_.JumpWallTime(-absl::Hours(2));
  clock_.Advance(absl::Seconds(26));
  EXPECT_THAT(lease_.Check(), HasCode(absl::StatusCode::kAborted));
}

TEST_F(HeldLeaseTest, ExpiredIsNotRevived) {
  clock_.Advance(absl::Seconds(26));
  lease_.Prolong(/*sent=*/absl::Seconds(24), absl::Seconds(30));
  EXPECT_TRUE(lease_.is_lost());
}

TEST_F(HeldLeaseTest, LostWinsOverEveryOtherReason) {
  lease_.HandBack();
  EXPECT_THAT(lease_.Check(), HasCode(absl::StatusCode::kUnavailable));
  lease_.Cancel();
  EXPECT_THAT(lease_.Check(), HasCode(absl::StatusCode::kCancelled));
  lease_.Lose("token 8 is current");
  lease_.Lose("later");
  EXPECT_THAT(lease_.Check(), StatusIs(absl::StatusCode::kAborted, HasSubstr("token 8")));
}

TEST_F(HeldLeaseTest, WhatIsHandedBackMayBeFinishedForAWhile) {
  EXPECT_FALSE(lease_.may_finish());
  lease_.HandBack(absl::Seconds(10));
  EXPECT_THAT(lease_.Check(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_TRUE(lease_.may_finish());
  lease_.HandBack(absl::Seconds(20));  // the first counts
  clock_.Advance(absl::Seconds(10));
  EXPECT_FALSE(lease_.may_finish());
}

TEST_F(HeldLeaseTest, WhatIsLostOrCancelledIsNotFinished) {
  lease_.HandBack(absl::Seconds(10));
  lease_.Cancel();
  EXPECT_FALSE(lease_.may_finish());
  HeldLease other("j", 1, absl::Seconds(30), &clock_);
  other.HandBack(absl::Seconds(10));
  other.Lose("another worker has it");
  EXPECT_FALSE(other.may_finish());
}

TEST_F(HeldLeaseTest, PauseEndsWhenSomethingChanges) {
  std::atomic<bool> is_over = false;
  std::thread waiter([&] {
    lease_.Pause(absl::Hours(1));
    is_over = true;
  });
  // Again and again, since the pause may begin after a change.
  while (!is_over) lease_.Cancel();
  waiter.join();
}

}  // namespace
}  // namespace walsh::service
