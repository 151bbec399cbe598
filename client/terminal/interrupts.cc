#include "client/terminal/interrupts.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "common/check.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

void Signal(int event_fd) {
  const uint64_t one = 1;
  WALSH_CHECK_EQ(write(event_fd, &one, sizeof(one)), static_cast<ssize_t>(sizeof(one)));
}

sigset_t InterruptSet() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

Interrupts::Interrupts() {
  const sigset_t set = InterruptSet();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal_fd_ = signalfd(-1, &set, SFD_CLOEXEC);
  stop_fd_ = eventfd(0, EFD_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  WALSH_CHECK(signal_fd_ >= 0 && stop_fd_ >= 0 && wake_fd_ >= 0);
  thread_ = std::thread([this] { Run(); });
}

Interrupts::~Interrupts() {
  Signal(stop_fd_);
  thread_.join();
  close(signal_fd_);
  close(stop_fd_);
  close(wake_fd_);
  const sigset_t set = InterruptSet();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

void Interrupts::OnNext(std::function<void()> action) {
  absl::MutexLock lock(&mu_);
  const auto none_runs = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !is_running_; };
  mu_.Await(absl::Condition(&none_runs));
  action_ = std::move(action);
}

Interrupts::Cancels::Cancels(Interrupts& interrupts, Cancellation& cancellation)
    : interrupts_(interrupts) {
  interrupts_.OnNext([&cancellation] { cancellation.Cancel(); });
}

Interrupts::Cancels::~Cancels() { interrupts_.OnNext(nullptr); }

void Interrupts::Run() {
  std::array<pollfd, 2> fds = {pollfd{signal_fd_, POLLIN, 0}, pollfd{stop_fd_, POLLIN, 0}};
  while (true) {
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) return;
    if (fds[1].revents != 0) return;
    if (fds[0].revents == 0) continue;
    signalfd_siginfo info;
    if (read(signal_fd_, &info, sizeof(info)) != sizeof(info)) continue;
    std::function<void()> action;
    {
      absl::MutexLock lock(&mu_);
      action = std::exchange(action_, nullptr);
      is_running_ = action != nullptr;
    }
    if (!action) {
      // Whatever the main thread waits for may never come: destructors are not run.
      std::_Exit(kExitFailed);
    }
    action();
    absl::MutexLock lock(&mu_);
    is_running_ = false;
  }
}

Interrupts::Read Interrupts::ReadLine(std::string* line) {
  uint64_t stale;
  if (read(wake_fd_, &stale, sizeof(stale)) < 0) stale = 0;  // nothing to clear
  OnNext([this] { Signal(wake_fd_); });
  std::array<pollfd, 2> fds = {pollfd{STDIN_FILENO, POLLIN, 0}, pollfd{wake_fd_, POLLIN, 0}};
  Read result = Read::kEnd;
  while (true) {
    if (const size_t newline = unread_.find('\n'); newline != std::string::npos) {
      *line = unread_.substr(0, newline);
      unread_.erase(0, newline + 1);
      result = Read::kLine;
      break;
    }
    if (poll(fds.data(), fds.size(), -1) < 0) {
      if (errno == EINTR) continue;
      break;
    }
    if (fds[1].revents != 0) {
      result = Read::kInterrupted;
      break;
    }
    std::array<char, 4096> buffer;
    const ssize_t n_bytes = read(STDIN_FILENO, buffer.data(), buffer.size());
    if (n_bytes < 0 && errno == EINTR) continue;
    if (n_bytes <= 0) {
      if (unread_.empty()) break;
      *line = std::exchange(unread_, "");
      result = Read::kLine;
      break;
    }
    unread_.append(buffer.data(), static_cast<size_t>(n_bytes));
  }
  OnNext(nullptr);
  return result;
}

}  // namespace walsh::client
