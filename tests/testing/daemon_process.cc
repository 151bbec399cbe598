#include "tests/testing/daemon_process.h"

#include <signal.h>

#include <cstdlib>
#include <utility>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/publish.h"
#include "tests/testing/wait.h"

namespace walsh::testing {
namespace {

std::string Binary(const std::string& daemon) {
  const char* bin_dir = std::getenv("WALSH_BIN_DIR");
  return std::string(bin_dir == nullptr ? "." : bin_dir) + "/walsh-" + daemon;
}

}  // namespace

DaemonProcess::DaemonProcess(std::string daemon, std::string data_dir,
                             const std::vector<std::string>& arguments,
                             std::vector<std::string> wrapper)
    : daemon_(std::move(daemon)), data_dir_(std::move(data_dir)) {
  WALSH_CHECK(MakeDirectories(data_dir_).ok());
  // A file that a killed process left would be taken for the new one's.
  RemoveEndpoints(data_dir_, daemon_);
  client::SpawnOptions options;
  options.argv = std::move(wrapper);
  options.argv.push_back(Binary(daemon_));
  options.argv.insert(options.argv.end(), {"--data-dir", data_dir_});
  options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
  options.stdout_path = options.stderr_path = data_dir_ + "/" + daemon_ + ".log";
  absl::StatusOr<client::ChildProcess> child = client::ChildProcess::Spawn(options);
  WALSH_CHECK(child.ok());
  child_ = *std::move(child);
}

DaemonProcess::~DaemonProcess() { Kill(); }

absl::StatusOr<Endpoints> DaemonProcess::WaitUntilReady(absl::Duration timeout) {
  absl::StatusOr<Endpoints> endpoints;
  const bool is_over = WaitUntil(
      [&] {
        endpoints = ReadEndpoints(data_dir_, daemon_);
        return endpoints.ok() || !is_running();
      },
      timeout);
  if (endpoints.ok()) return endpoints;
  return absl::UnavailableError(
      daemon_ + (is_over ? " ended before it was ready" : " was not ready in time"));
}

absl::StatusOr<int> DaemonProcess::Wait(absl::Duration timeout) {
  const std::optional<int> status = child_->Wait(timeout);
  if (!status.has_value()) return absl::DeadlineExceededError(daemon_ + " still runs");
  return client::ExitCode(*status);
}

void DaemonProcess::Kill() {
  if (!is_running()) return;
  kill(-child_->pid(), SIGKILL);  // the group: a killed strace leaves its child running
  WALSH_CHECK(child_->Wait(absl::Seconds(60)).has_value());
}

}  // namespace walsh::testing
