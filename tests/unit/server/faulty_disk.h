// Makes SQLite's writes and syncs fail or take their time, through the table of system calls that
// its Unix layer uses.
//
// One at a time, and for the whole process: tests that use it run alone in their process's moment.
#pragma once

#include <functional>

namespace walsh::testing {

class FaultyDisk {
 public:
  FaultyDisk();
  ~FaultyDisk();
  FaultyDisk(const FaultyDisk&) = delete;
  FaultyDisk& operator=(const FaultyDisk&) = delete;

  // From now on writes fail with `error` (ENOSPC, EROFS, EIO); 0 heals.
  void FailWrites(int error);
  // The n-th sync from now (1 is the next) fails with EIO, the others succeed.
  void FailSync(int n);
  // The next sync calls this first, on the thread that waits for it: what happens while a
  // transaction is on its way.
  void OnNextSync(std::function<void()> hook);
};

}  // namespace walsh::testing
