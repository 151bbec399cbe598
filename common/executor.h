// A few threads and a bounded queue for what may wait for the disk or takes its time, and timers.
// gRPC's own threads, of which a process has two on a small machine, would hold up all other calls.
//
// Threads: safe. Tasks run in the order of Post on up to `n_threads` threads.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh {

class Executor {
 public:
  struct Options {
    int n_threads = 4;
    // Tasks that wait beyond this are refused at once.
    int tasks_max = 4096;
  };
  explicit Executor(const Options& options);
  ~Executor();  // Stop()
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // False: too much waits, or the executor stops; the task was not taken.
  [[nodiscard]] bool Post(std::function<void()> task);
  // Runs the task in `delay`, however much waits by then. Dropped when the executor stops before.
  void PostAfter(absl::Duration delay, std::function<void()> task);
  // Runs what was posted, drops timers, joins. Not to be called from a task.
  void Stop();

 private:
  void Run();
  // The next task that is due, or null when stopping. Waits for it.
  std::function<void()> Next();

  const Options options_;
  absl::Mutex mu_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  int64_t n_timers_ ABSL_GUARDED_BY(mu_) = 0;
  // By time and order of PostAfter.
  std::map<std::pair<absl::Time, int64_t>, std::function<void()>> timers_ ABSL_GUARDED_BY(mu_);
  absl::CondVar changed_;
  std::vector<std::thread> threads_;
};

}  // namespace walsh
