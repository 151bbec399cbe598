#include "server/jobs/sql.h"

#include <utility>

#include "absl/time/time.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace walsh::jobs {
namespace {

// Somebody has to make room; a disk that fails may do so for a moment only.
constexpr absl::Duration kFullRetry = absl::Seconds(30);
constexpr absl::Duration kIoErrorRetry = absl::Seconds(1);

}  // namespace

absl::StatusOr<int64_t> Connection::Number(std::string_view sql) {
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Statement> statement, Prepare(sql));
  WALSH_ASSIGN_OR_RETURN(const bool has_row, statement->Step());
  return has_row ? statement->Int(0) : 0;
}

absl::StatusOr<Transaction> Transaction::Begin(Connection* connection) {
  WALSH_RETURN_IF_ERROR(connection->Begin());
  return Transaction(connection);
}

Transaction::Transaction(Transaction&& other) noexcept
    : connection_(std::exchange(other.connection_, nullptr)) {}

Transaction::~Transaction() {
  if (connection_ != nullptr) connection_->Rollback();
}

absl::Status Transaction::Commit() {
  WALSH_RETURN_IF_ERROR(connection_->Commit());
  connection_ = nullptr;
  return absl::OkStatus();
}

absl::Status StoreFull(std::string_view message) {
  absl::Status status = absl::ResourceExhaustedError(std::string(message));
  SetErrorInfo(status, "STORE_FULL");
  SetRetryDelay(status, kFullRetry);
  return status;
}

absl::Status StoreIoError(std::string_view message) {
  absl::Status status = absl::UnavailableError(std::string(message));
  SetErrorInfo(status, "STORE_IO_ERROR");
  SetRetryDelay(status, kIoErrorRetry);
  return status;
}

}  // namespace walsh::jobs
