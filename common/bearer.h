// Secrets that callers send as `authorization: Bearer SECRET`.
//
// Secrets are random and long, so that a plain SHA-256 of one tells nothing about it: servers keep
// digests only and compare all of them in constant time.
//
// Errors:  INVALID_ARGUMENT for a file without a fit secret; never names what it holds.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh {

// The secret in the value of an `authorization` header; empty when it is not of that form.
std::string_view BearerSecret(std::string_view authorization);
std::string BearerHeader(std::string_view secret);

using SecretDigest = std::array<uint8_t, 32>;
SecretDigest DigestOf(std::string_view secret);
// In a time that does not depend on where they differ.
bool SameDigest(const SecretDigest& a, const SecretDigest& b);

// 16 to 512 printable characters without spaces.
absl::Status CheckSecret(std::string_view secret);

// One secret a line; lines that are empty or begin with '#' are none. There is at least one.
absl::StatusOr<std::vector<std::string>> ReadSecrets(const std::string& path);

}  // namespace walsh
