#include "server/jobs/sqlite_job_store.h"

#include <cerrno>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "common/grpc_status.h"
#include "server/jobs/schema.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/faulty_disk.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
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
    absl::StatusOr<std::unique_ptr<SqliteJobStore>> store = SqliteJobStore::Open(path_, &clock_);
    ASSERT_OK(store);
    store_ = *std::move(store);
  }
  absl::Status Insert(const Transition& created, const RequestKey& key = {}) {
    return store_->Insert(created.next, *created.event, key);
  }
  // Applies `event` to a stored job and stores the result.
  absl::Status Step(const std::string& id, const JobEvent& event,
                    const v1::Model* model = nullptr) {
    JobRecord record = *store_->Get(id);
    Transition next = *Apply(record, event, clock_.Now());
    next.event->set_sequence(++next.next.last_sequence);
    return store_->Update(next.next, *next.event, model);
  }
  std::vector<std::string> Names(const JobPage& page) {
    std::vector<std::string> names;
    for (const JobRecord& record : page.jobs) names.push_back(record.job.name().substr(17));
    return names;
  }

  testing::TempDir dir_;
  const std::string path_ = dir_ / "jobs.db";
  ManualClock clock_;
  std::unique_ptr<SqliteJobStore> store_;
};

TEST_F(SqliteJobStoreTest, EverythingOfARecordSurvivesAReopen) {
  Transition created = SomeNewJob("a");
  ASSERT_OK(Insert(created));
  created.next.fencing_token = 7;
  created.next.completed_token = 6;
  created.next.last_sequence = 2;
  created.next.crashes = 2;
  created.next.crash_workers = {"workers/x", "workers/y"};
  created.next.retries = 3;
  created.next.not_before = absl::FromUnixSeconds(1'000'000'123);
  created.event->set_sequence(2);
  ASSERT_OK(store_->Update(created.next, *created.event, nullptr));
  Reopen();
  ASSERT_OK_AND_ASSIGN(const JobRecord record, store_->Get("a"));
  EXPECT_EQ(record.job.SerializeAsString(), created.next.job.SerializeAsString());
  EXPECT_EQ(record.fencing_token, 7);
  EXPECT_EQ(record.completed_token, 6);
  EXPECT_EQ(record.last_sequence, 2);
  EXPECT_EQ(record.crashes, 2);
  EXPECT_EQ(record.crash_workers, created.next.crash_workers);
  EXPECT_EQ(record.retries, 3);
  EXPECT_EQ(record.not_before, created.next.not_before);
  ASSERT_OK_AND_ASSIGN(const auto events, store_->Events("a", 0, 10));
  EXPECT_EQ(events.size(), 2u);
  ASSERT_OK_AND_ASSIGN(const auto later, store_->Events("a", 1, 10));
  EXPECT_EQ(later.size(), 1u);
  EXPECT_EQ(later[0].sequence(), 2);
}

TEST_F(SqliteJobStoreTest, NamesAreTakenOnce) {
  ASSERT_OK(Insert(SomeNewJob("a")));
  EXPECT_THAT(Insert(SomeNewJob("a")),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("quantizationJobs/a")));
  Transition same_model = SomeNewJob("b");
  same_model.next.job.set_model_name("a-model");
  EXPECT_THAT(Insert(same_model), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("a-model")));
  EXPECT_THAT(store_->Get("b"), HasCode(absl::StatusCode::kNotFound)) << "nothing of it is stored";

  // A job that is over gives its model's name back, unless it published it.
  ASSERT_OK(Step("a", RequestCancel{}));
  ASSERT_OK(Insert(same_model));
  ASSERT_OK(Step("b", Grant{"workers/w"}));
  v1::Model model;
  model.set_name("models/a-model");
  ASSERT_OK(Step("b", Succeed{1, {}}, &model));
  Transition again = SomeNewJob("c");
  again.next.job.set_model_name("a-model");
  EXPECT_THAT(Insert(again), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("published")));
  ASSERT_OK(store_->DeleteModel("a-model"));
  EXPECT_OK(Insert(again));
}

TEST_F(SqliteJobStoreTest, DeleteRemovesEventsToo) {
  ASSERT_OK(Insert(SomeNewJob("a")));
  ASSERT_OK(store_->Delete("a"));
  EXPECT_THAT(store_->Get("a"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(Insert(SomeNewJob("a")));
  ASSERT_OK_AND_ASSIGN(const auto events, store_->Events("a", 0, 10));
  EXPECT_EQ(events.size(), 1u);
  EXPECT_OK(store_->Delete("missing"));
}

TEST_F(SqliteJobStoreTest, RequestsAreKeptForSevenDays) {
  ASSERT_OK(Insert(SomeNewJob("a"), {.request_id = "r1", .body_sha256 = "h1"}));
  Reopen();
  ASSERT_OK_AND_ASSIGN(auto found, store_->FindRequest("r1"));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->job_id, "a");
  EXPECT_EQ(found->body_sha256, "h1");
  clock_.Advance(absl::Hours(24 * 7));
  ASSERT_OK_AND_ASSIGN(found, store_->FindRequest("r1"));
  EXPECT_TRUE(found.has_value());
  clock_.Advance(absl::Seconds(1));
  ASSERT_OK_AND_ASSIGN(found, store_->FindRequest("r1"));
  EXPECT_FALSE(found.has_value());
  EXPECT_OK(Insert(SomeNewJob("b"), {.request_id = "r1", .body_sha256 = "h2"}));
}

TEST_F(SqliteJobStoreTest, PagesAreStableUnderInsertsAndDeletes) {
  for (int i = 0; i < 5; ++i)
    ASSERT_OK(Insert(SomeNewJob(std::string(1, static_cast<char>('a' + i)))));
  JobQuery query{.page_size = 2};
  ASSERT_OK_AND_ASSIGN(JobPage page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("e", "d"));
  EXPECT_EQ(page.total_size, 5);
  ASSERT_OK(Insert(SomeNewJob("new")));
  ASSERT_OK(store_->Delete("d"));
  ASSERT_TRUE(page.next.has_value());
  query.after = page.next;
  ASSERT_OK_AND_ASSIGN(page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("c", "b"));
  query.after = page.next;
  ASSERT_OK_AND_ASSIGN(page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("a"));
  EXPECT_FALSE(page.next.has_value());
}

TEST_F(SqliteJobStoreTest, ListFiltersAndOrders) {
  for (const char* id : {"a", "b", "c"}) ASSERT_OK(Insert(SomeNewJob(id)));
  ASSERT_OK(Step("b", Grant{"workers/w"}));
  JobQuery query{.state = QuantizationJob::QUEUED, .newest_first = false, .page_size = 10};
  ASSERT_OK_AND_ASSIGN(JobPage page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("a", "c"));
  EXPECT_EQ(page.total_size, 2);
  query.model_name = "c-model";
  ASSERT_OK_AND_ASSIGN(page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("c"));
  query.model_name = "b-model";
  ASSERT_OK_AND_ASSIGN(page, store_->List(query));
  EXPECT_THAT(Names(page), IsEmpty());
  ASSERT_OK_AND_ASSIGN(const std::vector<JobRecord> live, store_->Live());
  EXPECT_EQ(live.size(), 3u);
}

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
  EXPECT_THAT(SqliteJobStore::Open(path, &clock_), HasCode(absl::StatusCode::kDataLoss));
}

TEST_F(SqliteJobStoreTest, Models) {
  v1::Model model;
  model.set_name("models/m");
  model.set_bits(4);
  ASSERT_OK(store_->PutModel(model));
  model.set_bits(2);
  ASSERT_OK(store_->PutModel(model));
  Reopen();
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::Model> models, store_->Models());
  ASSERT_EQ(models.size(), 1u);
  EXPECT_EQ(models[0].bits(), 2);
}

v1::ModelAlias Alias(const std::string& alias, const std::string& model, int64_t seconds = 7) {
  v1::ModelAlias row;
  row.set_name("aliases/" + alias);
  row.set_model("models/" + model);
  row.mutable_update_time()->set_seconds(seconds);
  row.mutable_update_time()->set_nanos(123'456'000);
  return row;
}

TEST_F(SqliteJobStoreTest, Aliases) {
  for (const char* name : {"models/m", "models/n"}) {
    v1::Model model;
    model.set_name(name);
    ASSERT_OK(store_->PutModel(model));
  }
  ASSERT_OK(store_->PutAlias(Alias("prod", "m")));
  ASSERT_OK(store_->PutAlias(Alias("dev", "m")));
  ASSERT_OK(store_->PutAlias(Alias("prod", "n", 8)));
  Reopen();
  ASSERT_OK_AND_ASSIGN(std::vector<v1::ModelAlias> aliases, store_->Aliases());
  ASSERT_EQ(aliases.size(), 2u);
  EXPECT_EQ(aliases[0].DebugString(), Alias("dev", "m").DebugString());
  EXPECT_EQ(aliases[1].DebugString(), Alias("prod", "n", 8).DebugString());
  EXPECT_FALSE(store_->DeleteModel("n").ok()) << "an alias points at it";
  ASSERT_OK(store_->DeleteAlias("prod"));
  EXPECT_OK(store_->DeleteModel("n"));
  EXPECT_OK(store_->DeleteAlias("prod"));
  ASSERT_OK_AND_ASSIGN(aliases, store_->Aliases());
  EXPECT_EQ(aliases.size(), 1u);
}

TEST_F(SqliteJobStoreTest, ANameIsAModelsOrAnAliass) {
  v1::Model model;
  model.set_name("models/m");
  ASSERT_OK(store_->PutModel(model));
  EXPECT_THAT(store_->PutAlias(Alias("m", "m")),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("published model")));
  ASSERT_OK(Insert(SomeNewJob("a")));
  EXPECT_THAT(store_->PutAlias(Alias("a-model", "m")),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("a job that has not ended")));
  ASSERT_OK(store_->PutAlias(Alias("prod", "m")));
  EXPECT_THAT(store_->CheckNamesAreFree("b", "prod"),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("an alias")));
  Transition taken = SomeNewJob("b");
  taken.next.job.set_model_name("prod");
  EXPECT_THAT(Insert(taken), HasCode(absl::StatusCode::kAlreadyExists));
}

// -- Schema

Connection OpenFile(const std::string& path) {
  return *Connection::Open(path, Connection::Mode::kReadWrite);
}

TEST_F(SqliteJobStoreTest, EveryOldVersionIsMigratedAndKeepsItsJobs) {
  for (int version = 0; version <= SchemaVersion(); ++version) {
    const std::string path = dir_ / ("v" + std::to_string(version) + ".db");
    {
      Connection connection = OpenFile(path);
      ASSERT_OK(Migrate(&connection, version));
      ASSERT_OK_AND_ASSIGN(const int64_t stored, connection.Number("PRAGMA user_version"));
      ASSERT_EQ(stored, version);
      if (version >= 1) {
        ASSERT_OK(connection.Execute(
            "INSERT INTO jobs (id, state, model_name, fencing_token, completed_token, "
            "last_sequence, crashes, crash_workers, retries, not_before_us, job) "
            "VALUES ('old', 1, 'm', 3, 0, 1, 0, '', 0, 0, x'')"));
      }
    }
    ASSERT_OK_AND_ASSIGN(auto store, SqliteJobStore::Open(path, &clock_));
    if (version >= 1) {
      ASSERT_OK_AND_ASSIGN(const JobRecord record, store->Get("old"));
      EXPECT_EQ(record.fencing_token, 3);
    }
    EXPECT_OK(store->Models());
    EXPECT_OK(store->Aliases());
  }
}

TEST_F(SqliteJobStoreTest, NewerSchemaIsRefusedNamingBoth) {
  const std::string path = dir_ / "newer.db";
  {
    Connection connection = OpenFile(path);
    ASSERT_OK(connection.Execute("PRAGMA user_version = 99"));
  }
  EXPECT_THAT(
      SqliteJobStore::Open(path, &clock_),
      StatusIs(absl::StatusCode::kFailedPrecondition,
               ::testing::AllOf(HasSubstr("99"), HasSubstr(std::to_string(SchemaVersion())))));
}

TEST_F(SqliteJobStoreTest, StepsAreNumberedWithoutGaps) {
  int expected = 0;
  for (const SchemaStep& step : SchemaSteps()) EXPECT_EQ(step.version, ++expected);
}

TEST_F(SqliteJobStoreTest, DurabilitySettings) {
  Connection connection = OpenFile(dir_ / "settings.db");
  ASSERT_OK_AND_ASSIGN(const int64_t synchronous, connection.Number("PRAGMA synchronous"));
  EXPECT_EQ(synchronous, 2) << "FULL";
  ASSERT_OK_AND_ASSIGN(const int64_t foreign_keys, connection.Number("PRAGMA foreign_keys"));
  EXPECT_EQ(foreign_keys, 1);
  ASSERT_OK_AND_ASSIGN(Statement mode, connection.Prepare("PRAGMA journal_mode"));
  ASSERT_OK(mode.Step());
  EXPECT_EQ(mode.Text(0), "wal");
}

}  // namespace
}  // namespace walsh::jobs
