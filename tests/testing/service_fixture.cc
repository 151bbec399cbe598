#include "tests/testing/service_fixture.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/testing/wait.h"

namespace walsh::testing {
namespace {

// Generous: test machines are busy.
constexpr absl::Duration kReadyTimeout = absl::Seconds(60);
constexpr absl::Duration kStopTimeout = absl::Seconds(60);

void Append(std::vector<std::string>& all, const std::vector<std::string>& more) {
  all.insert(all.end(), more.begin(), more.end());
}

}  // namespace

std::string BinaryPath(const std::string& name) {
  const char* bin_dir = std::getenv("WALSH_BIN_DIR");
  return absl::StrCat(bin_dir == nullptr ? "." : bin_dir, "/", name);
}

ServiceFixture::ServiceFixture(ServiceOptions options)
    : options_(std::move(options)),
      worker_data_dir_(options_.worker_data_dir.empty() ? data_dir_.path()
                                                        : options_.worker_data_dir) {}

ServiceFixture::~ServiceFixture() {
  client_.reset();
  children_.clear();
  if (!::testing::Test::HasFailure()) return;
  for (const char* daemon : {"coordinator", "worker"}) {
    const std::string log = Log(daemon);
    std::fprintf(stderr, "--- the end of %s.log\n%s---\n", daemon,
                 log.substr(log.size() - std::min<size_t>(log.size(), 8000)).c_str());
  }
}

std::string ServiceFixture::endpoint(const std::string& daemon, const std::string& key) const {
  const auto endpoints = endpoints_.find(daemon);
  if (endpoints == endpoints_.end()) return "";
  const auto found = endpoints->second.find(key);
  return found == endpoints->second.end() ? "" : found->second;
}

std::string ServiceFixture::PortFlag(const std::string& daemon, const std::string& key) const {
  const std::string known = endpoint(daemon, key);
  return known.empty() ? "0" : known.substr(known.rfind(':') + 1);
}

absl::Status ServiceFixture::StartDaemon(const std::string& daemon,
                                         const std::vector<std::string>& flags) {
  const bool is_worker = daemon == "worker";
  const std::string& data_dir = is_worker ? worker_data_dir_ : data_dir_.path();
  const Launch& launch = launches_[daemon];
  RemoveEndpoints(data_dir, daemon);
  client::SpawnOptions spawn;
  spawn.argv = launch.wrapper;
  Append(spawn.argv, {BinaryPath("walsh-" + daemon), "--data-dir", data_dir, "--host",
                      is_worker ? options_.worker_host : options_.coordinator_host});
  Append(spawn.argv, flags);
  spawn.environment = launch.environment;
  spawn.environment.insert(options_.environment.begin(), options_.environment.end());
  spawn.stdout_path = data_dir_ / (daemon + ".log");
  spawn.stderr_path = spawn.stdout_path;
  WALSH_ASSIGN_OR_RETURN(client::ChildProcess child, client::ChildProcess::Spawn(spawn));
  children_[daemon] = std::make_unique<client::ChildProcess>(std::move(child));
  absl::StatusOr<Endpoints> endpoints;
  const bool is_up = WaitUntil(
      [&] {
        endpoints = ReadEndpoints(data_dir, daemon);
        return endpoints.ok() || children_[daemon]->Poll().has_value();
      },
      kReadyTimeout);
  if (!endpoints.ok()) {
    return absl::UnavailableError(
        absl::StrCat("walsh-", daemon, is_up ? " ended while starting: " : " did not start: ",
                     ReadFile(spawn.stdout_path, 1 << 20).value_or("")));
  }
  endpoints_.emplace(daemon, *endpoints);
  return absl::OkStatus();
}

absl::Status ServiceFixture::StartCoordinator() {
  std::vector<std::string> flags = {"--grpc-port",         PortFlag("coordinator", "grpc"),
                                    "--internal-port",     PortFlag("coordinator", "internal"),
                                    "--http-port",         PortFlag("coordinator", "http"),
                                    "--metrics-port",      PortFlag("coordinator", "metrics"),
                                    "--job-lease-seconds", std::to_string(options_.lease_seconds),
                                    "--heartbeat-seconds", "1"};
  Append(flags, options_.coordinator_flags);
  WALSH_RETURN_IF_ERROR(StartDaemon("coordinator", flags));
  client::ClientOptions options;
  options.address = endpoint("coordinator", "grpc");
  options.security = options_.security;
  client_ = std::make_unique<client::Client>(options);
  absl::Status status;
  const auto is_healthy = [&] {
    status = client_->CheckHealth("", absl::Seconds(5));
    return status.ok();
  };
  return WaitUntil(is_healthy, kReadyTimeout) ? absl::OkStatus() : status;
}

absl::Status ServiceFixture::StartWorker(const std::string& coordinator) {
  const std::string address =
      coordinator.empty() ? endpoint("coordinator", "internal") : coordinator;
  std::vector<std::string> flags = {"--coordinator",  address,
                                    "--grpc-port",    PortFlag("worker", "grpc"),
                                    "--metrics-port", PortFlag("worker", "metrics"),
                                    "--threads",      absl::StrCat(options_.n_threads),
                                    "--device",       "cpu"};
  for (const std::string& root : options_.model_roots) Append(flags, {"--model-root", root});
  Append(flags, options_.worker_flags);
  WALSH_RETURN_IF_ERROR(StartDaemon("worker", flags));
  absl::Status status;
  const auto is_registered = [&] {
    const auto workers = client_->ListWorkers();
    status = workers.status();
    if (!workers.ok()) return false;
    status = absl::UnavailableError("no worker has registered");
    return std::any_of(workers->workers().begin(), workers->workers().end(),
                       [](const v1::Worker& w) { return w.state() == v1::Worker::ONLINE; });
  };
  return WaitUntil(is_registered, kReadyTimeout) ? absl::OkStatus() : status;
}

absl::Status ServiceFixture::Start() {
  WALSH_RETURN_IF_ERROR(StartCoordinator());
  return StartWorker();
}

void ServiceFixture::KillDaemon(const std::string& daemon) {
  const auto child = children_.find(daemon);
  if (child == children_.end()) return;
  child->second->Signal(SIGKILL);
  child->second->Wait(kStopTimeout);
  children_.erase(child);
}

absl::Status ServiceFixture::StopDaemon(const std::string& daemon) {
  const auto child = children_.find(daemon);
  if (child == children_.end()) return absl::OkStatus();
  child->second->Signal(SIGTERM);
  const auto ended = child->second->Wait(kStopTimeout);
  children_.erase(child);
  if (ended.has_value() && *ended == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      "walsh-", daemon, ": ", ended.has_value() ? client::WaitStatusText(*ended) : "did not end"));
}

void ServiceFixture::KillCoordinator() { KillDaemon("coordinator"); }
void ServiceFixture::KillWorker() { KillDaemon("worker"); }
absl::Status ServiceFixture::StopCoordinator() { return StopDaemon("coordinator"); }
absl::Status ServiceFixture::StopWorker() { return StopDaemon("worker"); }
void ServiceFixture::Signal(const std::string& daemon, int signal) {
  children_.at(daemon)->Signal(signal);
}

absl::StatusOr<int> ServiceFixture::WaitForExit(const std::string& daemon, absl::Duration timeout) {
  const auto ended = children_.at(daemon)->Wait(timeout);
  if (!ended.has_value()) return absl::DeadlineExceededError(daemon + " goes on running");
  children_.erase(daemon);
  return client::ExitCode(*ended);
}

std::string ServiceFixture::Log(const std::string& daemon) const {
  return ReadFile(data_dir_ / (daemon + ".log"), 64 << 20).value_or("");
}

absl::StatusOr<client::Output> ServiceFixture::RunWalsh(std::vector<std::string> arguments,
                                                        const std::string& input,
                                                        absl::Duration timeout) const {
  client::SpawnOptions spawn;
  spawn.argv = {BinaryPath("walsh"), "--server", endpoint("coordinator", "grpc")};
  Append(spawn.argv, arguments);
  return client::RunCommand(spawn, input, timeout);
}

}  // namespace walsh::testing
