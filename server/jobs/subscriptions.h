// Callbacks by key: who wants to hear that a job has a new event, or that there is work.
//
// A callback may be called from any thread until Remove has returned. It must be quick and must not
// call back into this object.
//
// Threads: safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include "absl/synchronization/mutex.h"

namespace walsh::jobs {

class Subscriptions {
 public:
  using Id = std::pair<std::string, int64_t>;

  Id Add(const std::string& key, std::function<void()> callback);
  void Remove(const Id& id);
  void Notify(const std::string& key) const;
  void NotifyAll() const;
  int size() const;

 private:
  mutable absl::Mutex mu_;
  int64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<Id, std::function<void()>> callbacks_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh::jobs
