// A real daemon of this build as a child process: started on free ports, found through its
// endpoints file, stopped or killed.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/child_process.h"
#include "common/endpoints.h"

namespace walsh::testing {

class DaemonProcess {
 public:
  // `daemon` is "coordinator" or "worker"; `wrapper` goes before it on the command line (strace …).
  // Output goes to `data_dir`/<daemon>.log. The binary comes from $WALSH_BIN_DIR.
  DaemonProcess(std::string daemon, std::string data_dir, const std::vector<std::string>& arguments,
                std::vector<std::string> wrapper = {});
  ~DaemonProcess();  // Kill()
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  // Waits until it listens. UNAVAILABLE when it ended or took too long.
  absl::StatusOr<Endpoints> WaitUntilReady(absl::Duration timeout = absl::Seconds(30));
  void Signal(int signal_number) const { child_->Signal(signal_number); }
  // The exit code, 128 + signal after one; DEADLINE_EXCEEDED when it goes on running.
  absl::StatusOr<int> Wait(absl::Duration timeout = absl::Seconds(30));
  // SIGKILL to it and its wrapper, and waits.
  void Kill();
  pid_t pid() const { return child_->pid(); }
  bool is_running() { return !child_->Poll().has_value(); }

 private:
  const std::string daemon_;
  const std::string data_dir_;
  std::optional<client::ChildProcess> child_;
};

}  // namespace walsh::testing
