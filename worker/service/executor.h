// A few threads and a bounded queue for work that takes too long for gRPC's callback threads, of
// which a process has two on a small machine: on those it would hold up every other call.
//
// Threads: safe.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace walsh::service {

class Executor {
 public:
  // `max_waiting`: tasks that wait beside those that run.
  Executor(int n_threads, size_t max_waiting);
  // Returns when all accepted tasks have run.
  ~Executor();
  // False when the queue is full: `task` will not run.
  [[nodiscard]] bool Run(std::function<void()> task);

 private:
  void Loop();

  const size_t max_waiting_;
  std::mutex mu_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  size_t n_idle_ = 0;
  bool is_stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace walsh::service
