// The real daemons on free ports with a temporary data folder, for end-to-end tests: started,
// stopped and killed by pid, restarted on the ports that they had.
//
//   ServiceFixture service({.model_roots = {root}});
//   ASSERT_OK(service.Start());
//   service.KillWorker();  // kill -9
//   ASSERT_OK(service.StartWorker());
//
// Binaries are found in $WALSH_BIN_DIR. Everything ends with the object.
#pragma once

#include <sys/types.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "client/child_process.h"
#include "client/client.h"
#include "common/endpoints.h"
#include "tests/testing/test_data.h"

namespace walsh::testing {

struct ServiceOptions {
  std::vector<std::string> model_roots;
  int n_threads = 1;
  // Of the worker; empty: the coordinator's, a fresh one.
  std::string worker_data_dir;
  // Short: a dead worker is noticed while a test waits for it.
  int lease_seconds = 3;
  ChannelSecurity security;  // of client()
  std::string coordinator_host = "127.0.0.1";
  std::string worker_host = "127.0.0.1";
  std::vector<std::string> coordinator_flags;
  std::vector<std::string> worker_flags;
  std::map<std::string, std::string> environment = {};  // of both, besides the test's
};

// How a daemon's process is started.
struct Launch {
  std::vector<std::string> wrapper;  // goes before it on the command line, and executes it
  std::map<std::string, std::string> environment;
};

class ServiceFixture {
 public:
  explicit ServiceFixture(ServiceOptions options = {});
  // Kills what still runs. Prints the daemons' logs when the test has failed.
  ~ServiceFixture();
  ServiceFixture(const ServiceFixture&) = delete;
  ServiceFixture& operator=(const ServiceFixture&) = delete;

  // Both daemons; returns when the worker is registered.
  absl::Status Start();
  absl::Status StartCoordinator();
  // `coordinator` where the worker is to reach it in another way than at its address.
  absl::Status StartWorker(const std::string& coordinator = "");
  // Of the next starts.
  void set_launch(const std::string& daemon, Launch launch) {
    launches_[daemon] = std::move(launch);
  }
  void KillCoordinator();  // SIGKILL
  void KillWorker();
  // SIGTERM; INTERNAL unless the exit code is 0 within 60 s.
  absl::Status StopCoordinator();
  absl::Status StopWorker();
  // Freezes and thaws the worker.
  void SignalWorker(int signal) { Signal("worker", signal); }
  void Signal(const std::string& daemon, int signal);
  // The exit code, 128 + signal after one; DEADLINE_EXCEEDED when the daemon goes on running.
  absl::StatusOr<int> WaitForExit(const std::string& daemon, absl::Duration timeout);
  pid_t pid(const std::string& daemon) const { return children_.at(daemon)->pid(); }
  std::string Log(const std::string& daemon) const;

  client::Client& client() { return *client_; }
  // "grpc", "internal", "http", "metrics" of "coordinator" or "worker".
  std::string endpoint(const std::string& daemon, const std::string& key) const;
  const std::string& data_dir() const { return data_dir_.path(); }
  const std::string& worker_data_dir() const { return worker_data_dir_; }

  // Runs `walsh` with --server set.
  absl::StatusOr<client::Output> RunWalsh(std::vector<std::string> arguments,
                                          const std::string& input = "",
                                          absl::Duration timeout = absl::Minutes(3)) const;

 private:
  absl::Status StartDaemon(const std::string& daemon, const std::vector<std::string>& flags);
  absl::Status StopDaemon(const std::string& daemon);
  void KillDaemon(const std::string& daemon);
  std::string PortFlag(const std::string& daemon, const std::string& key) const;

  const ServiceOptions options_;
  const TempDir data_dir_;
  const std::string worker_data_dir_;
  std::map<std::string, Launch> launches_;
  std::map<std::string, std::unique_ptr<client::ChildProcess>> children_;
  std::map<std::string, Endpoints> endpoints_;  // of the first start of each
  std::unique_ptr<client::Client> client_;
};

// Path of a binary of this build.
std::string BinaryPath(const std::string& name);

}  // namespace walsh::testing
