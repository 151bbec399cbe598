// Certificates, keys and CAs as PEM files, read and judged before anything uses them.
//
// A pair that does not fit, has expired or cannot be parsed would fail every handshake; gRPC takes
// it all the same. So what is here is checked first: by whoever starts, and again whenever the
// files have changed (common/reloaded.h), where a bad set leaves the last good one in use.
//
// Errors:  those of reading a file; INVALID_ARGUMENT names the flag and what is wrong with its
//          file. Never a byte of what a file holds.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/reloaded.h"

namespace walsh {

// Paths as the flags give them; empty: not given.
struct TlsFiles {
  std::string certificate;  // --tls-cert: our own, then its intermediates
  std::string private_key;  // --tls-key
  std::string ca;           // --tls-ca: of the servers that we call
  std::string client_ca;    // --tls-client-ca: of the clients that call us
  // Daemons call each other in both directions under one CA, so that a certificate that is not of
  // `ca`, or not fit for both directions, is one that no other daemon would take.
  bool certificate_is_of_ca = false;

  bool empty() const {
    return certificate.empty() && private_key.empty() && ca.empty() && client_ca.empty();
  }
};

// What the files hold; empty where none is given.
struct TlsPems {
  std::string certificate;
  std::string private_key;
  std::string ca;
  std::string client_ca;
  absl::Time expires = absl::InfiniteFuture();  // of our own certificate

  bool operator==(const TlsPems&) const = default;
};

absl::StatusOr<TlsPems> ReadTlsFiles(const TlsFiles& files, absl::Time now);

// The same, followed by Poll(); walsh_tls_certificate_expiry_timestamp_seconds follows it, too.
absl::StatusOr<std::unique_ptr<Reloaded<TlsPems>>> WatchTlsFiles(const TlsFiles& files);

}  // namespace walsh
