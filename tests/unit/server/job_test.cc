#include "server/jobs/job.h"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "tests/testing/status_matchers.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

const absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);
constexpr int64_t kToken = 7;      // of the current or last lease
constexpr int64_t kCompleted = 5;  // of an earlier, completed one
constexpr int64_t kOld = 4;

JobRecord InState(QuantizationJob::State state) {
  JobRecord record;
  record.job.set_name("quantizationJobs/a");
  record.job.set_state(state);
  record.job.set_attempt(3);
  record.fencing_token = kToken;
  record.completed_token = kCompleted;
  if (IsLeased(state)) record.job.set_worker("workers/w1");
  return record;
}

Report Reported(int64_t token, QuantizationJob::Stage stage) {
  Report report{.token = token, .event = {}};
  report.event.set_stage(stage);
  return report;
}

Fail Failed(int64_t token, absl::StatusCode code) {
  Fail fail{.token = token, .error = {}, .reason = "WHY", .jitter = 0};
  fail.error.set_code(static_cast<int>(code));
  fail.error.set_message("because");
  return fail;
}

Refuse Refused(int64_t token) {
  Refuse refuse{.token = token, .error = {}, .reason = "INSUFFICIENT_MEMORY"};
  refuse.error.set_code(static_cast<int>(absl::StatusCode::kFailedPrecondition));
  refuse.error.set_message("the job needs 100 bytes of memory, the worker has 80");
  return refuse;
}

// The rows of docs/job-states.md: what is applied, and to which record.
struct Case {
  JobEvent event;
  int retries = 0;
  int crashes = 0;
  QuantizationJob::Stage stage = QuantizationJob::STAGE_UNSPECIFIED;
};

std::map<std::string, Case> Cases() {
  const auto forever = absl::StatusCode::kDataLoss;
  const auto passing = absl::StatusCode::kUnavailable;
  return {
      {"Grant", {Grant{"workers/w2"}}},
      {"Report", {Reported(kToken, QuantizationJob::LOADING)}},
      {"Report of PUBLISHING", {Reported(kToken, QuantizationJob::PUBLISHING)}},
      {"Succeed", {Succeed{kToken, {}}}},
      {"Fail for ever", {Failed(kToken, forever)}},
      {"Fail that may pass", {Failed(kToken, passing), limits::kJobRetriesMax - 1}},
      {"Fail that may pass, retries used up", {Failed(kToken, passing), limits::kJobRetriesMax}},
      {"Refuse", {Refused(kToken)}},
      {"RunOutOfWorkers", {RunOutOfWorkers{}}},
      {"AcknowledgeCancel", {AcknowledgeCancel{kToken}}},
      {"GiveBack", {GiveBack{kToken}}},
      {"LoseLease", {LoseLease{}}},
      {"LoseLease, once too often", {LoseLease{}, 0, limits::kJobCrashesMax - 1}},
      {"Cancel", {RequestCancel{}}},
      {"Cancel while PUBLISHING", {RequestCancel{}, 0, 0, QuantizationJob::PUBLISHING}},
      {"Delete", {Delete{}}},
      {"Succeed, repeated", {Succeed{kCompleted, {}}}},
      {"Fail, repeated", {Failed(kCompleted, forever)}},
      {"Refuse, repeated", {Refused(kCompleted)}},
      {"AcknowledgeCancel, repeated", {AcknowledgeCancel{kCompleted}}},
      {"GiveBack, repeated", {GiveBack{kCompleted}}},
      {"Report with an old token", {Reported(kOld, QuantizationJob::LOADING)}},
      {"Succeed with an old token", {Succeed{kOld, {}}}},
      {"Fail with an old token", {Failed(kOld, forever)}},
      {"Refuse with an old token", {Refused(kOld)}},
      {"AcknowledgeCancel with an old token", {AcknowledgeCancel{kOld}}},
      {"GiveBack with an old token", {GiveBack{kOld}}},
  };
}

std::string Outcome(const Case& c, QuantizationJob::State state) {
  JobRecord record = InState(state);
  record.retries = c.retries;
  record.crashes = c.crashes;
  record.job.set_stage(c.stage);
  record.refusals["workers/w3"] = absl::UnimplementedError("head_dim 80");
  const absl::StatusOr<Transition> applied = Apply(record, c.event, kNow);
  if (!applied.ok()) return absl::StatusCodeToString(applied.status().code());
  if (!applied->event.has_value()) {
    EXPECT_EQ(applied->next.job.SerializeAsString(), record.job.SerializeAsString());
    EXPECT_EQ(applied->next.fencing_token, record.fencing_token);
    return "same";
  }
  EXPECT_EQ(applied->event->state(), applied->next.job.state());
  return std::string(StateName(applied->next.job.state()));
}

std::vector<std::string> Cells(const std::string& line) {
  std::vector<std::string> cells = absl::StrSplit(line, '|');
  for (std::string& cell : cells) absl::StripAsciiWhitespace(&cell);
  if (cells.size() < 3) return {};
  return {cells.begin() + 1, cells.end() - 1};
}

// Every pair of state and event, against the page that people read.
TEST(JobTest, EveryPairIsAsInTheDocument) {
  const char* root = std::getenv("WALSH_SOURCE_DIR");
  ASSERT_NE(root, nullptr) << "set by CTest";
  std::ifstream page(std::string(root) + "/docs/job-states.md");
  ASSERT_TRUE(page.good());
  std::map<std::string, Case> cases = Cases();
  std::vector<std::string> states;
  for (std::string line; std::getline(page, line);) {
    const std::vector<std::string> cells = Cells(line);
    if (cells.empty() || cells[0].starts_with("---")) continue;
    if (cells[0] == "Event") {
      states = cells;
      continue;
    }
    const auto it = cases.find(cells[0]);
    ASSERT_NE(it, cases.end()) << "no case for row " << cells[0];
    ASSERT_EQ(cells.size(), states.size()) << cells[0];
    for (size_t i = 1; i < cells.size(); ++i) {
      QuantizationJob::State state;
      ASSERT_TRUE(QuantizationJob::State_Parse(states[i], &state)) << states[i];
      EXPECT_EQ(Outcome(it->second, state), cells[i]) << cells[0] << " in " << states[i];
    }
    cases.erase(it);
  }
  EXPECT_EQ(states.size(), 7u);
  EXPECT_TRUE(cases.empty()) << "no row for " << cases.begin()->first;
}

TEST(JobTest, NewJobIsQueuedWithAnEvent) {
  QuantizationJob job;
  job.set_name("quantizationJobs/a");
  const Transition created = NewJob(job, kNow);
  EXPECT_EQ(created.next.job.state(), QuantizationJob::QUEUED);
  EXPECT_EQ(created.next.job.create_time().seconds(), 1'000'000'000);
  EXPECT_EQ(created.next.job.attempt(), 0);
  ASSERT_TRUE(created.event.has_value());
  EXPECT_EQ(created.event->layer(), -1);
}

TEST(JobTest, EachGrantHasAHigherTokenAndAttempt) {
  JobRecord record = InState(QuantizationJob::QUEUED);
  for (int i = 1; i <= 3; ++i) {
    ASSERT_OK_AND_ASSIGN(Transition granted, Apply(record, Grant{"workers/w"}, kNow));
    EXPECT_EQ(granted.next.fencing_token, kToken + i);
    EXPECT_EQ(granted.next.job.attempt(), 3 + i);
    ASSERT_OK_AND_ASSIGN(Transition back,
                         Apply(granted.next, GiveBack{granted.next.fencing_token}, kNow));
    EXPECT_EQ(back.next.job.worker(), "");
    EXPECT_EQ(back.next.crashes, 0);
    record = back.next;
  }
}

TEST(JobTest, OnlyFailuresThatMayPassAreRetried) {
  for (int code = 1; code <= 16; ++code) {
    const auto status = static_cast<absl::StatusCode>(code);
    const bool retried =
        status == absl::StatusCode::kUnavailable || status == absl::StatusCode::kResourceExhausted;
    ASSERT_OK_AND_ASSIGN(Transition failed,
                         Apply(InState(QuantizationJob::RUNNING), Failed(kToken, status), kNow));
    EXPECT_EQ(failed.next.job.state(), retried ? QuantizationJob::QUEUED : QuantizationJob::FAILED)
        << status;
    EXPECT_EQ(failed.next.not_before, retried ? kNow + absl::Seconds(10) : absl::InfinitePast());
    EXPECT_EQ(failed.next.job.error().code(), retried ? 0 : code);
    EXPECT_EQ(failed.next.job.error_reason(), retried ? "" : "WHY");
    EXPECT_EQ(failed.next.job.has_end_time(), !retried);
  }
}

// What a quality gate refused is kept with the job that ended so, and with no other.
TEST(JobTest, AFailedJobKeepsItsRejectedResult) {
  Fail fail = Failed(kToken, absl::StatusCode::kFailedPrecondition);
  fail.rejected_result.emplace().set_perplexity_after(12.5);
  ASSERT_OK_AND_ASSIGN(const Transition ended,
                       Apply(InState(QuantizationJob::RUNNING), fail, kNow));
  EXPECT_EQ(ended.next.job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(ended.next.job.result().perplexity_after(), 12.5);
  fail.error.set_code(static_cast<int>(absl::StatusCode::kUnavailable));
  ASSERT_OK_AND_ASSIGN(const Transition retried,
                       Apply(InState(QuantizationJob::RUNNING), fail, kNow));
  EXPECT_EQ(retried.next.job.state(), QuantizationJob::QUEUED);
  EXPECT_FALSE(retried.next.job.has_result());
}

TEST(JobTest, FailureWithoutAnErrorCodeIsInternal) {
  for (const int code : {0, -1, 17, std::numeric_limits<int>::max()}) {
    ASSERT_OK_AND_ASSIGN(Transition failed,
                         Apply(InState(QuantizationJob::RUNNING),
                               Failed(kToken, static_cast<absl::StatusCode>(code)), kNow));
    EXPECT_EQ(failed.next.job.error().code(), 13) << code;
  }
}

TEST(JobTest, BackoffDoublesToSixMinutes) {
  EXPECT_EQ(Backoff(0, 0), absl::Seconds(10));
  EXPECT_EQ(Backoff(1, 0), absl::Seconds(20));
  EXPECT_EQ(Backoff(5, 0), absl::Seconds(320));
  EXPECT_EQ(Backoff(6, 0), absl::Minutes(6));
  EXPECT_EQ(Backoff(1'000'000, 0), absl::Minutes(6));
  EXPECT_EQ(Backoff(0, 1), absl::Seconds(12.5));
  EXPECT_EQ(Backoff(0, -1), absl::Seconds(7.5));
  EXPECT_EQ(Backoff(0, 99), absl::Seconds(12.5));
}

TEST(JobTest, ARefusedJobWaitsForOtherWorkersAndCountsNothing) {
  JobRecord record = InState(QuantizationJob::RUNNING);
  record.retries = 2;
  record.job.set_stage(QuantizationJob::VALIDATING);
  ASSERT_OK_AND_ASSIGN(const Transition refused, Apply(record, Refused(kToken), kNow));
  EXPECT_EQ(refused.next.job.state(), QuantizationJob::QUEUED);
  EXPECT_EQ(refused.next.job.worker(), "");
  EXPECT_EQ(refused.next.job.stage(), QuantizationJob::STAGE_UNSPECIFIED);
  EXPECT_EQ(refused.next.job.error().code(), 0);
  EXPECT_EQ(refused.next.retries, 2);
  EXPECT_EQ(refused.next.crashes, 0);
  EXPECT_EQ(refused.next.not_before, absl::InfinitePast()) << "back at once";
  ASSERT_TRUE(refused.next.refusals.contains("workers/w1"));
  EXPECT_EQ(ErrorReason(refused.next.refusals.at("workers/w1")), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(refused.event->message(),
            "left to other workers, workers/w1 cannot run it: FAILED_PRECONDITION: the job needs "
            "100 bytes of memory, the worker has 80");
}

TEST(JobTest, AJobThatRunsOutOfWorkersFailsWithWhatTheySaid) {
  JobRecord record = InState(QuantizationJob::RUNNING);
  record = Apply(record, Refused(kToken), kNow)->next;
  ASSERT_OK_AND_ASSIGN(Transition failed, Apply(record, RunOutOfWorkers{}, kNow));
  EXPECT_EQ(failed.next.job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(failed.next.job.error().code(),
            static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(failed.next.job.error().message(),
            "no worker can run the job: workers/w1: the job needs 100 bytes of memory, the worker "
            "has 80");
  EXPECT_EQ(failed.next.job.error_reason(), "INSUFFICIENT_MEMORY");
  EXPECT_TRUE(failed.next.job.has_end_time());
  record.refusals.clear();
  EXPECT_THAT(Apply(record, RunOutOfWorkers{}, kNow),
              HasCode(absl::StatusCode::kFailedPrecondition));
}

TEST(JobTest, AbsurdRefusalsAreBounded) {
  Refuse refuse = Refused(kToken);
  refuse.error.set_code(-3);
  refuse.error.set_message("\xff" + std::string(5000, 'x'));
  refuse.reason = std::string(5000, 'R') + "\xff";
  ASSERT_OK_AND_ASSIGN(Transition refused, Apply(InState(QuantizationJob::RUNNING), refuse, kNow));
  const absl::Status& kept = refused.next.refusals.at("workers/w1");
  EXPECT_TRUE(absl::IsInternal(kept));
  EXPECT_LE(kept.message().size(), size_t{limits::kStatusMessageBytesMax});
  EXPECT_LE(ErrorReason(kept).size(), size_t{limits::kStatusMessageBytesMax});
  ASSERT_OK_AND_ASSIGN(Transition failed, Apply(refused.next, RunOutOfWorkers{}, kNow));
  EXPECT_LE(failed.next.job.error().message().size(), size_t{limits::kStatusMessageBytesMax});
}

JobRecord CrashOn(JobRecord record, const std::string& worker) {
  Transition granted = *Apply(record, Grant{worker}, kNow);
  return Apply(granted.next, LoseLease{}, kNow)->next;
}

TEST(JobTest, ThreeCrashesOnTwoWorkersPoison) {
  JobRecord record = InState(QuantizationJob::QUEUED);
  record = CrashOn(record, "workers/a");
  record = CrashOn(record, "workers/a");
  EXPECT_EQ(record.job.state(), QuantizationJob::QUEUED);
  EXPECT_EQ(record.not_before, absl::InfinitePast()) << "back at once";
  record = CrashOn(record, "workers/b");
  EXPECT_EQ(record.job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(record.job.error_reason(), "POISONED");
}

TEST(JobTest, OneWorkerMustCrashFiveTimes) {
  JobRecord record = InState(QuantizationJob::QUEUED);
  for (int i = 1; i <= 4; ++i) {
    record = CrashOn(record, "workers/a");
    EXPECT_EQ(record.job.state(), QuantizationJob::QUEUED) << i;
  }
  record = CrashOn(record, "workers/a");
  EXPECT_EQ(record.job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(record.job.error_reason(), "POISONED");
}

TEST(JobTest, RepeatedCompletionIsOkAlsoAfterTheNextLease) {
  JobRecord record = InState(QuantizationJob::RUNNING);
  const Fail fail = Failed(kToken, absl::StatusCode::kUnavailable);
  record = Apply(record, fail, kNow)->next;
  ASSERT_OK_AND_ASSIGN(Transition again, Apply(record, fail, kNow));
  EXPECT_FALSE(again.event.has_value());
  record = Apply(record, Grant{"workers/b"}, kNow)->next;
  EXPECT_OK(Apply(record, fail, kNow));
  // A completion whose token was lost without being completed is not one.
  record = Apply(record, LoseLease{}, kNow)->next;
  EXPECT_THAT(Apply(record, Succeed{record.fencing_token, {}}, kNow),
              HasCode(absl::StatusCode::kAborted));
}

TEST(JobTest, JobThatPublishesCannotBeCancelledAndSaysWhatToDo) {
  JobRecord record = InState(QuantizationJob::RUNNING);
  ASSERT_OK_AND_ASSIGN(
      const Transition publishing,
      Apply(record, JobEvent(Reported(kToken, QuantizationJob::PUBLISHING)), kNow));
  const absl::Status refused = Apply(publishing.next, RequestCancel{}, kNow).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("deleted")));
  EXPECT_EQ(ErrorReason(refused), "JOB_PUBLISHING");
  // The next attempt can be cancelled again.
  ASSERT_OK_AND_ASSIGN(const Transition lost, Apply(publishing.next, LoseLease{}, kNow));
  EXPECT_OK(Apply(lost.next, RequestCancel{}, kNow).status());
}

// A report whose worker has given it up may reach the job behind later ones. Without its stage the
// job could be cancelled while its worker publishes.
TEST(JobTest, AJobThatPublishesDoesNotGoBackToAnEarlierStage) {
  const JobRecord record = InState(QuantizationJob::RUNNING);
  ASSERT_OK_AND_ASSIGN(const Transition publishing,
                       Apply(record, Reported(kToken, QuantizationJob::PUBLISHING), kNow));
  ASSERT_OK_AND_ASSIGN(const Transition late,
                       Apply(publishing.next, Reported(kToken, QuantizationJob::QUANTIZING), kNow));
  EXPECT_EQ(late.next.job.stage(), QuantizationJob::PUBLISHING);
  EXPECT_EQ(late.event->stage(), QuantizationJob::PUBLISHING);
  EXPECT_EQ(ErrorReason(Apply(late.next, RequestCancel{}, kNow).status()), "JOB_PUBLISHING");
}

TEST(JobTest, StaleTokenHasAReason) {
  const absl::Status stale =
      Apply(InState(QuantizationJob::RUNNING), Succeed{kOld, {}}, kNow).status();
  EXPECT_EQ(ErrorReason(stale), "STALE_FENCING_TOKEN");
}

Report WithProgress(double fraction, int done, int total) {
  Report report = Reported(kToken, QuantizationJob::QUANTIZING);
  QuantizationJob::Progress* progress = report.event.mutable_progress();
  progress->set_fraction(fraction);
  progress->set_layers_done(done);
  progress->set_layers_total(total);
  return report;
}

TEST(JobTest, ProgressNeverGoesBackWithinAnAttempt) {
  JobRecord record = InState(QuantizationJob::RUNNING);
  record = Apply(record, WithProgress(0.5, 4, 8), kNow)->next;
  record = Apply(record, WithProgress(0.25, 2, 8), kNow)->next;
  EXPECT_EQ(record.job.progress().fraction(), 0.5);
  EXPECT_EQ(record.job.progress().layers_done(), 4);
  EXPECT_EQ(record.job.stage(), QuantizationJob::QUANTIZING);
  record = Apply(record, GiveBack{kToken}, kNow)->next;
  EXPECT_EQ(record.job.progress().fraction(), 0);
  EXPECT_EQ(record.job.stage(), QuantizationJob::STAGE_UNSPECIFIED);
}

TEST(JobTest, AbsurdReportsAreBounded) {
  const double inf = std::numeric_limits<double>::infinity();
  const int int_max = std::numeric_limits<int>::max();
  for (const double fraction : {std::nan(""), inf, -inf, -1.0, 2.0, 1e308}) {
    for (const int layers : {-1, 0, int_max, std::numeric_limits<int>::min()}) {
      Report report = WithProgress(fraction, layers, layers);
      report.event.set_message("\xff" + std::string(5000, 'x'));
      report.event.set_layer(layers);
      report.event.mutable_progress()->mutable_eta()->set_seconds(-5);
      ASSERT_OK_AND_ASSIGN(Transition reported,
                           Apply(InState(QuantizationJob::RUNNING), report, kNow));
      const QuantizationJob::Progress& progress = reported.next.job.progress();
      EXPECT_GE(progress.fraction(), 0);
      EXPECT_LE(progress.fraction(), 1);
      EXPECT_GE(progress.layers_done(), 0);
      EXPECT_LE(progress.layers_done(), progress.layers_total());
      EXPECT_LE(progress.layers_total(), limits::kLayersMax);
      EXPECT_FALSE(progress.has_eta());
      EXPECT_GE(reported.event->layer(), -1);
      EXPECT_LE(reported.event->message().size(), size_t{limits::kStatusMessageBytesMax});
      EXPECT_THAT(reported.event->message(), HasSubstr("\xef\xbf\xbd"));
    }
  }
}

TEST(JobTest, ReportCannotChangeStateAttemptOrTime) {
  Report report = Reported(kToken, QuantizationJob::LOADING);
  report.event.set_state(QuantizationJob::SUCCEEDED);
  report.event.set_attempt(99);
  report.event.set_sequence(99);
  ASSERT_OK_AND_ASSIGN(Transition reported, Apply(InState(QuantizationJob::RUNNING), report, kNow));
  EXPECT_EQ(reported.event->state(), QuantizationJob::RUNNING);
  EXPECT_EQ(reported.event->attempt(), 3);
  EXPECT_EQ(reported.event->sequence(), 0);
  EXPECT_EQ(reported.event->time().seconds(), absl::ToUnixSeconds(kNow));
}

}  // namespace
}  // namespace walsh::jobs
