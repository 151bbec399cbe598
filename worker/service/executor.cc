#include "worker/service/executor.h"

#include <utility>

namespace walsh::service {

Executor::Executor(int n_threads, size_t max_waiting)
    : max_waiting_(max_waiting), n_idle_(static_cast<size_t>(n_threads)) {
  for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { Loop(); });
}

Executor::~Executor() {
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool Executor::Run(std::function<void()> task) {
  {
    const std::lock_guard lock(mu_);
    // What an idle thread is about to take does not wait.
    if (waiting_.size() >= max_waiting_ + n_idle_) return false;
    waiting_.push_back(std::move(task));
  }
  changed_.notify_one();
  return true;
}

void Executor::Loop() {
  std::unique_lock lock(mu_);
  while (true) {
    changed_.wait(lock, [this] { return is_stopping_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    std::function<void()> task = std::move(waiting_.front());
    waiting_.pop_front();
    --n_idle_;
    lock.unlock();
    task();
    task = nullptr;  // what it holds goes before the thread counts as idle
    lock.lock();
    ++n_idle_;
  }
}

}  // namespace walsh::service
