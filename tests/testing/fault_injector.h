// Faults of a daemon at its n-th call that changes what is on a disk, counted over all its threads:
// no code of the daemon has to know of it.
//
//   FaultInjector faults(data_dir + "/coordinator.db");
//   service.set_launch("coordinator", {.environment = faults.environment()});
//   ASSERT_OK(service.StartCoordinator());
//   faults.Arm({.action = FaultAction::kKill, .first = 3});  // the third call from now on
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>

#include "absl/time/time.h"
#include "tests/testing/fault_plan.h"
#include "tests/testing/test_data.h"

namespace walsh::testing {

struct Fault {
  FaultAction action = FaultAction::kNone;
  uint32_t calls = kEveryCall;
  // Which of the calls since it was armed, from 1; `last` 0: only the first.
  int64_t first = 1;
  int64_t last = 0;
  int error = 0;         // errno of kError
  absl::Duration delay;  // of kDelay
};
inline constexpr int64_t kForEver = std::numeric_limits<int64_t>::max();

class FaultInjector {
 public:
  // Of calls on paths that begin so.
  explicit FaultInjector(const std::string& path_prefix);
  ~FaultInjector();
  FaultInjector(const FaultInjector&) = delete;
  FaultInjector& operator=(const FaultInjector&) = delete;

  // What the daemon is started with; one daemon at a time.
  std::map<std::string, std::string> environment() const;

  void Arm(const Fault& fault);  // counts from 1 again
  void Disarm();
  int64_t n_calls() const { return plan_->n_calls; }  // since Arm()
  int64_t n_faults() const { return plan_->n_faults; }

 private:
  const TempDir dir_;
  FaultPlan* plan_ = nullptr;
};

// How far apart the points are that a test tries of those that it enumerates: 1 where
// $WALSH_EVERY_FAULT is set, else `sample`, so that a build of every day takes seconds.
int FaultStep(int sample);

}  // namespace walsh::testing
