#include "common/clock.h"

#include <chrono>

#include "absl/time/clock.h"

namespace walsh {
namespace {

class RealClock : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }
  absl::Duration Monotonic() const override {
    return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
  }
};

}  // namespace

Clock* Clock::Real() {
  static RealClock* const clock = new RealClock;  // outlives every user at exit
  return clock;
}

absl::Time ManualClock::Now() const {
  absl::MutexLock lock(&mu_);
  return now_;
}

absl::Duration ManualClock::Monotonic() const {
  absl::MutexLock lock(&mu_);
  return monotonic_;
}

void ManualClock::Advance(absl::Duration d) {
  absl::MutexLock lock(&mu_);
  now_ += d;
  monotonic_ += d;
}

void ManualClock::JumpWallTime(absl::Duration d) {
  absl::MutexLock lock(&mu_);
  now_ += d;
}

}  // namespace walsh
