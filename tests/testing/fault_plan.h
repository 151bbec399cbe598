// What FaultInjector and the library that it preloads into a daemon share, in a mapped file.
//
// Threads: both sides change it by atomic operations; what a plan says is written before `action`.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace walsh::testing {

// Names the mapped file in the daemon's environment.
inline constexpr char kFaultPlanVariable[] = "WALSH_FAULT_PLAN";

// The calls that change what is on a disk.
enum FaultCall : uint32_t {
  kWriteCall = 1,   // write, writev, pwrite
  kSyncCall = 2,    // fsync, fdatasync
  kRenameCall = 4,  // rename, renameat2
  kOtherCall = 8,   // creating a file or folder, unlink, rmdir, ftruncate
  kEveryCall = 15,
};

enum class FaultAction : uint32_t {
  kNone,   // calls are counted
  kKill,   // SIGKILL before the call
  kTear,   // SIGKILL after half of a write; before other calls
  kStop,   // SIGSTOP before the call, which is made after SIGCONT
  kError,  // the call fails
  kDelay,  // the call comes later
};

struct FaultPlan {
  std::atomic<FaultAction> action;
  uint32_t calls;                      // FaultCall
  int32_t error;                       // errno of kError
  int64_t delay_us;                    // of kDelay
  int64_t first, last;                 // of the calls that are counted, from 1
  std::array<char, 4096> path_prefix;  // only calls on such paths are counted
  std::atomic<int64_t> n_calls;
  std::atomic<int64_t> n_faults;
};

}  // namespace walsh::testing
