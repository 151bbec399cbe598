#include "server/jobs/page_token.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/sha256.h"

namespace walsh::jobs {
namespace {

std::string Fingerprint(std::string_view query) { return Sha256Hex(query).substr(0, 8); }

}  // namespace

std::string MakePageToken(std::string_view query, std::string_view position) {
  return absl::WebSafeBase64Escape(Fingerprint(query).append(position));
}

absl::StatusOr<std::string> ReadPageToken(std::string_view query, std::string_view token) {
  std::string plain;
  const std::string fingerprint = Fingerprint(query);
  if (!absl::WebSafeBase64Unescape(absl::string_view(token.data(), token.size()), &plain) ||
      !std::string_view(plain).starts_with(fingerprint)) {
    return InvalidField("page_token",
                        "is not a token of this query; start again without a page_token");
  }
  return plain.substr(fingerprint.size());
}

absl::StatusOr<int> PageSize(int requested) {
  if (requested < 0) {
    return InvalidField("page_size",
                        absl::StrCat("must be 0 to ", limits::kPageSizeMax, ", is ", requested));
  }
  if (requested == 0) return limits::kPageSizeDefault;
  return std::min(requested, limits::kPageSizeMax);
}

}  // namespace walsh::jobs
