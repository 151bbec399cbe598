// PostgreSQL behind sql.h, by libpq.
//
// A connection that was cut is made anew by the next call outside a transaction, so that a call
// fails only where it was on its way. Nothing waits for ever: connecting, statements, locks,
// transactions of a process that has stopped, and answers each have a limit of seconds.
//
// Errors: as sql.h; UNAVAILABLE also when it is not known whether a Commit took place. What the
//         server or libpq said, which may name hosts and files, goes to the log.
#pragma once

#include <libpq-fe.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/jobs/sql.h"

namespace walsh::jobs {

// INVALID_ARGUMENT unless it is a URI of PostgreSQL (postgres://…) without a password, which would
// be seen by everybody who lists processes: libpq takes one from PGPASSFILE or PGPASSWORD.
absl::Status CheckPostgresUri(const std::string& uri);

class PostgresConnection : public Connection {
 public:
  // Where the URI names several servers, the one that may be written to.
  static absl::StatusOr<std::unique_ptr<PostgresConnection>> Open(const std::string& uri);

  absl::Status Execute(const std::string& sql) override;
  absl::StatusOr<std::unique_ptr<Statement>> Prepare(std::string_view sql) override;
  absl::Status Begin() override;
  absl::Status Commit() override;
  void Rollback() override;
  // The table schema_version.
  absl::StatusOr<int64_t> SchemaVersion() override;
  absl::Status TakeSchemaStep(int version, const std::string& sql) override;

  // Until the end of the transaction no other process has this lock.
  absl::Status LockSchema();

 private:
  friend class PostgresStatement;
  struct Finish {
    void operator()(PGconn* connection) const { PQfinish(connection); }
  };
  struct Clear {
    void operator()(PGresult* result) const { PQclear(result); }
  };
  using Result = std::unique_ptr<PGresult, Clear>;
  struct Parameter {
    Oid type;
    std::string bytes;  // in PostgreSQL's binary format
  };

  explicit PostgresConnection(std::string uri) : uri_(std::move(uri)) {}
  absl::Status Connect();
  bool IsAlive() const;
  // Connects anew if need be, unless in a transaction, whose first half would be missing.
  absl::Status EnsureConnected();
  absl::StatusOr<Result> Run(const std::string& sql, const std::vector<Parameter>& parameters);
  // Of what was sent: the first result that is an error, else the last.
  absl::StatusOr<Result> Receive();
  absl::Status WaitForResult(absl::Duration deadline);
  // Ends a connection of which nothing good is to be expected.
  absl::Status Lost(std::string_view what);

  const std::string uri_;
  std::unique_ptr<PGconn, Finish> connection_;  // null: lost
  bool is_in_transaction_ = false;
};

}  // namespace walsh::jobs
