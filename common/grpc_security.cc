#include "common/grpc_security.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/client_interceptor.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/bearer.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

std::string_view View(const grpc_slice& slice) {
  return {reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(slice)), GRPC_SLICE_LENGTH(slice)};
}

prometheus::Counter& Rejections(absl::StatusCode code) {
  return metrics::Counter(
             "walsh_auth_rejections_total",
             "Calls that ended before their handlers for want of credentials or rights.")
      .Add({{"code", absl::StatusCodeToString(code)}});
}

// What gRPC asks of a port, from its own threads. Belongs to the C credentials, which live longer
// than the C++ ones: as long as a connection may still come in.
class Port {
 public:
  explicit Port(const PortSecurity& security) : security_(security) {}

  // Whether callers must show a certificate.
  bool AsksForCertificate(const TlsPems& pems) const {
    return security_.caller_ca != nullptr && !(pems.*security_.caller_ca).empty();
  }

  // Before each handshake, under a lock of the port.
  static grpc_ssl_certificate_config_reload_status FetchCertificate(
      void* self, grpc_ssl_server_certificate_config** config) {
    Port& port = *static_cast<Port*>(self);
    std::shared_ptr<const TlsPems> current = port.security_.tls->Get();
    if (current == port.taken_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair = {current->private_key.c_str(),
                                             current->certificate.c_str()};
    // gRPC wants CAs here also where it asks no caller for a certificate and uses none.
    const std::string& caller_ca = port.AsksForCertificate(*current)
                                       ? (*current).*port.security_.caller_ca
                                       : current->certificate;
    *config = grpc_ssl_server_certificate_config_create(caller_ca.c_str(), &pair, 1);
    port.taken_ = std::move(current);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  static void CheckCall(void* self, grpc_auth_context*, const grpc_metadata* metadata,
                        size_t n_metadata, grpc_process_auth_metadata_done_cb done, void* call) {
    std::string_view method;
    std::string_view authorization;
    for (size_t i = 0; i < n_metadata; ++i) {
      if (View(metadata[i].key) == ":path") method = View(metadata[i].value);
      // The first of several, as handlers find it.
      if (View(metadata[i].key) == "authorization" && authorization.empty()) {
        authorization = View(metadata[i].value);
      }
    }
    const absl::Status status = static_cast<Port*>(self)->security_.check(method, authorization);
    if (!status.ok()) {
      Rejections(status.code()).Increment();
      WALSH_LOG(Debug, "call refused", {"method", method}, {"status", status});
    }
    // Both kinds of codes have the same numbers.
    done(call, nullptr, 0, nullptr, 0, static_cast<grpc_status_code>(status.code()),
         std::string(status.message()).c_str());
  }

  static void Destroy(void* self) { delete static_cast<Port*>(self); }

 private:
  const PortSecurity security_;
  std::shared_ptr<const TlsPems> taken_;  // by gRPC
};

// gRPC's own class for this is not in its headers.
class PortCredentials : public grpc::ServerCredentials {
 public:
  explicit PortCredentials(grpc_server_credentials* credentials) : credentials_(credentials) {}
  ~PortCredentials() override { grpc_server_credentials_release(credentials_); }

  // The check of calls has this place.
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  grpc_server_credentials* const credentials_;
};

// Sends the secret. Call credentials would need TLS, which a port on loopback may do without.
class SecretInterceptor : public grpc::experimental::Interceptor {
 public:
  explicit SecretInterceptor(const std::string& header) : header_(header) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", header_);
    }
    methods->Proceed();
  }

 private:
  const std::string& header_;
};

class SecretInterceptorFactory : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit SecretInterceptorFactory(const std::string& secret) : header_(BearerHeader(secret)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo*) override {
    return new SecretInterceptor(header_);
  }

 private:
  const std::string header_;
};

}  // namespace

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const PortSecurity& security) {
  auto* port = new Port(security);
  grpc_server_credentials* credentials = nullptr;
  if (security.tls == nullptr) {
    credentials = grpc_insecure_server_credentials_create();
  } else {
    credentials = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            port->AsksForCertificate(*security.tls->Get())
                ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE,
            &Port::FetchCertificate, port));
  }
  grpc_server_credentials_set_auth_metadata_processor(
      credentials, {.process = security.check ? &Port::CheckCall : nullptr,
                    .destroy = &Port::Destroy,
                    .state = port});
  return std::make_shared<PortCredentials>(credentials);
}

std::shared_ptr<grpc::Channel> MakeSecuredChannel(const std::string& address,
                                                  const ChannelSecurity& security,
                                                  grpc::ChannelArguments arguments) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (security.has_tls()) {
    credentials = grpc::SslCredentials({.pem_root_certs = security.tls->ca,
                                        .pem_private_key = security.tls->private_key,
                                        .pem_cert_chain = security.tls->certificate});
    if (!security.server_name.empty()) {
      arguments.SetSslTargetNameOverride(security.server_name);
    }
  }
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!security.secret.empty()) {
    interceptors.push_back(std::make_unique<SecretInterceptorFactory>(security.secret));
  }
  return grpc::experimental::CreateCustomChannelWithInterceptors(address, credentials, arguments,
                                                                 std::move(interceptors));
}

bool IsOpenToAll(std::string_view method) { return method.starts_with("/grpc.health.v1.Health/"); }

absl::StatusOr<std::unique_ptr<DaemonSecurity>> DaemonSecurity::Open(const Options& options) {
  TlsFiles files = options.tls;
  if (!files.ca.empty() && files.certificate.empty()) {
    // Else the port would be open to whom the CA was to keep out.
    return absl::InvalidArgumentError("--tls-ca needs --tls-cert and --tls-key");
  }
  files.certificate_is_of_ca = true;
  WALSH_ASSIGN_OR_RETURN(auto tls, WatchTlsFiles(files));
  std::unique_ptr<Reloaded<Secrets>> secrets;
  if (!options.worker_token_file.empty()) {
    const auto load = [path = options.worker_token_file]() -> absl::StatusOr<Secrets> {
      absl::StatusOr<Secrets> read = ReadSecrets(path);
      if (read.ok()) return read;
      return absl::Status(read.status().code(),
                          absl::StrCat("--worker-token-file: ", read.status().message()));
    };
    WALSH_ASSIGN_OR_RETURN(secrets,
                           Reloaded<Secrets>::Open({.name = "worker_token", .load = load}));
  }
  return std::unique_ptr<DaemonSecurity>(
      new DaemonSecurity(options, std::move(tls), std::move(secrets)));
}

DaemonSecurity::DaemonSecurity(const Options& options, std::unique_ptr<Reloaded<TlsPems>> tls,
                               std::unique_ptr<Reloaded<Secrets>> secrets)
    : has_certificate_(!options.tls.certificate.empty()),
      worker_name_(options.worker_name),
      tls_(std::move(tls)),
      secrets_(std::move(secrets)),
      poll_(options.reload_interval, [this] {
        tls_->Poll();
        if (secrets_ != nullptr) secrets_->Poll();
      }) {}

PortSecurity DaemonSecurity::internal_port(std::string_view open_service) const {
  PortSecurity security;
  if (has_certificate_) security.tls = tls_.get();
  security.caller_ca = &TlsPems::ca;
  if (secrets_ == nullptr) return security;
  security.check = [secrets = secrets_.get(), open_service = std::string(open_service)](
                       std::string_view method, std::string_view authorization) {
    if (IsOpenToAll(method)) return absl::OkStatus();
    if (!open_service.empty() && method.starts_with(absl::StrCat("/", open_service, "/"))) {
      return absl::OkStatus();
    }
    const SecretDigest sent = DigestOf(BearerSecret(authorization));
    for (const std::string& secret : *secrets->Get()) {
      if (SameDigest(DigestOf(secret), sent)) return absl::OkStatus();
    }
    return absl::UnauthenticatedError("this port is for the service's own daemons");
  };
  return security;
}

PortSecurity DaemonSecurity::public_port(CallCheck check) const {
  PortSecurity security;
  if (has_certificate_) security.tls = tls_.get();
  security.caller_ca = &TlsPems::client_ca;
  security.check = std::move(check);
  return security;
}

ChannelSecurity DaemonSecurity::to_coordinator() const {
  ChannelSecurity security;
  security.tls = tls_->Get();
  if (secrets_ != nullptr) security.secret = secrets_->Get()->front();
  return security;
}

ChannelSecurity DaemonSecurity::to_worker() const {
  ChannelSecurity security = to_coordinator();
  security.server_name = worker_name_;
  return security;
}

}  // namespace walsh
