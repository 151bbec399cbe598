#include "common/tls_files.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <ctime>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/metrics.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

struct Free {
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(X509_STORE* store) const { X509_STORE_free(store); }
  void operator()(X509_STORE_CTX* context) const { X509_STORE_CTX_free(context); }
  // Its certificates belong to somebody else.
  void operator()(STACK_OF(X509) * stack) const { sk_X509_free(stack); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;
using Certificates = std::vector<Owned<X509>>;

absl::Status Wrong(const char* flag, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", what));
}

Owned<BIO> Reader(const std::string& text) {
  return Owned<BIO>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

absl::StatusOr<Certificates> ParseCertificates(const char* flag, const std::string& pem) {
  const Owned<BIO> reader = Reader(pem);
  Certificates certificates;
  ERR_clear_error();
  while (X509* certificate = PEM_read_bio_X509(reader.get(), nullptr, nullptr, nullptr)) {
    certificates.emplace_back(certificate);
  }
  // The end is told as the want of another first line.
  const bool is_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (!is_end) return Wrong(flag, "a certificate in it is damaged");
  if (certificates.empty()) return Wrong(flag, "it holds no PEM certificate");
  return certificates;
}

absl::StatusOr<Owned<EVP_PKEY>> ParsePrivateKey(const std::string& pem) {
  // Without it OpenSSL would ask for the password of an encrypted key on the terminal.
  const auto no_password = +[](char*, int, int, void*) { return 0; };
  Owned<EVP_PKEY> key(PEM_read_bio_PrivateKey(Reader(pem).get(), nullptr, no_password, nullptr));
  ERR_clear_error();
  if (key == nullptr) return Wrong("--tls-key", "it holds no PEM private key without a password");
  return key;
}

absl::StatusOr<absl::Time> ToTime(const ASN1_TIME* time) {
  std::tm parts = {};
  if (ASN1_TIME_to_tm(time, &parts) != 1) return Wrong("--tls-cert", "its dates cannot be read");
  return absl::FromTM(parts, absl::UTCTimeZone());
}

absl::Status CheckIsOfCa(const Certificates& chain, const Certificates& cas, absl::Time now) {
  const Owned<X509_STORE> store(X509_STORE_new());
  for (const Owned<X509>& ca : cas) X509_STORE_add_cert(store.get(), ca.get());
  const Owned<STACK_OF(X509)> intermediates(sk_X509_new_null());
  for (size_t i = 1; i < chain.size(); ++i) sk_X509_push(intermediates.get(), chain[i].get());
  for (const int purpose : {X509_PURPOSE_SSL_SERVER, X509_PURPOSE_SSL_CLIENT}) {
    const Owned<X509_STORE_CTX> context(X509_STORE_CTX_new());
    X509_STORE_CTX_init(context.get(), store.get(), chain[0].get(), intermediates.get());
    X509_STORE_CTX_set_purpose(context.get(), purpose);
    X509_STORE_CTX_set_time(context.get(), 0, absl::ToTimeT(now));
    // As gRPC does it: a CA in the file is trusted although it may have been issued by another.
    X509_STORE_CTX_set_flags(context.get(), X509_V_FLAG_PARTIAL_CHAIN);
    if (X509_verify_cert(context.get()) != 1) {
      const char* why = X509_verify_cert_error_string(X509_STORE_CTX_get_error(context.get()));
      return Wrong("--tls-cert",
                   absl::StrCat("other daemons would not take it as a ",
                                purpose == X509_PURPOSE_SSL_SERVER ? "server's" : "client's",
                                " with the CAs of --tls-ca: ", why));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ReadPem(const char* flag, const std::string& path) {
  if (path.empty()) return std::string();
  absl::StatusOr<std::string> pem = ReadFile(path, limits::kTlsFileBytesMax);
  if (!pem.ok()) {
    return absl::Status(pem.status().code(), absl::StrCat(flag, ": ", pem.status().message()));
  }
  return pem;
}

}  // namespace

absl::StatusOr<TlsPems> ReadTlsFiles(const TlsFiles& files, absl::Time now) {
  if (files.certificate.empty() != files.private_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key must be given together");
  }
  if (!files.client_ca.empty() && files.certificate.empty()) {
    return absl::InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key");
  }
  TlsPems pems;
  WALSH_ASSIGN_OR_RETURN(pems.certificate, ReadPem("--tls-cert", files.certificate));
  WALSH_ASSIGN_OR_RETURN(pems.private_key, ReadPem("--tls-key", files.private_key));
  WALSH_ASSIGN_OR_RETURN(pems.ca, ReadPem("--tls-ca", files.ca));
  WALSH_ASSIGN_OR_RETURN(pems.client_ca, ReadPem("--tls-client-ca", files.client_ca));
  Certificates cas;
  if (!files.ca.empty()) {
    WALSH_ASSIGN_OR_RETURN(cas, ParseCertificates("--tls-ca", pems.ca));
  }
  if (!files.client_ca.empty()) {
    WALSH_RETURN_IF_ERROR(ParseCertificates("--tls-client-ca", pems.client_ca).status());
  }
  if (files.certificate.empty()) return pems;

  WALSH_ASSIGN_OR_RETURN(const Certificates chain,
                         ParseCertificates("--tls-cert", pems.certificate));
  WALSH_ASSIGN_OR_RETURN(const Owned<EVP_PKEY> key, ParsePrivateKey(pems.private_key));
  const bool is_pair = X509_check_private_key(chain[0].get(), key.get()) == 1;
  ERR_clear_error();
  if (!is_pair) return Wrong("--tls-key", "it is not the key of the first one in --tls-cert");
  WALSH_ASSIGN_OR_RETURN(const absl::Time begins, ToTime(X509_get0_notBefore(chain[0].get())));
  WALSH_ASSIGN_OR_RETURN(pems.expires, ToTime(X509_get0_notAfter(chain[0].get())));
  if (now < begins)
    return Wrong("--tls-cert", absl::StrCat("it is not valid before ",
                                            absl::FormatTime(begins, absl::UTCTimeZone())));
  if (now >= pems.expires)
    return Wrong("--tls-cert", absl::StrCat("it expired at ",
                                            absl::FormatTime(pems.expires, absl::UTCTimeZone())));
  if (files.certificate_is_of_ca && !cas.empty()) {
    WALSH_RETURN_IF_ERROR(CheckIsOfCa(chain, cas, now));
  }
  return pems;
}

absl::StatusOr<std::unique_ptr<Reloaded<TlsPems>>> WatchTlsFiles(const TlsFiles& files) {
  return Reloaded<TlsPems>::Open(
      {.name = "tls",
       .load = [files] { return ReadTlsFiles(files, absl::Now()); },
       .on_change =
           [](const TlsPems& pems) {
             if (pems.expires == absl::InfiniteFuture()) return;
             metrics::Gauge("walsh_tls_certificate_expiry_timestamp_seconds",
                            "When the certificate in use expires, in seconds since 1970.")
                 .Add({})
                 .Set(static_cast<double>(absl::ToUnixSeconds(pems.expires)));
           }});
}

}  // namespace walsh
