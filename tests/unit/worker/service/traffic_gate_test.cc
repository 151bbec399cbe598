#include "worker/service/traffic_gate.h"

#include <gtest/gtest.h>

#include <functional>

#include "tests/testing/status_matchers.h"

namespace walsh::service {
namespace {

using ::walsh::testing::HasCode;

// Time passes in waits, and where a test says that the job works.
class TrafficGateTest : public ::testing::Test {
 protected:
  TrafficGate MakeGate(ServeWhileQuantizing policy) {
    return {policy,
            {.n_requests = [this] { return n_requests_; },
             .wait_until_none =
                 [this](absl::Duration at_most) {
                   EXPECT_GT(at_most, absl::ZeroDuration());
                   EXPECT_LE(at_most, TrafficGate::kAskInterval);
                   const absl::Duration left = traffic_end_ - clock_.Monotonic();
                   clock_.Advance(std::min(at_most, left));
                   if (left <= at_most) n_requests_ = 0;
                 }},
            &clock_};
  }
  // Requests that end after so long.
  void BeginTraffic(absl::Duration length) {
    n_requests_ = 3;
    traffic_end_ = clock_.Monotonic() + length;
  }
  // How long the job waits after this much work.
  absl::Duration Step(TrafficGate& gate, absl::Duration work) {
    clock_.Advance(work);
    if (!gate.IsWanted()) return absl::ZeroDuration();
    const absl::Duration start = clock_.Monotonic();
    EXPECT_OK(gate.Wait([this] {
      ++n_asked_;
      return absl::OkStatus();
    }));
    return clock_.Monotonic() - start;
  }

  ManualClock clock_;
  int n_requests_ = 0;
  int n_asked_ = 0;
  absl::Duration traffic_end_;
};

constexpr absl::Duration kLong = absl::Hours(1);

TEST_F(TrafficGateTest, WithoutTrafficNothingIsWanted) {
  for (const auto policy : {ServeWhileQuantizing::kShare, ServeWhileQuantizing::kPreempt}) {
    TrafficGate gate = MakeGate(policy);
    EXPECT_FALSE(gate.IsWanted());
    clock_.Advance(absl::Seconds(5));
    EXPECT_FALSE(gate.IsWanted());
  }
  EXPECT_EQ(n_asked_, 0);
}

TEST_F(TrafficGateTest, ShareWaitsFourTimesTheWorkWithinItsBounds) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kShare);
  BeginTraffic(kLong);
  EXPECT_EQ(Step(gate, absl::Milliseconds(20)), absl::Milliseconds(80));
  EXPECT_EQ(Step(gate, absl::Milliseconds(5)), absl::Milliseconds(20));
  EXPECT_EQ(Step(gate, absl::Microseconds(2500)), TrafficGate::kWaitMin);
  EXPECT_EQ(Step(gate, absl::Milliseconds(250)), TrafficGate::kWaitMax);
  EXPECT_EQ(Step(gate, absl::Seconds(30)), TrafficGate::kWaitMax);
}

TEST_F(TrafficGateTest, ShareCollectsShortStepsToOneWait) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kShare);
  BeginTraffic(kLong);
  absl::Duration waited;
  for (int i = 0; i < 1000; ++i) waited += Step(gate, absl::Microseconds(100));
  EXPECT_EQ(waited, 4 * absl::Milliseconds(100)) << "80 % of the time, not more";
}

TEST_F(TrafficGateTest, ShareCountsWorkFromTheLastStepWithoutTraffic) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kShare);
  EXPECT_EQ(Step(gate, absl::Seconds(30)), absl::ZeroDuration());
  BeginTraffic(kLong);
  EXPECT_EQ(Step(gate, absl::Milliseconds(10)), absl::Milliseconds(40));
}

TEST_F(TrafficGateTest, ShareGoesOnWhenTheLastRequestEnds) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kShare);
  clock_.Advance(absl::Milliseconds(100));
  BeginTraffic(absl::Milliseconds(70));
  ASSERT_TRUE(gate.IsWanted());
  const absl::Duration start = clock_.Monotonic();
  EXPECT_OK(gate.Wait([] { return absl::OkStatus(); }));
  EXPECT_EQ(clock_.Monotonic() - start, absl::Milliseconds(70));
  EXPECT_FALSE(gate.IsWanted());
}

TEST_F(TrafficGateTest, PreemptWaitsForTheEndOfTraffic) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kPreempt);
  BeginTraffic(absl::Minutes(10));
  EXPECT_EQ(Step(gate, absl::ZeroDuration()), absl::Minutes(10));
  EXPECT_GE(n_asked_, absl::Minutes(10) / TrafficGate::kAskInterval);
  BeginTraffic(kLong);
  EXPECT_EQ(Step(gate, absl::Microseconds(1)), kLong - absl::Microseconds(1));
}

TEST_F(TrafficGateTest, AJobThatMustStopWaitsNoLonger) {
  for (const auto policy : {ServeWhileQuantizing::kShare, ServeWhileQuantizing::kPreempt}) {
    TrafficGate gate = MakeGate(policy);
    BeginTraffic(kLong);
    clock_.Advance(absl::Milliseconds(200));
    ASSERT_TRUE(gate.IsWanted());
    const absl::Duration start = clock_.Monotonic();
    int n_asked = 0;
    EXPECT_THAT(
        gate.Wait([&] { return ++n_asked < 3 ? absl::OkStatus() : absl::CancelledError("stop"); }),
        HasCode(absl::StatusCode::kCancelled));
    EXPECT_EQ(clock_.Monotonic() - start, 2 * TrafficGate::kAskInterval);
  }
}

TEST_F(TrafficGateTest, ExclusiveNeverWaits) {
  TrafficGate gate = MakeGate(ServeWhileQuantizing::kExclusive);
  BeginTraffic(kLong);
  EXPECT_FALSE(gate.IsWanted());
}

}  // namespace
}  // namespace walsh::service
