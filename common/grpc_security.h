// What secures gRPC's ports and channels: TLS whose files may change while the process runs, and a
// check of every call before its handler exists.
//
// gRPC's C++ API has neither for the version that we build with (ADR 24): its certificate
// watcher serves what it finds, good or bad, and its metadata processors need TLS. The C API below
// it has both, for ports with TLS and without.
//
// Threads: safe.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/periodic_task.h"
#include "common/reloaded.h"
#include "common/tls_files.h"

namespace walsh {

// Judges a call by its full method ("/walsh.v1.ModelService/GetModel") and its `authorization`
// (empty: none was sent). Code and message of an error go to the caller, without details. Runs on
// gRPC's threads for each call: it must not wait.
using CallCheck =
    std::function<absl::Status(std::string_view method, std::string_view authorization)>;

struct PortSecurity {
  // Null: no TLS. Must outlive the server. Each handshake takes what is current.
  const Reloaded<TlsPems>* tls = nullptr;
  // CAs of which a caller must show a certificate, where they are given; null: it need not.
  std::string TlsPems::*caller_ca = nullptr;
  CallCheck check;  // null: every call is served
};
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const PortSecurity& security);

// What a call to a server goes out with.
struct ChannelSecurity {
  // Null, or without a `ca`: no TLS. The certificate is shown to servers that ask for one.
  std::shared_ptr<const TlsPems> tls;
  // The name in the server's certificate; empty: that of its address.
  std::string server_name;
  std::string secret;  // sent with every call (common/bearer.h); empty: none

  bool has_tls() const { return tls != nullptr && !tls->ca.empty(); }
  bool operator==(const ChannelSecurity&) const = default;
};
std::shared_ptr<grpc::Channel> MakeSecuredChannel(const std::string& address,
                                                  const ChannelSecurity& security,
                                                  grpc::ChannelArguments arguments);

// How the daemons of one service know each other: certificates of one CA, a secret that all of them
// hold, or both. Follows its files.
class DaemonSecurity {
 public:
  struct Options {
    TlsFiles tls;
    std::string worker_token_file;  // empty: calls between daemons need no secret
    std::string worker_name;        // in workers' certificates; empty: their addresses
    absl::Duration reload_interval = kReloadInterval;
  };
  // Errors: those of the files, naming their flags.
  static absl::StatusOr<std::unique_ptr<DaemonSecurity>> Open(const Options& options);

  // Of ports that only daemons call. Health checks need no secret, nor does the service of this
  // name, if any, as its callers have none.
  PortSecurity internal_port(std::string_view open_service = {}) const;
  // Of ports for clients, which `check` judges.
  PortSecurity public_port(CallCheck check) const;
  ChannelSecurity to_coordinator() const;
  ChannelSecurity to_worker() const;

 private:
  using Secrets = std::vector<std::string>;
  DaemonSecurity(const Options& options, std::unique_ptr<Reloaded<TlsPems>> tls,
                 std::unique_ptr<Reloaded<Secrets>> secrets);

  const bool has_certificate_;
  const std::string worker_name_;
  const std::unique_ptr<Reloaded<TlsPems>> tls_;
  const std::unique_ptr<Reloaded<Secrets>> secrets_;  // null: none
  const PeriodicTask poll_;                           // last: it uses the others
};

// Health checks: probes have no credentials.
bool IsOpenToAll(std::string_view method);

}  // namespace walsh
