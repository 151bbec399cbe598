// How many requests run or wait in the engines that share it: whether a worker has traffic.
//
// Threads: safe. Reading the count takes no lock.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "absl/time/time.h"

namespace walsh::engine {

class RequestCount {
 public:
  void Add() { ++n_; }
  void Remove(int n) {
    if ((n_ -= n) > 0) return;
    // Whoever found a request before waits by now, and hears of it.
    { const std::lock_guard lock(mu_); }
    none_.notify_all();
  }
  int count() const { return n_; }
  // Returns once there is none, or after `at_most`.
  void WaitUntilNone(absl::Duration at_most) {
    std::unique_lock lock(mu_);
    none_.wait_for(lock, absl::ToChronoMicroseconds(at_most), [this] { return n_ == 0; });
  }

 private:
  std::atomic<int> n_ = 0;
  std::mutex mu_;
  std::condition_variable none_;
};

}  // namespace walsh::engine
