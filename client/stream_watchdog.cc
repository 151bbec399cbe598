#include "client/stream_watchdog.h"

namespace walsh::client {

StreamWatchdog::StreamWatchdog(grpc::ClientContext* context, absl::Duration silence_max)
    : context_(context), silence_max_(silence_max), thread_([this] { Run(); }) {}

StreamWatchdog::~StreamWatchdog() {
  {
    absl::MutexLock lock(&mu_);
    done_ = true;
  }
  thread_.join();
}

void StreamWatchdog::Feed() {
  absl::MutexLock lock(&mu_);
  fed_ = true;
}

bool StreamWatchdog::barked() const {
  absl::MutexLock lock(&mu_);
  return barked_;
}

void StreamWatchdog::Run() {
  absl::MutexLock lock(&mu_);
  const auto fed_or_done = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return fed_ || done_; };
  while (mu_.AwaitWithTimeout(absl::Condition(&fed_or_done), silence_max_)) {
    if (done_) return;
    fed_ = false;
  }
  barked_ = true;
  context_->TryCancel();
}

}  // namespace walsh::client
