#include "common/grpc_security_flags.h"

namespace walsh {

void AddDaemonSecurityFlags(CLI::App& app, DaemonSecurity::Options& options) {
  app.add_option("--tls-cert", options.tls.certificate,
                 "PEM file of this daemon's certificate and its intermediates: all gRPC ports "
                 "speak TLS. Read again when it changes, as all of these files");
  app.add_option("--tls-key", options.tls.private_key, "PEM file of its private key");
  app.add_option("--tls-ca", options.tls.ca,
                 "PEM file of the CA of the service's daemons: they are called over TLS, and must "
                 "show a certificate of it when they call this one");
  app.add_option("--worker-token-file", options.worker_token_file,
                 "File of the secret that daemons show each other, the same for all; of several "
                 "lines each is taken and the first is sent");
}

}  // namespace walsh
