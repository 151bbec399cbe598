#include "server/jobs/lease_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace walsh::jobs {
namespace {

constexpr absl::Duration kLease = absl::Seconds(30);

TEST(LeaseTableTest, LivesUntilTheDeadlineAndNotAtIt) {
  LeaseTable leases(kLease);
  leases.Grant("a", "workers/w", 1, absl::ZeroDuration());
  const absl::Duration just_before = kLease - absl::Nanoseconds(1);
  EXPECT_TRUE(leases.Holds("a", "workers/w", 1, just_before));
  EXPECT_FALSE(leases.Holds("a", "workers/w", 1, kLease));
  EXPECT_TRUE(leases.TakeExpired(just_before).empty());
  EXPECT_EQ(leases.TakeExpired(kLease).size(), 1u);
  EXPECT_TRUE(leases.TakeExpired(kLease).empty()) << "taken once";
}

TEST(LeaseTableTest, ExpiredLeaseCannotBeRenewed) {
  LeaseTable leases(kLease);
  leases.Grant("a", "workers/w", 1, absl::ZeroDuration());
  EXPECT_FALSE(leases.Renew("a", "workers/w", 1, kLease));
}

TEST(LeaseTableTest, RenewalCountsFromItsOwnTime) {
  LeaseTable leases(kLease);
  leases.Grant("a", "workers/w", 1, absl::ZeroDuration());
  EXPECT_FALSE(leases.OfWorker("workers/w")->is_confirmed);
  EXPECT_TRUE(leases.Renew("a", "workers/w", 1, absl::Seconds(29)));
  EXPECT_TRUE(leases.OfWorker("workers/w")->is_confirmed);
  EXPECT_TRUE(leases.Holds("a", "workers/w", 1, absl::Seconds(58)));
  EXPECT_FALSE(leases.Holds("a", "workers/w", 1, absl::Seconds(59)));
}

TEST(LeaseTableTest, OnlyTheHolderWithTheTokenHolds) {
  LeaseTable leases(kLease);
  leases.Grant("a", "workers/w", 2, absl::ZeroDuration());
  EXPECT_FALSE(leases.Renew("a", "workers/w", 1, absl::ZeroDuration()));
  EXPECT_FALSE(leases.Renew("a", "workers/v", 2, absl::ZeroDuration()));
  EXPECT_FALSE(leases.Renew("b", "workers/w", 2, absl::ZeroDuration()));
  leases.Grant("a", "workers/v", 3, absl::ZeroDuration());
  EXPECT_FALSE(leases.Holds("a", "workers/w", 2, absl::ZeroDuration()));
  EXPECT_FALSE(leases.OfWorker("workers/w").has_value());
  leases.Release("a");
  EXPECT_FALSE(leases.Holds("a", "workers/v", 3, absl::ZeroDuration()));
}

}  // namespace
}  // namespace walsh::jobs
