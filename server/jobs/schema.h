// The tables of the job store and the numbered steps that lead to them.
//
// A database carries the number of its last step. Steps are only ever added; a released step is
// never edited. They are in SQLite's words; the types and clauses that PostgreSQL has others for
// are listed in postgres.cc.
//
// Errors: FAILED_PRECONDITION the database is of a newer build, naming both versions.
#pragma once

#include <span>

#include "absl/status/status.h"
#include "server/jobs/sql.h"

namespace walsh::jobs {

struct SchemaStep {
  int version;  // after it; 1, 2, …
  const char* what;
  const char* sql;
};

std::span<const SchemaStep> SchemaSteps();
int SchemaVersion();  // of this build

// Brings the database to version `to`, each step in a transaction of its own.
absl::Status Migrate(Connection* connection, int to = SchemaVersion());

}  // namespace walsh::jobs
