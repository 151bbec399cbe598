// Preloaded into a daemon: its calls that change what is on a disk, which fail, wait or end the
// process where the plan says so (tests/testing/fault_injector.h).
//
// Here and not by strace, which counts the calls of each thread apart and slows all of them down.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/testing/fault_plan.h"

namespace walsh::testing {
namespace {

FaultPlan* MapPlan() {
  const char* path = std::getenv(kFaultPlanVariable);
  if (path == nullptr) return nullptr;
  const int fd = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0));
  if (fd < 0) return nullptr;
  void* mapped = mmap(nullptr, sizeof(FaultPlan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return mapped == MAP_FAILED ? nullptr : static_cast<FaultPlan*>(mapped);
}

FaultPlan* Plan() {
  static FaultPlan* const plan = MapPlan();
  return plan;
}

// The C library's function of this name.
template <typename Function>
Function* Next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

bool HasPrefix(const FaultPlan& plan, const char* path) {
  return std::strncmp(path, plan.path_prefix.data(), std::strlen(plan.path_prefix.data())) == 0;
}

[[noreturn]] void Die() {
  kill(getpid(), SIGKILL);
  while (true) pause();
}

// The action for this call, which is counted where it concerns the plan.
FaultAction Count(FaultCall call, const char* path) {
  FaultPlan* const plan = Plan();
  if (plan == nullptr || (plan->calls & call) == 0 || !HasPrefix(*plan, path)) {
    return FaultAction::kNone;
  }
  const FaultAction action = plan->action;
  const int64_t n = ++plan->n_calls;
  if (action == FaultAction::kNone || n < plan->first || n > plan->last) return FaultAction::kNone;
  ++plan->n_faults;
  return action;
}

FaultAction Count(FaultCall call, int fd) {
  if (Plan() == nullptr) return FaultAction::kNone;
  char link[32];
  std::snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  char path[4096];
  const int saved = errno;
  const ssize_t n = readlink(link, path, sizeof(path) - 1);
  errno = saved;
  if (n < 0) return FaultAction::kNone;
  path[n] = '\0';
  return Count(call, path);
}

// `call` unless the action keeps it from being made.
template <typename Call>
auto Make(FaultAction action, Call call) -> decltype(call()) {
  switch (action) {
    case FaultAction::kNone:
      break;
    case FaultAction::kKill:
    case FaultAction::kTear:
      Die();
    case FaultAction::kStop:
      // To this thread, so that it does not go on before the signal has come.
      syscall(SYS_tgkill, getpid(), gettid(), SIGSTOP);
      break;
    case FaultAction::kError:
      errno = Plan()->error;
      return -1;
    case FaultAction::kDelay:
      usleep(static_cast<useconds_t>(Plan()->delay_us));
      break;
  }
  return call();
}

// `write` makes the call for the first so many bytes.
template <typename Write>
ssize_t MakeWrite(int fd, size_t n_bytes, Write write_bytes) {
  const FaultAction action = Count(kWriteCall, fd);
  if (action == FaultAction::kTear) (void)write_bytes(n_bytes / 2);
  return Make(action, [&] { return write_bytes(n_bytes); });
}

template <typename Open>
int MakeOpen(int flags, const char* path, Open call) {
  return Make((flags & O_CREAT) != 0 ? Count(kOtherCall, path) : FaultAction::kNone, call);
}

mode_t Mode(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace
}  // namespace walsh::testing

// NOLINTBEGIN: the C library's names and signatures
using walsh::testing::Count;
using walsh::testing::Make;
using walsh::testing::Next;

extern "C" {

ssize_t write(int fd, const void* data, size_t n_bytes) {
  static auto* const next = Next<decltype(write)>("write");
  return walsh::testing::MakeWrite(fd, n_bytes, [&](size_t n) { return next(fd, data, n); });
}

ssize_t writev(int fd, const struct iovec* pieces, int n_pieces) {
  static auto* const next = Next<decltype(writev)>("writev");
  // Half of its pieces are half enough.
  return walsh::testing::MakeWrite(fd, static_cast<size_t>(n_pieces),
                                   [&](size_t n) { return next(fd, pieces, static_cast<int>(n)); });
}

ssize_t pwrite(int fd, const void* data, size_t n_bytes, off_t offset) {
  static auto* const next = Next<decltype(pwrite)>("pwrite");
  return walsh::testing::MakeWrite(fd, n_bytes,
                                   [&](size_t n) { return next(fd, data, n, offset); });
}

ssize_t pwrite64(int fd, const void* data, size_t n_bytes, off64_t offset) {
  static auto* const next = Next<decltype(pwrite64)>("pwrite64");
  return walsh::testing::MakeWrite(fd, n_bytes,
                                   [&](size_t n) { return next(fd, data, n, offset); });
}

int fsync(int fd) {
  static auto* const next = Next<decltype(fsync)>("fsync");
  return Make(Count(walsh::testing::kSyncCall, fd), [&] { return next(fd); });
}

int fdatasync(int fd) {
  static auto* const next = Next<decltype(fdatasync)>("fdatasync");
  return Make(Count(walsh::testing::kSyncCall, fd), [&] { return next(fd); });
}

int rename(const char* from, const char* to) noexcept {
  static auto* const next = Next<int(const char*, const char*)>("rename");
  return Make(Count(walsh::testing::kRenameCall, to), [&] { return next(from, to); });
}

int renameat2(int from_dir, const char* from, int to_dir, const char* to,
              unsigned int flags) noexcept {
  static auto* const next =
      Next<int(int, const char*, int, const char*, unsigned int)>("renameat2");
  return Make(Count(walsh::testing::kRenameCall, to),
              [&] { return next(from_dir, from, to_dir, to, flags); });
}

int open(const char* path, int flags, ...) {
  static auto* const next = Next<int(const char*, int, ...)>("open");
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = walsh::testing::Mode(flags, arguments);
  va_end(arguments);
  return walsh::testing::MakeOpen(flags, path, [&] { return next(path, flags, mode); });
}

int open64(const char* path, int flags, ...) {
  static auto* const next = Next<int(const char*, int, ...)>("open64");
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = walsh::testing::Mode(flags, arguments);
  va_end(arguments);
  return walsh::testing::MakeOpen(flags, path, [&] { return next(path, flags, mode); });
}

int mkdir(const char* path, mode_t mode) noexcept {
  static auto* const next = Next<int(const char*, mode_t)>("mkdir");
  return Make(Count(walsh::testing::kOtherCall, path), [&] { return next(path, mode); });
}

int unlink(const char* path) noexcept {
  static auto* const next = Next<int(const char*)>("unlink");
  return Make(Count(walsh::testing::kOtherCall, path), [&] { return next(path); });
}

int unlinkat(int directory, const char* path, int flags) noexcept {
  static auto* const next = Next<int(int, const char*, int)>("unlinkat");
  // Of std::filesystem::remove_all: names are relative to the folder.
  const auto action = path[0] == '/' ? Count(walsh::testing::kOtherCall, path)
                                     : Count(walsh::testing::kOtherCall, directory);
  return Make(action, [&] { return next(directory, path, flags); });
}

int rmdir(const char* path) noexcept {
  static auto* const next = Next<int(const char*)>("rmdir");
  return Make(Count(walsh::testing::kOtherCall, path), [&] { return next(path); });
}

int ftruncate(int fd, off_t size) noexcept {
  static auto* const next = Next<int(int, off_t)>("ftruncate");
  return Make(Count(walsh::testing::kOtherCall, fd), [&] { return next(fd, size); });
}

int ftruncate64(int fd, off64_t size) noexcept {
  static auto* const next = Next<int(int, off64_t)>("ftruncate64");
  return Make(Count(walsh::testing::kOtherCall, fd), [&] { return next(fd, size); });
}

}  // extern "C"
// NOLINTEND
