#include "worker/service/options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>

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

TEST(WorkerOptionsTest, IsOpenToTheNetworkWithoutATokenAndACa) {
  EXPECT_FALSE(IsOpenToTheNetwork({}));
  WorkerOptions options{.host = "0.0.0.0"};
  EXPECT_TRUE(IsOpenToTheNetwork(options));
  options.security.tls.ca = "ca.crt";
  EXPECT_FALSE(IsOpenToTheNetwork(options));
  options.security.tls.ca.clear();
  options.security.worker_token_file = "token";
  EXPECT_FALSE(IsOpenToTheNetwork(options));
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

TEST(WorkerOptionsTest, KvCachesAreLimitedInBytesAndInParts) {
  const auto parse = [](const std::string& flags) -> std::optional<WorkerOptions> {
    CLI::App app;
    WorkerOptions options;
    AddWorkerFlags(app, options);
    try {
      app.parse(flags);
    } catch (const CLI::ParseError&) {
      return std::nullopt;
    }
    return options;
  };
  EXPECT_EQ(parse("")->kv_cache_memory_bytes, 0u);
  EXPECT_EQ(parse("")->kv_cache_free_memory_fraction, 0.9);
  EXPECT_EQ(parse("--kv-cache-memory-bytes 1048576")->kv_cache_memory_bytes, 1u << 20);
  EXPECT_EQ(parse("--kv-cache-memory-bytes 4GiB")->kv_cache_memory_bytes, uint64_t{4} << 30);
  EXPECT_EQ(parse("--kv-cache-memory-bytes 500MB")->kv_cache_memory_bytes, 500'000'000u);
  EXPECT_EQ(parse("--kv-cache-free-memory-fraction 0.95")->kv_cache_free_memory_fraction, 0.95);
  EXPECT_EQ(parse("--kv-cache-free-memory-fraction 0.4")->kv_cache_free_memory_fraction, 0.4);
  for (const char* bad : {"--kv-cache-memory-bytes -1", "--kv-cache-memory-bytes much",
                          "--kv-cache-memory-bytes 9000PB", "--kv-cache-free-memory-fraction 0",
                          "--kv-cache-free-memory-fraction 0.96"}) {
    EXPECT_FALSE(parse(bad).has_value()) << bad;
  }
  EXPECT_THAT(
      CheckWorkerOptions({.kv_cache_free_memory_fraction = std::nan("")}),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--kv-cache-free-memory-fraction")));
}

TEST(WorkerOptionsTest, TheKvCacheIsOfAKnownType) {
  EXPECT_EQ(WorkerOptions().kv_cache_dtype, "auto");
  for (const char* dtype : {"auto", "bf16", "int8", "int4"}) {
    EXPECT_OK(CheckWorkerOptions({.kv_cache_dtype = dtype}));
  }
  EXPECT_THAT(CheckWorkerOptions({.kv_cache_dtype = "fp8"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--kv-cache-dtype 'fp8'")));
}

TEST(WorkerOptionsTest, StepsHoldWhatFlagsSayOrTheDeviceSuits) {
  const auto limits = [](int n_sequences, int n_tokens, bool on_cuda) {
    const StepLimits l =
        StepLimitsOf({.max_num_seqs = n_sequences, .max_num_batched_tokens = n_tokens}, on_cuda);
    return std::pair(l.max_sequences, l.max_batch_tokens);
  };
  EXPECT_EQ(limits(0, 0, false), std::pair(16, 512));
  EXPECT_EQ(limits(0, 0, true), std::pair(64, 2048));
  EXPECT_EQ(limits(3, 0, true), std::pair(3, 2048));
  EXPECT_EQ(limits(1000, 0, false), std::pair(1000, 1000)) << "each has its token";
  EXPECT_EQ(limits(0, 100, true), std::pair(64, 100));
  EXPECT_EQ(limits(0, 10, true), std::pair(10, 10)) << "or no model would load";
  EXPECT_EQ(limits(5, 10, false), std::pair(5, 10));
}

}  // namespace
}  // namespace walsh::service
