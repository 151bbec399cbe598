// Which of several coordinators on one PostgreSQL database leads: that is, has the queue in memory
// and answers the ports. The others stand by.
//
// The table `leadership` has one row: the epoch, which grows with each leader, who that is, and a
// counter that it moves on while it lives. One that has seen the counter stand still for so long
// that no healthy leader would let it takes the next epoch. So what counts is how much time passes
// on one machine, and clocks are never compared. While the database is away nobody sees anything
// and the leader stays what it is.
//
// That a leader was thought dead and is not, because it was stopped or cut off, is harmless to the
// database: each write holds the epoch that its process leads by (HoldEpoch), and a new epoch waits
// for those that are on their way (docs/adr/0025-postgresql-and-one-leader.md).
//
// Errors:  UNAVAILABLE  the database does not answer; (ErrorInfo NOT_LEADER) another leads.
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "server/jobs/sql.h"

namespace walsh::jobs {

class Leadership {
 public:
  // How often one that stands by calls TryToLead and one that leads calls Renew.
  static constexpr absl::Duration kLookInterval = absl::Milliseconds(500);
  static constexpr absl::Duration kRenewInterval = absl::Seconds(2);
  // A counter that stands still for so long is that of a dead leader. Above what PostgreSQL gives
  // the transaction of a process that was stopped (postgres.cc), which holds its epoch.
  static constexpr absl::Duration kDeadAfter = absl::Seconds(7);

  // `uri`: postgres.h. `holder` is for people who read the log. `clock` outlives this.
  static absl::StatusOr<std::unique_ptr<Leadership>> Open(const std::string& uri,
                                                          std::string holder, const Clock* clock);

  // Whether this process leads now. At once when the last leader has resigned or there was none.
  absl::StatusOr<bool> TryToLead();
  // Of this process while it leads.
  int64_t epoch() const { return epoch_; }
  // Who led when it was last looked at; empty: nobody.
  const std::string& leader() const { return leader_; }

  // Of one that leads. Renew tells the others that it lives; NOT_LEADER is for good.
  absl::Status Renew();
  // Lets another lead at once.
  absl::Status Resign();

 private:
  Leadership(std::unique_ptr<Connection> connection, std::string holder, const Clock* clock)
      : connection_(std::move(connection)), holder_(std::move(holder)), clock_(clock) {}
  // Whether an UPDATE of this epoch's row met one.
  absl::StatusOr<bool> UpdateOwn(std::string_view sql);

  const std::unique_ptr<Connection> connection_;
  const std::string holder_;
  const Clock* const clock_;
  int64_t epoch_ = 0;
  std::string leader_;
  // What was seen, and since when it has not changed (monotonic).
  struct Sight {
    int64_t epoch = 0;
    int64_t beats = 0;
    absl::Duration since;
  };
  std::optional<Sight> sight_;
};

// Whether `epoch` is that of the leader. Then it stays so until the transaction ends.
absl::StatusOr<bool> HoldEpoch(Connection* connection, int64_t epoch);
// UNAVAILABLE (NOT_LEADER): what a client may ask the new leader.
absl::Status NotLeader();

}  // namespace walsh::jobs
