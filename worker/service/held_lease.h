// The right to work on one job, as this worker sees it.
//
// A lease is only a hint: what decides is the fencing token that every effect carries. Still the
// worker stops by itself before the coordinator may give the job to another one: at its own
// monotonic deadline less a margin, without asking anyone. A successful heartbeat moves the
// deadline, counted from when it was sent.
//
// Threads: safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/clock.h"

namespace walsh::service {

class HeldLease {
 public:
  HeldLease(std::string job_name, int64_t fencing_token, absl::Duration duration, Clock* clock);

  const std::string& job_name() const { return job_name_; }
  int64_t fencing_token() const { return fencing_token_; }

  // Why the job must stop now, or OK: ABORTED (lost or about to expire; nothing more may be
  // changed), CANCELLED (its owner's wish), UNAVAILABLE (this worker stops and hands it back).
  absl::Status Check() const;
  bool is_lost() const { return absl::IsAborted(Check()); }

  // A heartbeat sent at the monotonic time `sent` was accepted.
  void Prolong(absl::Duration sent, absl::Duration duration);
  void Lose(std::string reason);
  void Cancel();
  // Check() says so at once; what is worth finishing may take `grace` more.
  void HandBack(absl::Duration grace = absl::ZeroDuration());
  // Whether the lease is handed back and nothing else, and that time is not over.
  bool may_finish() const;
  // Waits before something is tried again; less when the lease is lost, cancelled or handed back
  // meanwhile.
  void Pause(absl::Duration d);

 private:
  absl::Status CheckLocked() const;
  static absl::Duration Margin(absl::Duration duration);
  void Change(const std::function<void()>& change);

  const std::string job_name_;
  const int64_t fencing_token_;
  Clock* const clock_;
  mutable std::mutex mu_;
  std::condition_variable changed_;
  int n_changes_ = 0;
  absl::Duration stop_at_;
  std::string lost_reason_;
  bool is_cancelled_ = false;
  bool is_handed_back_ = false;
  absl::Duration finish_by_ = -absl::InfiniteDuration();
};

}  // namespace walsh::service
