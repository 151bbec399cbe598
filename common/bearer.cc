#include "common/bearer.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

constexpr absl::string_view kScheme = "Bearer ";

}  // namespace

std::string_view BearerSecret(std::string_view authorization) {
  // Names of schemes have no case (RFC 9110, 11.1).
  const std::string scheme(authorization.substr(0, kScheme.size()));
  if (!absl::EqualsIgnoreCase(scheme, kScheme)) return {};
  return authorization.substr(kScheme.size());
}

std::string BearerHeader(std::string_view secret) {
  return absl::StrCat(kScheme, std::string(secret));
}

SecretDigest DigestOf(std::string_view secret) {
  SecretDigest digest;
  SHA256(reinterpret_cast<const uint8_t*>(secret.data()), secret.size(), digest.data());
  return digest;
}

bool SameDigest(const SecretDigest& a, const SecretDigest& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

absl::Status CheckSecret(std::string_view secret) {
  const bool is_printable =
      std::all_of(secret.begin(), secret.end(), [](char c) { return c > 0x20 && c < 0x7f; });
  if (is_printable && secret.size() >= limits::kSecretBytesMin &&
      secret.size() <= limits::kSecretBytesMax) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("a secret has ", limits::kSecretBytesMin, " to ",
                                                 limits::kSecretBytesMax,
                                                 " printable characters without spaces"));
}

absl::StatusOr<std::vector<std::string>> ReadSecrets(const std::string& path) {
  WALSH_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limits::kSecretsFileBytesMax));
  std::vector<std::string> secrets;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    const absl::string_view secret = absl::StripAsciiWhitespace(line);
    if (secret.empty() || secret.front() == '#') continue;
    secrets.emplace_back(secret);
    WALSH_RETURN_IF_ERROR(CheckSecret(secrets.back()));
  }
  if (secrets.empty()) return absl::InvalidArgumentError("it holds no secret");
  return secrets;
}

}  // namespace walsh
