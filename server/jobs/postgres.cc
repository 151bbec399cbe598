#include "server/jobs/postgres.h"

#include <poll.h>

#include <array>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

// Longer than what the server takes to give up by itself (kSettings), so that its answer comes.
constexpr absl::Duration kAnswerMax = absl::Seconds(10);
constexpr int kBinary = 1;
// PostgreSQL's pg_type.dat; its header belongs to the server.
constexpr Oid kBytea = 17;
constexpr Oid kInt8 = 20;
constexpr Oid kText = 25;
// Any number that no other program locks in this database.
constexpr int64_t kSchemaLock = 0x77616c7368;  // "walsh"

// What the URI may say otherwise.
constexpr std::pair<const char*, const char*> kDefaults[] = {
    {"connect_timeout", "5"},
    {"target_session_attrs", "read-write"},
    {"keepalives_idle", "10"},
    {"keepalives_interval", "5"},
    {"keepalives_count", "3"},
    {"tcp_user_timeout", "10000"},
    {"fallback_application_name", "walsh-coordinator"},
};

// An idle transaction is one of a process that was stopped: it would hold its locks for ever.
// What is acknowledged is on the disk; a server that waits for its replicas, too, goes on doing so.
constexpr char kSettings[] = R"sql(
SET statement_timeout = '5s';
SET lock_timeout = '3s';
SET idle_in_transaction_session_timeout = '4s';
SELECT set_config('synchronous_commit', 'on', false)
  WHERE current_setting('synchronous_commit') = 'off';
)sql";

// The other words for what schema.cc says in SQLite's. Names are ordered by their bytes, as there.
std::string InPostgresWords(const std::string& sql) {
  return absl::StrReplaceAll(sql, {{"INTEGER PRIMARY KEY AUTOINCREMENT",
                                    "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"},
                                   {"INTEGER", "BIGINT"},
                                   {"TEXT", "TEXT COLLATE \"C\""},
                                   {"BLOB", "BYTEA"},
                                   {" WITHOUT ROWID", ""}});
}

// `?` becomes $1, $2, …
std::string NumberParameters(std::string_view sql) {
  std::string numbered;
  int n_parameters = 0;
  for (const char c : sql) {
    if (c == '?') {
      absl::StrAppend(&numbered, "$", ++n_parameters);
    } else {
      numbered += c;
    }
  }
  return numbered;
}

std::string BigEndian(int64_t value) {
  std::string bytes(sizeof(value), '\0');
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[bytes.size() - 1 - i] = static_cast<char>(static_cast<uint64_t>(value) >> (8 * i));
  }
  return bytes;
}

bool IsError(const PGresult* result) {
  const ExecStatusType status = PQresultStatus(result);
  return status != PGRES_TUPLES_OK && status != PGRES_COMMAND_OK;
}

// https://www.postgresql.org/docs/15/errcodes-appendix.html
absl::Status ErrorOf(const PGresult* result) {
  const char* field = PQresultErrorField(result, PG_DIAG_SQLSTATE);
  // Without one it is libpq that speaks: the connection is gone.
  const std::string state = field == nullptr ? "08006" : field;
  const std::string text = absl::StrCat("job store: SQLSTATE ", state);
  if (state == "23505") return absl::AlreadyExistsError(text);
  WALSH_LOG(Warning, "PostgreSQL failed", {"sqlstate", state},
            {"message", PQresultErrorMessage(result)});
  if (state == "53100" || state == "25006") return StoreFull(text);  // disk full, read-only
  if (state == "XX001" || state == "XX002") return absl::DataLossError(text);
  // Connections, resources, shutdown and timeouts, the system, locks, and what goes with them.
  for (const char* transient : {"08", "53", "57", "58", "40", "55P03", "25P03"}) {
    if (absl::StartsWith(state, transient)) return StoreIoError(text);
  }
  return absl::InternalError(text);
}

// `events` at the connection's socket within `timeout`; 0: none came.
int Poll(PGconn* connection, int events, absl::Duration timeout) {
  pollfd socket = {
      .fd = PQsocket(connection), .events = static_cast<int16_t>(events), .revents = 0};
  return poll(&socket, 1, static_cast<int>(absl::ToInt64Milliseconds(timeout)));
}

}  // namespace

absl::Status CheckPostgresUri(const std::string& uri) {
  const auto invalid = [](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("job store: ", std::string(what)));
  };
  if (!absl::StartsWith(uri, "postgres://") && !absl::StartsWith(uri, "postgresql://")) {
    return invalid("not a URI of PostgreSQL, such as postgres://USER@HOST/DATABASE");
  }
  // libpq's own message would quote what may be a password with a character too many.
  const std::unique_ptr<PQconninfoOption, decltype(&PQconninfoFree)> options(
      PQconninfoParse(uri.c_str(), nullptr), &PQconninfoFree);
  if (options == nullptr) return invalid("the URI cannot be parsed");
  for (const PQconninfoOption* option = options.get(); option->keyword != nullptr; ++option) {
    const std::string_view keyword = option->keyword;
    if (option->val == nullptr || *option->val == '\0') continue;
    if (keyword == "password" || keyword == "sslpassword") {
      return invalid(
          "the URI holds a password, which lists of processes would show; use PGPASSFILE or "
          "PGPASSWORD");
    }
    if (keyword != "port") continue;
    for (const absl::string_view port : absl::StrSplit(option->val, ',')) {
      int number = 0;
      if (!absl::SimpleAtoi(port, &number)) return invalid("the URI's port is not a number");
    }
  }
  return absl::OkStatus();
}

class PostgresStatement : public Statement {
 public:
  PostgresStatement(PostgresConnection* connection, std::string sql)
      : connection_(connection), sql_(std::move(sql)) {}

  Statement& Bind(int64_t value) override { return Add(kInt8, BigEndian(value)); }
  Statement& Bind(std::string_view text) override { return Add(kText, std::string(text)); }
  Statement& BindBlob(std::string_view bytes) override { return Add(kBytea, std::string(bytes)); }

  absl::StatusOr<bool> Step() override {
    if (result_ == nullptr) {
      WALSH_ASSIGN_OR_RETURN(result_, connection_->Run(sql_, parameters_));
    }
    return ++row_ < PQntuples(result_.get());
  }

  int64_t Int(int column) const override {
    uint64_t value = 0;
    for (const char byte : Bytes(column)) value = value << 8 | static_cast<uint8_t>(byte);
    return static_cast<int64_t>(value);
  }
  std::string Text(int column) const override { return std::string(Bytes(column)); }
  std::string Blob(int column) const override { return std::string(Bytes(column)); }

 private:
  Statement& Add(Oid type, std::string bytes) {
    parameters_.push_back({.type = type, .bytes = std::move(bytes)});
    return *this;
  }
  std::string_view Bytes(int column) const {
    return {PQgetvalue(result_.get(), row_, column),
            static_cast<size_t>(PQgetlength(result_.get(), row_, column))};
  }

  PostgresConnection* const connection_;
  const std::string sql_;
  std::vector<PostgresConnection::Parameter> parameters_;
  PostgresConnection::Result result_;
  int row_ = -1;
};

absl::StatusOr<std::unique_ptr<PostgresConnection>> PostgresConnection::Open(
    const std::string& uri) {
  WALSH_RETURN_IF_ERROR(CheckPostgresUri(uri));
  std::unique_ptr<PostgresConnection> connection(new PostgresConnection(uri));
  WALSH_RETURN_IF_ERROR(connection->Connect());
  return connection;
}

absl::Status PostgresConnection::Connect() {
  std::vector<const char*> keywords;
  std::vector<const char*> values;
  for (const auto& [keyword, value] : kDefaults) {
    keywords.push_back(keyword);
    values.push_back(value);
  }
  // Later ones go before earlier ones; a database that is a URI is taken apart.
  for (const auto& [keyword, value] :
       {std::pair{"dbname", uri_.c_str()}, {"client_encoding", "UTF8"}, {nullptr, nullptr}}) {
    keywords.push_back(keyword);
    values.push_back(value);
  }
  connection_.reset(PQconnectdbParams(keywords.data(), values.data(), /*expand_dbname=*/1));
  if (PQstatus(connection_.get()) != CONNECTION_OK) return Lost("cannot connect");
  PQsetNoticeProcessor(
      connection_.get(), [](void*, const char*) {}, nullptr);
  // So that sending, too, has a limit.
  if (PQsetnonblocking(connection_.get(), 1) != 0) return Lost("cannot connect");
  if (PQsendQuery(connection_.get(), kSettings) == 0) return Lost("cannot connect");
  return Receive().status();
}

absl::Status PostgresConnection::Lost(std::string_view what) {
  WALSH_LOG(Warning, "connection to PostgreSQL lost", {"what", what},
            {"message", PQerrorMessage(connection_.get())});
  connection_.reset();
  return StoreIoError(absl::StrCat("job store: ", std::string(what)));
}

// What the server said last, its end included, waits at the socket: it costs no question.
bool PostgresConnection::IsAlive() const {
  if (connection_ == nullptr) return false;
  while (Poll(connection_.get(), POLLIN, absl::ZeroDuration()) > 0) {
    if (PQconsumeInput(connection_.get()) == 0) return false;
  }
  return PQstatus(connection_.get()) == CONNECTION_OK;
}

absl::Status PostgresConnection::EnsureConnected() {
  if (is_in_transaction_) {
    return connection_ == nullptr ? StoreIoError("job store: the connection was lost")
                                  : absl::OkStatus();
  }
  return IsAlive() ? absl::OkStatus() : Connect();
}

absl::Status PostgresConnection::WaitForResult(absl::Duration deadline) {
  while (true) {
    const int n_unsent = PQflush(connection_.get());
    if (n_unsent < 0) return Lost("the connection was lost");
    if (n_unsent == 0 && PQisBusy(connection_.get()) == 0) return absl::OkStatus();
    const absl::Duration left = deadline - Clock::Real()->Monotonic();
    const int events = n_unsent == 0 ? POLLIN : POLLIN | POLLOUT;
    if (left <= absl::ZeroDuration() || Poll(connection_.get(), events, left) == 0) {
      return Lost(absl::StrCat("no answer within ", absl::FormatDuration(kAnswerMax)));
    }
    if (PQconsumeInput(connection_.get()) == 0) return Lost("the connection was lost");
  }
}

absl::StatusOr<PostgresConnection::Result> PostgresConnection::Receive() {
  const absl::Duration deadline = Clock::Real()->Monotonic() + kAnswerMax;
  Result answer;
  while (true) {
    WALSH_RETURN_IF_ERROR(WaitForResult(deadline));
    Result next(PQgetResult(connection_.get()));
    if (next == nullptr) break;
    if (answer == nullptr || !IsError(answer.get())) answer = std::move(next);
  }
  if (answer == nullptr) return Lost("the connection was lost");
  if (!IsError(answer.get())) return answer;
  absl::Status status = ErrorOf(answer.get());
  if (PQstatus(connection_.get()) != CONNECTION_OK) connection_.reset();
  return status;
}

absl::StatusOr<PostgresConnection::Result> PostgresConnection::Run(
    const std::string& sql, const std::vector<Parameter>& parameters) {
  WALSH_RETURN_IF_ERROR(EnsureConnected());
  std::vector<Oid> types;
  std::vector<const char*> values;
  std::vector<int> lengths;
  for (const Parameter& parameter : parameters) {
    types.push_back(parameter.type);
    values.push_back(parameter.bytes.data());
    lengths.push_back(static_cast<int>(parameter.bytes.size()));
  }
  const std::vector<int> formats(parameters.size(), kBinary);
  if (PQsendQueryParams(connection_.get(), sql.c_str(), static_cast<int>(parameters.size()),
                        types.data(), values.data(), lengths.data(), formats.data(),
                        kBinary) == 0) {
    return Lost("the connection was lost");
  }
  return Receive();
}

absl::Status PostgresConnection::Execute(const std::string& sql) {
  WALSH_RETURN_IF_ERROR(EnsureConnected());
  if (PQsendQuery(connection_.get(), sql.c_str()) == 0) return Lost("the connection was lost");
  return Receive().status();
}

absl::StatusOr<std::unique_ptr<Statement>> PostgresConnection::Prepare(std::string_view sql) {
  return std::make_unique<PostgresStatement>(this, NumberParameters(sql));
}

absl::Status PostgresConnection::Begin() {
  WALSH_RETURN_IF_ERROR(Execute("BEGIN"));
  is_in_transaction_ = true;
  return absl::OkStatus();
}

absl::Status PostgresConnection::Commit() {
  WALSH_ASSIGN_OR_RETURN(const Result result, Run("COMMIT", {}));
  is_in_transaction_ = false;
  // The answer to COMMIT after a statement that failed: it has rolled back.
  if (std::string_view(PQcmdStatus(result.get())) != "COMMIT") {
    return absl::InternalError("job store: the transaction was rolled back");
  }
  return absl::OkStatus();
}

void PostgresConnection::Rollback() {
  is_in_transaction_ = false;
  if (connection_ == nullptr) return;
  // A connection in an unknown state is not used again.
  if (!Execute("ROLLBACK").ok()) connection_.reset();
}

absl::Status PostgresConnection::LockSchema() {
  return Execute(absl::StrCat("SELECT pg_advisory_xact_lock(", kSchemaLock, ")"));
}

absl::StatusOr<int64_t> PostgresConnection::SchemaVersion() {
  WALSH_RETURN_IF_ERROR(LockSchema());
  WALSH_RETURN_IF_ERROR(
      Execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)"));
  return Number("SELECT version FROM schema_version");
}

absl::Status PostgresConnection::TakeSchemaStep(int version, const std::string& sql) {
  WALSH_RETURN_IF_ERROR(Execute(InPostgresWords(sql)));
  return Execute(absl::StrCat("DELETE FROM schema_version; INSERT INTO schema_version VALUES (",
                              version, ")"));
}

}  // namespace walsh::jobs
