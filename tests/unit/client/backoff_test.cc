#include "client/backoff.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(BackoffTest, GrowsToItsCeilingAndStartsAgainAfterSuccess) {
  Backoff backoff({absl::Milliseconds(100), absl::Milliseconds(500), 2.0, 0.0}, 1);
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(100));
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(200));
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(400));
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(500));
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(500));
  backoff.Reset();
  EXPECT_EQ(backoff.Next(), absl::Milliseconds(100));
}

TEST(BackoffTest, JitterStaysWithinItsShareAndDiffersBetweenClients) {
  const Backoff::Options options = {absl::Seconds(1), absl::Seconds(1), 1.0, 0.2};
  Backoff one(options, 1);
  Backoff other(options, 2);
  int n_equal = 0;
  for (int i = 0; i < 1000; ++i) {
    const absl::Duration a = one.Next();
    EXPECT_GE(a, absl::Milliseconds(800));
    EXPECT_LE(a, absl::Milliseconds(1200));
    n_equal += a == other.Next();
  }
  EXPECT_LT(n_equal, 10);
}

}  // namespace
}  // namespace walsh::client
