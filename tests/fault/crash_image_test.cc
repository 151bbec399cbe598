// Goal:   a power cut at any point where a daemon changes its disk loses no acknowledged job (row
// A2
//         of the fault matrix in docs/reliability.md) and leaves an artifact whole or absent (A5).
// Method: the real daemons on an ext4 image, stopped before their n-th change of the disk; a copy
// of
//         the image, in which nothing is that was not written back, is what the power cut leaves.
//         It is mounted, and a daemon started on it.
#include <gtest/gtest.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "client/client.h"
#include "tests/testing/daemon_process.h"
#include "tests/testing/fault_injector.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_disks.h"
#include "tests/testing/tiny_job.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::walsh::testing::CrashDisk;
using ::walsh::testing::DaemonProcess;
using ::walsh::testing::FaultAction;
using ::walsh::testing::FaultInjector;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TinyJob;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

const std::vector<std::string> kFreePorts = {"--grpc-port", "0", "--internal-port", "0",
                                             "--http-port", "0", "--metrics-port",  "0"};

class CrashImageTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!CrashDisk::IsPossible()) GTEST_SKIP() << CrashDisk::kNeeds;
  }

  // Whether a process has stopped: SIGSTOP has reached all its threads.
  static bool IsStopped(pid_t pid) {
    for (const auto& task :
         std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
      std::ifstream stat(task.path() / "stat");
      std::string line;
      std::getline(stat, line);
      const size_t end_of_name = line.rfind(')');
      if (end_of_name == std::string::npos || line[end_of_name + 2] != 'T') return false;
    }
    return true;
  }

  const TinyJob job_;
};

TEST_F(CrashImageTest, A2NoAcknowledgedJobIsLost) {
  const int n_images_max = testing::FaultStep(8) == 1 ? 100 : 8;
  const CrashDisk disk;
  const std::string data_dir = disk.path() + "/data";
  FaultInjector faults(data_dir + "/coordinator.db");
  std::vector<std::string> wrapper = {"/usr/bin/env"};
  for (const auto& [name, value] : faults.environment()) wrapper.push_back(name + "=" + value);
  DaemonProcess coordinator("coordinator", data_dir, kFreePorts, wrapper);
  ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, coordinator.WaitUntilReady());
  std::atomic<bool> is_over = false;
  absl::Mutex mu;
  std::set<std::string> acknowledged;
  std::thread submitting([&] {
    client::Client client({.address = endpoints.at("grpc"), .attempts_max = 1});
    for (int i = 0; !is_over; ++i) {
      const auto created = client.CreateJob(job_.Request("j" + std::to_string(i)));
      if (!created.ok()) break;
      const absl::MutexLock lock(&mu);
      acknowledged.insert(created->name());
    }
  });
  int n_images = 0;
  size_t n_found = 0;
  for (; n_images < n_images_max && !HasFailure(); ++n_images) {
    // So that it is another step of the transaction each time.
    faults.Arm({.action = FaultAction::kStop, .first = 1 + n_images * 7 % 23});
    if (!WaitUntil([&] { return faults.n_faults() != 0 && IsStopped(coordinator.pid()); })) {
      ADD_FAILURE() << "no change of the disk";
      break;
    }
    std::set<std::string> expected;
    {
      const absl::MutexLock lock(&mu);
      expected = acknowledged;
    }
    const CrashDisk after(disk);
    faults.Disarm();
    coordinator.Signal(SIGCONT);
    DaemonProcess recovered("coordinator", after.path() + "/data", kFreePorts);
    const absl::StatusOr<Endpoints> at = recovered.WaitUntilReady();
    EXPECT_OK(at);
    if (!at.ok()) break;
    client::Client client({.address = at->at("grpc")});
    const auto list = client.ListJobs("", "", 100'000);
    EXPECT_OK(list);
    if (!list.ok()) break;
    std::set<std::string> found;
    for (const Job& job : list->quantization_jobs()) found.insert(job.name());
    for (const std::string& name : expected) EXPECT_TRUE(found.contains(name)) << name;
    EXPECT_LE(found.size(), expected.size() + 1) << "one call was under way";
    n_found += expected.size();
  }
  is_over = true;
  submitting.join();
  std::printf("%d images, %zu acknowledged jobs found again\n", n_images, n_found);
}

TEST_F(CrashImageTest, A5AnArtifactIsWholeOrAbsent) {
  const CrashDisk disk;
  testing::ServiceOptions options{.model_roots = {job_.root()},
                                  .worker_data_dir = disk.path() + "/worker",
                                  .lease_seconds = 60};
  ServiceFixture service(options);
  FaultInjector faults(options.worker_data_dir + "/");
  service.set_launch("worker", {.environment = faults.environment()});
  ASSERT_OK(service.Start());
  const auto run = [&](const std::string& id) -> absl::StatusOr<Job> {
    const auto created = service.client().CreateJob(job_.Request(id));
    if (!created.ok()) return created.status();
    return service.client().WatchJob(created->name(), 0, {});
  };
  ASSERT_OK_AND_ASSIGN(const Job expected, run("undisturbed"));
  ASSERT_EQ(expected.state(), Job::SUCCEEDED) << expected.DebugString();
  int n_images = 0, n_whole = 0;
  // Stops before the last changes too: those of the artifact's name and of what comes after it.
  for (int64_t k = 1;; k += testing::FaultStep(31)) {
    const std::string id = "k" + std::to_string(k);
    SCOPED_TRACE(id);
    faults.Arm({.action = FaultAction::kStop, .first = k});
    ASSERT_OK_AND_ASSIGN(const Job created, service.client().CreateJob(job_.Request(id)));
    const auto is_over = [&] {
      return service.Log("worker").find("job completed job=" + created.name()) != std::string::npos;
    };
    ASSERT_TRUE(WaitUntil([&] { return faults.n_faults() != 0 || is_over(); }));
    if (faults.n_faults() == 0) break;
    ASSERT_TRUE(WaitUntil([&] { return IsStopped(service.pid("worker")); }));
    const CrashDisk after(disk);
    faults.Disarm();
    service.SignalWorker(SIGCONT);
    ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
    EXPECT_EQ(finished.state(), Job::SUCCEEDED);
    ASSERT_OK(service.client().DeleteModel(finished.model_name(), /*force=*/true));
    ++n_images;

    // A service of its own on what the power cut left.
    testing::ServiceOptions recovered_options = options;
    recovered_options.worker_data_dir = after.path() + "/worker";
    ServiceFixture recovered(recovered_options);
    ASSERT_OK(recovered.Start());
    // A worker is known a moment before its models are.
    v1::ListModelsResponse models;
    ASSERT_TRUE(WaitUntil([&] {
      models = recovered.client().ListModels().value_or(v1::ListModelsResponse());
      return models.models_size() > 0;
    }));
    for (const v1::Model& model : models.models()) {
      EXPECT_EQ(model.sha256(), expected.result().sha256()) << model.name();
      EXPECT_OK(recovered.client().LoadModel(model.name())) << "compares every digest";
    }
    n_whole += models.models_size() - 1;
  }
  std::printf("%d images, the artifact whole in %d and absent in the others\n", n_images, n_whole);
  EXPECT_GT(n_images, 3);
}

}  // namespace
}  // namespace walsh
