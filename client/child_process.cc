#include "client/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

extern char** environ;

namespace walsh::client {
namespace {

constexpr int kExecFailed = 127;

// Everything that the child needs, made before the fork: after it only async-signal-safe calls are
// allowed, because other threads of the parent may have held locks.
struct Prepared {
  std::vector<char*> argv;
  std::vector<std::string> environment_strings;
  std::vector<char*> environment;
  int stdin_fd = -1;
  int stdout_fd = -1;
  int stderr_fd = -1;
  bool own_process_group = true;
  pid_t parent = 0;
};

std::vector<std::string> MergedEnvironment(const std::map<std::string, std::string>& changes) {
  std::vector<std::string> merged;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    if (changes.count(text.substr(0, text.find('='))) == 0) merged.push_back(text);
  }
  for (const auto& [key, value] : changes) merged.push_back(absl::StrCat(key, "=", value));
  return merged;
}

[[noreturn]] void ExecInChild(const Prepared& prepared) {
  if (prepared.own_process_group) setpgid(0, 0);
  // The parent may have died between fork and prctl.
  if (prctl(PR_SET_PDEATHSIG, SIGTERM) != 0 || getppid() != prepared.parent) _exit(kExecFailed);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int signal_number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGCHLD}) {
    signal(signal_number, SIG_DFL);
  }
  if (prepared.stdin_fd >= 0) dup2(prepared.stdin_fd, STDIN_FILENO);
  if (prepared.stdout_fd >= 0) dup2(prepared.stdout_fd, STDOUT_FILENO);
  if (prepared.stderr_fd >= 0) dup2(prepared.stderr_fd, STDERR_FILENO);
  close_range(STDERR_FILENO + 1, ~0U, 0);
  execve(prepared.argv[0], prepared.argv.data(), prepared.environment.data());
  _exit(kExecFailed);
}

// A file descriptor that closes itself.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  ~Fd() { Reset(); }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  void Reset(int fd = -1) {
    if (fd_ >= 0) close(fd_);
    fd_ = fd;
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

absl::Status OpenForAppend(const std::string& path, Fd& fd) {
  if (path.empty()) return absl::OkStatus();
  fd.Reset(open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (fd.get() >= 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
}

absl::StatusOr<pid_t> Fork(const SpawnOptions& options, int stdin_fd, int stdout_fd,
                           int stderr_fd) {
  if (access(options.argv[0].c_str(), X_OK) != 0) {
    return absl::NotFoundError(absl::StrCat("there is no program ", options.argv[0]));
  }
  Prepared prepared;
  for (const std::string& arg : options.argv)
    prepared.argv.push_back(const_cast<char*>(arg.c_str()));
  prepared.argv.push_back(nullptr);
  prepared.environment_strings = MergedEnvironment(options.environment);
  for (std::string& text : prepared.environment_strings)
    prepared.environment.push_back(text.data());
  prepared.environment.push_back(nullptr);
  prepared.stdin_fd = stdin_fd;
  prepared.stdout_fd = stdout_fd;
  prepared.stderr_fd = stderr_fd;
  prepared.own_process_group = options.own_process_group;
  prepared.parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  if (pid == 0) ExecInChild(prepared);
  return pid;
}

struct Pipe {
  Fd read;
  Fd write;
  absl::Status Open() {
    std::array<int, 2> fds;
    if (pipe2(fds.data(), O_CLOEXEC) != 0) {
      return absl::InternalError(absl::StrCat("pipe: ", std::strerror(errno)));
    }
    read.Reset(fds[0]);
    write.Reset(fds[1]);
    return absl::OkStatus();
  }
};

// Reads what is there; closes at the end.
void Drain(Fd& fd, std::string& text) {
  std::array<char, 65536> buffer;
  const ssize_t n_bytes = read(fd.get(), buffer.data(), buffer.size());
  if (n_bytes > 0) {
    text.append(buffer.data(), static_cast<size_t>(n_bytes));
  } else if (n_bytes == 0 || errno != EINTR) {
    fd.Reset();
  }
}

}  // namespace

absl::StatusOr<ChildProcess> ChildProcess::Spawn(const SpawnOptions& options) {
  const std::string input = options.stdin_path.empty() ? "/dev/null" : options.stdin_path;
  Fd in(open(input.c_str(), O_RDONLY | O_CLOEXEC));
  if (in.get() < 0) {
    return absl::InternalError(absl::StrCat("cannot read ", input, ": ", std::strerror(errno)));
  }
  Fd out;
  Fd err;
  if (absl::Status status = OpenForAppend(options.stdout_path, out); !status.ok()) return status;
  if (absl::Status status = OpenForAppend(options.stderr_path, err); !status.ok()) return status;
  const auto pid = Fork(options, in.get(), out.get(), err.get());
  if (!pid.ok()) return pid.status();
  return ChildProcess(*pid);
}

ChildProcess::~ChildProcess() {
  if (pid_ <= 0 || Poll().has_value()) return;
  Signal(SIGKILL);
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)), status_(other.status_) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(status_, other.status_);
  return *this;
}

void ChildProcess::Signal(int signal) const {
  // After it was reaped the pid may belong to somebody else.
  if (pid_ > 0 && !status_.has_value()) kill(pid_, signal);
}

std::optional<int> ChildProcess::Poll() {
  if (status_.has_value() || pid_ <= 0) return status_;
  int status = 0;
  if (waitpid(pid_, &status, WNOHANG) == pid_) status_ = status;
  return status_;
}

std::optional<int> ChildProcess::Wait(absl::Duration timeout) {
  if (Poll().has_value() || pid_ <= 0) return status_;
  const absl::Time deadline = absl::Now() + timeout;
  Fd process(static_cast<int>(syscall(SYS_pidfd_open, pid_, 0)));
  pollfd ended = {process.get(), POLLIN, 0};
  while (!Poll().has_value()) {
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) break;
    // Kernels before 5.3 have no descriptors of processes: ask again now and then.
    const absl::Duration wait = process.get() < 0 ? std::min(left, absl::Milliseconds(5)) : left;
    poll(&ended, 1, static_cast<int>(absl::ToInt64Milliseconds(wait)) + 1);
  }
  return status_;
}

std::string WaitStatusText(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int number = WTERMSIG(wait_status);
    return absl::StrCat("killed by signal ", number, " (", strsignal(number), ")");
  }
  return absl::StrCat("exit code ", WEXITSTATUS(wait_status));
}

int ExitCode(int wait_status) {
  return WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

absl::StatusOr<Output> RunCommand(const SpawnOptions& options, const std::string& input,
                                  absl::Duration timeout) {
  Pipe in;
  Pipe out;
  Pipe err;
  for (Pipe* pipe : {&in, &out, &err}) {
    if (absl::Status status = pipe->Open(); !status.ok()) return status;
  }
  const auto pid = Fork(options, in.read.get(), out.write.get(), err.write.get());
  if (!pid.ok()) return pid.status();
  in.read.Reset();
  out.write.Reset();
  err.write.Reset();
  // A command that does not read its input must not kill this process.
  signal(SIGPIPE, SIG_IGN);
  fcntl(in.write.get(), F_SETFL, O_NONBLOCK);

  const absl::Time deadline = absl::Now() + timeout;
  Output output;
  size_t n_written = 0;
  while (out.read.get() >= 0 || err.read.get() >= 0) {
    if (n_written == input.size()) in.write.Reset();
    std::array<pollfd, 3> fds = {pollfd{out.read.get(), POLLIN, 0},
                                 pollfd{err.read.get(), POLLIN, 0},
                                 pollfd{in.write.get(), POLLOUT, 0}};
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration() ||
        (poll(fds.data(), fds.size(), static_cast<int>(absl::ToInt64Milliseconds(left)) + 1) < 0 &&
         errno != EINTR)) {
      kill(*pid, SIGKILL);
      while (waitpid(*pid, nullptr, 0) < 0 && errno == EINTR) {
      }
      return absl::DeadlineExceededError(
          absl::StrCat(options.argv[0], " did not end within ", absl::FormatDuration(timeout)));
    }
    if (fds[0].revents != 0) Drain(out.read, output.out);
    if (fds[1].revents != 0) Drain(err.read, output.err);
    if ((fds[2].revents & (POLLERR | POLLHUP)) != 0) {
      n_written = input.size();
    } else if (fds[2].revents != 0) {
      const ssize_t n_bytes =
          write(in.write.get(), input.data() + n_written, input.size() - n_written);
      if (n_bytes > 0) n_written += static_cast<size_t>(n_bytes);
    }
  }
  int status = 0;
  while (waitpid(*pid, &status, 0) < 0 && errno == EINTR) {
  }
  output.exit_code = ExitCode(status);
  return output;
}

std::string SiblingBinary(const std::string& name) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  return (self.parent_path() / name).string();
}

}  // namespace walsh::client
