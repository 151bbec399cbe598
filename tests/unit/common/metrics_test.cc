#include "common/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "common/version.h"

namespace walsh::metrics {
namespace {

using ::testing::HasSubstr;

TEST(MetricsTest, RendersWhatWasRegistered) {
  Counter("walsh_test_total", "Things.").Add({{"code", "OK"}}).Increment(3);
  Gauge("walsh_test_level", "Level.").Add({}).Set(0.5);
  Histogram("walsh_test_seconds", "Time.").Add({}, Buckets{0.1, 1}).Observe(0.5);
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("# HELP walsh_test_total Things.\n# TYPE walsh_test_total counter\n"
                              "walsh_test_total{code=\"OK\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("walsh_test_level 0.5\n"));
  EXPECT_THAT(text, HasSubstr("walsh_test_seconds_bucket{le=\"0.1\"} 0\n"));
  EXPECT_THAT(text, HasSubstr("walsh_test_seconds_bucket{le=\"1\"} 1\n"));
}

TEST(MetricsTest, TheSameNameIsTheSameFamily) {
  EXPECT_EQ(&Counter("walsh_same_total", "Same."), &Counter("walsh_same_total", "Same."));
}

TEST(MetricsTest, BuildInfoNamesVersionAndRevision) {
  RegisterBuildInfo();
  EXPECT_THAT(Render(), HasSubstr("walsh_build_info{cuda=\""));
  EXPECT_THAT(Render(), HasSubstr("version=\"" + std::string(Version()) + "\"} 1\n"));
  EXPECT_FALSE(Revision().empty());
}

TEST(MetricsTest, BucketsRiseBetweenTheStatedEnds) {
  const auto check = [](const Buckets& buckets, double first, double last) {
    EXPECT_EQ(buckets.front(), first);
    EXPECT_EQ(buckets.back(), last);
    EXPECT_TRUE(std::is_sorted(buckets.begin(), buckets.end()));
    EXPECT_EQ(std::adjacent_find(buckets.begin(), buckets.end()), buckets.end());
  };
  check(TimeToFirstTokenBuckets(), 0.001, 2560);
  check(InterTokenLatencyBuckets(), 0.001, 80);
  check(RequestLatencyBuckets(), 0.3, 7680);
  check(TokenCountBuckets(), 1, 1'000'000);
  check(JobDurationBuckets(), 1, 86'400);
}

}  // namespace
}  // namespace walsh::metrics
