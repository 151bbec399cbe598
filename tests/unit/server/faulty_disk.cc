#include "tests/unit/server/faulty_disk.h"

#include <sqlite3.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <utility>

#include "common/check.h"

namespace walsh::testing {
namespace {

std::atomic<int> write_error{0};
std::atomic<int> syncs_until_failure{0};
std::atomic<bool> has_hook{false};
std::function<void()> sync_hook;  // set before has_hook, called by the one who takes it

int Fail(int error) {
  errno = error;
  return -1;
}

int Sync(int fd, int64_t system_call) {
  if (has_hook.exchange(false)) sync_hook();
  if (syncs_until_failure > 0 && --syncs_until_failure == 0) return Fail(EIO);
  return static_cast<int>(syscall(system_call, fd));
}

ssize_t Write(int fd, const void* data, size_t n_bytes) {
  return write_error != 0 ? Fail(write_error) : write(fd, data, n_bytes);
}
ssize_t Pwrite(int fd, const void* data, size_t n_bytes, off_t offset) {
  return write_error != 0 ? Fail(write_error) : pwrite(fd, data, n_bytes, offset);
}
ssize_t Pwrite64(int fd, const void* data, size_t n_bytes, off64_t offset) {
  return write_error != 0 ? Fail(write_error) : pwrite64(fd, data, n_bytes, offset);
}
void Set(const char* name, sqlite3_syscall_ptr call) {
  sqlite3_vfs* vfs = sqlite3_vfs_find("unix");
  // A call that this build of SQLite does not use is not in its table.
  vfs->xSetSystemCall(vfs, name, call);
}

template <typename Function>
sqlite3_syscall_ptr Pointer(Function* function) {
  return reinterpret_cast<sqlite3_syscall_ptr>(function);
}

}  // namespace

FaultyDisk::FaultyDisk() {
  sqlite3_initialize();
  WALSH_CHECK(sqlite3_vfs_find("unix") != nullptr);
  Set("write", Pointer(Write));
  Set("pwrite", Pointer(Pwrite));
  Set("pwrite64", Pointer(Pwrite64));
}

FaultyDisk::~FaultyDisk() {
  write_error = 0;
  syncs_until_failure = 0;
  has_hook = false;
  sqlite3_vfs* vfs = sqlite3_vfs_find("unix");
  vfs->xSetSystemCall(vfs, nullptr, nullptr);
}

void FaultyDisk::FailWrites(int error) { write_error = error; }
void FaultyDisk::FailSync(int n) { syncs_until_failure = n; }
void FaultyDisk::OnNextSync(std::function<void()> hook) {
  sync_hook = std::move(hook);
  has_hook = true;
}

}  // namespace walsh::testing

// Syncs are not in SQLite's table. The executable's functions come before the C library's, also for
// the calls of shared libraries.
extern "C" int fsync(int fd) { return walsh::testing::Sync(fd, SYS_fsync); }
extern "C" int fdatasync(int fd) { return walsh::testing::Sync(fd, SYS_fdatasync); }
