#include "server/jobs/sql_job_store.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/jobs/leadership.h"
#include "server/jobs/postgres.h"
#include "server/jobs/schema.h"
#include "server/jobs/sqlite.h"

namespace walsh::jobs {
namespace {

constexpr absl::Duration kRequestAgeMax = absl::Hours(24 * 7);
// A page of large jobs ends early, so that it fits a message.
constexpr int64_t kPageBytesMax = limits::kMessageBytesMax / 4;
constexpr std::string_view kColumns =
    "ordinal, fencing_token, completed_token, last_sequence, crashes, crash_workers, retries, "
    "not_before_us, job, tenant";

std::string JobId(const JobRecord& record) {
  return record.job.name().substr(kJobCollection.size());
}

int64_t NotBeforeMicros(const JobRecord& record) {
  return record.not_before == absl::InfinitePast() ? 0 : absl::ToUnixMicros(record.not_before);
}

// The columns that Insert and Update share, in this order.
void BindRecord(const JobRecord& record, Statement* statement) {
  statement->Bind(int64_t{record.job.state()})
      .Bind(record.job.model_name())
      .Bind(record.fencing_token)
      .Bind(record.completed_token)
      .Bind(record.last_sequence)
      .Bind(int64_t{record.crashes})
      .Bind(absl::StrJoin(record.crash_workers, "\n"))
      .Bind(int64_t{record.retries})
      .Bind(NotBeforeMicros(record))
      .BindBlob(record.job.SerializeAsString());
}

// A row of kColumns.
absl::StatusOr<JobRecord> ReadRecord(const Statement& row) {
  JobRecord record;
  record.fencing_token = row.Int(1);
  record.completed_token = row.Int(2);
  record.last_sequence = row.Int(3);
  record.crashes = static_cast<int>(row.Int(4));
  const std::string workers = row.Text(5);
  if (!workers.empty()) record.crash_workers = absl::StrSplit(workers, '\n');
  record.retries = static_cast<int>(row.Int(6));
  if (row.Int(7) != 0) record.not_before = absl::FromUnixMicros(row.Int(7));
  if (!record.job.ParseFromString(row.Blob(8))) {
    return absl::DataLossError(
        absl::StrCat("job store: the job with ordinal ", row.Int(0), " is damaged"));
  }
  record.tenant = row.Text(9);
  return record;
}

// Of models and of the jobs that are to make one. `field` is the request's, for the error.
absl::Status CheckNoModelIsCalled(Connection& connection, std::string_view field,
                                  const std::string& model_name) {
  WALSH_ASSIGN_OR_RETURN(const auto published,
                         connection.Prepare("SELECT 1 FROM models WHERE id = ?"));
  WALSH_ASSIGN_OR_RETURN(const bool is_published, published->Bind(model_name).Step());
  if (is_published) return NameTaken(field, model_name, "a published model");
  WALSH_ASSIGN_OR_RETURN(
      const auto live,
      connection.Prepare("SELECT 1 FROM jobs WHERE model_name = ? AND state IN (1, 3, 5)"));
  WALSH_ASSIGN_OR_RETURN(const bool is_live, live->Bind(model_name).Step());
  // Not which one: it may be another tenant's.
  if (is_live) return NameTaken(field, model_name, "a job that has not ended");
  return absl::OkStatus();
}

absl::StatusOr<bool> IsAlias(Connection& connection, const std::string& id) {
  WALSH_ASSIGN_OR_RETURN(const auto select,
                         connection.Prepare("SELECT 1 FROM aliases WHERE id = ?"));
  return select->Bind(id).Step();
}

absl::Status CheckNames(Connection& connection, const std::string& id,
                        const std::string& model_name) {
  WALSH_ASSIGN_OR_RETURN(const auto by_id, connection.Prepare("SELECT 1 FROM jobs WHERE id = ?"));
  WALSH_ASSIGN_OR_RETURN(const bool id_taken, by_id->Bind(id).Step());
  if (id_taken) return NameTaken("job", JobName(id), "another job");
  WALSH_RETURN_IF_ERROR(CheckNoModelIsCalled(connection, "model_name", model_name));
  WALSH_ASSIGN_OR_RETURN(const bool is_alias, IsAlias(connection, model_name));
  if (is_alias) return NameTaken("model_name", model_name, "an alias");
  return absl::OkStatus();
}

std::string Where(const JobQuery& query) {
  std::vector<std::string> terms = {"TRUE"};
  if (query.state.has_value()) terms.push_back("state = ?");
  if (query.model_name.has_value()) terms.push_back("model_name = ?");
  if (query.tenant.has_value()) terms.push_back("tenant = ?");
  return absl::StrCat(" WHERE ", absl::StrJoin(terms, " AND "));
}

void BindWhere(const JobQuery& query, Statement* statement) {
  if (query.state.has_value()) statement->Bind(int64_t{*query.state});
  if (query.model_name.has_value()) statement->Bind(*query.model_name);
  if (query.tenant.has_value()) statement->Bind(*query.tenant);
}

}  // namespace

SqlJobStore::SqlJobStore(std::unique_ptr<Connection> writer, std::unique_ptr<Connection> reader,
                         std::optional<WriteFence> fence, const Clock* clock)
    : fence_(std::move(fence)),
      clock_(clock),
      writer_(std::move(writer)),
      reader_(std::move(reader)) {}

absl::StatusOr<std::unique_ptr<SqlJobStore>> SqlJobStore::OpenSqlite(const std::string& path,
                                                                     const Clock* clock) {
  using Mode = SqliteConnection::Mode;
  WALSH_ASSIGN_OR_RETURN(auto writer, SqliteConnection::Open(path, Mode::kReadWrite));
  WALSH_RETURN_IF_ERROR(Migrate(writer.get()));
  WALSH_ASSIGN_OR_RETURN(auto reader, SqliteConnection::Open(path, Mode::kReadOnly));
  return std::unique_ptr<SqlJobStore>(
      new SqlJobStore(std::move(writer), std::move(reader), std::nullopt, clock));
}

absl::StatusOr<std::unique_ptr<SqlJobStore>> SqlJobStore::OpenPostgres(const std::string& uri,
                                                                       WriteFence fence,
                                                                       const Clock* clock) {
  WALSH_ASSIGN_OR_RETURN(auto writer, PostgresConnection::Open(uri));
  WALSH_RETURN_IF_ERROR(Migrate(writer.get()));
  WALSH_ASSIGN_OR_RETURN(auto reader, PostgresConnection::Open(uri));
  return std::unique_ptr<SqlJobStore>(
      new SqlJobStore(std::move(writer), std::move(reader), std::move(fence), clock));
}

absl::StatusOr<Transaction> SqlJobStore::BeginWrite() {
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(writer_.get()));
  if (!fence_.has_value()) return transaction;
  WALSH_ASSIGN_OR_RETURN(const bool leads, HoldEpoch(writer_.get(), fence_->epoch));
  if (leads) return transaction;
  absl::Status lost = NotLeader();
  fence_->on_lost(lost);
  return lost;
}

absl::Status SqlJobStore::Commit(Transaction transaction) {
  absl::Status committed = transaction.Commit();
  if (fence_.has_value() && absl::IsUnavailable(committed)) fence_->on_lost(committed);
  return committed;
}

absl::Status SqlJobStore::Insert(const JobRecord& record, const QuantizationJobEvent& event,
                                 const RequestKey& key) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  const std::string id = JobId(record);
  WALSH_RETURN_IF_ERROR(CheckNames(*writer_, id, record.job.model_name()));
  WALSH_ASSIGN_OR_RETURN(
      const auto insert,
      writer_->Prepare("INSERT INTO jobs (state, model_name, fencing_token, completed_token, "
                       "last_sequence, crashes, crash_workers, retries, not_before_us, job, id, "
                       "tenant) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"));
  BindRecord(record, insert.get());
  WALSH_RETURN_IF_ERROR(insert->Bind(id).Bind(record.tenant).Run());
  WALSH_RETURN_IF_ERROR(AppendEvent(id, event));
  if (!key.request_id.empty()) WALSH_RETURN_IF_ERROR(InsertRequest(id, key));
  return Commit(std::move(transaction));
}

absl::Status SqlJobStore::CheckNamesAreFree(const std::string& id,
                                            const std::string& model_name) const {
  const absl::MutexLock lock(&read_mu_);
  return CheckNames(*reader_, id, model_name);
}

absl::Status SqlJobStore::AppendEvent(const std::string& id, const QuantizationJobEvent& event) {
  WALSH_ASSIGN_OR_RETURN(
      const auto insert,
      writer_->Prepare("INSERT INTO job_events (job, sequence, event) "
                       "VALUES ((SELECT ordinal FROM jobs WHERE id = ?), ?, ?)"));
  return insert->Bind(id).Bind(event.sequence()).BindBlob(event.SerializeAsString()).Run();
}

absl::Status SqlJobStore::InsertRequest(const std::string& job_id, const RequestKey& key) {
  WALSH_ASSIGN_OR_RETURN(const auto expire,
                         writer_->Prepare("DELETE FROM requests WHERE create_us < ?"));
  WALSH_RETURN_IF_ERROR(expire->Bind(absl::ToUnixMicros(clock_->Now() - kRequestAgeMax)).Run());
  WALSH_ASSIGN_OR_RETURN(
      const auto insert,
      writer_->Prepare("INSERT INTO requests (request_id, body_sha256, job_id, create_us) "
                       "VALUES (?, ?, ?, ?)"));
  return insert->Bind(key.stored_id())
      .Bind(key.body_sha256)
      .Bind(job_id)
      .Bind(absl::ToUnixMicros(clock_->Now()))
      .Run();
}

absl::Status SqlJobStore::Update(const JobRecord& record, const QuantizationJobEvent& event,
                                 const v1::Model* published) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_ASSIGN_OR_RETURN(
      const auto update,
      writer_->Prepare("UPDATE jobs SET state = ?, model_name = ?, fencing_token = ?, "
                       "completed_token = ?, last_sequence = ?, crashes = ?, crash_workers = ?, "
                       "retries = ?, not_before_us = ?, job = ? WHERE id = ?"));
  BindRecord(record, update.get());
  const std::string id = JobId(record);
  WALSH_RETURN_IF_ERROR(update->Bind(id).Run());
  WALSH_RETURN_IF_ERROR(AppendEvent(id, event));
  if (published != nullptr) WALSH_RETURN_IF_ERROR(WriteModel(*published));
  return Commit(std::move(transaction));
}

absl::Status SqlJobStore::Delete(const std::string& id) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_ASSIGN_OR_RETURN(const auto remove, writer_->Prepare("DELETE FROM jobs WHERE id = ?"));
  WALSH_RETURN_IF_ERROR(remove->Bind(id).Run());
  return Commit(std::move(transaction));
}

absl::StatusOr<JobRecord> SqlJobStore::Get(const std::string& id) const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(
      const auto select,
      reader_->Prepare(absl::StrCat("SELECT ", std::string(kColumns), " FROM jobs WHERE id = ?")));
  WALSH_ASSIGN_OR_RETURN(const bool found, select->Bind(id).Step());
  if (!found) return NotFound("job", JobName(id));
  return ReadRecord(*select);
}

absl::StatusOr<std::vector<JobRecord>> SqlJobStore::Live() const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(
      const auto select,
      reader_->Prepare(absl::StrCat("SELECT ", std::string(kColumns),
                                    " FROM jobs WHERE state IN (1, 3, 5) ORDER BY ordinal")));
  std::vector<JobRecord> live;
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const bool has_row, select->Step());
    if (!has_row) return live;
    WALSH_ASSIGN_OR_RETURN(live.emplace_back(), ReadRecord(*select));
  }
}

absl::StatusOr<JobPage> SqlJobStore::List(const JobQuery& query) const {
  const absl::MutexLock lock(&read_mu_);
  JobPage page;
  const std::string where = Where(query);
  WALSH_ASSIGN_OR_RETURN(const auto count,
                         reader_->Prepare(absl::StrCat("SELECT COUNT(*) FROM jobs", where)));
  BindWhere(query, count.get());
  WALSH_RETURN_IF_ERROR(count->Step().status());
  page.total_size = count->Int(0);

  std::string sql = absl::StrCat("SELECT ", std::string(kColumns), " FROM jobs", where);
  if (query.after.has_value())
    absl::StrAppend(&sql, " AND ordinal ", query.newest_first ? "<" : ">", " ?");
  absl::StrAppend(&sql, " ORDER BY ordinal ", query.newest_first ? "DESC" : "ASC", " LIMIT ?");
  WALSH_ASSIGN_OR_RETURN(const auto select, reader_->Prepare(sql));
  BindWhere(query, select.get());
  if (query.after.has_value()) select->Bind(*query.after);
  // One more than asked for, to know whether there is a next page.
  select->Bind(int64_t{query.page_size} + 1);
  int64_t last_ordinal = 0;
  int64_t n_bytes = 0;
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const bool has_row, select->Step());
    if (!has_row) return page;
    const bool is_full = static_cast<int>(page.jobs.size()) == query.page_size;
    if (is_full || n_bytes >= kPageBytesMax) {
      page.next = last_ordinal;
      return page;
    }
    last_ordinal = select->Int(0);
    WALSH_ASSIGN_OR_RETURN(page.jobs.emplace_back(), ReadRecord(*select));
    n_bytes += static_cast<int64_t>(page.jobs.back().job.ByteSizeLong());
  }
}

absl::StatusOr<std::vector<QuantizationJobEvent>> SqlJobStore::Events(const std::string& id,
                                                                      int64_t after,
                                                                      int n_max) const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(
      const auto select,
      reader_->Prepare("SELECT event FROM job_events WHERE job = (SELECT ordinal FROM jobs WHERE "
                       "id = ?) AND sequence > ? ORDER BY sequence LIMIT ?"));
  select->Bind(id).Bind(after).Bind(int64_t{n_max});
  std::vector<QuantizationJobEvent> events;
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const bool has_row, select->Step());
    if (!has_row) return events;
    if (!events.emplace_back().ParseFromString(select->Blob(0))) {
      return absl::DataLossError(absl::StrCat("job store: an event of ", id, " is damaged"));
    }
  }
}

absl::StatusOr<std::optional<StoredRequest>> SqlJobStore::FindRequest(
    const std::string& stored_id) const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(
      const auto select,
      reader_->Prepare(
          "SELECT body_sha256, job_id FROM requests WHERE request_id = ? AND create_us >= ?"));
  select->Bind(stored_id).Bind(absl::ToUnixMicros(clock_->Now() - kRequestAgeMax));
  WALSH_ASSIGN_OR_RETURN(const bool found, select->Step());
  if (!found) return std::nullopt;
  return StoredRequest{.body_sha256 = select->Text(0), .job_id = select->Text(1)};
}

absl::Status SqlJobStore::WriteModel(const v1::Model& model) {
  WALSH_ASSIGN_OR_RETURN(
      const auto put, writer_->Prepare("INSERT INTO models (id, model) VALUES (?, ?) ON CONFLICT "
                                       "(id) DO UPDATE SET model = excluded.model"));
  return put->Bind(model.name().substr(kModelCollection.size()))
      .BindBlob(model.SerializeAsString())
      .Run();
}

absl::Status SqlJobStore::PutModel(const v1::Model& model) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_RETURN_IF_ERROR(WriteModel(model));
  return Commit(std::move(transaction));
}

absl::Status SqlJobStore::DeleteModel(const std::string& id) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_ASSIGN_OR_RETURN(const auto remove, writer_->Prepare("DELETE FROM models WHERE id = ?"));
  WALSH_RETURN_IF_ERROR(remove->Bind(id).Run());
  return Commit(std::move(transaction));
}

absl::StatusOr<std::vector<v1::Model>> SqlJobStore::Models() const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(const auto select,
                         reader_->Prepare("SELECT id, model FROM models ORDER BY id"));
  std::vector<v1::Model> models;
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const bool has_row, select->Step());
    if (!has_row) return models;
    if (!models.emplace_back().ParseFromString(select->Blob(1))) {
      return absl::DataLossError(absl::StrCat("job store: model ", select->Text(0), " is damaged"));
    }
  }
}

absl::Status SqlJobStore::PutAlias(const v1::ModelAlias& alias) {
  const std::string id = alias.name().substr(kAliasCollection.size());
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_ASSIGN_OR_RETURN(const bool is_known, IsAlias(*writer_, id));
  if (!is_known) WALSH_RETURN_IF_ERROR(CheckNoModelIsCalled(*writer_, "alias", id));
  WALSH_ASSIGN_OR_RETURN(
      const auto put,
      writer_->Prepare(
          "INSERT INTO aliases (id, model, update_us) VALUES (?, ?, ?) ON CONFLICT "
          "(id) DO UPDATE SET model = excluded.model, update_us = excluded.update_us"));
  const absl::Time update_time = absl::FromUnixSeconds(alias.update_time().seconds()) +
                                 absl::Nanoseconds(alias.update_time().nanos());
  WALSH_RETURN_IF_ERROR(put->Bind(id)
                            .Bind(alias.model().substr(kModelCollection.size()))
                            .Bind(absl::ToUnixMicros(update_time))
                            .Run());
  return Commit(std::move(transaction));
}

absl::Status SqlJobStore::DeleteAlias(const std::string& id) {
  const absl::MutexLock lock(&write_mu_);
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, BeginWrite());
  WALSH_ASSIGN_OR_RETURN(const auto remove, writer_->Prepare("DELETE FROM aliases WHERE id = ?"));
  WALSH_RETURN_IF_ERROR(remove->Bind(id).Run());
  return Commit(std::move(transaction));
}

absl::StatusOr<std::vector<v1::ModelAlias>> SqlJobStore::Aliases() const {
  const absl::MutexLock lock(&read_mu_);
  WALSH_ASSIGN_OR_RETURN(const auto select,
                         reader_->Prepare("SELECT id, model, update_us FROM aliases ORDER BY id"));
  std::vector<v1::ModelAlias> aliases;
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const bool has_row, select->Step());
    if (!has_row) return aliases;
    v1::ModelAlias& alias = aliases.emplace_back();
    alias.set_name(AliasName(select->Text(0)));
    alias.set_model(ModelName(select->Text(1)));
    alias.mutable_update_time()->set_seconds(select->Int(2) / 1'000'000);
    alias.mutable_update_time()->set_nanos(static_cast<int32_t>(select->Int(2) % 1'000'000 * 1000));
  }
}

}  // namespace walsh::jobs
