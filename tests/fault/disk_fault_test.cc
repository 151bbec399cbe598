// Goal:   a disk that is full, fails or is slow costs no acknowledged job and no lease (rows C1,
// C3,
//         C4 and C6 of the fault matrix in docs/reliability.md), and what is missing is said.
// Method: the real daemons: syncs that fail at the n-th call, writes that find no room, small file
//         systems in memory, syncs that take their time.
#include <gtest/gtest.h>
#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/publish.h"
#include "tests/testing/fault_injector.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_disks.h"
#include "tests/testing/tiny_job.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::walsh::testing::FaultAction;
using ::walsh::testing::FaultInjector;
using ::walsh::testing::HasCode;
using ::walsh::testing::kForEver;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::SmallDisk;
using ::walsh::testing::TinyJob;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

class DiskFaultTest : public ::testing::Test {
 protected:
  testing::ServiceOptions Options() const {
    return {.model_roots = {job_.root()}, .worker_data_dir = dir_ / "worker"};
  }

  // To its end.
  absl::StatusOr<Job> Run(ServiceFixture& service, const std::string& id) const {
    const absl::StatusOr<Job> created = service.client().CreateJob(job_.Request(id));
    if (!created.ok()) return created.status();
    return service.client().WatchJob(created->name(), 0, {});
  }

  static std::set<std::string> JobsOf(ServiceFixture& service) {
    std::set<std::string> names;
    const auto list = service.client().ListJobs("", "", 1000);
    EXPECT_OK(list);
    for (const Job& job : list->quantization_jobs()) names.insert(job.name());
    return names;
  }

  const TinyJob job_{/*n_layers=*/4};
  const testing::TempDir dir_;
};

// C4. Without retries, which would hide a refusal.
TEST_F(DiskFaultTest, NoJobIsAcceptedWithoutACleanSync) {
  int n_points = 0, n_refused = 0;
  const int step = testing::FaultStep(3);
  std::set<std::string> accepted;
  ServiceFixture service;
  FaultInjector faults(service.data_dir() + "/coordinator.db");
  service.set_launch("coordinator", {.environment = faults.environment()});
  ASSERT_OK(service.StartCoordinator());
  // SQLite syncs its log with each commit, and both files when it moves the log into the database.
  for (int64_t k = 1; k <= 24; k += step) {
    SCOPED_TRACE("sync " + std::to_string(k));
    faults.Arm(
        {.action = FaultAction::kError, .calls = testing::kSyncCall, .first = k, .error = EIO});
    client::Client client({.address = service.endpoint("coordinator", "grpc"), .attempts_max = 1});
    for (int i = 0; i < 30 && faults.n_faults() == 0; ++i) {
      const auto created =
          client.CreateJob(job_.Request("k" + std::to_string(k) + "-" + std::to_string(i)));
      if (created.ok()) {
        accepted.insert(created->name());
        // A move of the log that fails costs nothing: it is tried again.
        continue;
      }
      ++n_refused;
      EXPECT_THAT(created, HasCode(absl::StatusCode::kUnavailable));
    }
    n_points += static_cast<int>(faults.n_faults());
    faults.Disarm();
    const auto next = client.CreateJob(job_.Request("after-" + std::to_string(k)));
    ASSERT_OK(next);
    accepted.insert(next->name());
    service.KillCoordinator();
    ASSERT_OK(service.StartCoordinator());
    EXPECT_EQ(JobsOf(service), accepted) << "what was refused is not there";
  }
  std::printf("%d syncs failed, %d jobs refused, %zu accepted and found\n", n_points, n_refused,
              accepted.size());
  EXPECT_GT(n_refused, 3);
}

// C4, of a worker: the job may fail or be tried again, but nothing that was not synced is
// published.
TEST_F(DiskFaultTest, NothingIsPublishedWithoutACleanSync) {
  ServiceFixture service(Options());
  FaultInjector faults(Options().worker_data_dir + "/");
  service.set_launch("worker", {.environment = faults.environment()});
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job expected, Run(service, "undisturbed"));
  ASSERT_EQ(expected.state(), Job::SUCCEEDED) << expected.DebugString();
  int n_points = 0, n_failed = 0;
  for (int64_t k = 1;; k += testing::FaultStep(11)) {
    const std::string id = "k" + std::to_string(k);
    SCOPED_TRACE(id);
    faults.Arm(
        {.action = FaultAction::kError, .calls = testing::kSyncCall, .first = k, .error = EIO});
    ASSERT_OK_AND_ASSIGN(const Job finished, Run(service, id));
    const bool is_untouched = faults.n_faults() == 0;
    faults.Disarm();
    if (is_untouched) break;
    ++n_points;
    const auto model = service.client().GetModel("model-" + id);
    if (finished.state() == Job::SUCCEEDED) {
      EXPECT_EQ(finished.result().sha256(), expected.result().sha256());
      EXPECT_OK(service.client().DeleteModel("model-" + id, /*force=*/true));
    } else {
      ++n_failed;
      EXPECT_EQ(finished.state(), Job::FAILED);
      EXPECT_THAT(finished.error().message(), HasSubstr("syncing"));
      EXPECT_FALSE(model.ok()) << model->DebugString();
    }
  }
  std::printf("%d syncs failed, %d jobs with them\n", n_points, n_failed);
  EXPECT_GT(n_points, 3);
  EXPECT_GT(n_failed, 0);
  ASSERT_OK_AND_ASSIGN(const Job next, Run(service, "next"));
  EXPECT_EQ(next.state(), Job::SUCCEEDED) << next.DebugString();
}

// C3.
TEST_F(DiskFaultTest, AFullJobStoreRefusesReadsAndRecovers) {
  ServiceFixture service;
  FaultInjector faults(service.data_dir() + "/coordinator.db");
  service.set_launch("coordinator", {.environment = faults.environment()});
  ASSERT_OK(service.StartCoordinator());
  ASSERT_OK(service.client().CreateJob(job_.Request("before")));
  faults.Arm({.action = FaultAction::kError,
              .calls = testing::kWriteCall,
              .last = kForEver,
              .error = ENOSPC});
  client::Client client({.address = service.endpoint("coordinator", "grpc"), .attempts_max = 1});
  for (int i = 0; i < 20; ++i) {
    EXPECT_THAT(client.CreateJob(job_.Request("refused-" + std::to_string(i))),
                HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_OK(client.GetJob("before"));
  }
  EXPECT_THAT(client.CancelJob("before"), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_OK(client.CheckHealth("", absl::Seconds(5)));
  faults.Disarm();
  EXPECT_OK(client.CreateJob(job_.Request("after")));
  EXPECT_OK(client.CancelJob("before"));
  service.KillCoordinator();
  ASSERT_OK(service.StartCoordinator());
  EXPECT_EQ(JobsOf(service),
            (std::set<std::string>{"quantizationJobs/before", "quantizationJobs/after"}));
}

// What a job whose worker finds no room told its watcher; it is cancelled then, since it would be
// tried again for as long as an hour.
struct NoRoom {
  v1::QuantizationJob::State state = Job::STATE_UNSPECIFIED;
  std::vector<std::string> messages;
};
absl::StatusOr<NoRoom> WatchUntilItWaits(ServiceFixture& service, const std::string& name) {
  NoRoom no_room;
  client::WatchObserver observer;
  observer.on_event = [&](const v1::QuantizationJobEvent& event) {
    no_room.messages.push_back(event.message());
    if (event.state() != Job::QUEUED || event.attempt() == 0) return;
    EXPECT_OK(service.client().CancelJob(name));
  };
  const absl::StatusOr<Job> finished = service.client().WatchJob(name, 0, observer);
  if (!finished.ok()) return finished.status();
  no_room.state = finished->state();
  return no_room;
}

// C1, with the disk full from the n-th write on: a checkpoint that cannot be kept costs the job
// nothing, an artifact that cannot be written is tried again later.
TEST_F(DiskFaultTest, AWorkerWithoutRoomLeavesNothingBehind) {
  ServiceFixture service(Options());
  FaultInjector faults(Options().worker_data_dir + "/");
  service.set_launch("worker", {.environment = faults.environment()});
  ASSERT_OK(service.Start());
  int n_points = 0, n_waited = 0;
  for (int64_t k = 1;; k += testing::FaultStep(17)) {
    const std::string id = "k" + std::to_string(k);
    SCOPED_TRACE(id);
    faults.Arm({.action = FaultAction::kError,
                .calls = testing::kWriteCall,
                .first = k,
                .last = kForEver,
                .error = ENOSPC});
    ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request(id)));
    ASSERT_OK_AND_ASSIGN(const NoRoom ended, WatchUntilItWaits(service, created.name()));
    const bool is_untouched = faults.n_faults() == 0;
    faults.Disarm();
    if (is_untouched) break;
    ++n_points;
    if (ended.state == Job::SUCCEEDED) {
      EXPECT_OK(service.client().LoadModel("model-" + id));
      EXPECT_OK(service.client().DeleteModel("model-" + id, /*force=*/true));
      continue;
    }
    ++n_waited;
    EXPECT_THAT(ended.messages, Contains(AllOf(HasSubstr("No space left"),
                                               HasSubstr("bytes needed"), HasSubstr("free"))));
    EXPECT_FALSE(service.client().GetModel("model-" + id).ok());
    for (const auto& entry :
         std::filesystem::directory_iterator(Options().worker_data_dir + "/models")) {
      EXPECT_EQ(entry.path().filename(), ".origins");
    }
  }
  std::printf("full from %d writes on, %d jobs waited for room\n", n_points, n_waited);
  EXPECT_GT(n_waited, 0);
  ASSERT_OK_AND_ASSIGN(const Job next, Run(service, "next"));
  EXPECT_EQ(next.state(), Job::SUCCEEDED) << next.DebugString();
}

// C1, with a disk that somebody else fills after the job was accepted.
TEST_F(DiskFaultTest, ADiskThatGetsFullIsFreeAgainAfterwards) {
  if (!SmallDisk::IsPossible()) GTEST_SKIP() << SmallDisk::kNeeds;
  const SmallDisk disk(48 << 20);
  testing::ServiceOptions options = Options();
  options.worker_data_dir = disk.path() + "/worker";
  ServiceFixture service(options);
  ASSERT_OK(service.Start());
  const auto free_bytes = [&] { return FreeBytes(disk.path()).value_or(-1); };
  const int64_t free_before = free_bytes();
  v1::CreateQuantizationJobRequest request = job_.Request("full");
  request.mutable_quantization_job()->mutable_config()->mutable_calibration()->set_num_samples(512);
  ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(request));
  const std::string filler = disk.path() + "/filler";
  std::ofstream(filler) << std::string(static_cast<size_t>(free_before), 'x');
  ASSERT_OK_AND_ASSIGN(const NoRoom ended, WatchUntilItWaits(service, created.name()));
  EXPECT_EQ(ended.state, Job::CANCELLED);
  // By the worker's own comparison, or by a write: the disk may be full before either.
  EXPECT_THAT(ended.messages, Contains(AllOf(HasSubstr("RESOURCE_EXHAUSTED"), HasSubstr("bytes"),
                                             HasSubstr(" free"))));
  std::filesystem::remove(filler);
  EXPECT_TRUE(
      WaitUntil([&] { return free_bytes() >= free_before - (64 << 10); }, absl::Seconds(10)))
      << free_bytes() << " bytes free, " << free_before << " before";
  ASSERT_OK_AND_ASSIGN(const Job next, Run(service, "next"));
  EXPECT_EQ(next.state(), Job::SUCCEEDED) << next.DebugString();
}

// C6, of the coordinator's disk and the worker's.
TEST_F(DiskFaultTest, SlowSyncsCostNoLease) {
  testing::ServiceOptions options = Options();
  options.lease_seconds = 3;
  ServiceFixture service(options);
  FaultInjector store(service.data_dir() + "/coordinator.db");
  FaultInjector artifacts(Options().worker_data_dir + "/");
  service.set_launch("coordinator", {.environment = store.environment()});
  service.set_launch("worker", {.environment = artifacts.environment()});
  ASSERT_OK(service.Start());
  store.Arm({.action = FaultAction::kDelay,
             .calls = testing::kSyncCall,
             .last = kForEver,
             .delay = absl::Milliseconds(500)});
  // One that is longer than the lease.
  artifacts.Arm({.action = FaultAction::kDelay,
                 .calls = testing::kSyncCall,
                 .first = 5,
                 .delay = absl::Seconds(4)});
  ASSERT_OK_AND_ASSIGN(const Job finished, Run(service, "slow"));
  EXPECT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(finished.attempt(), 1);
  EXPECT_EQ(artifacts.n_faults(), 1);
  EXPECT_GT(store.n_faults(), 3);
  EXPECT_EQ(service.Log("coordinator").find("lease expired"), std::string::npos);
}

}  // namespace
}  // namespace walsh
