#include "worker/kernels/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/check.h"

namespace walsh {
namespace {

// About 50 µs: longer than the serial steps between two parallel ones of a decoding pass, shorter
// than what a descheduled thread would notice.
constexpr int kSpins = 2000;

// The gate is one 32-bit word, since that is what a futex compares: a job's number, whether it
// still admits threads, and how many workers joined it.
constexpr uint32_t kJoinedMask = 0xfff;
constexpr uint32_t kOpen = 0x1000;
constexpr uint32_t kJobStep = 0x2000;
constexpr int kThreadsMax = 1024;
static_assert(kThreadsMax < static_cast<int>(kJoinedMask));

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Returns once `word` differs from `old`.
template <typename T>
void WaitForChange(const std::atomic<T>& word, T old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  word.wait(old, std::memory_order_acquire);
}

// The CPUs that a cgroup's quota amounts to, rounded up; 0 when there is no limit.
int CgroupCpus() {
  double quota_us = 0;
  double period_us = 0;
  std::string first;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> first >> period_us) {
    if (first == "max") return 0;
    std::istringstream(first) >> quota_us;
  } else {
    std::ifstream quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    std::ifstream period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(quota >> quota_us) || !(period >> period_us)) return 0;
  }
  if (quota_us <= 0 || period_us <= 0) return 0;
  return std::max(1, static_cast<int>((quota_us + period_us - 1) / period_us));
}

}  // namespace

// A job is admitted to while its gate is open. The caller takes tiles like everybody else, closes
// the gate when none is left and waits for those who joined: a worker that the system has not
// scheduled yet is never waited for.
struct ThreadPool::State {
  std::mutex calls;
  std::atomic<uint32_t> gate{0};
  std::atomic<uint32_t> finished{0};  // workers that joined the current job and left it
  std::atomic<int64_t> next{0};
  int64_t n_tiles = 0;
  const std::function<void(int64_t)>* tile = nullptr;
  std::atomic<bool> stop{false};
  std::mutex failure_mutex;
  std::exception_ptr failure;  // the first of the current job
  std::vector<std::thread> workers;

  // Lets nothing out: on a worker it would end the process, and on the caller it would unwind what
  // workers still use.
  void RunTiles() noexcept {
    try {
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n_tiles;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        (*tile)(i);
      }
    } catch (...) {
      next.store(n_tiles, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  }

  void Work() {
    uint32_t seen = 0;  // the job last looked at, without its count
    for (;;) {
      uint32_t word = gate.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_acquire)) return;
      if ((word & kOpen) == 0 || (word & ~kJoinedMask) == seen) {
        WaitForChange(gate, word);
        continue;
      }
      if (!gate.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
      seen = word & ~kJoinedMask;
      RunTiles();
      finished.fetch_add(1, std::memory_order_acq_rel);
      finished.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int n_threads)
    : n_threads_(std::clamp(n_threads, 1, kThreadsMax)), state_(std::make_unique<State>()) {
  for (int i = 1; i < n_threads_; ++i) {
    state_->workers.emplace_back([state = state_.get()] { state->Work(); });
  }
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true, std::memory_order_release);
  state_->gate.fetch_add(kJobStep, std::memory_order_acq_rel);
  state_->gate.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

void ThreadPool::ParallelFor(int64_t n_tiles, const std::function<void(int64_t)>& tile) {
  if (n_tiles <= 0) return;
  if (n_threads_ == 1 || n_tiles == 1) {
    for (int64_t i = 0; i < n_tiles; ++i) tile(i);
    return;
  }
  State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.calls);
  state.n_tiles = n_tiles;
  state.tile = &tile;
  state.next.store(0, std::memory_order_relaxed);
  state.finished.store(0, std::memory_order_relaxed);
  const uint32_t last = state.gate.load(std::memory_order_relaxed) & ~(kJoinedMask | kOpen);
  state.gate.store((last + kJobStep) | kOpen, std::memory_order_release);
  state.gate.notify_all();

  state.RunTiles();

  const uint32_t joined = state.gate.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoinedMask;
  for (uint32_t done = state.finished.load(std::memory_order_acquire); done != joined;
       done = state.finished.load(std::memory_order_acquire)) {
    WaitForChange(state.finished, done);
  }
  if (state.failure != nullptr) {
    std::rethrow_exception(std::exchange(state.failure, std::exception_ptr()));
  }
}

int ThreadPool::HardwareThreads() {
  int n = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) n = CPU_COUNT(&set);
  if (const int granted = CgroupCpus(); granted > 0) n = std::min(n, granted);
  return std::clamp(n, 1, kThreadsMax);
}

}  // namespace walsh
