// The contract of JobStore, on each database that there is.
#include "server/jobs/job_store.h"

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "server/jobs/leadership.h"
#include "server/jobs/postgres.h"
#include "server/jobs/schema.h"
#include "server/jobs/sql_job_store.h"
#include "server/jobs/sqlite.h"
#include "tests/testing/postgres_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

// One that is empty at first.
class Database {
 public:
  virtual ~Database() = default;
  virtual absl::StatusOr<std::unique_ptr<SqlJobStore>> Open(const Clock* clock) = 0;
  virtual absl::StatusOr<std::unique_ptr<Connection>> Connect() = 0;
};

class SqliteDatabase : public Database {
 public:
  absl::StatusOr<std::unique_ptr<SqlJobStore>> Open(const Clock* clock) override {
    return SqlJobStore::OpenSqlite(path_, clock);
  }
  absl::StatusOr<std::unique_ptr<Connection>> Connect() override {
    return SqliteConnection::Open(path_, SqliteConnection::Mode::kReadWrite);
  }

 private:
  testing::TempDir dir_;
  const std::string path_ = dir_ / "jobs.db";
};

class PostgresDatabase : public Database {
 public:
  PostgresDatabase() {
    leadership_ = *Leadership::Open(uri_, "test", Clock::Real());
    EXPECT_TRUE(*leadership_->TryToLead());
  }
  absl::StatusOr<std::unique_ptr<SqlJobStore>> Open(const Clock* clock) override {
    const auto on_lost = [](const absl::Status& why) { ADD_FAILURE() << why; };
    return SqlJobStore::OpenPostgres(uri_, {.epoch = leadership_->epoch(), .on_lost = on_lost},
                                     clock);
  }
  absl::StatusOr<std::unique_ptr<Connection>> Connect() override {
    return PostgresConnection::Open(uri_);
  }

 private:
  const std::string uri_ = testing::PostgresServer::Shared().NewDatabase();
  std::unique_ptr<Leadership> leadership_;
};

enum class Kind { kSqlite, kPostgres };

std::unique_ptr<Database> NewDatabase(Kind kind) {
  if (kind == Kind::kSqlite) return std::make_unique<SqliteDatabase>();
  return std::make_unique<PostgresDatabase>();
}

class JobStoreTest : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (GetParam() == Kind::kPostgres) WALSH_REQUIRE_POSTGRES();
    database_ = NewDatabase(GetParam());
    Reopen();
  }

  void Reopen() {
    store_.reset();
    ASSERT_OK_AND_ASSIGN(store_, database_->Open(&clock_));
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

  ManualClock clock_;
  std::unique_ptr<Database> database_;
  std::unique_ptr<SqlJobStore> store_;
};

TEST_P(JobStoreTest, EverythingOfARecordSurvivesAReopen) {
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

TEST_P(JobStoreTest, NamesAreTakenOnce) {
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

TEST_P(JobStoreTest, DeleteRemovesEventsToo) {
  ASSERT_OK(Insert(SomeNewJob("a")));
  ASSERT_OK(store_->Delete("a"));
  EXPECT_THAT(store_->Get("a"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(Insert(SomeNewJob("a")));
  ASSERT_OK_AND_ASSIGN(const auto events, store_->Events("a", 0, 10));
  EXPECT_EQ(events.size(), 1u);
  EXPECT_OK(store_->Delete("missing"));
}

TEST_P(JobStoreTest, RequestsAreKeptForSevenDays) {
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

TEST_P(JobStoreTest, PagesAreStableUnderInsertsAndDeletes) {
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

TEST_P(JobStoreTest, ListFiltersAndOrders) {
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

TEST_P(JobStoreTest, Models) {
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

TEST_P(JobStoreTest, Aliases) {
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

TEST_P(JobStoreTest, ANameIsAModelsOrAnAliass) {
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

// Whatever bytes a field has, and however the machine sorts.
TEST_P(JobStoreTest, NamesAreOrderedByTheirBytesAndBytesAreKept) {
  for (const char* name : {"models/b", "models/a-b", "models/aa", "models/\xC3\xA9", "models/Z"}) {
    v1::Model model;
    model.set_name(name);
    model.set_sha256(std::string("\0\\x?$1'\"\n", 9));
    ASSERT_OK(store_->PutModel(model));
  }
  ASSERT_OK_AND_ASSIGN(const std::vector<v1::Model> models, store_->Models());
  std::vector<std::string> names;
  for (const v1::Model& model : models) {
    names.push_back(model.name().substr(7));
    EXPECT_EQ(model.sha256(), std::string("\0\\x?$1'\"\n", 9));
  }
  EXPECT_THAT(names, ElementsAre("Z", "a-b", "aa", "b", "\xC3\xA9"));
}

TEST_P(JobStoreTest, TenantsHaveTheirJobsToThemselves) {
  for (const auto& [id, tenant] : {std::pair{"a", "x"}, {"b", "y"}, {"c", "x"}}) {
    Transition created = SomeNewJob(id);
    created.next.tenant = tenant;
    ASSERT_OK(Insert(created, {.request_id = "r", .body_sha256 = id, .tenant = id}));
  }
  JobQuery query{.newest_first = false, .page_size = 10};
  query.tenant = "x";
  ASSERT_OK_AND_ASSIGN(const JobPage page, store_->List(query));
  EXPECT_THAT(Names(page), ElementsAre("a", "c"));
  ASSERT_OK_AND_ASSIGN(const auto found, store_->FindRequest("b/r"));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->job_id, "b");
}

// A write of several parts is stored whole or not at all, and the next one is not hurt.
TEST_P(JobStoreTest, AWriteThatFailsInItsMidstLeavesNothing) {
  ASSERT_OK(Insert(SomeNewJob("a"), {.request_id = "r", .body_sha256 = "h"}));
  EXPECT_THAT(Insert(SomeNewJob("b"), {.request_id = "r", .body_sha256 = "h"}),
              HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(store_->Get("b"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(Insert(SomeNewJob("b")));
  // An event with a number that is there already.
  JobRecord record = *store_->Get("a");
  Transition next = *Apply(record, RequestCancel{}, clock_.Now());
  next.event->set_sequence(1);
  EXPECT_FALSE(store_->Update(next.next, *next.event, nullptr).ok());
  EXPECT_EQ(store_->Get("a")->job.state(), QuantizationJob::QUEUED);
  EXPECT_OK(Step("a", RequestCancel{}));
}

// -- Schema

TEST_P(JobStoreTest, EveryOldVersionIsMigratedAndKeepsItsJobs) {
  for (int version = 0; version <= SchemaVersion(); ++version) {
    const std::unique_ptr<Database> database = NewDatabase(GetParam());
    {
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Connection> connection, database->Connect());
      ASSERT_OK(Migrate(connection.get(), version));
      ASSERT_OK_AND_ASSIGN(const int64_t stored, connection->SchemaVersion());
      ASSERT_EQ(stored, version);
      if (version >= 1) {
        ASSERT_OK_AND_ASSIGN(
            const std::unique_ptr<Statement> insert,
            connection->Prepare(
                "INSERT INTO jobs (id, state, model_name, fencing_token, completed_token, "
                "last_sequence, crashes, crash_workers, retries, not_before_us, job) "
                "VALUES ('old', 1, 'm', 3, 0, 1, 0, '', 0, 0, ?)"));
        ASSERT_OK(insert->BindBlob("").Run());
      }
    }
    ASSERT_OK_AND_ASSIGN(const auto store, database->Open(&clock_));
    if (version >= 1) {
      ASSERT_OK_AND_ASSIGN(const JobRecord record, store->Get("old"));
      EXPECT_EQ(record.fencing_token, 3);
    }
    EXPECT_OK(store->Models());
    EXPECT_OK(store->Aliases());
  }
}

TEST_P(JobStoreTest, NewerSchemaIsRefusedNamingBoth) {
  {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Connection> connection, database_->Connect());
    ASSERT_OK(connection->TakeSchemaStep(99, "CREATE TABLE newer (id TEXT)"));
  }
  EXPECT_THAT(
      database_->Open(&clock_),
      StatusIs(absl::StatusCode::kFailedPrecondition,
               ::testing::AllOf(HasSubstr("99"), HasSubstr(std::to_string(SchemaVersion())))));
}

INSTANTIATE_TEST_SUITE_P(Databases, JobStoreTest, ::testing::Values(Kind::kSqlite, Kind::kPostgres),
                         [](const auto& kind) {
                           return kind.param == Kind::kSqlite ? "Sqlite" : "Postgres";
                         });

}  // namespace
}  // namespace walsh::jobs
