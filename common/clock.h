// Time as a dependency, so that leases, deadlines and metrics are tested without sleeping.
//
// Threads: every method may be called from any thread.
#pragma once

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh {

class Clock {
 public:
  virtual ~Clock() = default;
  // Wall time, for what people and databases read.
  virtual absl::Time Now() const = 0;
  // Time since an arbitrary start that never jumps: leases, timeouts and intervals use only this.
  virtual absl::Duration Monotonic() const = 0;
  // The system's clock. Never deleted.
  static Clock* Real();
};

class ManualClock : public Clock {
 public:
  explicit ManualClock(absl::Time now = absl::FromUnixSeconds(1'000'000'000)) : now_(now) {}
  absl::Time Now() const override;
  absl::Duration Monotonic() const override;
  void Advance(absl::Duration d);
  // Moves wall time only, as an administrator or NTP would.
  void JumpWallTime(absl::Duration d);

 private:
  mutable absl::Mutex mu_;
  absl::Time now_;
  absl::Duration monotonic_ = absl::ZeroDuration();
};

}  // namespace walsh
