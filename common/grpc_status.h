// The only conversion between absl::Status and grpc::Status, and the rich details beside a code.
//
// Details travel as google.rpc.Status in grpc-status-details-bin and as payloads of absl::Status,
// so that they survive both ways. Messages are cut at 1,024 bytes at a code point.
#pragma once

#include <grpcpp/support/status.h>

#include <map>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "google/rpc/status.pb.h"

namespace walsh {

inline constexpr std::string_view kErrorDomain = "walsh.v1";

grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);
google::rpc::Status ToProtoStatus(const absl::Status& status);
absl::Status FromProtoStatus(const google::rpc::Status& status);

// ErrorInfo{reason, domain walsh.v1, metadata}; reason is UPPER_SNAKE.
void SetErrorInfo(absl::Status& status, std::string_view reason,
                  const std::map<std::string, std::string>& metadata = {});
// Reason of the status's ErrorInfo, or empty.
std::string ErrorReason(const absl::Status& status);
// BadRequest.field_violations with one entry.
absl::Status InvalidField(std::string_view field, std::string_view description);
// ResourceInfo with NOT_FOUND: "model 'x' does not exist".
absl::Status NotFound(std::string_view type, std::string_view name);
// ALREADY_EXISTS (NAME_TAKEN) with ResourceInfo: "model 'x' is taken by an alias".
absl::Status NameTaken(std::string_view type, std::string_view name, std::string_view by);
// ResourceInfo beside ALREADY_EXISTS: what is there already.
void SetResourceInfo(absl::Status& status, std::string_view type, std::string_view name,
                     std::string_view description);
// PreconditionFailure beside FAILED_PRECONDITION, with one entry; `type` is UPPER_SNAKE.
void SetPreconditionFailure(absl::Status& status, std::string_view type, std::string_view subject,
                            std::string_view description);
// QuotaFailure beside RESOURCE_EXHAUSTED, with one entry.
void SetQuotaFailure(absl::Status& status, std::string_view subject, std::string_view description);
// RetryInfo beside RESOURCE_EXHAUSTED or UNAVAILABLE.
void SetRetryDelay(absl::Status& status, absl::Duration delay);

}  // namespace walsh
