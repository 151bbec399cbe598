#include "client/client.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "tests/testing/fake_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::walsh::testing::FakeServer;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

const grpc::Status kUnavailable(grpc::StatusCode::UNAVAILABLE, "try again");
constexpr char kJob[] = "quantizationJobs/j";

ClientOptions FastOptions(const FakeServer& server) {
  ClientOptions options;
  options.address = server.address();
  options.timeout = absl::Seconds(20);
  options.backoff = {absl::Milliseconds(2), absl::Milliseconds(50), 2.0, 0.2};
  return options;
}

v1::QuantizationJobEvent Event(v1::QuantizationJob::State state) {
  v1::QuantizationJobEvent event;
  event.set_state(state);
  return event;
}

void AddRunningEvents(FakeServer& server, int n) {
  for (int i = 0; i < n; ++i) server.AddEvent(kJob, Event(v1::QuantizationJob::RUNNING));
}

v1::CreateQuantizationJobRequest CreateRequest() {
  v1::CreateQuantizationJobRequest request;
  request.mutable_quantization_job()->set_source_model("/m");
  return request;
}

// Sequences seen by a watcher, and how often it was told of a broken stream.
struct Seen {
  std::vector<int64_t> sequences;
  std::atomic<int> n_disconnects{0};

  WatchObserver Observer() {
    return {[this](const v1::QuantizationJobEvent& e) { sequences.push_back(e.sequence()); },
            [this](const absl::Status&, absl::Duration) { ++n_disconnects; }};
  }
};

std::vector<int64_t> OneTo(int64_t n) {
  std::vector<int64_t> sequence;
  for (int64_t i = 1; i <= n; ++i) sequence.push_back(i);
  return sequence;
}

// -- Unary calls

TEST(ClientTest, RetriesUnavailableWithTheSameRequestId) {
  FakeServer server;
  Client client(FastOptions(server));
  server.FailNext("CreateQuantizationJob", 2, kUnavailable);
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, client.CreateJob(CreateRequest()));
  EXPECT_EQ(job.name(), "quantizationJobs/job1");
  const auto requests = server.create_requests();
  ASSERT_EQ(requests.size(), 3u);
  EXPECT_EQ(requests[0].request_id().size(), 32u);
  EXPECT_EQ(requests[0].request_id(), requests[1].request_id());
  EXPECT_EQ(requests[0].request_id(), requests[2].request_id());
}

TEST(ClientTest, KeepsTheCallersRequestIdAndDrawsDifferentOnes) {
  FakeServer server;
  Client client(FastOptions(server));
  v1::CreateQuantizationJobRequest request = CreateRequest();
  request.set_request_id("mine");
  ASSERT_OK(client.CreateJob(request));
  ASSERT_OK(client.CreateJob(CreateRequest()));
  ASSERT_OK(client.CreateJob(CreateRequest()));
  const auto requests = server.create_requests();
  EXPECT_EQ(requests[0].request_id(), "mine");
  EXPECT_NE(requests[1].request_id(), requests[2].request_id());
}

TEST(ClientTest, DoesNotRetryOtherErrorsAndKeepsTheirDetails) {
  FakeServer server;
  Client client(FastOptions(server));
  absl::Status planned = absl::FailedPreconditionError("no");
  SetErrorInfo(planned, "MODEL_IN_USE");
  server.FailNext("DeleteModel", 1, ToGrpcStatus(planned));
  const absl::Status status = client.DeleteModel("m", false);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kFailedPrecondition, "no"));
  EXPECT_EQ(ErrorReason(status), "MODEL_IN_USE");
  EXPECT_EQ(server.Calls("DeleteModel"), 1);
}

TEST(ClientTest, GivesUpAfterItsAttempts) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.attempts_max = 3;
  Client client(options);
  server.FailNext("ListWorkers", 100, kUnavailable);
  EXPECT_THAT(client.ListWorkers(), StatusIs(absl::StatusCode::kUnavailable, "try again"));
  EXPECT_EQ(server.Calls("ListWorkers"), 3);
}

TEST(ClientTest, WaitsAsLongAsTheServiceAsks) {
  FakeServer server;
  Client client(FastOptions(server));
  absl::Status busy = absl::UnavailableError("loading");
  SetRetryDelay(busy, absl::Milliseconds(300));
  server.FailNext("ListWorkers", 1, ToGrpcStatus(busy));
  const absl::Time start = absl::Now();
  ASSERT_OK(client.ListWorkers());
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(290));
}

TEST(ClientTest, DoesNotWaitBeyondItsDeadline) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.timeout = absl::Seconds(5);
  Client client(options);
  absl::Status busy = absl::UnavailableError("loading");
  SetRetryDelay(busy, absl::Minutes(10));
  server.FailNext("ListWorkers", 1, ToGrpcStatus(busy));
  const absl::Time start = absl::Now();
  EXPECT_THAT(client.ListWorkers(), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
}

TEST(ClientTest, SaysThatNobodyAnswersAtTheAddress) {
  FakeServer server;
  Client client(FastOptions(server));
  server.Stop();
  EXPECT_THAT(client.ListWorkers(),
              StatusIs(absl::StatusCode::kUnavailable,
                       HasSubstr(absl::StrCat("no walsh service answers at ", server.address()))));
}

TEST(ClientTest, ReachesAServiceThatStartsWhileItTries) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.attempts_max = 1000;
  Client client(options);
  server.Stop();
  std::thread starter([&] {
    // Time for attempts that find nobody.
    const absl::Time start_at = absl::Now() + absl::Milliseconds(300);
    EXPECT_TRUE(WaitUntil([&] { return absl::Now() > start_at; }));
    server.Start();
  });
  EXPECT_OK(client.ListWorkers());
  starter.join();
}

TEST(ClientTest, CollectsPages) {
  FakeServer server;
  Client client(FastOptions(server));
  server.SetPageSizeMax(2);
  for (int i = 0; i < 5; ++i) {
    v1::Model model;
    model.set_name(absl::StrCat("models/m", i));
    server.AddModel(model);
    server.AddEvent(absl::StrCat("quantizationJobs/j", i), Event(v1::QuantizationJob::RUNNING));
  }
  ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, client.ListModels());
  ASSERT_EQ(models.models_size(), 5);
  EXPECT_EQ(models.models(4).name(), "models/m4");
  ASSERT_OK_AND_ASSIGN(const v1::ListQuantizationJobsResponse jobs, client.ListJobs("", "", 100));
  EXPECT_EQ(jobs.quantization_jobs_size(), 5);
  EXPECT_EQ(jobs.next_page_token(), "");
  ASSERT_OK_AND_ASSIGN(const v1::ListQuantizationJobsResponse some, client.ListJobs("", "", 3));
  EXPECT_EQ(some.quantization_jobs_size(), 3);
  EXPECT_NE(some.next_page_token(), "");
}

TEST(ClientTest, ADeletionWhoseAnswerWasLostIsDone) {
  FakeServer server;
  Client client(FastOptions(server));
  EXPECT_THAT(client.DeleteModel("m", false), HasCode(absl::StatusCode::kNotFound));
  server.FailNext("DeleteModel", 1, kUnavailable);
  EXPECT_OK(client.DeleteModel("m", false));
  server.FailNext("DeleteQuantizationJob", 1, kUnavailable);
  EXPECT_OK(client.DeleteJob("j"));
}

TEST(ClientTest, AsksForHealth) {
  FakeServer server;
  Client client(FastOptions(server));
  EXPECT_OK(client.CheckHealth("", absl::Seconds(5)));
  EXPECT_THAT(client.CheckHealth("no.such.Service", absl::Seconds(5)),
              HasCode(absl::StatusCode::kNotFound));
}

// -- Watching

TEST(WatchJobTest, SeesEveryEventInOrderAndReturnsTheFinalJob) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 5);
  server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  Seen seen;
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, client.WatchJob("j", 0, seen.Observer()));
  EXPECT_EQ(job.state(), v1::QuantizationJob::SUCCEEDED);
  EXPECT_EQ(seen.sequences, OneTo(6));
  EXPECT_EQ(seen.n_disconnects, 0);
}

TEST(WatchJobTest, GoesOnAfterBrokenStreamsWithoutGapOrRepetition) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 9);
  server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  server.CutWatchAfter(3, kUnavailable);
  Seen seen;
  ASSERT_OK(client.WatchJob(kJob, 0, seen.Observer()));
  EXPECT_EQ(seen.sequences, OneTo(10));
  EXPECT_THAT(server.watched_after(), ElementsAre(0, 3, 6, 9));
  EXPECT_EQ(seen.n_disconnects, 3);
}

TEST(WatchJobTest, StartsAfterAnEvent) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 4);
  server.AddEvent(kJob, Event(v1::QuantizationJob::FAILED));
  Seen seen;
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, client.WatchJob(kJob, 3, seen.Observer()));
  EXPECT_EQ(job.state(), v1::QuantizationJob::FAILED);
  EXPECT_THAT(seen.sequences, ElementsAre(4, 5));
}

TEST(WatchJobTest, EndsAtOnceWhenEverythingWasSeenBefore) {
  FakeServer server;
  Client client(FastOptions(server));
  server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  Seen seen;
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, client.WatchJob(kJob, 1, seen.Observer()));
  EXPECT_EQ(job.state(), v1::QuantizationJob::SUCCEEDED);
  EXPECT_THAT(seen.sequences, ElementsAre());
}

TEST(WatchJobTest, ReconnectsWhenTheStreamEndsBeforeTheJob) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 3);
  server.AddEvent(kJob, Event(v1::QuantizationJob::RUNNING));
  server.CutWatchAfter(2, grpc::Status::OK);
  Seen seen;
  std::thread finisher([&] {
    EXPECT_TRUE(WaitUntil([&] { return server.watched_after().size() >= 3; }));
    server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  });
  ASSERT_OK(client.WatchJob(kJob, 0, seen.Observer()));
  finisher.join();
  EXPECT_EQ(seen.sequences, OneTo(5));
}

TEST(WatchJobTest, SurvivesARestartedService) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 3);
  Seen seen;
  std::thread operator_thread([&] {
    EXPECT_TRUE(WaitUntil([&] { return server.Calls("WatchQuantizationJob") == 1; }));
    server.Stop();
    AddRunningEvents(server, 3);
    server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
    EXPECT_TRUE(WaitUntil([&] { return seen.n_disconnects >= 2; }));
    server.Start();
  });
  const auto job = client.WatchJob(kJob, 0, seen.Observer());
  operator_thread.join();
  ASSERT_OK(job);
  EXPECT_EQ(seen.sequences, OneTo(7));
  EXPECT_GE(seen.n_disconnects, 2);
}

TEST(WatchJobTest, ReportsALostEvent) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 5);
  server.LoseEvent(3);
  Seen seen;
  EXPECT_THAT(client.WatchJob(kJob, 0, seen.Observer()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("4 came after 2")));
  EXPECT_THAT(seen.sequences, ElementsAre(1, 2));
}

TEST(WatchJobTest, TakesASilentStreamForDead) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.watch_silence_max = absl::Milliseconds(200);
  Client client(options);
  server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  server.SilenceNextWatch(1);
  Seen seen;
  ASSERT_OK(client.WatchJob(kJob, 0, seen.Observer()));
  EXPECT_THAT(seen.sequences, ElementsAre(1));
  EXPECT_EQ(seen.n_disconnects, 1);
}

TEST(WatchJobTest, GivesUpWhenTheServiceStaysAway) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.watch_patience = absl::Milliseconds(300);
  Client client(options);
  AddRunningEvents(server, 1);
  server.FailNext("WatchQuantizationJob", 1'000'000, kUnavailable);
  const absl::Time start = absl::Now();
  EXPECT_THAT(client.WatchJob(kJob, 0, {}), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

// A quiet job behind something that cuts long streams: the service is there.
TEST(WatchJobTest, HasPatienceWhileHeartbeatsCome) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.watch_patience = absl::Milliseconds(300);
  Client client(options);
  AddRunningEvents(server, 1);
  server.BeginWatchesWithAHeartbeat();
  server.CutWatchAfter(0, kUnavailable);
  std::thread finisher([&] {
    const absl::Time finish_at = absl::Now() + 3 * options.watch_patience;
    EXPECT_TRUE(WaitUntil([&] { return absl::Now() > finish_at; }));
    server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
    server.CutWatchAfter(-1, grpc::Status::OK);
  });
  const auto job = client.WatchJob(kJob, 1, {});
  finisher.join();
  ASSERT_OK(job);
  EXPECT_EQ(job->state(), v1::QuantizationJob::SUCCEEDED);
}

TEST(WatchJobTest, WaitsForAServiceThatGoesAwayBeforeItTellsOfTheEnd) {
  FakeServer server;
  ClientOptions options = FastOptions(server);
  options.attempts_max = 2;
  Client client(options);
  server.AddEvent(kJob, Event(v1::QuantizationJob::SUCCEEDED));
  for (const int64_t after_sequence : {0, 1}) {  // with a last event and without one
    server.FailNext("GetQuantizationJob", 5, kUnavailable);
    Seen seen;
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job,
                         client.WatchJob(kJob, after_sequence, seen.Observer()));
    EXPECT_EQ(job.state(), v1::QuantizationJob::SUCCEEDED);
    EXPECT_EQ(seen.sequences, OneTo(1 - after_sequence));
    EXPECT_EQ(seen.n_disconnects, 2);
  }
}

TEST(WatchJobTest, EndsWithTheServicesErrorForAnUnknownJob) {
  FakeServer server;
  Client client(FastOptions(server));
  EXPECT_THAT(client.WatchJob("nobody", 0, {}), HasCode(absl::StatusCode::kNotFound));
  EXPECT_EQ(server.Calls("WatchQuantizationJob"), 1);
}

TEST(WatchJobTest, CanBeCancelledWhileItListensAndWhileItWaits) {
  FakeServer server;
  Client client(FastOptions(server));
  AddRunningEvents(server, 1);
  Cancellation listening;
  WatchObserver cancel_at_event;
  cancel_at_event.on_event = [&](const v1::QuantizationJobEvent&) { listening.Cancel(); };
  EXPECT_THAT(client.WatchJob(kJob, 0, cancel_at_event, &listening),
              HasCode(absl::StatusCode::kCancelled));

  ClientOptions slow = FastOptions(server);
  slow.backoff = {absl::Minutes(5), absl::Minutes(5), 1.0, 0.0};
  Client slow_client(slow);
  Cancellation waiting;
  WatchObserver cancel_at_disconnect;
  cancel_at_disconnect.on_disconnect = [&](const absl::Status&, absl::Duration) {
    waiting.Cancel();
  };
  server.CutWatchAfter(1, kUnavailable);
  EXPECT_THAT(slow_client.WatchJob(kJob, 0, cancel_at_disconnect, &waiting),
              HasCode(absl::StatusCode::kCancelled));
}

// -- Generation

std::string StreamedText(Client& client, absl::Status* status) {
  std::string text;
  *status = client.GenerateStream(
      {}, [&](const v1::GenerateStreamResponse& event) { text += event.delta().text(); });
  return text;
}

TEST(GenerateStreamTest, DeliversTheWholeStream) {
  FakeServer server;
  Client client(FastOptions(server));
  absl::Status status;
  EXPECT_EQ(StreamedText(client, &status), "Hello, world");
  EXPECT_OK(status);
}

TEST(GenerateStreamTest, RetriesBeforeTheFirstEventOnly) {
  FakeServer server;
  Client client(FastOptions(server));
  server.FailNext("GenerateStream", 2, kUnavailable);
  absl::Status status;
  EXPECT_EQ(StreamedText(client, &status), "Hello, world");
  EXPECT_OK(status);
  EXPECT_EQ(server.Calls("GenerateStream"), 3);

  server.CutStreamAfter(2, kUnavailable);
  EXPECT_EQ(StreamedText(client, &status), "Hello, ");
  EXPECT_THAT(status, HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(server.Calls("GenerateStream"), 4);
}

TEST(GenerateStreamTest, AnOkEndWithoutTheLastMessageIsAnError) {
  FakeServer server;
  Client client(FastOptions(server));
  server.CutStreamAfter(1, grpc::Status::OK);
  absl::Status status;
  StreamedText(client, &status);
  EXPECT_THAT(status, HasCode(absl::StatusCode::kDataLoss));
}

TEST(GenerateStreamTest, CancellationReachesTheService) {
  FakeServer server;
  Client client(FastOptions(server));
  server.SetStream({"a", "b"}, absl::Seconds(30));
  Cancellation cancellation;
  std::thread canceller([&] {
    EXPECT_TRUE(WaitUntil([&] { return server.n_streams() == 1; }));
    cancellation.Cancel();
  });
  const absl::Status status = client.ChatStream(
      {}, [](const v1::GenerateStreamResponse&) {}, &cancellation);
  canceller.join();
  EXPECT_THAT(status, HasCode(absl::StatusCode::kCancelled));
  EXPECT_TRUE(WaitUntil([&] { return server.n_streams_cancelled() == 1; }));
}

TEST(GenerateStreamTest, TheCallersTimeoutEndsIt) {
  FakeServer server;
  Client client(FastOptions(server));
  server.SetStream({"a", "b"}, absl::Seconds(30));
  EXPECT_THAT(client.GenerateStream(
                  {}, [](const v1::GenerateStreamResponse&) {}, nullptr, absl::Milliseconds(100)),
              HasCode(absl::StatusCode::kDeadlineExceeded));
}

TEST(GenerateStreamTest, MoreStreamsThanAConnectionCarriesOpenAnother) {
  constexpr int kStreams = limits::kConcurrentStreamsMax + 16;
  FakeServer server;
  Client client(FastOptions(server));
  server.SetStream({"a", "b"}, absl::Seconds(30));
  Cancellation cancellation[kStreams];
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] {
      client
          .GenerateStream(
              {}, [](const v1::GenerateStreamResponse&) {}, &cancellation[i])
          .IgnoreError();  // they are all cancelled
    });
  }
  // On one connection the last 16 would wait for the first 64.
  EXPECT_TRUE(WaitUntil([&] { return server.n_streams() == kStreams; }));
  for (Cancellation& c : cancellation) c.Cancel();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(client.n_connections(), 2);
  EXPECT_EQ(server.n_peers(), 2);
}

}  // namespace
}  // namespace walsh::client
