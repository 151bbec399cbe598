// Ends streams whose reader takes nothing for too long, so that they do not hold memory for ever.
//
// Threads: safe; one thread of its own.
#pragma once

#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/time/time.h"
#include "worker/service/generation_call.h"

namespace walsh::service {

class StallMonitor {
 public:
  explicit StallMonitor(absl::Duration limit);
  ~StallMonitor();
  void Watch(std::weak_ptr<StreamCall> call);

 private:
  void Loop();

  const absl::Duration limit_;
  std::mutex mu_;
  std::condition_variable stop_;
  bool is_stopping_ = false;
  std::list<std::weak_ptr<StreamCall>> calls_;
  std::thread thread_;
};

}  // namespace walsh::service
