// Makes a job wait after every step, for as long as a test says.
#pragma once

#include <chrono>
#include <functional>

#include "worker/pipeline/yield.h"

namespace walsh::testing {

class CountingYield final : public pipeline::Yield {
 public:
  explicit CountingYield(std::chrono::microseconds wait) : wait_(wait) {}

  bool IsWanted() override { return true; }
  absl::Status Wait(const KeepGoing& keep_going) override {
    ++n_waits_;
    const auto end = std::chrono::steady_clock::now() + wait_;
    do {
      if (absl::Status status = keep_going(); !status.ok()) return status;
    } while (std::chrono::steady_clock::now() < end);
    return absl::OkStatus();
  }
  int n_waits() const { return n_waits_; }
  // That the waits took at least.
  double seconds() const { return n_waits_ * std::chrono::duration<double>(wait_).count(); }

 private:
  const std::chrono::microseconds wait_;
  int n_waits_ = 0;
};

}  // namespace walsh::testing
