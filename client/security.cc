#include "client/security.h"

#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/address.h"
#include "common/bearer.h"
#include "common/status_macros.h"

namespace walsh::client {
namespace {

absl::StatusOr<std::string> ReadApiKey(const std::string& path) {
  const char* from_environment = std::getenv("WALSH_API_KEY");
  const std::string key = from_environment == nullptr ? "" : from_environment;
  if (path.empty()) {
    if (key.empty()) return key;
    if (absl::Status status = CheckSecret(key); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("WALSH_API_KEY: ", status.message()));
    }
    return key;
  }
  if (!key.empty()) {
    return absl::InvalidArgumentError("--api-key-file and WALSH_API_KEY cannot both be given");
  }
  absl::StatusOr<std::vector<std::string>> secrets = ReadSecrets(path);
  if (secrets.ok() && secrets->size() > 1) {
    secrets = absl::InvalidArgumentError("it holds more than one key");
  }
  if (!secrets.ok()) {
    return absl::Status(secrets.status().code(),
                        absl::StrCat("--api-key-file: ", secrets.status().message()));
  }
  return secrets->front();
}

}  // namespace

void AddSecurityFlags(CLI::App& app, SecurityFlags& flags) {
  app.add_option("--tls-ca", flags.tls.ca,
                 "PEM file of the CA of the service, which is then called over TLS");
  app.add_option("--tls-cert", flags.tls.certificate,
                 "PEM file of a client certificate, for a service that asks for one");
  app.add_option("--tls-key", flags.tls.private_key, "PEM file of its private key");
  app.add_option("--api-key-file", flags.api_key_file,
                 "File of the API key, for a service that asks for one; or WALSH_API_KEY, the key");
}

absl::StatusOr<ChannelSecurity> ReadSecurity(const SecurityFlags& flags,
                                             const std::string& address) {
  if (flags.tls.ca.empty() && !flags.tls.certificate.empty()) {
    return absl::InvalidArgumentError("--tls-cert needs --tls-ca: without it there is no TLS");
  }
  ChannelSecurity security;
  WALSH_ASSIGN_OR_RETURN(TlsPems pems, ReadTlsFiles(flags.tls, absl::Now()));
  security.tls = std::make_shared<const TlsPems>(std::move(pems));
  WALSH_ASSIGN_OR_RETURN(security.secret, ReadApiKey(flags.api_key_file));
  if (!security.secret.empty() && !security.has_tls() && !IsLoopback(address)) {
    return absl::InvalidArgumentError(
        absl::StrCat("an API key is not sent to ", address, " without TLS: give --tls-ca"));
  }
  return security;
}

}  // namespace walsh::client
