#include "server/jobs/leadership.h"

#include <memory>
#include <string>
#include <thread>

#include "common/grpc_status.h"
#include "server/jobs/postgres.h"
#include "tests/testing/postgres_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace walsh::jobs {
namespace {

using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::PostgresServer;

class LeadershipTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_POSTGRES();
    uri_ = PostgresServer::Shared().NewDatabase();
  }
  std::unique_ptr<Leadership> Candidate(const std::string& name) {
    return *Leadership::Open(uri_, name, &clock_);
  }

  std::string uri_;
  ManualClock clock_;
};

TEST_F(LeadershipTest, TheFirstLeadsAndTheSecondWhenTheFirstResigns) {
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  ASSERT_OK_AND_ASSIGN(bool leads, first->TryToLead());
  EXPECT_TRUE(leads);
  const int64_t epoch = first->epoch();
  ASSERT_OK_AND_ASSIGN(leads, second->TryToLead());
  EXPECT_FALSE(leads);
  EXPECT_EQ(second->leader(), "first");
  ASSERT_OK(first->Resign());
  ASSERT_OK_AND_ASSIGN(leads, second->TryToLead());
  EXPECT_TRUE(leads);
  EXPECT_GT(second->epoch(), epoch);
  EXPECT_EQ(ErrorReason(first->Renew()), "NOT_LEADER");
  EXPECT_EQ(ErrorReason(first->Resign()), "NOT_LEADER");
  EXPECT_OK(second->Renew()) << "the first did not resign for it";
}

TEST_F(LeadershipTest, OneThatRenewsIsNeverTakenForDead) {
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  ASSERT_TRUE(*first->TryToLead());
  for (absl::Duration t; t < 5 * Leadership::kDeadAfter; t += Leadership::kRenewInterval) {
    ASSERT_OK(first->Renew());
    ASSERT_OK_AND_ASSIGN(const bool leads, second->TryToLead());
    EXPECT_FALSE(leads);
    clock_.Advance(Leadership::kRenewInterval);
  }
}

TEST_F(LeadershipTest, OneThatStandsStillIsReplacedAndFindsOut) {
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  ASSERT_TRUE(*first->TryToLead());
  EXPECT_FALSE(*second->TryToLead());
  clock_.Advance(Leadership::kDeadAfter - absl::Milliseconds(1));
  EXPECT_FALSE(*second->TryToLead());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(*second->TryToLead());
  EXPECT_EQ(ErrorReason(first->Renew()), "NOT_LEADER");
}

// A database that was away was so for the leader, too: it has its time to come back.
TEST_F(LeadershipTest, TimeCountsOnlyWhileTheDatabaseAnswers) {
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  ASSERT_TRUE(*first->TryToLead());
  EXPECT_FALSE(*second->TryToLead());
  PostgresServer::Shared().Crash();
  clock_.Advance(2 * Leadership::kDeadAfter);
  EXPECT_THAT(second->TryToLead(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(first->Renew(), HasCode(absl::StatusCode::kUnavailable));
  PostgresServer::Shared().Start();
  EXPECT_FALSE(*second->TryToLead());
  EXPECT_OK(first->Renew());
}

TEST_F(LeadershipTest, OfTwoWhoSeeADeadLeaderOneLeads) {
  ASSERT_TRUE(*Candidate("dead")->TryToLead());
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  EXPECT_FALSE(*first->TryToLead());
  EXPECT_FALSE(*second->TryToLead());
  clock_.Advance(Leadership::kDeadAfter);
  EXPECT_TRUE(*first->TryToLead());
  EXPECT_FALSE(*second->TryToLead());
}

// A write that holds its epoch ends before another leads; renewals go on beside it.
TEST_F(LeadershipTest, WhoLeadsNextWaitsForAHeldEpoch) {
  const auto first = Candidate("first");
  const auto second = Candidate("second");
  ASSERT_TRUE(*first->TryToLead());
  EXPECT_FALSE(*second->TryToLead());
  clock_.Advance(Leadership::kDeadAfter);
  ASSERT_OK_AND_ASSIGN(const auto writer, PostgresConnection::Open(uri_));
  ASSERT_OK_AND_ASSIGN(Transaction write, Transaction::Begin(writer.get()));
  EXPECT_TRUE(*HoldEpoch(writer.get(), first->epoch()));
  EXPECT_OK(first->Renew());
  EXPECT_FALSE(*second->TryToLead());
  clock_.Advance(Leadership::kDeadAfter);
  std::thread next([&] { EXPECT_TRUE(*second->TryToLead()); });
  ASSERT_OK_AND_ASSIGN(const auto observer, PostgresConnection::Open(uri_));
  EXPECT_TRUE(testing::WaitUntil([&] {
    return *observer->Number(
               "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == 1;
  }));
  EXPECT_OK(write.Commit());
  next.join();
  ASSERT_OK_AND_ASSIGN(const Transaction late, Transaction::Begin(writer.get()));
  EXPECT_FALSE(*HoldEpoch(writer.get(), first->epoch()));
}

}  // namespace
}  // namespace walsh::jobs
