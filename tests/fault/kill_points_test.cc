// Goal:   a process may die at any point where it changes the disk (rows A1, A4, A5 of the fault
//         matrix in docs/reliability.md): what was acknowledged is there afterwards, ids are whose
//         they were, the job ends with the same bytes, and no model is listed that is not whole.
// Method: the real daemons, killed before their n-th call that writes, syncs, renames, creates or
//         removes, or after half of a write, for n = 1, 2, … until a run ends untouched; then
//         started again on what is left.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstdio>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "client/client.h"
#include "common/status_macros.h"
#include "tests/testing/fake_worker.h"
#include "tests/testing/fault_injector.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_job.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;
using ::walsh::testing::FakeWorker;
using ::walsh::testing::FaultAction;
using ::walsh::testing::FaultInjector;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TinyJob;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

// -- The coordinator

// What a client and a worker of a coordinator that may die at any moment were told.
class Customer {
 public:
  explicit Customer(const TinyJob* job) : job_(job) {}

  // Every kind of change of the store. Ends early with the first call that fails.
  absl::Status Live(const ServiceFixture& service) {
    client::Client client({.address = service.endpoint("coordinator", "grpc"), .attempts_max = 1});
    FakeWorker worker(service.endpoint("coordinator", "internal"), "w1");
    WALSH_RETURN_IF_ERROR(Create(client, "a"));
    WALSH_RETURN_IF_ERROR(Create(client, "b"));
    WALSH_RETURN_IF_ERROR(client.CancelJob("b").status());
    told_["b"] = Job::CANCELLED;
    WALSH_RETURN_IF_ERROR(Create(client, "c"));
    WALSH_RETURN_IF_ERROR(worker.Register());
    WALSH_ASSIGN_OR_RETURN(const auto lease, worker.Acquire());
    if (!lease.has_value()) return absl::InternalError("no lease");
    WALSH_RETURN_IF_ERROR(worker.Report(*lease, Job::QUANTIZING, 0.5, "layer 0"));
    WALSH_RETURN_IF_ERROR(worker.Report(*lease, Job::PUBLISHING, 1));
    WALSH_RETURN_IF_ERROR(worker.Succeed(*lease));
    told_["a"] = Job::SUCCEEDED;
    WALSH_RETURN_IF_ERROR(client.SetModelAlias("best", "model-a", /*force=*/true).status());
    is_alias_told_ = true;
    may_be_deleted_ = "b";
    WALSH_RETURN_IF_ERROR(client.DeleteJob("b"));
    told_.erase("b");
    return Create(client, "d");
  }

  // After a restart.
  void Check(client::Client& client) const {
    ASSERT_OK_AND_ASSIGN(const auto list, client.ListJobs("", "", 1000));
    std::map<std::string, Job::State> found;
    for (const Job& job : list.quantization_jobs()) {
      EXPECT_TRUE(found.emplace(job.name(), job.state()).second) << job.name() << " is twice there";
    }
    for (const auto& [id, state] : told_) {
      const auto job = found.find("quantizationJobs/" + id);
      if (job == found.end()) {
        EXPECT_EQ(id, may_be_deleted_) << "lost";
        continue;
      }
      if (state != Job::QUEUED) {
        EXPECT_EQ(job->second, state) << id;
      }
      ASSERT_OK_AND_ASSIGN(const Job again, client.CreateJob(job_->Request(id)));
      EXPECT_EQ(again.name(), job->first) << "the same request is the same job";
    }
    for (const auto& [name, state] : found) {
      EXPECT_TRUE(asked_.contains(name)) << name << " was never asked for";
    }
    // One call at most was under way.
    EXPECT_LE(found.size(), told_.size() + 1);
    if (is_alias_told_) {
      EXPECT_OK(client.SetModelAlias("best", "model-a", /*force=*/true));
    }
  }

  int n_told() const { return static_cast<int>(told_.size()); }

 private:
  absl::Status Create(client::Client& client, const std::string& id) {
    asked_.insert("quantizationJobs/" + id);
    WALSH_RETURN_IF_ERROR(client.CreateJob(job_->Request(id)).status());
    told_[id] = Job::QUEUED;
    return absl::OkStatus();
  }

  const TinyJob* const job_;
  std::map<std::string, Job::State> told_;  // the last state of each job that is certain
  std::set<std::string> asked_;             // names
  std::string may_be_deleted_;              // that a deletion was sent for
  bool is_alias_told_ = false;
};

class CoordinatorKillPointsTest : public ::testing::TestWithParam<FaultAction> {};

TEST_P(CoordinatorKillPointsTest, NothingAcknowledgedIsLost) {
  const uint32_t calls =
      GetParam() == FaultAction::kTear ? testing::kWriteCall : testing::kEveryCall;
  const TinyJob job;
  int n_points = 0;
  int n_told = 0;
  bool is_untouched = false;
  for (int64_t k = 1; !is_untouched; k += testing::FaultStep(11)) {
    SCOPED_TRACE("before call " + std::to_string(k));
    ServiceFixture service;
    FaultInjector faults(service.data_dir() + "/coordinator.db");
    service.set_launch("coordinator", {.environment = faults.environment()});
    faults.Arm({.action = GetParam(), .calls = calls, .first = k});
    absl::Status ended = service.StartCoordinator();
    Customer customer(&job);
    if (ended.ok()) ended = customer.Live(service);
    is_untouched = ended.ok();
    if (!is_untouched) {
      ++n_points;
      ASSERT_EQ(faults.n_faults(), 1) << ended;
      // A coordinator that died within its start has been reaped.
      ASSERT_OK_AND_ASSIGN(const int exit_code,
                           service.WaitForExit("coordinator", absl::Seconds(30)));
      ASSERT_EQ(exit_code, 128 + SIGKILL);
      faults.Disarm();
      ASSERT_OK(service.StartCoordinator());
    }
    faults.Disarm();
    customer.Check(service.client());
    n_told += customer.n_told();
    if (HasFatalFailure()) return;
  }
  std::printf("%d points, %d acknowledged jobs found again\n", n_points, n_told);
  EXPECT_GT(n_points, 5);
}

INSTANTIATE_TEST_SUITE_P(A1, CoordinatorKillPointsTest,
                         ::testing::Values(FaultAction::kKill, FaultAction::kTear),
                         [](const auto& param) {
                           return param.param == FaultAction::kKill ? "BeforeACall"
                                                                    : "WithinAWrite";
                         });

// -- The worker

class WorkerKillPointsTest : public ::testing::TestWithParam<FaultAction> {
 protected:
  testing::ServiceOptions Options() const {
    // A worker that is started again at its address ends its lease at once.
    return {.model_roots = {job_.root()}, .worker_data_dir = dir_ / "worker", .lease_seconds = 60};
  }

  // Its worker's last line about a job comes after its last change of the disk.
  static bool IsOver(const ServiceFixture& service, const Job& job) {
    return service.Log("worker").find("job completed job=" + job.name()) != std::string::npos;
  }
  // What is in a folder of the worker's.
  std::vector<std::string> Names(const std::string& folder) const {
    std::vector<std::string> names;
    for (const auto& entry :
         std::filesystem::directory_iterator(Options().worker_data_dir + "/" + folder)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

  const TinyJob job_;
  const testing::TempDir dir_;
};

TEST_P(WorkerKillPointsTest, TheJobEndsWithTheSameBytes) {
  const uint32_t calls =
      GetParam() == FaultAction::kTear ? testing::kWriteCall : testing::kEveryCall;
  ServiceFixture service(Options());
  FaultInjector faults(Options().worker_data_dir + "/");
  service.set_launch("worker", {.environment = faults.environment()});
  ASSERT_OK(service.Start());
  ASSERT_OK_AND_ASSIGN(const Job undisturbed,
                       service.client().CreateJob(job_.Request("undisturbed")));
  ASSERT_OK_AND_ASSIGN(const Job expected, service.client().WatchJob(undisturbed.name(), 0, {}));
  ASSERT_EQ(expected.state(), Job::SUCCEEDED) << expected.DebugString();
  ASSERT_TRUE(WaitUntil([&] { return IsOver(service, undisturbed); }));

  int n_points = 0;
  bool is_untouched = false;
  for (int64_t k = 1; !is_untouched; k += testing::FaultStep(23)) {
    SCOPED_TRACE("before call " + std::to_string(k));
    faults.Arm({.action = GetParam(), .calls = calls, .first = k});
    ASSERT_OK_AND_ASSIGN(const Job created,
                         service.client().CreateJob(job_.Request("k" + std::to_string(k))));
    ASSERT_TRUE(WaitUntil([&] { return faults.n_faults() != 0 || IsOver(service, created); }));
    is_untouched = faults.n_faults() == 0;
    faults.Disarm();
    if (!is_untouched) {
      ++n_points;
      ASSERT_OK_AND_ASSIGN(const int exit_code, service.WaitForExit("worker", absl::Seconds(30)));
      ASSERT_EQ(exit_code, 128 + SIGKILL);
      ASSERT_OK(service.StartWorker());
    }
    ASSERT_OK_AND_ASSIGN(const Job finished, service.client().WatchJob(created.name(), 0, {}));
    ASSERT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
    EXPECT_EQ(finished.result().sha256(), expected.result().sha256());
    // All that are listed are whole: loading compares every digest.
    ASSERT_OK_AND_ASSIGN(const auto models, service.client().ListModels());
    EXPECT_EQ(models.models_size(), 2);
    ASSERT_OK(service.client().LoadModel(finished.model_name()));
    ASSERT_OK(service.client().DeleteModel(finished.model_name(), /*force=*/true));
  }
  std::printf("%d points\n", n_points);
  EXPECT_GT(n_points, 3);
  // No half of a model is left; a checkpoint may be, until it is old.
  ASSERT_OK(service.StopWorker());
  ASSERT_OK(service.StartWorker());
  EXPECT_THAT(Names("models"), UnorderedElementsAre("model-undisturbed", ".origins"));
  EXPECT_THAT(Names("models/.origins"), SizeIs(1));
}

INSTANTIATE_TEST_SUITE_P(A5, WorkerKillPointsTest,
                         ::testing::Values(FaultAction::kKill, FaultAction::kTear),
                         [](const auto& param) {
                           return param.param == FaultAction::kKill ? "BeforeACall"
                                                                    : "WithinAWrite";
                         });

}  // namespace
}  // namespace walsh
