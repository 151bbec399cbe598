#include "common/periodic_task.h"

#include <utility>

namespace walsh {

PeriodicTask::PeriodicTask(absl::Duration interval, std::function<void()> task)
    : interval_(interval), task_(std::move(task)), thread_([this] { Run(); }) {}

PeriodicTask::~PeriodicTask() {
  {
    const absl::MutexLock lock(&mu_);
    is_stopping_ = true;
  }
  thread_.join();
}

void PeriodicTask::Run() {
  while (true) {
    {
      const absl::MutexLock lock(&mu_);
      if (mu_.AwaitWithTimeout(absl::Condition(&is_stopping_), interval_)) return;
    }
    task_();
  }
}

}  // namespace walsh
