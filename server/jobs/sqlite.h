// A thin layer over SQLite's C interface: connections, statements and transactions as values.
//
// Errors:  RESOURCE_EXHAUSTED (ErrorInfo STORE_FULL) no space, or read-only; UNAVAILABLE
//          (STORE_IO_ERROR) the system failed, or another process holds the lock for too long;
//          DATA_LOSS not a database, or damaged; ALREADY_EXISTS a UNIQUE constraint; INTERNAL else.
//          Messages hold no path.
// Threads: a connection and its statements belong to one thread at a time.
#pragma once

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh::jobs {

class Statement {
 public:
  // Binds the next parameter.
  Statement& Bind(int64_t value);
  Statement& Bind(std::string_view text);
  Statement& BindBlob(std::string_view bytes);

  // True: a row is there. False: no more rows.
  absl::StatusOr<bool> Step();
  // For statements without rows.
  absl::Status Run();

  int64_t Int(int column) const;
  std::string Text(int column) const;
  std::string Blob(int column) const;

 private:
  friend class Connection;
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
  };
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
  int n_bound_ = 0;
  // The first failure of Bind, reported by Step.
  int bind_result_ = SQLITE_OK;
};

class Connection {
 public:
  enum class Mode { kReadWrite, kReadOnly };
  // WAL, synchronous=FULL, foreign keys on, 5 s busy timeout.
  static absl::StatusOr<Connection> Open(const std::string& path, Mode mode);

  // Statements without parameters and rows.
  absl::Status Execute(const std::string& sql);
  absl::StatusOr<Statement> Prepare(std::string_view sql) const;
  // The one number that a query gives.
  absl::StatusOr<int64_t> Number(std::string_view sql) const;

 private:
  struct Close {
    void operator()(sqlite3* db) const { sqlite3_close_v2(db); }
  };
  std::unique_ptr<sqlite3, Close> db_;
};

// BEGIN IMMEDIATE; rolled back unless committed.
class Transaction {
 public:
  static absl::StatusOr<Transaction> Begin(Connection* connection);
  Transaction(Transaction&& other) noexcept;
  Transaction& operator=(Transaction&&) = delete;
  ~Transaction();
  absl::Status Commit();

 private:
  explicit Transaction(Connection* connection) : connection_(connection) {}
  Connection* connection_;  // null when done
};

}  // namespace walsh::jobs
