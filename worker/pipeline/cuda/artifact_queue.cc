#include "worker/pipeline/cuda/artifact_queue.h"

#include <chrono>
#include <exception>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/kernels/cuda/wait_timer.h"

namespace walsh::pipeline::cuda {

using kernels::cuda::WaitTimer;

namespace {

constexpr std::chrono::milliseconds kAskInterval(200);

}  // namespace

ArtifactQueue::ArtifactQueue(ArtifactWriter& writer, KeepGoing keep_going)
    : writer_(writer), keep_going_(std::move(keep_going)), thread_([this] { Run(); }) {}

ArtifactQueue::~ArtifactQueue() {
  {
    const std::lock_guard lock(mutex_);
    is_done_ = true;
    // The front one may be running.
    while (entries_.size() > 1) entries_.pop_back();
  }
  changed_.notify_all();
  thread_.join();
}

absl::Status ArtifactQueue::WaitUntil(std::unique_lock<std::mutex>& lock,
                                      const std::function<bool()>& is_so) {
  const auto wait = [&] {
    const WaitTimer timer(&seconds_waited_);
    return changed_.wait_for(lock, kAskInterval, is_so);
  };
  while (!wait()) {
    lock.unlock();
    const absl::Status status = Ask(keep_going_);
    lock.lock();
    if (!status.ok()) return status;
  }
  return status_;
}

absl::Status ArtifactQueue::Push(int64_t n_bytes, Write write) {
  std::unique_lock lock(mutex_);
  if (absl::Status status = WaitUntil(
          lock, [&] { return !status_.ok() || entries_.empty() || bytes_ + n_bytes <= kBytesMax; });
      !status.ok()) {
    return status;
  }
  bytes_ += n_bytes;
  entries_.push_back({n_bytes, std::move(write)});
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status ArtifactQueue::Finish() {
  std::unique_lock lock(mutex_);
  return WaitUntil(lock, [&] { return entries_.empty(); });
}

void ArtifactQueue::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return is_done_ || !entries_.empty(); });
    if (entries_.empty()) return;
    if (status_.ok()) {
      const Write write = std::move(entries_.front().write);
      lock.unlock();
      absl::Status status;
      try {
        status = write(writer_);
      } catch (const std::bad_alloc&) {
        status = absl::ResourceExhaustedError("no memory left to write the artifact");
      } catch (const std::exception& e) {
        // Nothing may leave the thread; what a library throws is ours to mend.
        status = absl::InternalError(absl::StrCat("writing the artifact: ", e.what()));
      }
      lock.lock();
      status_ = std::move(status);
    }
    bytes_ -= entries_.front().n_bytes;
    entries_.pop_front();
    changed_.notify_all();
  }
}

}  // namespace walsh::pipeline::cuda
