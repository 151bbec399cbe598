// Writes an artifact on a thread of its own, beside the device's work on the next layer.
//
// Errors:  the writer's, at the next Push or at Finish
// Threads: used by one thread
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "absl/status/status.h"
#include "common/keep_going.h"
#include "worker/io/artifact.h"

namespace walsh::pipeline::cuda {

class ArtifactQueue {
 public:
  using Write = std::function<absl::Status(ArtifactWriter& writer)>;

  // Some layers of a 70B model at 4 bits; one write more than this waits alone.
  static constexpr int64_t kBytesMax = int64_t{2} << 30;

  // `writer` outlives the queue and is used by nobody else meanwhile. `keep_going` is asked while
  // Push and Finish wait.
  explicit ArtifactQueue(ArtifactWriter& writer, KeepGoing keep_going = {});
  // What has not been written by then is dropped.
  ~ArtifactQueue();
  ArtifactQueue(const ArtifactQueue&) = delete;
  ArtifactQueue& operator=(const ArtifactQueue&) = delete;

  // Queues a write that holds `n_bytes`; waits while too many bytes are queued.
  absl::Status Push(int64_t n_bytes, Write write);
  // Waits for all of them.
  absl::Status Finish();
  // That Push and Finish have waited so far.
  double seconds_waited() const { return seconds_waited_; }

 private:
  struct Entry {
    int64_t n_bytes;
    Write write;
  };
  void Run();
  absl::Status WaitUntil(std::unique_lock<std::mutex>& lock, const std::function<bool()>& is_so);

  ArtifactWriter& writer_;
  const KeepGoing keep_going_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> entries_;  // the front one is being written
  int64_t bytes_ = 0;          // of all entries
  bool is_done_ = false;
  double seconds_waited_ = 0;  // of the caller's thread
  absl::Status status_;        // of the first write that failed; nothing is written after it
  std::thread thread_;
};

}  // namespace walsh::pipeline::cuda
