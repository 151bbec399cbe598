// Goal:   what alerts stand on: how old the queue is, when a job last came forward, which jobs a
//         quality gate ended, and series that are there before their first event.
// Method: a queue on a store in memory; counters are the process's, so that tests look at what they
//         add.
#include "server/jobs/job_metrics.h"

#include <memory>
#include <string>

#include "common/metrics.h"
#include "server/jobs/job_queue.h"
#include "server/jobs/sql_job_store.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/server/job_records.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::MetricValue;

constexpr char kJob[] = "job=\"quantizationJobs/a\"";

class JobMetricsTest : public ::testing::Test {
 protected:
  JobMetricsTest() { Restart(&metrics_); }

  void Restart(JobMetrics* metrics) {
    queue_.reset();
    store_.reset();
    ASSERT_OK_AND_ASSIGN(store_, SqlJobStore::OpenSqlite(dir_ / "jobs.db", &clock_));
    ASSERT_OK_AND_ASSIGN(queue_, JobQueue::Open(store_.get(), &clock_, {}, metrics));
  }

  void Submit(const std::string& id) { ASSERT_OK(queue_->Submit(SomeJob(id + "-model"), id, {})); }
  int64_t Acquire() {
    const auto lease = queue_->Acquire("workers/1");
    EXPECT_OK(lease);
    return lease.ok() && lease->has_value() ? (*lease)->token : 0;
  }
  void ReportLayers(int64_t token, int done, int total) {
    Report report{.token = token, .event = {}};
    report.event.set_stage(QuantizationJob::QUANTIZING);
    report.event.mutable_progress()->set_layers_done(done);
    report.event.mutable_progress()->set_layers_total(total);
    ASSERT_OK(queue_->Report("workers/1", "a", report));
  }
  void Fail(int64_t token, absl::StatusCode code, const std::string& reason) {
    jobs::Fail fail{.token = token, .error = {}, .reason = reason};
    fail.error.set_code(static_cast<int>(code));
    ASSERT_OK(queue_->Complete("workers/1", "a", token, fail, nullptr));
  }
  double AgeAfter(absl::Duration duration) {
    clock_.Advance(duration);
    EXPECT_OK(queue_->Tick());
    return MetricValue("walsh_quantization_oldest_queued_job_age_seconds", {});
  }
  double Now() const { return absl::ToDoubleSeconds(clock_.Now() - absl::UnixEpoch()); }

  testing::TempDir dir_;
  ManualClock clock_;
  JobMetrics metrics_;
  std::unique_ptr<SqlJobStore> store_;
  std::unique_ptr<JobQueue> queue_;
};

TEST_F(JobMetricsTest, TheQueueIsAsOldAsTheJobThatHasWaitedLongest) {
  EXPECT_EQ(AgeAfter(absl::Seconds(1)), 0) << "nothing waits";
  Submit("a");
  EXPECT_EQ(AgeAfter(absl::Seconds(20)), 20);
  Submit("b");
  EXPECT_EQ(AgeAfter(absl::Seconds(5)), 25);
  const int64_t token = Acquire();
  EXPECT_EQ(AgeAfter(absl::ZeroDuration()), 5) << "only b waits";
  ASSERT_OK(queue_->Complete("workers/1", "a", token, GiveBack{token}, nullptr));
  EXPECT_EQ(AgeAfter(absl::Seconds(2)), 7) << "a came back after b had waited for 5 s";
}

TEST_F(JobMetricsTest, TheAgeOfTheQueueOutlivesTheCoordinator) {
  Submit("a");
  clock_.Advance(absl::Seconds(30));
  Restart(&metrics_);
  EXPECT_EQ(AgeAfter(absl::Seconds(1)), 31);
}

TEST_F(JobMetricsTest, AWallClockThatIsSetBackMakesNoNegativeAge) {
  Submit("a");
  clock_.JumpWallTime(-absl::Hours(1));
  EXPECT_EQ(AgeAfter(absl::ZeroDuration()), 0);
}

TEST_F(JobMetricsTest, ARunningJobSaysWhenItLastCameForward) {
  constexpr char kTime[] = "walsh_quantization_job_progress_timestamp_seconds";
  Submit("a");
  EXPECT_THAT(metrics::Render(), Not(HasSubstr(kJob))) << "no worker has it";
  const int64_t token = Acquire();
  EXPECT_EQ(MetricValue(kTime, {kJob}), Now());
  EXPECT_THAT(metrics::Render(), Not(HasSubstr("walsh_quantization_layers{")))
      << "how many there are is not known yet";

  clock_.Advance(absl::Seconds(10));
  ReportLayers(token, 3, 30);
  const double reported = Now();
  clock_.Advance(absl::Seconds(10));
  EXPECT_TRUE(queue_->Renew("workers/1", "a", token).is_held);
  EXPECT_EQ(MetricValue(kTime, {kJob}), reported) << "a heartbeat is no progress";
  EXPECT_EQ(MetricValue("walsh_quantization_layers", {kJob}), 30);
  EXPECT_EQ(MetricValue("walsh_quantization_layers_done", {kJob}), 3);

  Fail(token, absl::StatusCode::kInternal, "");
  EXPECT_THAT(metrics::Render(), Not(HasSubstr(kJob))) << "it ended";
}

TEST_F(JobMetricsTest, AJobThatIsFoundRunningIsWatchedToo) {
  Restart(nullptr);  // the process before had other metrics
  Submit("a");
  ReportLayers(Acquire(), 3, 30);
  const double reported = Now();
  clock_.Advance(absl::Seconds(10));
  Restart(&metrics_);
  EXPECT_EQ(MetricValue("walsh_quantization_job_progress_timestamp_seconds", {kJob}), reported);
  EXPECT_EQ(MetricValue("walsh_quantization_layers_done", {kJob}), 3);
}

TEST_F(JobMetricsTest, AQualityGateIsTheOnlyReasonThatCountsAsOne) {
  const auto failures = [] {
    return MetricValue("walsh_quantization_quality_gate_failures_total", {});
  };
  const double before = failures();
  Submit("a");
  Fail(Acquire(), absl::StatusCode::kInternal, "");
  EXPECT_EQ(failures(), before);
  ASSERT_OK(queue_->Delete("a"));
  Submit("a");
  Fail(Acquire(), absl::StatusCode::kFailedPrecondition, "QUALITY_GATE");
  EXPECT_EQ(failures(), before + 1);
}

// increase() of a counter that appears with its first event is 0.
TEST_F(JobMetricsTest, SeriesAreThereBeforeTheirFirstEvent) {
  const std::string text = metrics::Render();
  for (const char* series :
       {"walsh_quantization_jobs_finished_total{method=\"GPTQ\",state=\"FAILED\"}",
        "walsh_quantization_jobs_finished_total{method=\"RTN\",state=\"SUCCEEDED\"}",
        "walsh_quantization_stage_seconds_count{stage=\"EVALUATING\"}",
        "walsh_quantization_quality_gate_failures_total"}) {
    EXPECT_THAT(text, HasSubstr(std::string("\n") + series));
  }
}

}  // namespace
}  // namespace walsh::jobs
