// A fixed set of threads that walks tiles in parallel.
//
// Results never depend on the number of threads: callers cut their work into tiles by shape alone,
// and each tile writes only its own outputs.
//
// Threads: ParallelFor may be called from several threads; the calls run one after another.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace walsh {

class ThreadPool {
 public:
  // `n_threads` counts the caller; 1 runs everything in the caller.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }
  // Calls tile(i) once for each i in [0, n_tiles), and returns when all are done. `tile` must not
  // call ParallelFor. It may run out of memory: what it throws first is thrown on, once no thread
  // runs a tile any more, and tiles that nobody has begun are left out.
  void ParallelFor(int64_t n_tiles, const std::function<void(int64_t)>& tile);

  // What the machine (or its cgroup) grants.
  static int HardwareThreads();

 private:
  struct State;
  int n_threads_;
  std::unique_ptr<State> state_;
};

}  // namespace walsh
