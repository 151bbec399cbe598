// Who holds which job until when. In memory only: the durable part of a lease is the job's worker
// and fencing token.
//
// Time is the monotonic clock's, passed in; a jump of wall time does not move a deadline. A worker
// holds at most one lease, a job has at most one.
//
// Threads: none; the owner locks.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace walsh::jobs {

struct Lease {
  std::string job_id;
  std::string worker;  // "workers/{id}"
  int64_t token = 0;
  absl::Duration deadline;    // on the monotonic clock
  bool is_confirmed = false;  // the worker has used the token, so the answer had reached it
};

class LeaseTable {
 public:
  explicit LeaseTable(absl::Duration duration) : duration_(duration) {}

  // Replaces any lease of the job.
  void Grant(const std::string& job_id, const std::string& worker, int64_t token,
             absl::Duration now);
  // Confirms and prolongs the lease from `now`. False: this worker and token do not hold it (any
  // more); that includes a lease that has expired and was not yet taken.
  bool Renew(const std::string& job_id, const std::string& worker, int64_t token,
             absl::Duration now);
  bool Holds(const std::string& job_id, const std::string& worker, int64_t token,
             absl::Duration now) const;
  std::optional<Lease> OfWorker(const std::string& worker) const;
  void Release(const std::string& job_id) { leases_.erase(job_id); }
  // Removes and returns the leases whose deadline has passed.
  std::vector<Lease> TakeExpired(absl::Duration now);

 private:
  const absl::Duration duration_;
  std::map<std::string, Lease> leases_;  // by job
};

}  // namespace walsh::jobs
