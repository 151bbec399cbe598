// What the job store asks of a database: connections, statements and transactions.
//
// sqlite.h and postgres.h have the two that there are. SQL is written once, in what both
// understand: parameters are `?`, whatever is named is portable, and tables are described in
// SQLite's words, which PostgreSQL's connection translates (schema.h).
//
// Errors:  RESOURCE_EXHAUSTED (ErrorInfo STORE_FULL) no space, or read-only; UNAVAILABLE
//          (STORE_IO_ERROR) the system or the connection failed, or another process holds the lock
//          for too long; DATA_LOSS not a database, or damaged; ALREADY_EXISTS a UNIQUE constraint;
//          INTERNAL else. Messages hold no path, host or password.
// Threads: a connection and its statements belong to one thread at a time. A connection outlives
//          its statements, of which one at a time has been stepped and not come to its last row.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::jobs {

class Statement {
 public:
  virtual ~Statement() = default;

  // Binds the next parameter.
  virtual Statement& Bind(int64_t value) = 0;
  virtual Statement& Bind(std::string_view text) = 0;
  virtual Statement& BindBlob(std::string_view bytes) = 0;

  // True: a row is there. False: no more rows.
  virtual absl::StatusOr<bool> Step() = 0;
  // For statements whose rows nobody reads.
  absl::Status Run() { return Step().status(); }

  virtual int64_t Int(int column) const = 0;
  virtual std::string Text(int column) const = 0;
  virtual std::string Blob(int column) const = 0;
};

class Connection {
 public:
  virtual ~Connection() = default;

  // One statement or several, without parameters and rows.
  virtual absl::Status Execute(const std::string& sql) = 0;
  virtual absl::StatusOr<std::unique_ptr<Statement>> Prepare(std::string_view sql) = 0;
  // The one number that a query gives; 0 without a row.
  absl::StatusOr<int64_t> Number(std::string_view sql);

  // Between these two writes are one. See Transaction.
  virtual absl::Status Begin() = 0;
  virtual absl::Status Commit() = 0;
  virtual void Rollback() = 0;

  // The number of the schema's last step; 0 where there is none. Within a transaction, until whose
  // end no other process takes steps.
  virtual absl::StatusOr<int64_t> SchemaVersion() = 0;
  // Executes what SchemaStep::sql describes and sets the number.
  virtual absl::Status TakeSchemaStep(int version, const std::string& sql) = 0;
};

// Rolled back unless committed.
class Transaction {
 public:
  static absl::StatusOr<Transaction> Begin(Connection* connection);
  Transaction(Transaction&& other) noexcept;
  Transaction& operator=(Transaction&&) = delete;
  ~Transaction();
  // After UNAVAILABLE it may have been committed all the same.
  absl::Status Commit();

 private:
  explicit Transaction(Connection* connection) : connection_(connection) {}
  Connection* connection_;  // null when done
};

// RESOURCE_EXHAUSTED (STORE_FULL) and UNAVAILABLE (STORE_IO_ERROR), with the pause after which a
// client may ask again.
absl::Status StoreFull(std::string_view message);
absl::Status StoreIoError(std::string_view message);

}  // namespace walsh::jobs
