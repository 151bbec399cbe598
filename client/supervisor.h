// `walsh up`: a coordinator and a worker as children of this process, kept running.
//
// The coordinator starts first, the worker when it is ready; a child that ends unasked is started
// again with growing pauses, on the ports that it had, so that clients and the other daemon find
// it. SIGTERM, SIGINT and SIGHUP stop the worker first, while the coordinator is still there to
// take its leases back, then the coordinator; a second signal kills both. A signal that was ignored
// when this process started stays so (nohup). Should this process die, the kernel sends both
// SIGTERM.
//
// Everything happens on the calling thread, which waits for signals with them blocked: there are no
// handlers and no races between a child's end and a wait.
#pragma once

#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/backoff.h"
#include "client/child_process.h"
#include "client/client.h"
#include "common/endpoints.h"

namespace walsh::client {

struct SupervisorOptions {
  std::string coordinator_binary;
  std::string worker_binary;
  std::string data_dir;
  std::string device = "auto";
  std::string serve_while_quantizing = "share";
  std::string kv_cache_dtype = "auto";
  std::vector<std::string> model_roots;
  std::string config_path;  // of a file that both daemons read, too; empty: none
  int port = 50051;         // public gRPC; 0 takes free ports for everything
  int n_threads = 0;        // 0: the worker's default
  bool log_to_stderr = false;
  ChannelSecurity security;  // of this process's own calls to the coordinator
  absl::Duration ready_timeout = absl::Seconds(60);
  // That each daemon gives running calls when it stops; one that is not gone 10 s later is killed.
  absl::Duration shutdown_timeout = absl::Seconds(30);
};

class Supervisor {
 public:
  // Blocks the signals that Run() waits for. Construct before any thread starts.
  explicit Supervisor(SupervisorOptions options);
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  // Starts both daemons and waits until the worker is registered. FAILED_PRECONDITION when another
  // `walsh up` runs on the data folder, or a daemon ended while starting (with its last log lines);
  // CANCELLED when a signal came first. Whatever was started is stopped again.
  absl::Status Start();
  // Keeps them running until a signal comes, then stops them. OK when both ended cleanly;
  // ABORTED when one had to be killed, FAILED_PRECONDITION when one cannot be started again.
  absl::Status Run();

  const Endpoints& coordinator() const { return coordinator_.endpoints; }
  const Endpoints& worker() const { return worker_.endpoints; }
  std::string LogPath(const std::string& daemon) const;

 private:
  struct Daemon {
    explicit Daemon(std::string n);

    const std::string name;  // of the endpoints file and the log
    std::unique_ptr<ChildProcess> child;
    Endpoints endpoints;  // of the first start; later starts take the same ports
    Backoff backoff;
    absl::Time started;
    absl::Time restart_at = absl::InfiniteFuture();  // while it is down
  };

  absl::Status LockDataDir();
  std::vector<std::string> CoordinatorArguments() const;
  std::vector<std::string> WorkerArguments() const;
  absl::Status Spawn(Daemon& daemon);
  absl::Status StartAndWait(Daemon& daemon);
  bool IsReady(const Daemon& daemon);
  // Restarts what ended; sets restart_at. FAILED_PRECONDITION for a usage error, which repeats.
  absl::Status Tend(Daemon& daemon);
  // Waits at most `timeout`; true when a signal that asks this process to stop came.
  bool WaitForStopSignal(absl::Duration timeout) const;
  absl::Status Stop();
  absl::Status StopDaemon(Daemon& daemon, bool* kill_now);
  std::string LastLogLines(const Daemon& daemon) const;

  const SupervisorOptions options_;
  const sigset_t awaited_signals_;
  int lock_fd_ = -1;
  Daemon coordinator_;
  Daemon worker_;
  std::unique_ptr<Client> client_;
};

}  // namespace walsh::client
