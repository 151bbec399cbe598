#include "client/supervisor.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "client/terminal/quantities.h"
#include "common/command_line.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh::client {
namespace {

constexpr absl::Duration kPollInterval = absl::Milliseconds(100);
constexpr absl::Duration kHealthTimeout = absl::Seconds(2);
// A daemon that ran so long before it ended is started again at once.
constexpr absl::Duration kStableAfter = absl::Minutes(1);
// To hand leases back and close, after the calls have ended.
constexpr absl::Duration kStopGrace = absl::Seconds(10);
constexpr int kLogLinesShown = 12;
constexpr int64_t kLogBytesMax = 64 << 20;

// A blocked signal is taken by a wait even when it is ignored, so ignored ones are left out.
sigset_t AwaitedSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction current = {};
    if (sigaction(number, nullptr, &current) == 0 && current.sa_handler == SIG_IGN) continue;
    sigaddset(&set, number);
  }
  return set;
}

// "127.0.0.1:50051" -> "50051"; `otherwise` when there is no such endpoint yet.
std::string PortOf(const Endpoints& endpoints, const std::string& key, int otherwise) {
  const auto found = endpoints.find(key);
  if (found == endpoints.end()) return absl::StrCat(otherwise);
  return found->second.substr(found->second.rfind(':') + 1);
}

Backoff::Options RestartPauses() {
  Backoff::Options pauses;
  pauses.initial = absl::Milliseconds(500);
  pauses.max = absl::Seconds(30);
  return pauses;
}

void Say(const std::string& text) {
  std::fprintf(stderr, "walsh up: %s\n", text.c_str());
  std::fflush(stderr);
}

}  // namespace

Supervisor::Daemon::Daemon(std::string n) : name(std::move(n)), backoff(RestartPauses(), 0) {}

Supervisor::Supervisor(SupervisorOptions options)
    : options_(std::move(options)),
      awaited_signals_(AwaitedSignals()),
      coordinator_("coordinator"),
      worker_("worker") {
  pthread_sigmask(SIG_BLOCK, &awaited_signals_, nullptr);
}

Supervisor::~Supervisor() {
  if (lock_fd_ >= 0) close(lock_fd_);
}

std::string Supervisor::LogPath(const std::string& daemon) const {
  return absl::StrCat(options_.data_dir, "/log/", daemon, ".log");
}

bool Supervisor::WaitForStopSignal(absl::Duration timeout) const {
  const timespec time = absl::ToTimespec(std::max(timeout, absl::ZeroDuration()));
  const int number = sigtimedwait(&awaited_signals_, nullptr, &time);
  return number == SIGINT || number == SIGTERM || number == SIGHUP;
}

absl::Status Supervisor::LockDataDir() {
  WALSH_RETURN_IF_ERROR(MakeDirectories(options_.data_dir + "/run"));
  WALSH_RETURN_IF_ERROR(MakeDirectories(options_.data_dir + "/log"));
  const std::string path = options_.data_dir + "/run/up.lock";
  lock_fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_fd_ < 0) return ErrnoStatus(errno, absl::StrCat("opening ", path));
  if (flock(lock_fd_, LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("another `walsh up` runs on ", options_.data_dir));
}

std::vector<std::string> Supervisor::CoordinatorArguments() const {
  // Other ports than the usual ones would clash with them if only the public one differed.
  const bool usual = options_.port == 50051;
  const Endpoints& known = coordinator_.endpoints;
  return {options_.coordinator_binary,
          "--data-dir",
          options_.data_dir,
          "--host",
          "127.0.0.1",
          "--grpc-port",
          PortOf(known, "grpc", options_.port),
          "--internal-port",
          PortOf(known, "internal", usual ? 50052 : 0),
          "--http-port",
          PortOf(known, "http", usual ? 8000 : 0),
          "--metrics-port",
          PortOf(known, "metrics", usual ? 8002 : 0),
          "--shutdown-timeout",
          absl::StrCat(absl::ToDoubleSeconds(options_.shutdown_timeout))};
}

std::vector<std::string> Supervisor::WorkerArguments() const {
  const bool usual = options_.port == 50051;
  const Endpoints& known = worker_.endpoints;
  std::vector<std::string> arguments = {
      options_.worker_binary,
      "--data-dir",
      options_.data_dir,
      "--host",
      "127.0.0.1",
      "--coordinator",
      coordinator_.endpoints.at("internal"),
      "--grpc-port",
      PortOf(known, "grpc", usual ? 50053 : 0),
      "--metrics-port",
      PortOf(known, "metrics", usual ? 8003 : 0),
      "--device",
      options_.device,
      "--serve-while-quantizing",
      options_.serve_while_quantizing,
      "--kv-cache-dtype",
      options_.kv_cache_dtype,
      "--shutdown-timeout",
      absl::StrCat(absl::ToDoubleSeconds(options_.shutdown_timeout))};
  for (const std::string& root : options_.model_roots) {
    arguments.insert(arguments.end(), {"--model-root", root});
  }
  if (options_.n_threads > 0) {
    arguments.insert(arguments.end(), {"--threads", absl::StrCat(options_.n_threads)});
  }
  return arguments;
}

absl::Status Supervisor::Spawn(Daemon& daemon) {
  // An endpoints file from before would pass for the new process's.
  RemoveEndpoints(options_.data_dir, daemon.name);
  SpawnOptions spawn;
  spawn.argv = &daemon == &coordinator_ ? CoordinatorArguments() : WorkerArguments();
  if (!options_.config_path.empty()) spawn.environment["WALSH_CONFIG"] = options_.config_path;
  if (!options_.log_to_stderr) {
    const std::string log = LogPath(daemon.name);
    struct stat info;
    if (stat(log.c_str(), &info) == 0 && info.st_size > kLogBytesMax) {
      std::rename(log.c_str(), (log + ".1").c_str());
    }
    spawn.stdout_path = log;
    spawn.stderr_path = log;
  }
  WALSH_ASSIGN_OR_RETURN(ChildProcess child, ChildProcess::Spawn(spawn));
  daemon.child = std::make_unique<ChildProcess>(std::move(child));
  daemon.started = absl::Now();
  daemon.restart_at = absl::InfiniteFuture();
  return absl::OkStatus();
}

bool Supervisor::IsReady(const Daemon& daemon) {
  if (!ReadEndpoints(options_.data_dir, daemon.name).ok()) return false;
  if (&daemon == &coordinator_) {
    const auto endpoints = ReadEndpoints(options_.data_dir, "coordinator");
    if (!endpoints.ok() || endpoints->count("grpc") == 0) return false;
    if (client_ == nullptr) {
      ClientOptions options;
      options.address = endpoints->at("grpc");
      options.security = options_.security;
      options.timeout = kHealthTimeout;
      client_ = std::make_unique<Client>(options);
    }
    return client_->CheckHealth("", kHealthTimeout).ok();
  }
  const auto workers = client_->ListWorkers();
  return workers.ok() &&
         std::any_of(workers->workers().begin(), workers->workers().end(),
                     [](const v1::Worker& w) { return w.state() == v1::Worker::ONLINE; });
}

absl::Status Supervisor::StartAndWait(Daemon& daemon) {
  WALSH_RETURN_IF_ERROR(Spawn(daemon));
  const absl::Time deadline = absl::Now() + options_.ready_timeout;
  while (!IsReady(daemon)) {
    if (WaitForStopSignal(kPollInterval)) return absl::CancelledError("stopped while starting");
    if (const auto ended = daemon.child->Poll(); ended.has_value()) {
      return absl::FailedPreconditionError(
          absl::StrCat("walsh-", daemon.name, " ended while starting: ", WaitStatusText(*ended),
                       LastLogLines(daemon)));
    }
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat(
          "walsh-", daemon.name, " was not ready after ",
          SecondsText(absl::ToDoubleSeconds(options_.ready_timeout)), LastLogLines(daemon)));
    }
  }
  WALSH_ASSIGN_OR_RETURN(daemon.endpoints, ReadEndpoints(options_.data_dir, daemon.name));
  return absl::OkStatus();
}

absl::Status Supervisor::Start() {
  WALSH_RETURN_IF_ERROR(LockDataDir());
  absl::Status status = StartAndWait(coordinator_);
  if (status.ok() && coordinator_.endpoints.count("internal") == 0) {
    status = absl::InternalError("walsh-coordinator did not say where workers connect");
  }
  if (status.ok()) status = StartAndWait(worker_);
  if (!status.ok()) Stop().IgnoreError();  // the first failure is the one to tell
  return status;
}

absl::Status Supervisor::Tend(Daemon& daemon) {
  if (daemon.child != nullptr) {
    const auto ended = daemon.child->Poll();
    if (!ended.has_value()) return absl::OkStatus();
    if (WIFEXITED(*ended) && WEXITSTATUS(*ended) == kExitUsage) {
      return absl::FailedPreconditionError(
          absl::StrCat("walsh-", daemon.name, " does not accept its flags", LastLogLines(daemon)));
    }
    if (absl::Now() - daemon.started > kStableAfter) daemon.backoff.Reset();
    const absl::Duration pause = daemon.backoff.Next();
    Say(absl::StrCat("walsh-", daemon.name, " ended (", WaitStatusText(*ended),
                     "), starting it again in ", SecondsText(absl::ToDoubleSeconds(pause)),
                     "; its log: ", LogPath(daemon.name)));
    daemon.child.reset();
    daemon.restart_at = absl::Now() + pause;
  }
  if (absl::Now() < daemon.restart_at) return absl::OkStatus();
  return Spawn(daemon);
}

absl::Status Supervisor::Run() {
  absl::Status status;
  while (status.ok()) {
    const absl::Time next = std::min(coordinator_.restart_at, worker_.restart_at);
    // SIGCHLD ends the wait early.
    if (WaitForStopSignal(std::min(next - absl::Now(), absl::Seconds(10)))) break;
    status = Tend(coordinator_);
    if (status.ok()) status = Tend(worker_);
  }
  const absl::Status stopped = Stop();
  return status.ok() ? stopped : status;
}

absl::Status Supervisor::StopDaemon(Daemon& daemon, bool* kill_now) {
  if (daemon.child == nullptr || daemon.child->Poll().has_value()) return absl::OkStatus();
  daemon.child->Signal(*kill_now ? SIGKILL : SIGTERM);
  const absl::Time deadline = absl::Now() + options_.shutdown_timeout + kStopGrace;
  bool killed = *kill_now;
  while (!daemon.child->Poll().has_value()) {
    const bool again = WaitForStopSignal(kPollInterval);
    if (killed || (!again && absl::Now() < deadline)) continue;
    Say(absl::StrCat("killing walsh-", daemon.name));
    daemon.child->Signal(SIGKILL);
    killed = true;
    *kill_now = again;
  }
  if (killed) return absl::AbortedError(absl::StrCat("walsh-", daemon.name, " had to be killed"));
  const int ended = *daemon.child->Poll();
  if (ExitCode(ended) == kExitOk) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("walsh-", daemon.name, " ended with ", WaitStatusText(ended)));
}

absl::Status Supervisor::Stop() {
  bool kill_now = false;
  const absl::Status worker = StopDaemon(worker_, &kill_now);
  const absl::Status coordinator = StopDaemon(coordinator_, &kill_now);
  // A killed daemon leaves its file behind.
  RemoveEndpoints(options_.data_dir, worker_.name);
  RemoveEndpoints(options_.data_dir, coordinator_.name);
  return worker.ok() ? coordinator : worker;
}

std::string Supervisor::LastLogLines(const Daemon& daemon) const {
  if (options_.log_to_stderr) return "";
  const auto log = ReadFile(LogPath(daemon.name), 2 * kLogBytesMax);
  if (!log.ok()) return "";
  std::vector<std::string> lines = absl::StrSplit(*log, '\n', absl::SkipEmpty());
  if (lines.size() > kLogLinesShown) lines.erase(lines.begin(), lines.end() - kLogLinesShown);
  return absl::StrCat("; the end of ", LogPath(daemon.name), ":\n  ", absl::StrJoin(lines, "\n  "));
}

}  // namespace walsh::client
