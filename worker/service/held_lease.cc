#include "worker/service/held_lease.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace walsh::service {

HeldLease::HeldLease(std::string job_name, int64_t fencing_token, absl::Duration duration,
                     Clock* clock)
    : job_name_(std::move(job_name)),
      fencing_token_(fencing_token),
      clock_(clock),
      stop_at_(clock->Monotonic() + duration - Margin(duration)) {}

// 5 s, or a quarter of leases too short for that.
absl::Duration HeldLease::Margin(absl::Duration duration) {
  return std::min(absl::Seconds(5), duration / 4);
}

absl::Status HeldLease::Check() const {
  const std::lock_guard lock(mu_);
  return CheckLocked();
}

bool HeldLease::may_finish() const {
  const std::lock_guard lock(mu_);
  return absl::IsUnavailable(CheckLocked()) && clock_->Monotonic() < finish_by_;
}

absl::Status HeldLease::CheckLocked() const {
  // Lost comes first: whatever else is wished, nothing may be changed any more.
  if (!lost_reason_.empty()) {
    return absl::AbortedError(absl::StrCat("the lease of ", job_name_, " is lost: ", lost_reason_));
  }
  if (clock_->Monotonic() >= stop_at_) {
    return absl::AbortedError(
        absl::StrCat("the lease of ", job_name_, " is about to expire without a heartbeat"));
  }
  if (is_cancelled_) return absl::CancelledError(absl::StrCat(job_name_, " was cancelled"));
  if (is_handed_back_) return absl::UnavailableError("the worker is stopping");
  return absl::OkStatus();
}

void HeldLease::Prolong(absl::Duration sent, absl::Duration duration) {
  const std::lock_guard lock(mu_);
  // A lease whose time was over stays over: the job may run elsewhere by now.
  if (clock_->Monotonic() >= stop_at_) return;
  stop_at_ = std::max(stop_at_, sent + duration - Margin(duration));
}

void HeldLease::Lose(std::string reason) {
  Change([&] {
    if (lost_reason_.empty()) lost_reason_ = std::move(reason);
  });
}

void HeldLease::Cancel() {
  Change([&] { is_cancelled_ = true; });
}

void HeldLease::HandBack(absl::Duration grace) {
  Change([&] {
    if (std::exchange(is_handed_back_, true)) return;
    finish_by_ = clock_->Monotonic() + grace;
  });
}

void HeldLease::Change(const std::function<void()>& change) {
  const std::lock_guard lock(mu_);
  change();
  ++n_changes_;
  changed_.notify_all();
}

void HeldLease::Pause(absl::Duration d) {
  std::unique_lock lock(mu_);
  changed_.wait_for(lock, absl::ToChronoMicroseconds(d),
                    [this, before = n_changes_] { return n_changes_ != before; });
}

}  // namespace walsh::service
