// A real daemon of this build as a child process: started on free ports, found through its
// endpoints file, stopped or killed.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/endpoints.h"

namespace walsh::testing {

class DaemonProcess {
 public:
  // `daemon` is "coordinator" or "worker"; `wrapper` goes before it on the command line (strace …).
  // Output goes to `data_dir`/<daemon>.log. The binary comes from $WALSH_BIN_DIR.
  DaemonProcess(std::string daemon, std::string data_dir, std::vector<std::string> arguments,
                std::vector<std::string> wrapper = {});
  ~DaemonProcess();  // SIGKILL when it still runs
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  static std::string Binary(const std::string& daemon);

  // Waits until it listens. UNAVAILABLE when it ended or took too long.
  absl::StatusOr<Endpoints> WaitUntilReady(absl::Duration timeout = absl::Seconds(30));
  void Signal(int signal_number);
  // The exit status as waitpid gives it; DEADLINE_EXCEEDED when it goes on running.
  absl::StatusOr<int> Wait(absl::Duration timeout = absl::Seconds(30));
  // SIGKILL to it (and its wrapper), and waits.
  void Kill();
  bool is_running();

 private:
  const std::string daemon_;
  const std::string data_dir_;
  pid_t pid_ = -1;
  int exit_status_ = 0;
};

}  // namespace walsh::testing
