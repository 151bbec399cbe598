#include "common/executor.h"

#include "common/clock.h"

namespace walsh {
namespace {

// A time axis for timers that does not jump with the wall clock.
absl::Time SteadyNow() { return absl::UnixEpoch() + Clock::Real()->Monotonic(); }

}  // namespace

Executor::Executor(const Options& options) : options_(options) {
  for (int i = 0; i < options.n_threads; ++i) threads_.emplace_back([this] { Run(); });
}

Executor::~Executor() { Stop(); }

bool Executor::Post(std::function<void()> task) {
  const absl::MutexLock lock(&mu_);
  if (is_stopping_ || static_cast<int>(tasks_.size()) >= options_.tasks_max) return false;
  tasks_.push_back(std::move(task));
  changed_.Signal();
  return true;
}

void Executor::PostAfter(absl::Duration delay, std::function<void()> task) {
  const absl::MutexLock lock(&mu_);
  if (is_stopping_) return;
  timers_.emplace(std::pair(SteadyNow() + delay, n_timers_++), std::move(task));
  changed_.Signal();
}

void Executor::Stop() {
  {
    const absl::MutexLock lock(&mu_);
    is_stopping_ = true;
    timers_.clear();
    changed_.SignalAll();
  }
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void Executor::Run() {
  while (std::function<void()> task = Next()) task();
}

std::function<void()> Executor::Next() {
  const absl::MutexLock lock(&mu_);
  while (true) {
    const absl::Time now = SteadyNow();
    if (!timers_.empty() && timers_.begin()->first.first <= now) {
      std::function<void()> task = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
      return task;
    }
    if (!tasks_.empty()) {
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      return task;
    }
    if (is_stopping_) return nullptr;
    if (timers_.empty()) {
      changed_.Wait(&mu_);
    } else {
      changed_.WaitWithTimeout(&mu_, timers_.begin()->first.first - now);
    }
  }
}

}  // namespace walsh
