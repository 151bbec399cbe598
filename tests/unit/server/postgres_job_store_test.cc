// What is PostgreSQL's own; job_store_test.cc has the rest.
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/grpc_status.h"
#include "server/jobs/leadership.h"
#include "server/jobs/postgres.h"
#include "server/jobs/sql_job_store.h"
#include "tests/testing/postgres_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::PostgresServer;
using ::walsh::testing::StatusIs;

class PostgresJobStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_POSTGRES();
    uri_ = PostgresServer::Shared().NewDatabase();
    ASSERT_OK_AND_ASSIGN(const auto leadership, Leadership::Open(uri_, "test", &clock_));
    ASSERT_TRUE(*leadership->TryToLead());
    ASSERT_OK_AND_ASSIGN(store_,
                         SqlJobStore::OpenPostgres(
                             uri_,
                             {.epoch = leadership->epoch(),
                              .on_lost = [this](const absl::Status& why) { lost_.push_back(why); }},
                             &clock_));
  }
  // Ends the epoch of the store that there is.
  void TakeOver() {
    ASSERT_OK_AND_ASSIGN(const auto other, PostgresConnection::Open(uri_));
    ASSERT_OK(other->Execute("UPDATE leadership SET epoch = epoch + 1"));
  }
  // Cuts every other connection to the database.
  void CutConnections() {
    ASSERT_OK_AND_ASSIGN(const auto other, PostgresConnection::Open(uri_));
    ASSERT_OK(
        other->Execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE "
                       "datname = current_database() AND pid <> pg_backend_pid()"));
  }
  static absl::Status Insert(SqlJobStore& store, const std::string& id) {
    const Transition created = SomeNewJob(id);
    return store.Insert(created.next, *created.event, {});
  }

  std::string uri_;
  ManualClock clock_;
  std::unique_ptr<SqlJobStore> store_;
  std::vector<absl::Status> lost_;
};

TEST_F(PostgresJobStoreTest, ACrashedServerIsFoundAgainByTheNextCall) {
  ASSERT_OK(Insert(*store_, "a"));
  PostgresServer::Shared().Crash();
  const absl::Status refused = Insert(*store_, "b");
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, Not(HasSubstr("walsh"))));
  EXPECT_EQ(ErrorReason(refused), "STORE_IO_ERROR");
  EXPECT_THAT(store_->Get("a"), HasCode(absl::StatusCode::kUnavailable));
  PostgresServer::Shared().Start();
  EXPECT_OK(store_->Get("a"));
  EXPECT_OK(Insert(*store_, "b"));
  EXPECT_THAT(lost_, SizeIs(0)) << "nothing was on its way";
}

TEST_F(PostgresJobStoreTest, ACutConnectionIsMadeAnewByTheNextCall) {
  ASSERT_OK(Insert(*store_, "a"));
  CutConnections();
  EXPECT_OK(Insert(*store_, "b"));
  EXPECT_OK(store_->Get("b"));
}

TEST_F(PostgresJobStoreTest, AWriteThatIsCutInItsMidstIsNotStored) {
  ASSERT_OK_AND_ASSIGN(const auto connection, PostgresConnection::Open(uri_));
  {
    ASSERT_OK_AND_ASSIGN(Transaction transaction, Transaction::Begin(connection.get()));
    ASSERT_OK(connection->Execute("INSERT INTO models VALUES ('m', '')"));
    CutConnections();
    EXPECT_THAT(transaction.Commit(), HasCode(absl::StatusCode::kUnavailable));
  }
  EXPECT_EQ(*connection->Number("SELECT COUNT(*) FROM models"), 0) << "and goes on being of use";
}

TEST_F(PostgresJobStoreTest, WhatWasAcknowledgedSurvivesACrashOfTheServer) {
  std::vector<std::string> acknowledged;
  std::atomic<int> n_acknowledged{0};
  std::thread writer([&] {
    for (std::string id = "a"; Insert(*store_, id).ok(); id += 'a') {
      acknowledged.push_back(id);
      ++n_acknowledged;
    }
  });
  EXPECT_TRUE(testing::WaitUntil([&] { return n_acknowledged > 10; }));
  PostgresServer::Shared().Crash();
  writer.join();
  PostgresServer::Shared().Start();
  for (const std::string& id : acknowledged) EXPECT_OK(store_->Get(id));
}

TEST_F(PostgresJobStoreTest, AFormerLeadersWritesChangeNothing) {
  ASSERT_OK(Insert(*store_, "a"));
  const JobRecord before = *store_->Get("a");
  TakeOver();
  Transition cancelled = *Apply(before, RequestCancel{}, clock_.Now());
  cancelled.event->set_sequence(2);
  v1::Model model;
  model.set_name("models/m");
  v1::ModelAlias alias;
  alias.set_name("aliases/x");
  alias.set_model("models/m");
  const absl::Status refused[] = {
      Insert(*store_, "b"),     store_->Update(cancelled.next, *cancelled.event, &model),
      store_->Delete("a"),      store_->PutModel(model),
      store_->DeleteModel("m"), store_->PutAlias(alias),
      store_->DeleteAlias("x")};
  for (const absl::Status& status : refused) {
    EXPECT_THAT(status, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(status), "NOT_LEADER");
  }
  EXPECT_THAT(lost_, SizeIs(std::size(refused)));
  EXPECT_EQ(store_->Get("a")->job.SerializeAsString(), before.job.SerializeAsString());
  EXPECT_THAT(store_->Get("b"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(*store_->Models(), SizeIs(0));
}

// It may have been stored or not: memory and database may differ, and only a new leader is sure.
TEST_F(PostgresJobStoreTest, ALostAnswerToCommitIsNoSuccessAndEndsTheLead) {
  ASSERT_OK_AND_ASSIGN(const auto other, PostgresConnection::Open(uri_));
  ASSERT_OK(other->Execute(R"sql(
CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS
  'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER cut_at_commit AFTER INSERT ON models
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut();
)sql"));
  v1::Model model;
  model.set_name("models/m");
  EXPECT_THAT(store_->PutModel(model), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(lost_, SizeIs(1));
}

// Its transaction holds the epoch, so that nobody could lead; PostgreSQL ends it.
TEST_F(PostgresJobStoreTest, ALeaderThatIsStoppedInATransactionIsCutOff) {
  ASSERT_OK_AND_ASSIGN(const auto stopped, PostgresConnection::Open(uri_));
  const std::string timeout = "idle_in_transaction_session_timeout";
  ASSERT_OK_AND_ASSIGN(
      const int64_t timeout_ms,
      stopped->Number("SELECT setting::bigint FROM pg_settings WHERE name = '" + timeout + "'"));
  EXPECT_GT(timeout_ms, 0);
  EXPECT_LT(absl::Milliseconds(timeout_ms), Leadership::kDeadAfter);
  ASSERT_OK(stopped->Execute("SET " + timeout + " = '100ms'"));
  ASSERT_OK_AND_ASSIGN(Transaction write, Transaction::Begin(stopped.get()));
  ASSERT_TRUE(*HoldEpoch(stopped.get(), 1));
  TakeOver();
  EXPECT_THAT(write.Commit(), HasCode(absl::StatusCode::kUnavailable));
}

TEST_F(PostgresJobStoreTest, WhatIsAcknowledgedIsOnTheDiskWhateverTheServersDefault) {
  ASSERT_OK_AND_ASSIGN(const auto admin, PostgresConnection::Open(uri_));
  ASSERT_OK(admin->Execute("ALTER ROLE walsh SET synchronous_commit = off"));
  const auto is_on = [&] {
    const auto connection = *PostgresConnection::Open(uri_);
    return *connection->Number(
        "SELECT COUNT(*) FROM pg_settings WHERE name = 'synchronous_commit' AND setting = 'on'");
  };
  EXPECT_EQ(is_on(), 1);
  ASSERT_OK(admin->Execute("ALTER ROLE walsh RESET synchronous_commit"));
}

TEST_F(PostgresJobStoreTest, AReadOnlyServerIsAFullStore) {
  ASSERT_OK_AND_ASSIGN(const auto connection, PostgresConnection::Open(uri_));
  ASSERT_OK(connection->Execute("SET default_transaction_read_only = on"));
  const absl::Status refused = connection->Execute("DELETE FROM models");
  EXPECT_THAT(refused, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(refused), "STORE_FULL");
}

TEST_F(PostgresJobStoreTest, AStatementThatHangsIsEnded) {
  ASSERT_OK_AND_ASSIGN(const auto connection, PostgresConnection::Open(uri_));
  ASSERT_OK(connection->Execute("SET statement_timeout = '50ms'"));
  EXPECT_THAT(connection->Execute("SELECT pg_sleep(60)"), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(*connection->Number("SELECT 7"), 7);
}

TEST(PostgresUriTest, NothingSecretIsTakenOrRepeated) {
  EXPECT_OK(CheckPostgresUri("postgres://walsh@db:5432,standby:5433/walsh?sslmode=verify-full"));
  EXPECT_OK(CheckPostgresUri("postgresql:///walsh?host=/run/postgresql"));
  for (const char* uri :
       {"postgres://walsh:hunter2@db/walsh", "postgres://db/walsh?password=hunter2",
        "postgres://walsh:hu/nter2@db/walsh", "postgres://db/walsh?nothing=hunter2",
        "postgres://db/%zzhunter2", "hunter2", "host=db password=hunter2"}) {
    EXPECT_THAT(CheckPostgresUri(uri),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(Not(HasSubstr("hu")), Not(HasSubstr("nter2")))))
        << uri;
  }
}

TEST(PostgresUriTest, WhoDoesNotAnswerIsUnavailable) {
  const absl::Status refused =
      PostgresConnection::Open("postgres://walsh@/walsh?host=/nowhere").status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, Not(HasSubstr("nowhere"))));
}

}  // namespace
}  // namespace walsh::jobs
