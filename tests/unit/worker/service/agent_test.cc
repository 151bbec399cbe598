#include "worker/service/agent.h"

#include <gtest/gtest.h>

#include <atomic>

#include "common/grpc_server.h"
#include "common/resource_name.h"
#include "tests/testing/fake_coordinator.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using walsh::testing::FakeCoordinator;
using walsh::testing::HasCode;
using walsh::testing::StatusIs;
using Record = FakeCoordinator::Record;

v1::QuantizationJob Job(const std::string& id) {
  v1::QuantizationJob job;
  job.set_name(JobName(id));
  job.set_model_name("m");
  return job;
}

class AgentTest : public ::testing::Test {
 protected:
  void SetUp() override { MakeAgent(); }

  void MakeAgent(ExclusiveUse* exclusive = nullptr) {
    agent_ = std::make_unique<Agent>(
        Agent::Identity{.worker_id = "w-1", .address = "127.0.0.1:7", .device = "cpu"}, &link_,
        Agent::Hooks{.load =
                         [] {
                           Agent::Load load{.requests_running = 2, .requests_waiting = 3};
                           load.models.emplace_back().set_name("models/m");
                           return load;
                         },
                     .run_job = [this](const internal::v1::Lease&,
                                       HeldLease& held) { RunUntilStopped(held); },
                     .exclusive = exclusive},
        &clock_);
  }

  // A job that works for ever unless something stops it.
  void RunUntilStopped(HeldLease& held) {
    ++n_runs_;
    while (held.Check().ok()) held.Pause(absl::Milliseconds(5));
    const std::lock_guard lock(mu_);
    last_stop_ = held.Check();
    ++n_stops_;
  }

  void WaitForStops(int n) {
    ASSERT_TRUE(walsh::testing::WaitUntil([&] { return n_stops_ >= n; }));
  }
  absl::Status last_stop() {
    const std::lock_guard lock(mu_);
    return last_stop_;
  }

  // Leases run out when a test says so, however busy the machine is.
  ManualClock clock_;
  FakeCoordinator coordinator_{
      {.heartbeat_interval = absl::Milliseconds(10), .lease_duration = absl::Seconds(2)}};
  CoordinatorLink link_{coordinator_.address()};
  std::atomic<int> n_runs_ = 0;
  std::atomic<int> n_stops_ = 0;
  std::mutex mu_;
  absl::Status last_stop_;
  ExclusiveUse use_;  // of those agents that are given it
  std::unique_ptr<Agent> agent_;
};

TEST_F(AgentTest, RegistersAndSendsHeartbeats) {
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.heartbeats.size() >= 3; }));
  const Record record = coordinator_.record();
  ASSERT_EQ(record.registrations.size(), 1u);
  EXPECT_EQ(record.registrations[0].worker_id(), "w-1");
  EXPECT_EQ(record.registrations[0].address(), "127.0.0.1:7");
  ASSERT_EQ(record.registrations[0].models_size(), 1);
  EXPECT_GT(record.registrations[0].memory_bytes_total(), 0);
  EXPECT_EQ(record.heartbeats[0].requests_running(), 2);
  EXPECT_EQ(record.heartbeats[0].requests_waiting(), 3);
  EXPECT_EQ(record.heartbeats[0].job_name(), "");
  EXPECT_FALSE(record.heartbeats[0].draining());
  EXPECT_TRUE(agent_->is_registered());
}

TEST_F(AgentTest, RegistersAgainWhenForgotten) {
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  coordinator_.ForgetWorkers();
  EXPECT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.registrations.size() == 2; }));
}

TEST_F(AgentTest, SurvivesARestartOfTheCoordinator) {
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  coordinator_.Stop();
  coordinator_.Restart();
  EXPECT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.registrations.size() == 2; }));
}

TEST_F(AgentTest, HeartbeatsKeepALeaseAliveBeyondItsDuration) {
  agent_->Start();
  const int64_t token = coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record& r) {
    return !r.heartbeats.empty() && r.heartbeats.back().fencing_token() == token;
  }));
  // 2 s of lease, of which the worker uses 1.5 s at most without a heartbeat.
  for (int second = 0; second < 5; ++second) {
    clock_.Advance(absl::Seconds(1));
    // The first of these may be from before, the third is begun when the second was answered.
    const size_t n_heartbeats = coordinator_.record().heartbeats.size();
    ASSERT_TRUE(coordinator_.WaitFor(
        [&](const Record& r) { return r.heartbeats.size() >= n_heartbeats + 3; }));
  }
  EXPECT_EQ(n_runs_, 1);
  EXPECT_EQ(n_stops_, 0);
  EXPECT_EQ(coordinator_.record().heartbeats.back().job_name(), "quantizationJobs/j");
}

TEST_F(AgentTest, LeaseRunsOutWithoutACoordinator) {
  agent_->Start();
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) {
    return !r.heartbeats.empty() && !r.heartbeats.back().job_name().empty();
  }));
  coordinator_.Stop();
  EXPECT_EQ(n_stops_, 0);
  // Before the 2 s after which the coordinator may lease it again.
  clock_.Advance(absl::Milliseconds(1500));
  WaitForStops(1);
  EXPECT_THAT(last_stop(), HasCode(absl::StatusCode::kAborted));
}

TEST_F(AgentTest, CancellationComesWithTheHeartbeat) {
  agent_->Start();
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record&) { return n_runs_ == 1; }));
  coordinator_.CancelJob();
  WaitForStops(1);
  EXPECT_THAT(last_stop(), HasCode(absl::StatusCode::kCancelled));
}

TEST_F(AgentTest, LostLeaseStopsTheJobAndTheNextOneRuns) {
  agent_->Start();
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record&) { return n_runs_ == 1; }));
  coordinator_.LoseLease();
  WaitForStops(1);
  EXPECT_THAT(last_stop(), HasCode(absl::StatusCode::kAborted));
  coordinator_.Offer(Job("k"));
  EXPECT_TRUE(coordinator_.WaitFor([&](const Record&) { return n_runs_ == 2; }));
}

TEST_F(AgentTest, StopHandsTheLeaseBackAndSaysGoodbye) {
  agent_->Start();
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record&) { return n_runs_ == 1; }));
  agent_->Stop();
  EXPECT_EQ(n_stops_, 1);
  EXPECT_THAT(last_stop(), HasCode(absl::StatusCode::kUnavailable));
  const Record record = coordinator_.record();
  ASSERT_EQ(record.goodbyes.size(), 1u);
  EXPECT_EQ(record.goodbyes[0].worker_id(), "w-1");
}

TEST_F(AgentTest, DrainingWorkerTakesNoLease) {
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  agent_->Drain();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.heartbeats.back().draining(); }));
  coordinator_.Offer(Job("j"));
  const size_t n_heartbeats = coordinator_.record().heartbeats.size();
  ASSERT_TRUE(coordinator_.WaitFor(
      [&](const Record& r) { return r.heartbeats.size() > n_heartbeats + 10; }));
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(AgentTest, RegistersAsDrainingWhenForgottenWhileItDrains) {
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return !r.heartbeats.empty(); }));
  EXPECT_FALSE(coordinator_.record().registrations[0].draining());
  agent_->Drain();
  coordinator_.ForgetWorkers();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.registrations.size() == 2; }));
  EXPECT_TRUE(coordinator_.record().registrations[1].draining());
}

TEST_F(AgentTest, ArrivalsAreAwaitedUntilTheCoordinatorAnswers) {
  std::atomic<bool> is_answered = false;
  coordinator_.set_on_drain([&] {
    // Not before the coordinator has seen the job stop, which the worker does beside.
    EXPECT_TRUE(walsh::testing::WaitUntil([&] { return n_stops_ == 1; }));
    is_answered = true;
  });
  agent_->Start();
  coordinator_.Offer(Job("j"));
  ASSERT_TRUE(walsh::testing::WaitUntil([&] { return n_runs_ == 1; }));
  agent_->Drain();
  agent_->HandBack(absl::ZeroDuration());
  agent_->AwaitArrivals();
  EXPECT_TRUE(is_answered);
  const Record record = coordinator_.record();
  ASSERT_EQ(record.drains.size(), 1u);
  EXPECT_EQ(record.drains[0].worker_id(), "w-1");
  EXPECT_TRUE(record.goodbyes.empty());
  agent_->Stop();
}

// It is there like any other, and the coordinator keeps what it has for it.
TEST_F(AgentTest, AWorkerWithAModelAsksForNoJob) {
  MakeAgent(&use_);
  ASSERT_OK(use_.BeginModel());
  agent_->Start();
  coordinator_.Offer(Job("j"));
  // Longer than it may ask for at a time.
  const absl::Time start = absl::Now();
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record& r) {
    return r.heartbeats.size() > 10 && absl::Now() > start + 2 * ExclusiveUse::kLeaseWait;
  }));
  EXPECT_EQ(n_runs_, 0);
  EXPECT_FALSE(coordinator_.record().heartbeats.back().draining());
  use_.EndModel();
  ASSERT_TRUE(coordinator_.WaitFor([&](const Record&) { return n_runs_ == 1; }));
  EXPECT_THAT(use_.BeginModel(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("quantizationJobs/j")));
  coordinator_.LoseLease();
  WaitForStops(1);
  EXPECT_TRUE(walsh::testing::WaitUntil([&] { return use_.BeginModel().ok(); }));
}

// The load takes a moment, not the time for which other workers wait for a job.
TEST_F(AgentTest, AModelIsLoadedAlthoughAJobIsBeingAskedFor) {
  MakeAgent(&use_);
  agent_->Start();
  ASSERT_TRUE(coordinator_.WaitFor([](const Record& r) { return r.heartbeats.size() > 3; }));
  const absl::Time start = absl::Now();
  ASSERT_OK(use_.BeginModel());
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  coordinator_.Offer(Job("j"));
  agent_->Stop();
  EXPECT_EQ(n_runs_, 0);
}

TEST_F(AgentTest, StopsAtOnceWithoutACoordinator) {
  coordinator_.Stop();
  agent_->Start();
  const absl::Time start = absl::Now();
  agent_->AwaitArrivals();
  agent_->Stop();
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

}  // namespace
}  // namespace walsh::service
