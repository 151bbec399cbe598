#include "server/coordinator_flags.h"

#include <iostream>

#include "absl/strings/strip.h"
#include "common/command_line.h"
#include "common/endpoints.h"
#include "common/grpc_security_flags.h"
#include "server/jobs/postgres.h"

namespace walsh {
namespace {

// "sqlite:PATH" or a URI of PostgreSQL; empty: SQLite in the data folder.
absl::Status ParseJobStore(const std::string& job_store, ServerOptions* server) {
  if (job_store.empty()) return absl::OkStatus();
  absl::string_view path = job_store;
  if (absl::ConsumePrefix(&path, "sqlite:")) {
    server->sqlite_path = std::string(path);
    return path.empty() ? absl::InvalidArgumentError("--job-store sqlite: needs a path")
                        : absl::OkStatus();
  }
  server->postgres_uri = job_store;
  return jobs::CheckPostgresUri(job_store);
}

}  // namespace

std::optional<int> ParseFlags(int argc, const char* const* argv, CoordinatorFlags* flags) {
  ServerOptions& server = flags->server;
  server.data_dir = DefaultDataDir();
  double lease_seconds = absl::ToDoubleSeconds(server.lease_duration);
  double heartbeat_seconds = absl::ToDoubleSeconds(server.heartbeat_interval);
  double shutdown_seconds = absl::ToDoubleSeconds(flags->shutdown_timeout);
  std::optional<bool> enable_reflection;
  std::string job_store;
  std::string log_format = "text";
  std::string log_level = "info";

  CLI::App app(
      "walsh-coordinator: accepts quantization jobs, leases them to workers, routes "
      "generation.",
      "walsh-coordinator");
  app.add_option("--host", server.host, "Address to listen on")->capture_default_str();
  app.add_option("--grpc-port", server.grpc_port, "Public gRPC port; 0 takes a free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--internal-port", server.internal_port, "gRPC port for workers")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--http-port", server.http_port, "HTTP port: health and metrics")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  app.add_option("--metrics-port", server.metrics_port, "HTTP port for metrics only")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  AddDaemonSecurityFlags(app, server.security);
  app.add_option("--tls-client-ca", server.security.tls.client_ca,
                 "PEM file of CAs: clients of the public port must show a certificate of one");
  app.add_option("--tls-worker-name", server.security.worker_name,
                 "Name in the workers' certificates; by default each must have its address");
  app.add_option("--api-keys-file", server.api_keys_file,
                 "JSON file of API keys, of which clients must send one; without it the public "
                 "port is open");
  app.add_option("--data-dir", server.data_dir, "Folder of what it stores")->capture_default_str();
  app.add_option("--job-store", job_store,
                 "sqlite:PATH, by default coordinator.db in --data-dir, or "
                 "postgres://USER@HOST/DATABASE, which several coordinators may share: one leads, "
                 "the others stand by. The password is taken from PGPASSFILE or PGPASSWORD");
  app.add_option("--job-lease-seconds", lease_seconds, "A worker silent for so long loses its job")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  app.add_option("--heartbeat-seconds", heartbeat_seconds, "Between two heartbeats of a worker")
      ->check(CLI::Range(0.01, 1200.0))
      ->capture_default_str();
  app.add_option("--max-queued-jobs", server.queued_jobs_max, "More are refused")
      ->check(CLI::Range(1, limits::kQueuedJobsMax))
      ->capture_default_str();
  app.add_option("--enable-reflection", enable_reflection,
                 "gRPC reflection; by default when --host is a loopback address");
  app.add_option("--shutdown-timeout", shutdown_seconds,
                 "Seconds that running calls have to finish after SIGTERM")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  app.add_option("--log-format", log_format, "text or json")->capture_default_str();
  app.add_option("--log-level", log_level, "debug, info, warning or error")->capture_default_str();
  if (const std::optional<int> exit_code = ParseCommandLine(app, argc, argv)) return exit_code;

  absl::Status parsed = log::ParseFormat(log_format, &flags->log_format);
  parsed.Update(log::ParseLevel(log_level, &flags->log_level));
  parsed.Update(ParseJobStore(job_store, &server));
  // Written so that NaN, which CLI's ranges let through, fails.
  if (!(shutdown_seconds >= 0)) {
    parsed.Update(absl::InvalidArgumentError("--shutdown-timeout must be a number"));
  }
  if (!(3 * heartbeat_seconds <= lease_seconds)) {
    // Two lost heartbeats must not cost a job.
    parsed.Update(absl::InvalidArgumentError(
        "--job-lease-seconds must be at least three times --heartbeat-seconds"));
  }
  if (!parsed.ok()) {
    std::cerr << "walsh-coordinator: " << parsed.message() << "\n";
    return kExitUsage;
  }
  server.lease_duration = absl::Seconds(lease_seconds);
  server.heartbeat_interval = absl::Seconds(heartbeat_seconds);
  server.enable_reflection = enable_reflection.value_or(IsLoopbackHost(server.host));
  flags->shutdown_timeout = absl::Seconds(shutdown_seconds);
  return std::nullopt;
}

}  // namespace walsh
