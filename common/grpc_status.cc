#include "common/grpc_status.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/utf8.h"
#include "google/rpc/error_details.pb.h"

namespace walsh {
namespace {

constexpr std::string_view kTypePrefix = "type.googleapis.com/";

std::string TypeUrl(const google::protobuf::Message& message) {
  return absl::StrCat(std::string(kTypePrefix), message.GetTypeName());
}

void SetDetail(absl::Status& status, const google::protobuf::Message& detail) {
  status.SetPayload(TypeUrl(detail), absl::Cord(detail.SerializeAsString()));
}

std::string ClientMessage(absl::string_view message) {
  const std::string valid = ReplaceInvalidUtf8({message.data(), message.size()});
  return std::string(Utf8Prefix(valid, limits::kStatusMessageBytesMax));
}

}  // namespace

google::rpc::Status ToProtoStatus(const absl::Status& status) {
  google::rpc::Status proto;
  proto.set_code(static_cast<int>(status.code()));
  proto.set_message(ClientMessage(status.message()));
  std::vector<std::pair<std::string, std::string>> details;
  status.ForEachPayload([&](absl::string_view type_url, const absl::Cord& payload) {
    std::string url(type_url);
    if (!url.starts_with(kTypePrefix)) return;  // a mark that is this process's
    details.emplace_back(std::move(url), std::string(payload));
  });
  // Payloads have no order of their own; sorted, equal statuses give equal bytes, and the small
  // ones are kept when not all fit the metadata.
  std::sort(details.begin(), details.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second.size(), a.first) < std::pair(b.second.size(), b.first);
  });
  for (auto& [type_url, value] : details) {
    google::protobuf::Any* any = proto.add_details();
    any->set_type_url(type_url);
    any->set_value(std::move(value));
    if (proto.ByteSizeLong() > static_cast<size_t>(limits::kStatusDetailsBytesMax)) {
      proto.mutable_details()->RemoveLast();
      break;
    }
  }
  return proto;
}

absl::Status FromProtoStatus(const google::rpc::Status& proto) {
  if (proto.code() == 0) return absl::OkStatus();
  // absl::Status maps codes that it does not know to UNKNOWN only when it is asked for the code.
  const bool known = proto.code() > 0 && proto.code() <= 16;
  absl::Status status(
      known ? static_cast<absl::StatusCode>(proto.code()) : absl::StatusCode::kUnknown,
      proto.message());
  for (const google::protobuf::Any& any : proto.details()) {
    status.SetPayload(any.type_url(), absl::Cord(any.value()));
  }
  return status;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const google::rpc::Status proto = ToProtoStatus(status);
  return grpc::Status(static_cast<grpc::StatusCode>(proto.code()), proto.message(),
                      proto.details().empty() ? "" : proto.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  google::rpc::Status proto;
  // What a peer sent beside another code is not about this failure.
  if (status.error_details().empty() || !proto.ParseFromString(status.error_details()) ||
      proto.code() != static_cast<int>(status.error_code())) {
    proto.Clear();
  }
  proto.set_code(static_cast<int>(status.error_code()));
  proto.set_message(ReplaceInvalidUtf8(status.error_message()));
  return FromProtoStatus(proto);
}

void SetErrorInfo(absl::Status& status, std::string_view reason,
                  const std::map<std::string, std::string>& metadata) {
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(std::string(kErrorDomain));
  for (const auto& [key, value] : metadata) {
    (*info.mutable_metadata())[ReplaceInvalidUtf8(key)] = ReplaceInvalidUtf8(value);
  }
  SetDetail(status, info);
}

std::string ErrorReason(const absl::Status& status) {
  google::rpc::ErrorInfo info;
  const auto payload = status.GetPayload(TypeUrl(info));
  if (!payload.has_value() || !info.ParseFromString(std::string(*payload))) return "";
  return info.reason();
}

absl::Status InvalidField(std::string_view field, std::string_view description) {
  const std::string field_name = ReplaceInvalidUtf8(field);
  const std::string text = ReplaceInvalidUtf8(description);
  absl::Status status = absl::InvalidArgumentError(absl::StrCat(field_name, ": ", text));
  google::rpc::BadRequest bad_request;
  auto* violation = bad_request.add_field_violations();
  violation->set_field(field_name);
  violation->set_description(std::string(Utf8Prefix(text, limits::kStatusMessageBytesMax)));
  SetDetail(status, bad_request);
  return status;
}

absl::Status NotFound(std::string_view type, std::string_view name) {
  const std::string shown(Utf8Prefix(ReplaceInvalidUtf8(name), limits::kDisplayNameBytesMax));
  absl::Status status =
      absl::NotFoundError(absl::StrCat(std::string(type), " '", shown, "' does not exist"));
  google::rpc::ResourceInfo info;
  info.set_resource_type(std::string(type));
  info.set_resource_name(shown);
  SetDetail(status, info);
  return status;
}

absl::Status NameTaken(std::string_view type, std::string_view name, std::string_view by) {
  const std::string taken = absl::StrCat("taken by ", std::string(by));
  absl::Status status = absl::AlreadyExistsError(
      absl::StrCat(std::string(type), " '", std::string(name), "' is ", taken));
  SetErrorInfo(status, "NAME_TAKEN", {{"name", std::string(name)}});
  SetResourceInfo(status, type, name, taken);
  return status;
}

void SetResourceInfo(absl::Status& status, std::string_view type, std::string_view name,
                     std::string_view description) {
  google::rpc::ResourceInfo info;
  info.set_resource_type(ReplaceInvalidUtf8(type));
  info.set_resource_name(ReplaceInvalidUtf8(name));
  info.set_description(ReplaceInvalidUtf8(description));
  SetDetail(status, info);
}

void SetPreconditionFailure(absl::Status& status, std::string_view type, std::string_view subject,
                            std::string_view description) {
  google::rpc::PreconditionFailure failure;
  auto* violation = failure.add_violations();
  violation->set_type(std::string(type));
  violation->set_subject(ReplaceInvalidUtf8(subject));
  violation->set_description(ReplaceInvalidUtf8(description));
  SetDetail(status, failure);
}

void SetQuotaFailure(absl::Status& status, std::string_view subject, std::string_view description) {
  google::rpc::QuotaFailure failure;
  auto* violation = failure.add_violations();
  violation->set_subject(ReplaceInvalidUtf8(subject));
  violation->set_description(ReplaceInvalidUtf8(description));
  SetDetail(status, failure);
}

void SetRetryDelay(absl::Status& status, absl::Duration delay) {
  google::rpc::RetryInfo info;
  absl::Duration rest = std::clamp(delay, absl::ZeroDuration(), absl::Hours(24));
  info.mutable_retry_delay()->set_seconds(absl::IDivDuration(rest, absl::Seconds(1), &rest));
  info.mutable_retry_delay()->set_nanos(static_cast<int>(absl::ToInt64Nanoseconds(rest)));
  SetDetail(status, info);
}

}  // namespace walsh
