#include "server/jobs/job_queue.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "common/tenant_limit.h"
#include "server/jobs/sql_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/faulty_disk.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::FaultyDisk;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

constexpr absl::Duration kLease = absl::Seconds(30);
constexpr auto kAborted = absl::StatusCode::kAborted;
constexpr auto kNotFound = absl::StatusCode::kNotFound;

class JobQueueTest : public ::testing::Test {
 protected:
  JobQueueTest() { Restart(); }

  // As after kill -9: nothing but the file is kept.
  void Restart() {
    queue_.reset();
    store_.reset();
    absl::StatusOr<std::unique_ptr<SqlJobStore>> store =
        SqlJobStore::OpenSqlite(dir_ / "jobs.db", &clock_);
    ASSERT_OK(store);
    store_ = *std::move(store);
    absl::StatusOr<std::unique_ptr<JobQueue>> queue =
        JobQueue::Open(store_.get(), &clock_, options_, &metrics_);
    ASSERT_OK(queue);
    queue_ = *std::move(queue);
  }

  std::string Submit(const std::string& id) {
    const absl::StatusOr<QuantizationJob> job = queue_->Submit(SomeJob(id + "-model"), id, {});
    EXPECT_OK(job);
    return id;
  }
  // The id and token of the job that `worker` gets, or "".
  std::pair<std::string, int64_t> Acquire(const std::string& worker) {
    auto lease = queue_->Acquire(worker);
    EXPECT_OK(lease);
    if (!lease.ok() || !lease->has_value()) return {"", 0};
    return {(*lease)->job.name().substr(17), (*lease)->token};
  }
  QuantizationJob::State State(const std::string& id) { return queue_->Get(id)->state(); }
  void Wait(absl::Duration duration) {
    clock_.Advance(duration);
    EXPECT_OK(queue_->Tick());
  }
  static Report Progress(int64_t token, QuantizationJob::Stage stage, double fraction) {
    Report report{.token = token, .event = {}};
    report.event.set_stage(stage);
    report.event.mutable_progress()->set_fraction(fraction);
    return report;
  }
  // `worker` acquires `id` and refuses it.
  void Refuse(const std::string& worker, const std::string& id) {
    const auto [acquired, token] = Acquire(worker);
    ASSERT_EQ(acquired, id);
    jobs::Refuse refuse{.token = token, .error = {}, .reason = "INSUFFICIENT_MEMORY"};
    refuse.error.set_code(static_cast<int>(absl::StatusCode::kFailedPrecondition));
    refuse.error.set_message(worker + " has 80 bytes");
    EXPECT_OK(queue_->Complete(worker, id, token, refuse, nullptr));
  }
  absl::Status Succeeded(const std::string& worker, const std::string& id, int64_t token) {
    v1::Model model;
    model.set_name("models/" + id + "-model");
    return queue_->Complete(worker, id, token, Succeed{token, {}}, &model);
  }

  testing::TempDir dir_;
  ManualClock clock_;
  JobQueue::Options options_;
  JobMetrics metrics_;
  std::unique_ptr<SqlJobStore> store_;
  std::unique_ptr<JobQueue> queue_;
};

// A store whose changes are seen by readers before its caller hears of them, or never does, as a
// database's are: what was stored is said by `tell`.
class TellingStore : public JobStore {
 public:
  TellingStore(JobStore* store, std::function<absl::Status()> tell)
      : store_(store), tell_(std::move(tell)) {}
  absl::Status Insert(const JobRecord& record, const QuantizationJobEvent& event,
                      const RequestKey& key) override {
    WALSH_RETURN_IF_ERROR(store_->Insert(record, event, key));
    return tell_();
  }
  absl::Status CheckNamesAreFree(const std::string& id, const std::string& model) const override {
    return store_->CheckNamesAreFree(id, model);
  }
  absl::Status Update(const JobRecord& record, const QuantizationJobEvent& event,
                      const v1::Model* model) override {
    WALSH_RETURN_IF_ERROR(store_->Update(record, event, model));
    return tell_();
  }
  absl::Status Delete(const std::string& id) override { return store_->Delete(id); }
  absl::StatusOr<JobRecord> Get(const std::string& id) const override { return store_->Get(id); }
  absl::StatusOr<std::vector<JobRecord>> Live() const override { return store_->Live(); }
  absl::StatusOr<JobPage> List(const JobQuery& query) const override { return store_->List(query); }
  absl::StatusOr<std::vector<QuantizationJobEvent>> Events(const std::string& id, int64_t after,
                                                           int n_max) const override {
    return store_->Events(id, after, n_max);
  }
  absl::StatusOr<std::optional<StoredRequest>> FindRequest(
      const std::string& request_id) const override {
    return store_->FindRequest(request_id);
  }
  absl::Status PutModel(const v1::Model& model) override { return store_->PutModel(model); }
  absl::Status DeleteModel(const std::string& id) override { return store_->DeleteModel(id); }
  absl::StatusOr<std::vector<v1::Model>> Models() const override { return store_->Models(); }
  absl::Status PutAlias(const v1::ModelAlias& alias) override { return store_->PutAlias(alias); }
  absl::Status DeleteAlias(const std::string& id) override { return store_->DeleteAlias(id); }
  absl::StatusOr<std::vector<v1::ModelAlias>> Aliases() const override { return store_->Aliases(); }

 private:
  JobStore* const store_;
  const std::function<absl::Status()> tell_;
};

// A watcher asks for what comes after the last event that it was given, whenever that was.
TEST_F(JobQueueTest, EventsAreReadOnlyOnceTheQueueHasThem) {
  int n_reads = 0;
  std::unique_ptr<JobQueue> queue;
  TellingStore store(store_.get(), [&]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const auto batch, queue->ReadEvents("a", 0));
    if (!batch.events.empty()) {
      EXPECT_OK(queue->ReadEvents("a", batch.events.back().sequence()));
      ++n_reads;
    }
    return absl::OkStatus();
  });
  auto opened = JobQueue::Open(&store, &clock_, options_, nullptr);
  ASSERT_OK(opened);
  queue = *std::move(opened);
  ASSERT_OK(queue->Submit(SomeJob("a-model"), "a", {}));
  ASSERT_OK(queue->Acquire("workers/1"));
  EXPECT_EQ(n_reads, 2);
  const auto batch = queue->ReadEvents("a", 0);
  ASSERT_OK(batch);
  EXPECT_EQ(batch->events.size(), 2u);
}

TEST_F(JobQueueTest, OldestFirstAndOneLeaseEach) {
  Submit("a");
  Submit("b");
  EXPECT_EQ(Acquire("workers/1"), (std::pair<std::string, int64_t>("a", 1)));
  EXPECT_EQ(Acquire("workers/2"), (std::pair<std::string, int64_t>("b", 1)));
  EXPECT_EQ(Acquire("workers/3").first, "");
  EXPECT_EQ(queue_->Get("a")->worker(), "workers/1");
  EXPECT_EQ(queue_->Get("a")->attempt(), 1);
}

TEST_F(JobQueueTest, ExpiredLeaseGoesBackWithAHigherToken) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held);
  Wait(kLease - absl::Milliseconds(1));
  EXPECT_EQ(State("a"), QuantizationJob::RUNNING);
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held);
  Wait(kLease);
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  EXPECT_FALSE(queue_->Renew("workers/1", id, token).is_held);
  const auto [again, higher] = Acquire("workers/2");
  EXPECT_EQ(again, "a");
  EXPECT_GT(higher, token);
  EXPECT_THAT(queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, 0.1)),
              HasCode(kAborted));
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kAborted));
  EXPECT_OK(Succeeded("workers/2", id, higher));
  EXPECT_EQ(State("a"), QuantizationJob::SUCCEEDED);
}

TEST_F(JobQueueTest, LeaseIsLostAtItsDeadlineAlsoBeforeTick) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  clock_.Advance(kLease);
  EXPECT_FALSE(queue_->Renew("workers/1", id, token).is_held);
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kAborted));
}

TEST_F(JobQueueTest, WallClockJumpsMoveNoLease) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  clock_.JumpWallTime(absl::Hours(1));
  Wait(absl::Seconds(1));
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held);
  clock_.JumpWallTime(-absl::Hours(2));
  Wait(kLease - absl::Seconds(1));
  EXPECT_EQ(State("a"), QuantizationJob::RUNNING);
  Wait(absl::Seconds(1));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
}

TEST_F(JobQueueTest, CompletionIsIdempotentAlsoAcrossARestart) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  EXPECT_OK(Succeeded("workers/1", id, token));
  EXPECT_OK(Succeeded("workers/1", id, token));
  Restart();
  EXPECT_OK(Succeeded("workers/1", id, token));
  ASSERT_OK_AND_ASSIGN(const JobQueue::EventBatch batch, queue_->ReadEvents("a", 0));
  EXPECT_EQ(batch.events.size(), 3u) << "queued, started, succeeded: once each";
  EXPECT_TRUE(batch.is_final);
  ASSERT_OK_AND_ASSIGN(const auto models, store_->Models());
  EXPECT_EQ(models.size(), 1u);
}

TEST_F(JobQueueTest, RunningJobKeepsItsLeaseAcrossARestart) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  clock_.Advance(kLease - absl::Seconds(1));
  Restart();
  clock_.Advance(kLease - absl::Seconds(1));
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held) << "a fresh, full lease time";
  EXPECT_OK(Succeeded("workers/1", id, token));
  EXPECT_EQ(queue_->Get("a")->attempt(), 1) << "nothing was repeated";
}

TEST_F(JobQueueTest, RunningJobOfAVanishedWorkerIsQueuedAfterARestart) {
  Submit("a");
  Acquire("workers/1");
  Restart();
  EXPECT_EQ(Acquire("workers/2").first, "");
  Wait(kLease);
  EXPECT_EQ(Acquire("workers/2"), (std::pair<std::string, int64_t>("a", 2)));
}

TEST_F(JobQueueTest, CancelBeforeWhileAndAfter) {
  Submit("a");
  EXPECT_OK(queue_->Cancel("a"));
  EXPECT_EQ(State("a"), QuantizationJob::CANCELLED);
  EXPECT_OK(queue_->Cancel("a"));
  EXPECT_EQ(Acquire("workers/1").first, "");

  Submit("b");
  const auto [id, token] = Acquire("workers/1");
  EXPECT_FALSE(queue_->Renew("workers/1", id, token).is_cancelled);
  EXPECT_OK(queue_->Cancel("b"));
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_cancelled);
  EXPECT_THAT(queue_->Report("workers/1", id, Progress(token, QuantizationJob::PUBLISHING, 0.9)),
              HasCode(absl::StatusCode::kFailedPrecondition));
  Restart();
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_cancelled);
  EXPECT_OK(queue_->Complete("workers/1", id, token, AcknowledgeCancel{token}, nullptr));
  EXPECT_EQ(State("b"), QuantizationJob::CANCELLED);

  Submit("c");
  const auto [c, c_token] = Acquire("workers/1");
  EXPECT_OK(Succeeded("workers/1", c, c_token));
  EXPECT_THAT(queue_->Cancel("c"), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(queue_->Cancel("missing"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(JobQueueTest, CancellingJobOfAVanishedWorkerIsCancelled) {
  Submit("a");
  Acquire("workers/1");
  EXPECT_OK(queue_->Cancel("a"));
  Wait(kLease);
  EXPECT_EQ(State("a"), QuantizationJob::CANCELLED);
}

TEST_F(JobQueueTest, FailureThatMayPassWaitsItsPause) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  Fail fail{.token = token, .error = {}, .reason = "", .jitter = 0};
  fail.error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_OK(queue_->Complete("workers/1", id, token, fail, nullptr));
  Submit("b");
  EXPECT_EQ(Acquire("workers/1").first, "b") << "a paused job holds up no other";
  Wait(absl::Seconds(9));
  EXPECT_EQ(Acquire("workers/2").first, "");
  int n_woken = 0;
  queue_->work_subscriptions().Add("w", [&] { ++n_woken; });
  Wait(absl::Seconds(1));
  EXPECT_EQ(n_woken, 1);
  EXPECT_EQ(Acquire("workers/2").first, "a");
}

TEST_F(JobQueueTest, PauseSurvivesARestartAndWallClockJumps) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  Fail fail{.token = token, .error = {}, .reason = "", .jitter = 0};
  fail.error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_OK(queue_->Complete("workers/1", id, token, fail, nullptr));
  clock_.Advance(absl::Seconds(4));
  Restart();
  EXPECT_EQ(Acquire("workers/1").first, "");
  clock_.JumpWallTime(-absl::Hours(24));
  Restart();
  Wait(absl::Minutes(8));
  EXPECT_EQ(Acquire("workers/1").first, "a") << "no pause is longer than the longest";
}

TEST_F(JobQueueTest, GoodbyeReturnsTheLeaseWithoutACrash) {
  for (int i = 0; i < 10; ++i) {
    if (i == 0) Submit("a");
    EXPECT_EQ(Acquire("workers/1").first, "a");
    EXPECT_OK(queue_->ReturnLease("workers/1"));
    EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  }
  EXPECT_OK(queue_->ReturnLease("workers/none"));
}

TEST_F(JobQueueTest, JobThatKillsItsWorkersIsPoisoned) {
  Submit("a");
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(Acquire("workers/" + std::to_string(i)).first, "a") << i;
    Wait(kLease);
  }
  EXPECT_EQ(State("a"), QuantizationJob::FAILED);
  EXPECT_EQ(queue_->Get("a")->error_reason(), "POISONED");
  EXPECT_EQ(Acquire("workers/4").first, "");
}

TEST_F(JobQueueTest, CrashesAreCountedAcrossRestarts) {
  Submit("a");
  for (int i = 1; i <= 3; ++i) {
    EXPECT_EQ(Acquire("workers/" + std::to_string(i)).first, "a") << i;
    Restart();
    EXPECT_OK(queue_->LoseLease("workers/" + std::to_string(i)));
  }
  EXPECT_EQ(queue_->Get("a")->error_reason(), "POISONED");
}

TEST_F(JobQueueTest, AskingAgainDropsTheLeaseThatIsHeld) {
  Submit("a");
  // The answers were lost: no crash, however often.
  for (int i = 1; i <= 9; ++i) {
    EXPECT_EQ(Acquire("workers/1"), (std::pair<std::string, int64_t>("a", i)));
  }
  // The worker knew of it and dropped it: that counts, and ends.
  for (int i = 10; i <= 14; ++i) {
    queue_->Renew("workers/1", "a", i - 1);
    Acquire("workers/1");
  }
  EXPECT_EQ(queue_->Get("a")->error_reason(), "POISONED");
}

// A worker that was without a coordinator for longer than its lease drops its job; so it does when
// the coordinator died between granting and answering.
TEST_F(JobQueueTest, AskingAgainAfterARestartIsNoCrash) {
  Submit("a");
  for (int i = 1; i <= 9; ++i) {
    const auto [id, token] = Acquire("workers/" + std::to_string(i % 2));
    ASSERT_EQ(id, "a");
    EXPECT_TRUE(queue_->Renew("workers/" + std::to_string(i % 2), id, token).is_held);
    Restart();
    // It asks again, gets the job as a new attempt, and gives it back.
    const auto [again, higher] = Acquire("workers/" + std::to_string(i % 2));
    ASSERT_EQ(again, "a");
    EXPECT_GT(higher, token);
    EXPECT_OK(queue_->ReturnLease("workers/" + std::to_string(i % 2)));
  }
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  // One that has told since the restart that it has the job, and then drops it, did crash.
  const auto [id, token] = Acquire("workers/1");
  Restart();
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held);
  for (int i = 1; i <= 5; ++i) {
    const auto [again, next] = Acquire("workers/1");
    queue_->Renew("workers/1", again, next);
  }
  EXPECT_EQ(queue_->Get("a")->error_reason(), "POISONED");
}

TEST_F(JobQueueTest, DeleteNeedsATerminalJob) {
  Submit("a");
  EXPECT_THAT(queue_->Delete("a"), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_OK(queue_->Cancel("a"));
  EXPECT_OK(queue_->Delete("a"));
  EXPECT_THAT(queue_->Get("a"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(queue_->Delete("a"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(JobQueueTest, CompletingADeletedJobIsStale) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  EXPECT_OK(Succeeded("workers/1", id, token));
  EXPECT_OK(queue_->Delete("a"));
  // NOT_FOUND would tell the worker to register again.
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kAborted));
}

TEST_F(JobQueueTest, FullQueueRefusesAtOnce) {
  options_.queued_jobs_max = 2;
  Restart();
  Submit("a");
  Submit("b");
  const absl::Status full = queue_->Submit(SomeJob("c-model"), "c", {}).status();
  EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("2")));
  EXPECT_EQ(ErrorReason(full), "QUEUE_FULL");
  Acquire("workers/1");
  EXPECT_OK(queue_->Submit(SomeJob("c-model"), "c", {}));
}

// -- Tenants

TEST_F(JobQueueTest, ATenantsJobsAreNotThereForAnother) {
  ASSERT_OK(queue_->Submit(SomeJob("m"), "a", {}, {.tenant = "one"}));
  ASSERT_OK(queue_->Submit(SomeJob("n"), "b", {}, {.tenant = "two"}));
  Submit("c");  // made without a key
  for (const bool is_restarted : {false, true}) {
    if (is_restarted) Restart();
    EXPECT_OK(queue_->Get("a", "one"));
    EXPECT_OK(queue_->Get("a")) << "the service itself sees all";
    for (const char* id : {"a", "c", "no-such-job"}) {
      EXPECT_THAT(
          queue_->Get(id, "two"),
          StatusIs(kNotFound, absl::StrCat("job 'quantizationJobs/", id, "' does not exist")));
      EXPECT_THAT(queue_->Cancel(id, "two"), HasCode(kNotFound));
      EXPECT_THAT(queue_->Delete(id, "two"), HasCode(kNotFound));
      EXPECT_THAT(queue_->ReadEvents(id, 0, "two"), HasCode(kNotFound));
    }
    JobQuery query{.tenant = "two", .page_size = 10};
    ASSERT_OK_AND_ASSIGN(const JobPage page, queue_->List(query));
    EXPECT_EQ(page.total_size, 1);
    ASSERT_EQ(page.jobs.size(), 1u);
    EXPECT_EQ(page.jobs[0].job.name(), "quantizationJobs/b");
  }
  EXPECT_OK(queue_->Cancel("a", "one"));
  EXPECT_THAT(queue_->Get("a", "two"), HasCode(kNotFound)) << "of ended jobs, too";
}

TEST_F(JobQueueTest, TenantsHaveRequestIdsOfTheirOwn) {
  const RequestKey one{.request_id = "r", .body_sha256 = "x", .tenant = "one"};
  const RequestKey two{.request_id = "r", .body_sha256 = "y", .tenant = "two"};
  ASSERT_OK(queue_->Submit(SomeJob("m"), "a", one, {.tenant = "one"}));
  EXPECT_EQ(*queue_->FindSubmitted(two), std::nullopt);
  ASSERT_OK_AND_ASSIGN(const QuantizationJob other,
                       queue_->Submit(SomeJob("n"), "b", two, {.tenant = "two"}));
  EXPECT_EQ(other.name(), "quantizationJobs/b");
  EXPECT_EQ(other.request_id(), "r");
  ASSERT_OK_AND_ASSIGN(const auto again, queue_->FindSubmitted(one));
  EXPECT_EQ(again->name(), "quantizationJobs/a");
}

// Row F5 of the fault matrix.
TEST_F(JobQueueTest, AHundredJobsAtOnceNeverExceedATenantsLimit) {
  const JobOwner owner{.tenant = "one", .live_jobs_max = 7};
  std::atomic<int> n_taken = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 100; ++i) {
    threads.emplace_back([&, i] {
      const absl::Status status =
          queue_->Submit(SomeJob(absl::StrCat("m", i)), absl::StrCat("j", i), {}, owner).status();
      if (status.ok()) return void(++n_taken);
      absl::Status full = TenantLimitReached("7 jobs that have not ended", 7);
      SetRetryDelay(full, absl::Seconds(10));
      EXPECT_EQ(status, full) << "in the words of a tenant's other limits";
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(n_taken, 7);
  EXPECT_OK(queue_->Submit(SomeJob("m"), "other", {}, {.tenant = "two", .live_jobs_max = 1}));
  // A job that has ended makes room.
  const auto [id, token] = Acquire("workers/1");
  EXPECT_OK(queue_->Cancel(id));
  EXPECT_OK(queue_->Complete("workers/1", id, token, AcknowledgeCancel{token}, nullptr));
  EXPECT_OK(queue_->Submit(SomeJob("next"), "next", {}, owner));
}

// -- Refusals

TEST_F(JobQueueTest, ARefusedJobIsOfferedToOthersAndNeverAgainToTheSame) {
  Submit("a");
  Submit("b");
  int n_woken = 0;
  queue_->work_subscriptions().Add("w", [&] { ++n_woken; });
  Refuse("workers/1", "a");
  EXPECT_EQ(n_woken, 1) << "somebody else may have it at once";
  const auto [b, b_token] = Acquire("workers/1");
  EXPECT_EQ(b, "b") << "a refused job holds up no other";
  EXPECT_OK(Succeeded("workers/1", b, b_token));
  const size_t n_events = queue_->ReadEvents("a", 0)->events.size();
  Wait(absl::Milliseconds(250));
  n_woken = 0;
  for (int i = 0; i < 1000; ++i) {
    Wait(absl::Milliseconds(250));
    EXPECT_EQ(Acquire("workers/1").first, "");
  }
  EXPECT_EQ(n_woken, 0) << "the job waits for another worker and disturbs none";
  EXPECT_EQ(queue_->ReadEvents("a", 0)->events.size(), n_events) << "nothing goes round";
  const auto [id, token] = Acquire("workers/2");
  EXPECT_EQ(id, "a");
  EXPECT_OK(Succeeded("workers/2", id, token));
  EXPECT_EQ(State("a"), QuantizationJob::SUCCEEDED);
}

TEST_F(JobQueueTest, ARefusalIsFencedAndIdempotent) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  jobs::Refuse refuse{.token = token, .error = {}, .reason = ""};
  refuse.error.set_code(static_cast<int>(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(queue_->Complete("workers/2", id, token, refuse, nullptr), HasCode(kAborted));
  EXPECT_OK(queue_->Complete("workers/1", id, token, refuse, nullptr));
  EXPECT_OK(queue_->Complete("workers/1", id, token, refuse, nullptr)) << "its answer was lost";
  const auto [again, higher] = Acquire("workers/2");
  EXPECT_EQ(again, "a");
  EXPECT_GT(higher, token);
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(absl::StatusCode::kOk))
      << "a repeated completion changes nothing";
  EXPECT_EQ(State("a"), QuantizationJob::RUNNING);
}

TEST_F(JobQueueTest, AJobFailsOnceEveryWorkerHasRefusedIt) {
  Submit("a");
  Refuse("workers/1", "a");
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1", "workers/2"}));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED) << "workers/2 is busy, but there";
  Refuse("workers/2", "a");
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1", "workers/2"}));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, queue_->Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(job.error_reason(), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(job.error().message(),
            "no worker can run the job: workers/1: workers/1 has 80 bytes; workers/2: workers/2 "
            "has 80 bytes");
  EXPECT_EQ(Acquire("workers/3").first, "");
}

// Its worker's device broke, say: the worker has left, and may be back by then.
TEST_F(JobQueueTest, AJobThatIsToBeTriedAgainDoesNotFailBeforeItIsDue) {
  Submit("a");
  Refuse("workers/1", "a");
  const auto [id, token] = Acquire("workers/2");
  Fail fail{.token = token, .error = {}, .reason = "DEVICE_BROKEN", .jitter = 0};
  fail.error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_OK(queue_->Complete("workers/2", id, token, fail, nullptr));
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1"}));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  Wait(absl::Seconds(9));
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1"}));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  Wait(absl::Seconds(1));
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1", "workers/3"}));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED) << "workers/3 is new";
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1"}));
  EXPECT_EQ(State("a"), QuantizationJob::FAILED) << "nobody came";
}

TEST_F(JobQueueTest, OnlyQueuedJobsFailForWantOfAWorker) {
  Submit("a");
  Refuse("workers/1", "a");
  const auto [id, token] = Acquire("workers/2");
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1"}));  // workers/2 drains
  EXPECT_EQ(State("a"), QuantizationJob::RUNNING);
  EXPECT_OK(Succeeded("workers/2", id, token));
}

TEST_F(JobQueueTest, WithoutAnyWorkerARefusedJobWaitsForTheNext) {
  Submit("a");
  Refuse("workers/1", "a");
  EXPECT_OK(queue_->FailRefusedByAll({}));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  EXPECT_EQ(Acquire("workers/1").first, "a") << "one that comes back is asked again";
}

TEST_F(JobQueueTest, RefusalsCountNeitherAsRetriesNorAsCrashes) {
  Submit("a");
  for (int i = 0; i < 3 * limits::kJobRetriesMax; ++i) {
    Refuse("workers/" + std::to_string(i), "a");
  }
  const auto [id, token] = Acquire("workers/good");
  Fail fail{.token = token, .error = {}, .reason = "", .jitter = 0};
  fail.error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_OK(queue_->Complete("workers/good", id, token, fail, nullptr));
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  Wait(absl::Seconds(10));
  EXPECT_EQ(Acquire("workers/good").first, "a");
}

TEST_F(JobQueueTest, RefusalsThatARestartForgetsAreMadeAgain) {
  Submit("a");
  Refuse("workers/1", "a");
  Restart();
  EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1", "workers/2"}));
  Refuse("workers/1", "a");
  EXPECT_EQ(Acquire("workers/1").first, "");
  EXPECT_EQ(Acquire("workers/2").first, "a");
}

TEST_F(JobQueueTest, ARefusedJobThatTheDiskDoesNotLetFailFailsLater) {
  Submit("a");
  Refuse("workers/1", "a");
  {
    FaultyDisk disk;
    disk.FailWrites(ENOSPC);
    EXPECT_THAT(queue_->FailRefusedByAll({"workers/1"}),
                HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_EQ(State("a"), QuantizationJob::QUEUED);
  }
  EXPECT_OK(queue_->FailRefusedByAll({"workers/1"}));
  EXPECT_EQ(State("a"), QuantizationJob::FAILED);
}

TEST_F(JobQueueTest, ACancelledJobThatIsRefusedIsCancelled) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  EXPECT_OK(queue_->Cancel("a"));
  jobs::Refuse refuse{.token = token, .error = {}, .reason = ""};
  refuse.error.set_code(static_cast<int>(absl::StatusCode::kUnimplemented));
  EXPECT_OK(queue_->Complete("workers/1", id, token, refuse, nullptr));
  EXPECT_EQ(State("a"), QuantizationJob::CANCELLED);
}

// -- Idempotency

TEST_F(JobQueueTest, RepeatedRequestGivesTheSameJob) {
  const RequestKey key = {.request_id = "r", .body_sha256 = "h"};
  ASSERT_OK_AND_ASSIGN(const QuantizationJob first, queue_->Submit(SomeJob("m"), "", key));
  ASSERT_OK_AND_ASSIGN(QuantizationJob again, queue_->Submit(SomeJob("m"), "", key));
  EXPECT_EQ(again.name(), first.name());
  Restart();
  ASSERT_OK_AND_ASSIGN(again, queue_->Submit(SomeJob("m"), "", key));
  EXPECT_EQ(again.name(), first.name());
  EXPECT_EQ(again.request_id(), "r");
  const absl::Status other =
      queue_->Submit(SomeJob("m2"), "", {.request_id = "r", .body_sha256 = "other"}).status();
  EXPECT_THAT(other, HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_EQ(ErrorReason(other), "REQUEST_ID_REUSED");
  clock_.Advance(absl::Hours(24 * 8));
  EXPECT_OK(queue_->Submit(SomeJob("m2"), "", {.request_id = "r", .body_sha256 = "other"}));
}

TEST_F(JobQueueTest, RepeatedRequestDoesNotGiveALaterJobOfTheSameId) {
  const RequestKey key = {.request_id = "r1", .body_sha256 = "h1"};
  ASSERT_OK(queue_->Submit(SomeJob("m"), "a", key));
  ASSERT_OK(queue_->Cancel("a"));
  ASSERT_OK(queue_->Delete("a"));
  const absl::Status deleted = queue_->Submit(SomeJob("m"), "a", key).status();
  EXPECT_THAT(deleted, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("deleted since")));
  ASSERT_OK(queue_->Submit(SomeJob("m2"), "a", {.request_id = "r2", .body_sha256 = "h2"}));
  EXPECT_EQ(queue_->Submit(SomeJob("m"), "a", key).status(), deleted);
  EXPECT_EQ(ErrorReason(deleted), "REQUEST_ID_REUSED");
}

TEST_F(JobQueueTest, RepeatedRequestDoesNotGiveAnotherTenantsJobOfTheSameId) {
  const RequestKey key = {.request_id = "r1", .body_sha256 = "h1", .tenant = "a"};
  ASSERT_OK(queue_->Submit(SomeJob("m"), "nightly", key, {.tenant = "a"}));
  ASSERT_OK(queue_->Cancel("nightly"));
  ASSERT_OK(queue_->Delete("nightly"));
  ASSERT_OK(queue_->Submit(SomeJob("m"), "nightly",
                           {.request_id = "r1", .body_sha256 = "h2", .tenant = "b"},
                           {.tenant = "b"}));
  EXPECT_THAT(queue_->Submit(SomeJob("m"), "nightly", key, {.tenant = "a"}).status(),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("deleted since")));
}

TEST_F(JobQueueTest, HundredParallelDuplicatesGiveOneJob) {
  constexpr int kThreads = 100;
  std::vector<std::string> names(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const auto job = queue_->Submit(SomeJob("m"), "", {.request_id = "same", .body_sha256 = "h"});
      names[i] = job.ok() ? job->name() : std::string(job.status().message());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(std::set<std::string>(names.begin(), names.end()).size(), 1u);
  EXPECT_EQ(queue_->List({.page_size = 10})->total_size, 1);
}

// -- Events and progress

TEST_F(JobQueueTest, EventsAreGaplessAndEndWithTheJob) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  for (int i = 0; i < 400; ++i) {
    Report report = Progress(token, QuantizationJob::QUANTIZING, i / 400.0);
    report.event.set_message("layer " + std::to_string(i));
    ASSERT_OK(queue_->Report("workers/1", id, report));
  }
  EXPECT_OK(Succeeded("workers/1", id, token));
  int64_t next = 1;
  while (true) {
    ASSERT_OK_AND_ASSIGN(const JobQueue::EventBatch batch, queue_->ReadEvents("a", next - 1));
    for (const QuantizationJobEvent& event : batch.events) EXPECT_EQ(event.sequence(), next++);
    if (batch.is_final) break;
    ASSERT_FALSE(batch.events.empty());
  }
  EXPECT_EQ(next, 404);
  ASSERT_OK_AND_ASSIGN(const JobQueue::EventBatch rest, queue_->ReadEvents("a", next - 1));
  EXPECT_TRUE(rest.events.empty() && rest.is_final);
  EXPECT_THAT(queue_->ReadEvents("a", next), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(queue_->ReadEvents("a", -1), HasCode(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(queue_->ReadEvents("b", 0), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(JobQueueTest, PureProgressIsStoredTwiceASecondAndVisibleAtOnce) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  ASSERT_OK(queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, 0)));
  const size_t n_before = queue_->ReadEvents("a", 0)->events.size();
  for (int i = 1; i <= 100; ++i) {  // one second, a report each 10 ms
    Wait(absl::Milliseconds(10));
    ASSERT_OK(
        queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, i / 200.0)));
    EXPECT_EQ(queue_->Get("a")->progress().fraction(), i / 200.0);
  }
  EXPECT_LE(queue_->ReadEvents("a", 0)->events.size(), n_before + 2);
  // What was held back is stored when the worker falls silent.
  ASSERT_OK(queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, 0.75)));
  Wait(absl::Seconds(1));
  EXPECT_EQ(queue_->ReadEvents("a", 0)->events.back().progress().fraction(), 0.75);
  Restart();
  EXPECT_EQ(queue_->Get("a")->progress().fraction(), 0.75);
}

TEST_F(JobQueueTest, ProgressDuringACancellationDoesNotShowTheJobRunningAgain) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  ASSERT_OK(queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, 0.1)));
  FaultyDisk disk;
  bool is_reported = false;
  disk.OnNextSync([&, token = token] {
    is_reported = true;
    EXPECT_OK(queue_->Report("workers/1", "a", Progress(token, QuantizationJob::LOADING, 0.5)));
  });
  ASSERT_OK(queue_->Cancel("a"));
  ASSERT_TRUE(is_reported);
  Wait(absl::Seconds(1));
  const std::vector<QuantizationJobEvent> events = queue_->ReadEvents("a", 0)->events;
  EXPECT_EQ(events.back().progress().fraction(), 0.5) << "kept, and stored later";
  EXPECT_EQ(events.back().state(), QuantizationJob::CANCELLING);
}

TEST_F(JobQueueTest, StagesAndLayersAreAlwaysStored) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  const size_t n_before = queue_->ReadEvents("a", 0)->events.size();
  for (const auto stage : {QuantizationJob::LOADING, QuantizationJob::ROTATING,
                           QuantizationJob::CALIBRATING, QuantizationJob::QUANTIZING}) {
    ASSERT_OK(queue_->Report("workers/1", id, Progress(token, stage, 0.1)));
  }
  Report layer = Progress(token, QuantizationJob::QUANTIZING, 0.1);
  layer.event.mutable_progress()->set_layers_total(2);
  layer.event.mutable_progress()->set_layers_done(1);
  ASSERT_OK(queue_->Report("workers/1", id, layer));
  layer.event.add_linears()->set_name("layers.0.mlp.up_proj");
  ASSERT_OK(queue_->Report("workers/1", id, layer));
  EXPECT_EQ(queue_->ReadEvents("a", 0)->events.size(), n_before + 6);
}

// So that whoever hears of it finds the model.
TEST_F(JobQueueTest, WhoCompletesIsToldOnceAndBeforeSubscribers) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  std::vector<std::string> told;
  const Subscriptions::Id subscription =
      queue_->event_subscriptions().Add("a", [&] { told.push_back("subscriber"); });
  v1::Model model;
  model.set_name("models/a-model");
  const auto complete = [&, id = id, token = token] {
    return queue_->Complete("workers/1", id, token, Succeed{token, {}}, &model, [&] {
      EXPECT_EQ(State("a"), QuantizationJob::RUNNING) << "nobody knows yet";
      told.push_back("worker");
    });
  };
  EXPECT_OK(complete());
  EXPECT_OK(complete()) << "a repeated completion";
  EXPECT_EQ(told, (std::vector<std::string>{"worker", "subscriber"}));
  queue_->event_subscriptions().Remove(subscription);
}

TEST_F(JobQueueTest, SubscribersHearOfTheirJobOnly) {
  Submit("a");
  Submit("b");
  std::atomic<int> n_a{0};
  const Subscriptions::Id id = queue_->event_subscriptions().Add("a", [&] { ++n_a; });
  Acquire("workers/1");
  EXPECT_EQ(n_a, 1);
  Acquire("workers/2");
  EXPECT_EQ(n_a, 1);
  queue_->event_subscriptions().Remove(id);
  EXPECT_OK(queue_->Cancel("a"));
  EXPECT_EQ(n_a, 1);
  EXPECT_EQ(queue_->event_subscriptions().size(), 0);
}

// -- The disk

TEST_F(JobQueueTest, FullDiskRefusesJobsKeepsLeasesAndRecovers) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  {
    FaultyDisk disk;
    disk.FailWrites(ENOSPC);
    EXPECT_THAT(queue_->Submit(SomeJob("b-model"), "b", {}),
                HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_OK(queue_->Get("a"));
    EXPECT_OK(queue_->List({.page_size = 10}));
    EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_held);
    EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_EQ(State("a"), QuantizationJob::RUNNING) << "what is not stored did not happen";
    // A lease that expires now is lost although that cannot be stored yet.
    clock_.Advance(kLease);
    EXPECT_THAT(queue_->Tick(), HasCode(absl::StatusCode::kResourceExhausted));
    EXPECT_FALSE(queue_->Renew("workers/1", id, token).is_held);
    EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kAborted));
    EXPECT_EQ(Acquire("workers/2").first, "");
  }
  EXPECT_OK(queue_->Tick());
  EXPECT_EQ(Acquire("workers/2"), (std::pair<std::string, int64_t>("a", 2)));
  EXPECT_OK(queue_->Submit(SomeJob("b-model"), "b", {}));
}

// A disk that fails while a transaction ends: it was stored, and nobody was told.
class JobQueueInDoubtTest : public JobQueueTest {
 protected:
  JobQueueInDoubtTest() : store_in_doubt_(store_.get(), [this] { return Tell(); }) {
    absl::StatusOr<std::unique_ptr<JobQueue>> queue =
        JobQueue::Open(&store_in_doubt_, &clock_, options_, &metrics_);
    EXPECT_OK(queue);
    queue_ = *std::move(queue);
  }
  absl::Status Tell() const {
    return fails_ ? absl::UnavailableError("the disk failed") : absl::OkStatus();
  }

  bool fails_ = false;
  TellingStore store_in_doubt_;
};

constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

TEST_F(JobQueueInDoubtTest, AJobThatWasStoredNonethelessIsRun) {
  const RequestKey key = {.request_id = "r", .body_sha256 = "b"};
  fails_ = true;
  EXPECT_THAT(queue_->Submit(SomeJob("m"), "a", key), HasCode(kUnavailable));
  fails_ = false;
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, queue_->Submit(SomeJob("m"), "b", key));
  EXPECT_EQ(job.name(), "quantizationJobs/a");
  EXPECT_OK(queue_->Tick());
  EXPECT_EQ(Acquire("workers/1").first, "a");
}

TEST_F(JobQueueInDoubtTest, AGrantThatWasStoredNonethelessIsNoOthers) {
  Submit("a");
  fails_ = true;
  EXPECT_THAT(queue_->Acquire("workers/1"), HasCode(kUnavailable));
  fails_ = false;
  EXPECT_EQ(Acquire("workers/2").first, "");
  // Its worker never heard of it, and has not crashed.
  EXPECT_EQ(Acquire("workers/1"), (std::pair<std::string, int64_t>("a", 2)));
  EXPECT_EQ(store_->Get("a")->crashes, 0);
}

TEST_F(JobQueueInDoubtTest, ACompletionThatWasStoredNonethelessIsRepeated) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  fails_ = true;
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kUnavailable));
  fails_ = false;
  EXPECT_OK(Succeeded("workers/1", id, token));
  EXPECT_EQ(State(id), QuantizationJob::SUCCEEDED);
  EXPECT_EQ(queue_->n_live(), 0);
}

TEST_F(JobQueueInDoubtTest, ACompletionThatWasStoredIsRepeatedAfterItsLease) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  fails_ = true;
  EXPECT_THAT(Succeeded("workers/1", id, token), HasCode(kUnavailable));
  fails_ = false;
  clock_.Advance(kLease);
  EXPECT_OK(Succeeded("workers/1", id, token));
}

TEST_F(JobQueueInDoubtTest, ALostLeaseThatWasStoredNonethelessIsLostOnce) {
  Submit("a");
  Acquire("workers/1");
  clock_.Advance(kLease);
  fails_ = true;
  EXPECT_THAT(queue_->Tick(), HasCode(kUnavailable));
  fails_ = false;
  EXPECT_OK(queue_->Tick());
  EXPECT_EQ(Acquire("workers/2"), (std::pair<std::string, int64_t>("a", 2)));
  EXPECT_OK(queue_->Tick());
  EXPECT_TRUE(queue_->Renew("workers/2", "a", 2).is_held);
  EXPECT_EQ(store_->Get("a")->crashes, 1);
}

TEST_F(JobQueueInDoubtTest, ReportsAndCancellationsGoOnBehindWhatWasStored) {
  Submit("a");
  const auto [id, token] = Acquire("workers/1");
  fails_ = true;
  EXPECT_THAT(queue_->Report("workers/1", id, Progress(token, QuantizationJob::LOADING, 0.1)),
              HasCode(kUnavailable));
  fails_ = false;
  EXPECT_OK(queue_->Report("workers/1", id, Progress(token, QuantizationJob::ROTATING, 0.2)));
  fails_ = true;
  EXPECT_THAT(queue_->Cancel(id), HasCode(kUnavailable));
  fails_ = false;
  EXPECT_OK(queue_->Tick());
  EXPECT_TRUE(queue_->Renew("workers/1", id, token).is_cancelled);
  EXPECT_OK(queue_->Complete("workers/1", id, token, AcknowledgeCancel{token}, nullptr));
  ASSERT_OK_AND_ASSIGN(const JobQueue::EventBatch batch, queue_->ReadEvents(id, 0));
  EXPECT_TRUE(batch.is_final);
}

// -- Everything at once

// Random operations of clients and workers, lost answers, vanished workers and restarts, on a seed.
// Checked throughout: no acknowledged job is lost, terminal states are final, tokens only grow, one
// holder at a time; and at the end, with faults over, every job becomes terminal.
TEST_F(JobQueueTest, RandomHistoriesKeepTheInvariants) {
  const char* fixed = std::getenv("WALSH_SEED");
  const uint64_t first = fixed == nullptr ? 1 : std::strtoull(fixed, nullptr, 10);
  const uint64_t n_seeds = fixed == nullptr ? 20 : 1;
  for (uint64_t seed = first; seed < first + n_seeds; ++seed) {
    SCOPED_TRACE("WALSH_SEED=" + std::to_string(seed));
    std::mt19937_64 random(seed);
    const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
    struct Held {
      std::string id;
      int64_t token;
    };
    std::map<std::string, Held> held;  // what each worker believes to hold
    std::map<std::string, QuantizationJob::State> known;
    std::map<std::string, int64_t> tokens;
    std::map<std::string, int> n_succeeded;
    std::set<std::pair<std::string, std::string>> refused;  // since the last restart
    const std::string prefix = "s" + std::to_string(seed) + "-";
    for (int step = 0; step < 300; ++step) {
      const std::string worker = "workers/" + std::to_string(pick(3));
      switch (pick(13)) {
        case 0: {
          const std::string id = prefix + std::to_string(step);
          if (queue_->Submit(SomeJob(id + "-model"), id, {}).ok()) {
            known[id] = QuantizationJob::QUEUED;
          }
          break;
        }
        case 1:
        case 2:
        case 3: {
          const auto [id, token] = Acquire(worker);
          held.erase(worker);
          if (id.empty()) break;
          EXPECT_FALSE(refused.contains({worker, id}));
          EXPECT_GT(token, tokens[id]);
          tokens[id] = token;
          if (pick(8) != 0) held[worker] = {id, token};  // else: the answer was lost
          break;
        }
        case 4:
        case 5:
          if (held.contains(worker)) {
            const Held h = held[worker];
            const bool is_held = queue_->Renew(worker, h.id, h.token).is_held;
            EXPECT_TRUE(!is_held || tokens[h.id] == h.token);
            if (!is_held) held.erase(worker);
          }
          break;
        case 6:
          if (held.contains(worker)) {
            const Held h = held[worker];
            queue_->Report(worker, h.id, Progress(h.token, QuantizationJob::QUANTIZING, 0.5))
                .IgnoreError();
          }
          break;
        case 7:
          if (held.contains(worker)) {
            const Held h = held[worker];
            Fail fail{.token = h.token, .error = {}, .reason = "R", .jitter = 0};
            fail.error.set_code(pick(2) == 0 ? 14 : 3);
            const bool refuses = pick(4) == 0;
            const bool succeeds = !refuses && pick(2) == 0;
            const JobEvent failure =
                refuses ? JobEvent(jobs::Refuse{h.token, fail.error, "R"}) : JobEvent(fail);
            const absl::Status status =
                succeeds ? Succeeded(worker, h.id, h.token)
                         : queue_->Complete(worker, h.id, h.token, failure, nullptr);
            if (status.ok() && refuses) refused.insert({worker, h.id});
            if (status.ok()) {
              EXPECT_EQ(tokens[h.id], h.token);
            }
            if (status.ok() && succeeds) {
              EXPECT_EQ(++n_succeeded[h.id], 1);
            }
            held.erase(worker);
          }
          break;
        case 8:
          if (!known.empty()) {
            queue_->Cancel(std::next(known.begin(), pick(static_cast<int>(known.size())))->first)
                .IgnoreError();
          }
          break;
        case 9:
          held.erase(worker);  // kill -9
          break;
        case 10:
          if (pick(4) != 0) break;
          Restart();
          refused.clear();
          break;
        case 11:
          EXPECT_OK(queue_->FailRefusedByAll({"workers/0", "workers/1", "workers/2"}));
          break;
        default:
          Wait(absl::Seconds(pick(12)));
      }
      for (auto& [id, state] : known) {
        const absl::StatusOr<QuantizationJob> job = queue_->Get(id);
        ASSERT_OK(job) << id << " was acknowledged";
        if (IsTerminal(state)) {
          EXPECT_EQ(job->state(), state) << id;
        }
        state = job->state();
      }
    }
    // Faults are over: one healthy worker that finishes what it gets.
    for (int i = 0; i < 2000; ++i) {
      Wait(absl::Seconds(10));
      const auto [id, token] = Acquire("workers/healthy");
      if (!id.empty()) {
        EXPECT_OK(Succeeded("workers/healthy", id, token));
      }
    }
    for (const auto& [id, state] : known) EXPECT_TRUE(IsTerminal(State(id))) << id;
    if (HasFailure()) return;
  }
}

// Many threads on one queue, for ThreadSanitizer: clients submit, cancel, list and follow while
// workers run what they get.
TEST_F(JobQueueTest, ThreadsTogether) {
  constexpr int kJobs = 24;
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (int w = 0; w < 3; ++w) {
    threads.emplace_back([&, worker = "workers/" + std::to_string(w)] {
      while (!done) {
        const auto [id, token] = Acquire(worker);
        if (id.empty()) continue;
        queue_->Renew(worker, id, token);
        queue_->Report(worker, id, Progress(token, QuantizationJob::LOADING, 0.5)).IgnoreError();
        Succeeded(worker, id, token).IgnoreError();
      }
    });
  }
  threads.emplace_back([&] {
    while (!done) EXPECT_OK(queue_->Tick());
  });
  std::atomic<int> n_notified{0};
  threads.emplace_back([&] {
    while (!done) {
      const auto id = queue_->event_subscriptions().Add("j0", [&] { ++n_notified; });
      EXPECT_OK(queue_->List({.page_size = 10}));
      queue_->event_subscriptions().Remove(id);
    }
  });
  for (int i = 0; i < kJobs; ++i) {
    Submit("j" + std::to_string(i));
    if (i % 5 == 0) queue_->Cancel("j" + std::to_string(i)).IgnoreError();
  }
  for (int i = 0; i < kJobs; ++i) {
    while (!IsTerminal(State("j" + std::to_string(i)))) std::this_thread::yield();
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace walsh::jobs
