#include "worker/service/options.h"

#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using walsh::testing::StatusIs;

TEST(AdvertisedHostTest, IsTheGivenOneElseTheListeningOne) {
  EXPECT_EQ(AdvertisedHost({.coordinator = "far:50052", .host = "10.0.0.7"}).value(), "10.0.0.7");
  EXPECT_EQ(
      AdvertisedHost({.coordinator = "far:50052", .host = "0.0.0.0", .advertise_host = "worker-7"})
          .value(),
      "worker-7");
}

// Two machines that both said 0.0.0.0 would take each other's place at the coordinator.
TEST(AdvertisedHostTest, AllAddressesAreNone) {
  for (const char* host : {"0.0.0.0", "::", "[::]"}) {
    const WorkerOptions far{.coordinator = "far:50052", .host = host};
    EXPECT_THAT(AdvertisedHost(far),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--advertise-host")));
    EXPECT_THAT(CheckWorkerOptions(far),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("far:50052")));
    for (const char* near : {"127.0.0.1:50052", "localhost:50052", "[::1]:50052"}) {
      EXPECT_EQ(AdvertisedHost({.coordinator = near, .host = host}).value(), "127.0.0.1");
    }
  }
}

TEST(WorkerOptionsTest, DevicesAreSpelledInOneWayOnly) {
  for (const char* device : {"auto", "cpu", "cuda", "cuda:1"}) {
    EXPECT_OK(CheckWorkerOptions({.device = device}));
  }
  for (const char* device : {"", "gpu", "cuda:", "cuda:01", "cuda:1,2"}) {
    EXPECT_THAT(CheckWorkerOptions({.device = device}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--device '")));
  }
}

TEST(WorkerOptionsTest, ServingWhileQuantizingIsOneOfThree) {
  EXPECT_EQ(WorkerOptions().serve_while_quantizing, "share");
  for (const char* policy : {"exclusive", "share", "preempt"}) {
    EXPECT_OK(CheckWorkerOptions({.serve_while_quantizing = policy}));
  }
  EXPECT_THAT(
      CheckWorkerOptions({.serve_while_quantizing = "never"}),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--serve-while-quantizing 'never'")));
}

}  // namespace
}  // namespace walsh::service
