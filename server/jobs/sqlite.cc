#include "server/jobs/sqlite.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

constexpr int kBusyTimeoutMs = 5000;
// Somebody has to make room; a disk that fails may do so for a moment only.
constexpr absl::Duration kFullRetry = absl::Seconds(30);
constexpr absl::Duration kIoErrorRetry = absl::Seconds(1);

absl::Status SqliteStatus(int result) {
  const std::string text = absl::StrCat("job store: ", sqlite3_errstr(result));
  absl::Status status;
  // A disk that went read-only shows as a failed write, not as SQLITE_READONLY.
  switch (result == SQLITE_IOERR_WRITE ? SQLITE_FULL : result & 0xff) {
    case SQLITE_FULL:
    case SQLITE_READONLY:
    case SQLITE_PERM:
    case SQLITE_CANTOPEN:
      status = absl::ResourceExhaustedError(text);
      SetErrorInfo(status, "STORE_FULL");
      SetRetryDelay(status, kFullRetry);
      return status;
    case SQLITE_IOERR:
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_NOMEM:
      status = absl::UnavailableError(text);
      SetErrorInfo(status, "STORE_IO_ERROR");
      SetRetryDelay(status, kIoErrorRetry);
      return status;
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

}  // namespace

Statement& Statement::Bind(int64_t value) {
  const int result = sqlite3_bind_int64(statement_.get(), ++n_bound_, value);
  if (bind_result_ == SQLITE_OK) bind_result_ = result;
  return *this;
}

Statement& Statement::Bind(std::string_view text) {
  const int result = sqlite3_bind_text64(statement_.get(), ++n_bound_, text.data(), text.size(),
                                         SQLITE_TRANSIENT, SQLITE_UTF8);
  if (bind_result_ == SQLITE_OK) bind_result_ = result;
  return *this;
}

Statement& Statement::BindBlob(std::string_view bytes) {
  const int result = sqlite3_bind_blob64(statement_.get(), ++n_bound_, bytes.data(), bytes.size(),
                                         SQLITE_TRANSIENT);
  if (bind_result_ == SQLITE_OK) bind_result_ = result;
  return *this;
}

absl::StatusOr<bool> Statement::Step() {
  if (bind_result_ != SQLITE_OK) return SqliteStatus(bind_result_);
  const int result = sqlite3_step(statement_.get());
  if (result == SQLITE_ROW) return true;
  if (result == SQLITE_DONE) return false;
  return SqliteStatus(result);
}

absl::Status Statement::Run() { return Step().status(); }

int64_t Statement::Int(int column) const { return sqlite3_column_int64(statement_.get(), column); }

std::string Statement::Text(int column) const {
  const void* text = sqlite3_column_text(statement_.get(), column);
  return Bytes(text, sqlite3_column_bytes(statement_.get(), column));
}

std::string Statement::Blob(int column) const {
  const void* blob = sqlite3_column_blob(statement_.get(), column);
  return Bytes(blob, sqlite3_column_bytes(statement_.get(), column));
}

absl::StatusOr<Connection> Connection::Open(const std::string& path, Mode mode) {
  const int access =
      mode == Mode::kReadWrite ? SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE : SQLITE_OPEN_READONLY;
  sqlite3* db = nullptr;
  const int result = sqlite3_open_v2(path.c_str(), &db, access | SQLITE_OPEN_NOMUTEX, nullptr);
  Connection connection;
  connection.db_.reset(db);  // also to be closed after a failure
  if (result != SQLITE_OK) return SqliteStatus(result);
  sqlite3_extended_result_codes(db, 1);
  sqlite3_busy_timeout(db, kBusyTimeoutMs);
  WALSH_RETURN_IF_ERROR(connection.Execute("PRAGMA foreign_keys = ON"));
  if (mode == Mode::kReadWrite) {
    WALSH_RETURN_IF_ERROR(connection.Execute("PRAGMA journal_mode = WAL"));
    WALSH_RETURN_IF_ERROR(connection.Execute("PRAGMA synchronous = FULL"));
  }
  return connection;
}

absl::Status Connection::Execute(const std::string& sql) {
  const int result = sqlite3_exec(db_.get(), sql.c_str(), nullptr, nullptr, nullptr);
  return result == SQLITE_OK ? absl::OkStatus() : SqliteStatus(result);
}

absl::StatusOr<Statement> Connection::Prepare(std::string_view sql) const {
  sqlite3_stmt* raw = nullptr;
  const int result =
      sqlite3_prepare_v2(db_.get(), sql.data(), static_cast<int>(sql.size()), &raw, nullptr);
  if (result != SQLITE_OK) return SqliteStatus(result);
  Statement statement;
  statement.statement_.reset(raw);
  return statement;
}

absl::StatusOr<int64_t> Connection::Number(std::string_view sql) const {
  WALSH_ASSIGN_OR_RETURN(Statement statement, Prepare(sql));
  WALSH_ASSIGN_OR_RETURN(const bool has_row, statement.Step());
  return has_row ? statement.Int(0) : 0;
}

absl::StatusOr<Transaction> Transaction::Begin(Connection* connection) {
  WALSH_RETURN_IF_ERROR(connection->Execute("BEGIN IMMEDIATE"));
  return Transaction(connection);
}

Transaction::Transaction(Transaction&& other) noexcept
    : connection_(std::exchange(other.connection_, nullptr)) {}

Transaction::~Transaction() {
  // After some failures SQLite has rolled back by itself, and says so with an error.
  if (connection_ != nullptr) connection_->Execute("ROLLBACK").IgnoreError();
}

absl::Status Transaction::Commit() {
  WALSH_RETURN_IF_ERROR(connection_->Execute("COMMIT"));
  connection_ = nullptr;
  return absl::OkStatus();
}

}  // namespace walsh::jobs
