// The coordinator: everything that a process of it is made of, in order of construction, and the
// order in which it stops.
//
// Ports: public gRPC (quantization, models, generation, health, reflection), internal gRPC
// (workers), HTTP (health, metrics) and metrics. Port 0 takes a free one; ports() says which.
//
// Errors of Start: those of the security's files and of the job store; UNAVAILABLE a port is taken;
//                  FAILED_PRECONDITION another coordinator uses the data folder, or its job store
//                  is of a newer build.
// Threads: Start, Stop and the destructor from one thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/endpoints.h"
#include "common/grpc_security.h"
#include "common/limits.h"

namespace walsh {

struct ServerOptions {
  std::string host = "127.0.0.1";
  int grpc_port = 50051;
  int internal_port = 50052;
  int http_port = 8000;
  int metrics_port = 8002;
  DaemonSecurity::Options security;
  // Of the keys that clients of the public port must send; empty: it is open.
  std::string api_keys_file;
  std::string data_dir;
  absl::Duration lease_duration = absl::Seconds(30);
  absl::Duration heartbeat_interval = absl::Seconds(10);
  int queued_jobs_max = limits::kQueuedJobsMax;
  bool enable_reflection = true;
  // A reader of a stream that takes nothing for so long is given up.
  absl::Duration stream_stall_max = absl::Seconds(limits::kStreamStallSecondsMax);
  // A watcher hears something at least this often.
  absl::Duration watch_heartbeat = absl::Seconds(10);
  // Workers are asked about a new job for so long in all.
  absl::Duration validation_max = absl::Seconds(20);
};

class Server {
 public:
  // Returns when every port answers.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options);
  ~Server();

  // host:port of "grpc", "internal", "http" and "metrics".
  const Endpoints& endpoints() const;

  // Health turns NOT_SERVING, waiting calls end, running ones have `timeout` to finish, then they
  // are cancelled.
  void Stop(absl::Duration timeout);

 private:
  Server();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace walsh
