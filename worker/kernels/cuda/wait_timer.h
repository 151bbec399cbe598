// Adds the time of its life to a total, in seconds.
#pragma once

#include <chrono>

namespace walsh::kernels::cuda {

class WaitTimer {
 public:
  explicit WaitTimer(double* total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~WaitTimer() {
    *total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  WaitTimer(const WaitTimer&) = delete;
  WaitTimer& operator=(const WaitTimer&) = delete;

 private:
  double* const total_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace walsh::kernels::cuda
