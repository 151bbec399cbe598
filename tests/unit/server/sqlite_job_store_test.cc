// What is SQLite's own; job_store_test.cc has the rest.
#include <cerrno>
#include <fstream>
#include <string>

#include "common/grpc_status.h"
#include "server/jobs/schema.h"
#include "server/jobs/sql_job_store.h"
#include "server/jobs/sqlite.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/faulty_disk.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::FaultyDisk;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

class SqliteJobStoreTest : public ::testing::Test {
 protected:
  SqliteJobStoreTest() { Reopen(); }

  void Reopen() {
    store_.reset();
    ASSERT_OK_AND_ASSIGN(store_, SqlJobStore::OpenSqlite(path_, &clock_));
  }
  absl::Status Insert(const Transition& created, const RequestKey& key = {}) {
    return store_->Insert(created.next, *created.event, key);
  }

  testing::TempDir dir_;
  const std::string path_ = dir_ / "jobs.db";
  ManualClock clock_;
  std::unique_ptr<SqlJobStore> store_;
};

// Disk full and read-only: nothing is stored, reads go on, and all is well when it is over.
TEST_F(SqliteJobStoreTest, FullDiskRefusesWritesAndServesReads) {
  ASSERT_OK(Insert(SomeNewJob("a")));
  for (const int error : {ENOSPC, EROFS, EIO}) {
    FaultyDisk disk;
    disk.FailWrites(error);
    const absl::Status refused = Insert(SomeNewJob("b"), {.request_id = "r", .body_sha256 = "h"});
    EXPECT_THAT(refused,
                StatusIs(absl::StatusCode::kResourceExhausted, Not(HasSubstr(dir_.path()))));
    EXPECT_EQ(ErrorReason(refused), "STORE_FULL");
    EXPECT_OK(store_->Get("a"));
    EXPECT_THAT(store_->Get("b"), HasCode(absl::StatusCode::kNotFound));
    disk.FailWrites(0);
    ASSERT_OK(Insert(SomeNewJob("b")));
    ASSERT_OK(store_->Delete("b"));
  }
  Reopen();
  EXPECT_OK(store_->Get("a"));
}

// A sync that fails must not be taken for success: for every one of them the insert either fails
// and leaves nothing, or is there after a reopen.
TEST_F(SqliteJobStoreTest, NoSuccessWithoutACleanSync) {
  FaultyDisk disk;
  int n_failed = 0;
  for (int k = 1; k <= 8; ++k) {
    const std::string id = "j" + std::to_string(k);
    disk.FailSync(k);
    const bool acknowledged = Insert(SomeNewJob(id)).ok();
    disk.FailSync(0);
    n_failed += acknowledged ? 0 : 1;
    Reopen();
    EXPECT_EQ(store_->Get(id).ok(), acknowledged) << k;
  }
  EXPECT_GE(n_failed, 1) << "the fault was never hit";
}

TEST_F(SqliteJobStoreTest, NotADatabaseIsDataLoss) {
  const std::string path = dir_ / "garbage.db";
  std::ofstream(path) << std::string(8192, 'x');
  EXPECT_THAT(SqlJobStore::OpenSqlite(path, &clock_), HasCode(absl::StatusCode::kDataLoss));
}

TEST_F(SqliteJobStoreTest, StepsAreNumberedWithoutGaps) {
  int expected = 0;
  for (const SchemaStep& step : SchemaSteps()) EXPECT_EQ(step.version, ++expected);
}

TEST_F(SqliteJobStoreTest, DurabilitySettings) {
  ASSERT_OK_AND_ASSIGN(
      const auto connection,
      SqliteConnection::Open(dir_ / "settings.db", SqliteConnection::Mode::kReadWrite));
  ASSERT_OK_AND_ASSIGN(const int64_t synchronous, connection->Number("PRAGMA synchronous"));
  EXPECT_EQ(synchronous, 2) << "FULL";
  ASSERT_OK_AND_ASSIGN(const int64_t foreign_keys, connection->Number("PRAGMA foreign_keys"));
  EXPECT_EQ(foreign_keys, 1);
  ASSERT_OK_AND_ASSIGN(const auto mode, connection->Prepare("PRAGMA journal_mode"));
  ASSERT_OK(mode->Step());
  EXPECT_EQ(mode->Text(0), "wal");
}

}  // namespace
}  // namespace walsh::jobs
