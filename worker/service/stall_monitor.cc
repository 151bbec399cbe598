#include "worker/service/stall_monitor.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace walsh::service {

StallMonitor::StallMonitor(absl::Duration limit) : limit_(limit), thread_([this] { Loop(); }) {}

StallMonitor::~StallMonitor() {
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void StallMonitor::Watch(std::weak_ptr<StreamCall> call) {
  const std::lock_guard lock(mu_);
  calls_.push_back(std::move(call));
}

void StallMonitor::Loop() {
  const auto interval = absl::ToChronoMicroseconds(std::min(limit_ / 4, absl::Seconds(1)));
  std::unique_lock lock(mu_);
  while (!stop_.wait_for(lock, interval, [this] { return is_stopping_; })) {
    std::vector<std::shared_ptr<StreamCall>> live;
    calls_.remove_if([&live](const std::weak_ptr<StreamCall>& weak) {
      auto call = weak.lock();
      if (call == nullptr) return true;
      live.push_back(std::move(call));
      return false;
    });
    lock.unlock();
    for (const auto& call : live) call->EndIfStalled(limit_);
    live.clear();
    lock.lock();
  }
}

}  // namespace walsh::service
