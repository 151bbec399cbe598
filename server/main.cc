// walsh-coordinator.
#include <signal.h>
#include <unistd.h>

#include <iostream>
#include <thread>

#include "common/command_line.h"
#include "common/metrics.h"
#include "server/coordinator_flags.h"

namespace {

constexpr char kDaemon[] = "coordinator";

int WaitForSignal(const sigset_t& signals) {
  int signal_number = 0;
  sigwait(&signals, &signal_number);
  return signal_number;
}

}  // namespace

int main(int argc, char** argv) {
  walsh::CoordinatorFlags flags;
  if (const auto exit_code = walsh::ParseFlags(argc, argv, &flags)) return *exit_code;
  walsh::log::Configure(kDaemon, flags.log_format, flags.log_level);
  walsh::metrics::RegisterBuildInfo();

  // Before the first thread, which inherit it: signals are taken by sigwait only.
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal_number : {SIGTERM, SIGINT}) sigaddset(&signals, signal_number);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  flags.server.on_leadership_lost = [&flags](const absl::Status&) {
    walsh::RemoveEndpoints(flags.server.data_dir, kDaemon);
    _exit(walsh::kExitFailed);  // to be started anew, and stand by
  };
  auto server = walsh::Server::Start(flags.server);
  if (!server.ok()) {
    WALSH_LOG(Error, "cannot start", {"status", server.status()});
    return walsh::kExitFailed;
  }
  int exit_code = walsh::kExitOk;  // of `leading` until it is joined
  // Beside the signals, as its turn may never come.
  std::thread leading([&] {
    absl::Status status = (*server)->Lead();
    if (absl::IsCancelled(status)) return;
    if (status.ok()) {
      status = walsh::WriteEndpoints(flags.server.data_dir, kDaemon, (*server)->endpoints());
    }
    if (!status.ok()) {
      WALSH_LOG(Error, "cannot start", {"status", status});
      exit_code = walsh::kExitFailed;
      kill(getpid(), SIGTERM);  // it may lead already, and a stop lets the next one do so at once
      return;
    }
    for (const auto& [port, address] : (*server)->endpoints()) {
      std::cout << port << " " << address << std::endl;
    }
  });

  const int signal_number = WaitForSignal(signals);
  WALSH_LOG(Info, "stopping", {"signal", signal_number});
  std::thread([signals] {
    WaitForSignal(signals);
    _exit(walsh::kExitFailed);  // the second one: at once
  }).detach();
  (*server)->Stop(flags.shutdown_timeout);
  leading.join();
  walsh::RemoveEndpoints(flags.server.data_dir, kDaemon);
  WALSH_LOG(Info, "stopped");
  return exit_code;
}
