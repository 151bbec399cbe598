// Opaque page tokens: base64url of a position and a fingerprint of the query that it belongs to.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh::jobs {

std::string MakePageToken(std::string_view query, std::string_view position);
// The position. INVALID_ARGUMENT (field page_token) when the token is damaged or of another query.
absl::StatusOr<std::string> ReadPageToken(std::string_view query, std::string_view token);

// The number of items of a page: 0 means 50, at most 1000 are given. INVALID_ARGUMENT below 0.
absl::StatusOr<int> PageSize(int requested);

}  // namespace walsh::jobs
