#include "tests/testing/daemon_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "common/check.h"
#include "common/publish.h"

namespace walsh::testing {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(5);

}  // namespace

std::string DaemonProcess::Binary(const std::string& daemon) {
  const char* bin_dir = std::getenv("WALSH_BIN_DIR");
  return std::string(bin_dir == nullptr ? "." : bin_dir) + "/walsh-" + daemon;
}

DaemonProcess::DaemonProcess(std::string daemon, std::string data_dir,
                             std::vector<std::string> arguments, std::vector<std::string> wrapper)
    : daemon_(std::move(daemon)), data_dir_(std::move(data_dir)) {
  WALSH_CHECK(MakeDirectories(data_dir_).ok());
  // A file that a killed process left would be taken for the new one's.
  RemoveEndpoints(data_dir_, daemon_);
  std::vector<std::string> words = std::move(wrapper);
  words.push_back(Binary(daemon_));
  words.insert(words.end(), {"--data-dir", data_dir_});
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const std::string log = data_dir_ + "/" + daemon_ + ".log";
  pid_ = fork();
  WALSH_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    // A group of its own, so that a wrapper and its child are killed together.
    setpgid(0, 0);
    const int fd = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  setpgid(pid_, pid_);
}

DaemonProcess::~DaemonProcess() { Kill(); }

bool DaemonProcess::is_running() {
  if (pid_ < 0) return false;
  if (waitpid(pid_, &exit_status_, WNOHANG) == pid_) pid_ = -1;
  return pid_ >= 0;
}

absl::StatusOr<Endpoints> DaemonProcess::WaitUntilReady(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (absl::Now() < deadline) {
    absl::StatusOr<Endpoints> endpoints = ReadEndpoints(data_dir_, daemon_);
    if (endpoints.ok()) return endpoints;
    if (!is_running()) return absl::UnavailableError(daemon_ + " ended before it was ready");
    absl::SleepFor(kPoll);
  }
  return absl::UnavailableError(daemon_ + " was not ready in time");
}

void DaemonProcess::Signal(int signal_number) {
  if (is_running()) kill(pid_, signal_number);
}

absl::StatusOr<int> DaemonProcess::Wait(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (is_running()) {
    if (absl::Now() >= deadline) return absl::DeadlineExceededError(daemon_ + " still runs");
    absl::SleepFor(kPoll);
  }
  return exit_status_;
}

void DaemonProcess::Kill() {
  if (!is_running()) return;
  kill(-pid_, SIGKILL);
  waitpid(pid_, &exit_status_, 0);
  pid_ = -1;
}

}  // namespace walsh::testing
