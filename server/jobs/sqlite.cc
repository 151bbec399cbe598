#include "server/jobs/sqlite.h"

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

constexpr int kBusyTimeoutMs = 5000;

absl::Status SqliteStatus(int result) {
  const std::string text = absl::StrCat("job store: ", sqlite3_errstr(result));
  // A disk that went read-only shows as a failed write, not as SQLITE_READONLY.
  switch (result == SQLITE_IOERR_WRITE ? SQLITE_FULL : result & 0xff) {
    case SQLITE_FULL:
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_CANTOPEN:
      return StoreFull(text);
    case SQLITE_IOERR:
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_NOMEM:
      return StoreIoError(text);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
      return absl::DataLossError(text);
    case SQLITE_CONSTRAINT:
      return result == SQLITE_CONSTRAINT_UNIQUE || result == SQLITE_CONSTRAINT_PRIMARYKEY
                 ? absl::AlreadyExistsError(text)
                 : absl::InternalError(text);
    default:
      return absl::InternalError(text);
  }
}

std::string Bytes(const void* data, int n_bytes) {
  return data == nullptr ? "" : std::string(static_cast<const char*>(data), n_bytes);
}

class SqliteStatement : public Statement {
 public:
  explicit SqliteStatement(sqlite3_stmt* statement) : statement_(statement) {}

  Statement& Bind(int64_t value) override {
    return Bound(sqlite3_bind_int64(statement_.get(), ++n_bound_, value));
  }
  Statement& Bind(std::string_view text) override {
    return Bound(sqlite3_bind_text64(statement_.get(), ++n_bound_, text.data(), text.size(),
                                     SQLITE_TRANSIENT, SQLITE_UTF8));
  }
  Statement& BindBlob(std::string_view bytes) override {
    return Bound(sqlite3_bind_blob64(statement_.get(), ++n_bound_, bytes.data(), bytes.size(),
                                     SQLITE_TRANSIENT));
  }

  absl::StatusOr<bool> Step() override {
    if (bind_result_ != SQLITE_OK) return SqliteStatus(bind_result_);
    const int result = sqlite3_step(statement_.get());
    if (result == SQLITE_ROW) return true;
    if (result == SQLITE_DONE) return false;
    return SqliteStatus(result);
  }

  int64_t Int(int column) const override { return sqlite3_column_int64(statement_.get(), column); }
  std::string Text(int column) const override {
    const void* text = sqlite3_column_text(statement_.get(), column);
    return Bytes(text, sqlite3_column_bytes(statement_.get(), column));
  }
  std::string Blob(int column) const override {
    const void* blob = sqlite3_column_blob(statement_.get(), column);
    return Bytes(blob, sqlite3_column_bytes(statement_.get(), column));
  }

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
  };

  Statement& Bound(int result) {
    if (bind_result_ == SQLITE_OK) bind_result_ = result;
    return *this;
  }

  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
  int n_bound_ = 0;
  // The first failure of Bind, reported by Step.
  int bind_result_ = SQLITE_OK;
};

}  // namespace

absl::StatusOr<std::unique_ptr<SqliteConnection>> SqliteConnection::Open(const std::string& path,
                                                                         Mode mode) {
  const int access =
      mode == Mode::kReadWrite ? SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE : SQLITE_OPEN_READONLY;
  sqlite3* db = nullptr;
  const int result = sqlite3_open_v2(path.c_str(), &db, access | SQLITE_OPEN_NOMUTEX, nullptr);
  // Also to be closed after a failure.
  std::unique_ptr<SqliteConnection> connection(new SqliteConnection(db));
  if (result != SQLITE_OK) return SqliteStatus(result);
  sqlite3_extended_result_codes(db, 1);
  sqlite3_busy_timeout(db, kBusyTimeoutMs);
  WALSH_RETURN_IF_ERROR(connection->Execute("PRAGMA foreign_keys = ON"));
  if (mode == Mode::kReadWrite) {
    WALSH_RETURN_IF_ERROR(connection->Execute("PRAGMA journal_mode = WAL"));
    WALSH_RETURN_IF_ERROR(connection->Execute("PRAGMA synchronous = FULL"));
  }
  return connection;
}

absl::Status SqliteConnection::Execute(const std::string& sql) {
  const int result = sqlite3_exec(db_.get(), sql.c_str(), nullptr, nullptr, nullptr);
  return result == SQLITE_OK ? absl::OkStatus() : SqliteStatus(result);
}

absl::StatusOr<std::unique_ptr<Statement>> SqliteConnection::Prepare(std::string_view sql) {
  sqlite3_stmt* statement = nullptr;
  const int result =
      sqlite3_prepare_v2(db_.get(), sql.data(), static_cast<int>(sql.size()), &statement, nullptr);
  if (result != SQLITE_OK) return SqliteStatus(result);
  return std::make_unique<SqliteStatement>(statement);
}

// The lock for writing from the start: one that is asked for later may be refused.
absl::Status SqliteConnection::Begin() { return Execute("BEGIN IMMEDIATE"); }

absl::Status SqliteConnection::Commit() { return Execute("COMMIT"); }

// After some failures SQLite has rolled back by itself, and says so with an error.
void SqliteConnection::Rollback() { Execute("ROLLBACK").IgnoreError(); }

absl::StatusOr<int64_t> SqliteConnection::SchemaVersion() { return Number("PRAGMA user_version"); }

absl::Status SqliteConnection::TakeSchemaStep(int version, const std::string& sql) {
  WALSH_RETURN_IF_ERROR(Execute(sql));
  return Execute(absl::StrCat("PRAGMA user_version = ", version));
}

}  // namespace walsh::jobs
