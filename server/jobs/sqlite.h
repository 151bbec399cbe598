// SQLite behind sql.h.
#pragma once

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/jobs/sql.h"

namespace walsh::jobs {

class SqliteConnection : public Connection {
 public:
  enum class Mode { kReadWrite, kReadOnly };
  // WAL, synchronous=FULL, foreign keys on, 5 s busy timeout.
  static absl::StatusOr<std::unique_ptr<SqliteConnection>> Open(const std::string& path, Mode mode);

  absl::Status Execute(const std::string& sql) override;
  absl::StatusOr<std::unique_ptr<Statement>> Prepare(std::string_view sql) override;
  absl::Status Begin() override;
  absl::Status Commit() override;
  void Rollback() override;
  // PRAGMA user_version.
  absl::StatusOr<int64_t> SchemaVersion() override;
  absl::Status TakeSchemaStep(int version, const std::string& sql) override;

 private:
  struct Close {
    void operator()(sqlite3* db) const { sqlite3_close_v2(db); }
  };
  explicit SqliteConnection(sqlite3* db) : db_(db) {}
  std::unique_ptr<sqlite3, Close> db_;
};

}  // namespace walsh::jobs
