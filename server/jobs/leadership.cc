#include "server/jobs/leadership.h"

#include <utility>

#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "server/jobs/postgres.h"

namespace walsh::jobs {
namespace {

constexpr absl::Duration kNotLeaderRetry = absl::Seconds(1);

// That the epoch is the key lets a write hold it (FOR KEY SHARE) while the counter moves on.
constexpr char kTable[] = R"sql(
CREATE TABLE IF NOT EXISTS leadership (
  epoch  BIGINT PRIMARY KEY,
  holder TEXT NOT NULL,        -- empty: nobody leads
  beats  BIGINT NOT NULL
);
INSERT INTO leadership (epoch, holder, beats)
  SELECT 0, '', 0 WHERE NOT EXISTS (SELECT 1 FROM leadership);
)sql";

}  // namespace

absl::StatusOr<std::unique_ptr<Leadership>> Leadership::Open(const std::string& uri,
                                                             std::string holder,
                                                             const Clock* clock) {
  WALSH_ASSIGN_OR_RETURN(auto connection, PostgresConnection::Open(uri));
  WALSH_ASSIGN_OR_RETURN(Transaction transaction, Transaction::Begin(connection.get()));
  WALSH_RETURN_IF_ERROR(connection->LockSchema());
  WALSH_RETURN_IF_ERROR(connection->Execute(kTable));
  WALSH_RETURN_IF_ERROR(transaction.Commit());
  return std::unique_ptr<Leadership>(
      new Leadership(std::move(connection), std::move(holder), clock));
}

absl::StatusOr<bool> Leadership::TryToLead() {
  // What happened between two sights is known only when both came about.
  const std::optional<Sight> before = std::exchange(sight_, std::nullopt);
  WALSH_ASSIGN_OR_RETURN(const auto look,
                         connection_->Prepare("SELECT epoch, beats, holder FROM leadership"));
  WALSH_ASSIGN_OR_RETURN(const bool has_row, look->Step());
  if (!has_row) return absl::DataLossError("job store: the table leadership is empty");
  sight_ = {.epoch = look->Int(0), .beats = look->Int(1), .since = clock_->Monotonic()};
  leader_ = look->Text(2);
  if (before.has_value() && before->epoch == sight_->epoch && before->beats == sight_->beats) {
    sight_->since = before->since;
  }
  if (!leader_.empty() && clock_->Monotonic() - sight_->since < kDeadAfter) return false;

  WALSH_ASSIGN_OR_RETURN(const auto take,
                         connection_->Prepare("UPDATE leadership SET epoch = epoch + 1, beats = 0, "
                                              "holder = ? WHERE epoch = ? AND beats = ? "
                                              "RETURNING epoch"));
  take->Bind(holder_).Bind(sight_->epoch).Bind(sight_->beats);
  WALSH_ASSIGN_OR_RETURN(const bool is_taken, take->Step());
  if (!is_taken) return false;
  epoch_ = take->Int(0);
  leader_ = holder_;
  return true;
}

absl::StatusOr<bool> Leadership::UpdateOwn(std::string_view sql) {
  WALSH_ASSIGN_OR_RETURN(const auto update, connection_->Prepare(sql));
  return update->Bind(epoch_).Step();
}

absl::Status Leadership::Renew() {
  WALSH_ASSIGN_OR_RETURN(
      const bool leads,
      UpdateOwn("UPDATE leadership SET beats = beats + 1 WHERE epoch = ? RETURNING 1"));
  return leads ? absl::OkStatus() : NotLeader();
}

absl::Status Leadership::Resign() {
  // The epoch goes on, so that what this process still has on its way is not stored.
  WALSH_ASSIGN_OR_RETURN(const bool leads,
                         UpdateOwn("UPDATE leadership SET epoch = epoch + 1, holder = '', beats = "
                                   "0 WHERE epoch = ? RETURNING 1"));
  return leads ? absl::OkStatus() : NotLeader();
}

absl::StatusOr<bool> HoldEpoch(Connection* connection, int64_t epoch) {
  WALSH_ASSIGN_OR_RETURN(const auto hold, connection->Prepare("SELECT 1 FROM leadership WHERE "
                                                              "epoch = ? FOR KEY SHARE"));
  return hold->Bind(epoch).Step();
}

absl::Status NotLeader() {
  absl::Status status = absl::UnavailableError("job store: another coordinator leads");
  SetErrorInfo(status, "NOT_LEADER");
  SetRetryDelay(status, kNotLeaderRetry);
  return status;
}

}  // namespace walsh::jobs
