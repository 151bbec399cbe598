#include "server/jobs/subscriptions.h"

namespace walsh::jobs {

Subscriptions::Id Subscriptions::Add(const std::string& key, std::function<void()> callback) {
  const absl::MutexLock lock(&mu_);
  Id id(key, next_++);
  callbacks_.emplace(id, std::move(callback));
  return id;
}

void Subscriptions::Remove(const Id& id) {
  const absl::MutexLock lock(&mu_);
  callbacks_.erase(id);
}

void Subscriptions::Notify(const std::string& key) const {
  const absl::MutexLock lock(&mu_);
  for (auto it = callbacks_.lower_bound({key, 0}); it != callbacks_.end() && it->first.first == key;
       ++it) {
    it->second();
  }
}

void Subscriptions::NotifyAll() const {
  const absl::MutexLock lock(&mu_);
  for (const auto& [id, callback] : callbacks_) callback();
}

int Subscriptions::size() const {
  const absl::MutexLock lock(&mu_);
  return static_cast<int>(callbacks_.size());
}

}  // namespace walsh::jobs
