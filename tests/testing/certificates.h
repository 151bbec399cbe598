// Certificates for tests, made while they run: no key is ever committed.
#pragma once

#include <openssl/evp.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace walsh::testing {

struct IssueOptions {
  std::string names = "DNS:localhost,IP:127.0.0.1";  // as OpenSSL's subjectAltName; empty: none
  std::string uses = "serverAuth,clientAuth";        // as its extendedKeyUsage
  absl::Time begins = absl::Now() - absl::Hours(1);
  absl::Time expires = absl::Now() + absl::Hours(1);
};

struct Issued {
  std::string certificate;  // PEM
  std::string private_key;
};

class CertificateAuthority {
 public:
  explicit CertificateAuthority(const std::string& name = "a test's CA");
  std::string pem() const;
  Issued Issue(const IssueOptions& options = {});

 private:
  std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY*)> key_;
  std::unique_ptr<X509, void (*)(X509*)> certificate_;
  long n_issued_ = 0;
};

}  // namespace walsh::testing
