// Starts and watches processes: the daemons under `walsh up`, the worker's self-description, and
// the real binaries in tests.
//
// Threads: not safe. A child asks the kernel for a signal when its parent's *thread* ends
//          (PR_SET_PDEATHSIG), so long-lived children are started from the main thread.
#pragma once

#include <sys/types.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace walsh::client {

struct SpawnOptions {
  std::vector<std::string> argv;                   // argv[0] is the path of the binary
  std::map<std::string, std::string> environment;  // set or replaced in the child
  // Files (or terminals) for the child's standard streams. Output is appended; empty: no input, the
  // output and error of this process. RunCommand() has its own.
  std::string stdin_path;
  std::string stdout_path;
  std::string stderr_path;
  // Ctrl-C on the terminal reaches the parent only, which decides what to do.
  bool own_process_group = true;
};

class ChildProcess {
 public:
  // NOT_FOUND when there is no such binary, INTERNAL when the system refuses.
  static absl::StatusOr<ChildProcess> Spawn(const SpawnOptions& options);
  // Kills a child that still runs, and reaps it.
  ~ChildProcess();
  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // The wait status once the child has ended; does not block.
  std::optional<int> Poll();
  // The wait status, or nothing when it still runs after `timeout`.
  std::optional<int> Wait(absl::Duration timeout);

 private:
  explicit ChildProcess(pid_t pid) : pid_(pid) {}

  pid_t pid_;
  std::optional<int> status_;
};

// "exit code 3" or "killed by signal 9 (Killed)".
std::string WaitStatusText(int wait_status);
// The exit code, or 128 + signal as shells have it.
int ExitCode(int wait_status);

struct Output {
  int exit_code = 0;
  std::string out;
  std::string err;
};
// Runs a command to its end, with `input` on its standard input. DEADLINE_EXCEEDED after `timeout`;
// the command is killed then.
absl::StatusOr<Output> RunCommand(const SpawnOptions& options, const std::string& input,
                                  absl::Duration timeout);

// Path of another binary of this build: beside the one that runs.
std::string SiblingBinary(const std::string& name);

}  // namespace walsh::client
