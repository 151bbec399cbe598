#include "server/jobs/schema.h"

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

constexpr SchemaStep kSteps[] = {
    {1, "jobs, events and requests", R"sql(
CREATE TABLE jobs (
  ordinal         INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of creation; pages are cut by it
  id              TEXT NOT NULL UNIQUE,
  state           INTEGER NOT NULL,                   -- walsh.v1.QuantizationJob.State
  model_name      TEXT NOT NULL,
  fencing_token   INTEGER NOT NULL,
  completed_token INTEGER NOT NULL,
  last_sequence   INTEGER NOT NULL,
  crashes         INTEGER NOT NULL,
  crash_workers   TEXT NOT NULL,                      -- names, one a line
  retries         INTEGER NOT NULL,
  not_before_us   INTEGER NOT NULL,                   -- Unix time; 0 for at once
  job             BLOB NOT NULL                       -- walsh.v1.QuantizationJob
);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE INDEX jobs_by_model_name ON jobs (model_name);
-- QUEUED, RUNNING and CANCELLING jobs have their model's name to themselves.
CREATE UNIQUE INDEX live_model_names ON jobs (model_name) WHERE state IN (1, 3, 5);
CREATE TABLE job_events (
  job      INTEGER NOT NULL REFERENCES jobs (ordinal) ON DELETE CASCADE,
  sequence INTEGER NOT NULL,
  event    BLOB NOT NULL,                             -- walsh.v1.QuantizationJobEvent
  PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
CREATE TABLE requests (
  request_id  TEXT PRIMARY KEY,
  body_sha256 TEXT NOT NULL,
  job_id      TEXT NOT NULL,                          -- may have been deleted since
  create_us   INTEGER NOT NULL
) WITHOUT ROWID;
)sql"},
    {2, "published models", R"sql(
CREATE TABLE models (
  id    TEXT PRIMARY KEY,
  model BLOB NOT NULL                                 -- walsh.v1.Model without what only a worker knows
) WITHOUT ROWID;
CREATE INDEX requests_by_time ON requests (create_us);
)sql"},
    {3, "aliases of models", R"sql(
CREATE TABLE aliases (
  id        TEXT PRIMARY KEY,
  model     TEXT NOT NULL REFERENCES models (id),
  update_us INTEGER NOT NULL                          -- Unix time
) WITHOUT ROWID;
)sql"},
    {4, "tenants of jobs", R"sql(
ALTER TABLE jobs ADD COLUMN tenant TEXT NOT NULL DEFAULT '';  -- empty: made without a key
CREATE INDEX jobs_by_tenant ON jobs (tenant);
)sql"},
};

}  // namespace

std::span<const SchemaStep> SchemaSteps() { return kSteps; }

int SchemaVersion() { return SchemaSteps().back().version; }

absl::Status Migrate(Connection* connection, int to) {
  while (true) {
    WALSH_ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(connection));
    WALSH_ASSIGN_OR_RETURN(const int64_t from, connection->SchemaVersion());
    if (from > SchemaVersion()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the job store has schema version ", from, ", this build knows versions up to ",
          SchemaVersion(), ": start the newer build"));
    }
    if (from >= to) return absl::OkStatus();
    const SchemaStep& step = SchemaSteps()[static_cast<size_t>(from)];
    WALSH_RETURN_IF_ERROR(connection->TakeSchemaStep(step.version, step.sql));
    WALSH_RETURN_IF_ERROR(transaction.Commit());
    WALSH_LOG(Info, "job store migrated", {"version", step.version}, {"step", step.what});
  }
}

}  // namespace walsh::jobs
