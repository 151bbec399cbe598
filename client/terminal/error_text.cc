#include "client/terminal/error_text.h"

#include "absl/strings/str_cat.h"
#include "client/terminal/safe_text.h"
#include "common/grpc_status.h"
#include "google/rpc/error_details.pb.h"

namespace walsh::client {
namespace {

// The lines of one detail, each "  text\n". The message often names the field already.
std::string DetailText(const google::protobuf::Any& detail, std::string_view message) {
  std::string text;
  google::rpc::BadRequest bad_request;
  google::rpc::PreconditionFailure precondition;
  google::rpc::ErrorInfo info;
  google::rpc::RetryInfo retry;
  if (detail.UnpackTo(&bad_request)) {
    for (const auto& violation : bad_request.field_violations()) {
      const std::string line = absl::StrCat(violation.field(), ": ", violation.description());
      if (message.find(line) == std::string_view::npos) absl::StrAppend(&text, "  ", line, "\n");
    }
  } else if (detail.UnpackTo(&precondition)) {
    for (const auto& violation : precondition.violations()) {
      absl::StrAppend(&text, "  ", violation.subject(), ": ", violation.description(), "\n");
    }
  } else if (detail.UnpackTo(&info)) {
    absl::StrAppend(&text, "  reason: ", info.reason());
    for (const auto& [key, value] : info.metadata()) absl::StrAppend(&text, ", ", key, ": ", value);
    text += "\n";
  } else if (detail.UnpackTo(&retry)) {
    absl::StrAppend(&text, "  try again in ",
                    absl::FormatDuration(absl::Seconds(retry.retry_delay().seconds()) +
                                         absl::Nanoseconds(retry.retry_delay().nanos())),
                    "\n");
  }
  return text;
}

}  // namespace

std::string ErrorText(const absl::Status& status) {
  const std::string message(status.message());
  std::string text =
      absl::StrCat("error: ", absl::StatusCodeToString(status.code()), ": ", message, "\n");
  const google::rpc::Status proto = ToProtoStatus(status);
  for (const auto& detail : proto.details()) text += DetailText(detail, message);
  return SafeText(text);
}

}  // namespace walsh::client
