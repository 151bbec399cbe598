// The coordinator: everything that a process of it is made of, in order of construction, and the
// order in which it stops.
//
// Ports: public gRPC (quantization, models, generation, health, reflection), internal gRPC
// (workers), HTTP (health, metrics) and metrics. Port 0 takes a free one; ports() says which.
//
// Of several coordinators whose job store is one PostgreSQL database one leads (jobs/leadership.h)
// and has all of these. Those that stand by have the HTTP ports only, and are not ready.
//
// Errors of Start and Lead: those of the security's files and of the job store; UNAVAILABLE a port
//                  is taken; FAILED_PRECONDITION another coordinator uses the data folder, or its
//                  job store is of a newer build.
// Threads: Start, Stop and the destructor from one thread; Lead from another, which the destructor
//          must not meet.
#pragma once

#include <functional>
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
  // The job store, one of the two: a file of SQLite's, in the data folder if empty, or PostgreSQL.
  std::string sqlite_path;
  std::string postgres_uri;
  // Called once, on any thread, when this process has led and no longer does, or cannot know what
  // its database holds. Another may lead already: the process should end without a further word.
  std::function<void(const absl::Status& why)> on_leadership_lost;
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
  // Of a call that the coordinator answers itself, when its client names no deadline.
  absl::Duration call_timeout = absl::Seconds(10);
};

class Server {
 public:
  // Returns when every port answers; with PostgreSQL the HTTP ports, and Lead() is to be called.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options);
  ~Server();

  // Returns when this process leads and every port answers: at once with SQLite. CANCELLED when
  // Stop comes first. After another error it may lead all the same, until Stop.
  absl::Status Lead();

  // host:port of "grpc", "internal", "http" and "metrics", once it leads.
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
