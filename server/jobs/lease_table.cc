#include "server/jobs/lease_table.h"

#include <utility>

namespace walsh::jobs {

void LeaseTable::Grant(const std::string& job_id, const std::string& worker, int64_t token,
                       absl::Duration now) {
  leases_[job_id] = {.job_id = job_id,
                     .worker = worker,
                     .token = token,
                     .deadline = now + duration_,
                     .is_confirmed = false};
}

bool LeaseTable::Renew(const std::string& job_id, const std::string& worker, int64_t token,
                       absl::Duration now) {
  if (!Holds(job_id, worker, token, now)) return false;
  Lease& lease = leases_[job_id];
  lease.deadline = now + duration_;
  lease.is_confirmed = true;
  return true;
}

bool LeaseTable::Holds(const std::string& job_id, const std::string& worker, int64_t token,
                       absl::Duration now) const {
  const auto it = leases_.find(job_id);
  return it != leases_.end() && it->second.worker == worker && it->second.token == token &&
         now < it->second.deadline;
}

std::optional<Lease> LeaseTable::OfWorker(const std::string& worker) const {
  for (const auto& [job_id, lease] : leases_) {
    if (lease.worker == worker) return lease;
  }
  return std::nullopt;
}

std::vector<Lease> LeaseTable::TakeExpired(absl::Duration now) {
  std::vector<Lease> expired;
  for (auto it = leases_.begin(); it != leases_.end();) {
    if (now < it->second.deadline) {
      ++it;
      continue;
    }
    expired.push_back(std::move(it->second));
    it = leases_.erase(it);
  }
  return expired;
}

}  // namespace walsh::jobs
