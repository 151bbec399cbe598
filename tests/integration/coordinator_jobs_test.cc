// Jobs over the wire: a real coordinator, a scripted worker, the public API.
#include <grpcpp/create_channel.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/http_server.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/metric_value.h"
#include "tests/unit/server/faulty_disk.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using v1::QuantizationJob;
using v1::QuantizationJobEvent;
using ::walsh::testing::FakeWorker;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::Pause;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

class CoordinatorJobsTest : public CoordinatorFixture {
 protected:
  // Reads a watch to its end.
  grpc::Status Watch(const std::string& id, int64_t after,
                     std::vector<QuantizationJobEvent>* events) {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
    v1::WatchQuantizationJobRequest request;
    request.set_name("quantizationJobs/" + id);
    request.set_after_sequence(after);
    const auto reader = jobs_->WatchQuantizationJob(&context, request);
    QuantizationJobEvent event;
    while (reader->Read(&event)) {
      if (!event.heartbeat()) events->push_back(event);
    }
    return reader->Finish();
  }
  bool IsInState(const std::string& id, QuantizationJob::State state) {
    const absl::StatusOr<QuantizationJob> job = Get(id);
    return job.ok() && job->state() == state;
  }
};

TEST_F(CoordinatorJobsTest, SubmitLeaseProgressComplete) {
  const auto worker = NewWorker("w1");
  ASSERT_OK_AND_ASSIGN(QuantizationJob job, Create(NewJob("a")));
  EXPECT_EQ(job.name(), "quantizationJobs/a");
  EXPECT_EQ(job.state(), QuantizationJob::QUEUED);
  EXPECT_EQ(job.config().bits(), 4);
  const FakeWorker::Lease lease = worker->MustAcquire();
  EXPECT_EQ(lease.job_name(), "quantizationJobs/a");
  EXPECT_EQ(lease.job().source_model(), "/models/tiny");
  EXPECT_EQ(lease.duration().seconds(), absl::ToInt64Seconds(options_.lease_duration));
  ASSERT_OK(worker->Report(lease, QuantizationJob::LOADING, 0.1));
  ASSERT_OK_AND_ASSIGN(job, Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::RUNNING);
  EXPECT_EQ(job.stage(), QuantizationJob::LOADING);
  EXPECT_EQ(job.worker(), "workers/w1");
  EXPECT_EQ(job.attempt(), 1);
  ASSERT_OK(worker->Report(lease, QuantizationJob::PUBLISHING, 0.99));
  ASSERT_OK(worker->Succeed(lease));
  ASSERT_OK(worker->Succeed(lease)) << "a repeated completion is OK";
  ASSERT_OK_AND_ASSIGN(job, Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::SUCCEEDED);
  EXPECT_EQ(job.result().perplexity_after(), 11);

  v1::GetModelRequest request;
  request.set_name("models/a-model");
  ASSERT_OK_AND_ASSIGN(const v1::Model model,
                       Send<v1::Model>(models_.get(), &ModelStub::GetModel, request));
  EXPECT_EQ(model.state(), v1::Model::UNLOADED);
  EXPECT_EQ(model.quantization_job(), "quantizationJobs/a");
}

TEST_F(CoordinatorJobsTest, WaitingWorkerGetsAJobAtOnce) {
  const auto worker = NewWorker("w1");
  std::thread waiting([&] { EXPECT_EQ(worker->MustAcquire().job_name(), "quantizationJobs/a"); });
  ASSERT_OK(Create(NewJob("a")));
  waiting.join();
}

TEST_F(CoordinatorJobsTest, LongPollEndsWithoutALease) {
  const auto worker = NewWorker("w1");
  const absl::Time start = absl::Now();
  ASSERT_OK_AND_ASSIGN(const auto lease, worker->Acquire(absl::Milliseconds(300)));
  EXPECT_FALSE(lease.has_value());
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(290));
}

TEST_F(CoordinatorJobsTest, HeartbeatRenewsAlsoWhenItsModelsCannotBeStored) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  worker->SetModel("models/found", v1::Model::UNLOADED);
  v1::GetModelRequest request;
  request.set_name("models/found");
  const auto is_known = [&] {
    return Send<v1::Model>(models_.get(), &ModelStub::GetModel, request).ok();
  };
  {
    testing::FaultyDisk disk;
    disk.FailWrites(ENOSPC);
    for (int i = 0; i < 3; ++i) {
      ASSERT_OK_AND_ASSIGN(const auto answer, worker->Heartbeat(lease));
      EXPECT_TRUE(answer.lease_valid());
    }
    EXPECT_FALSE(is_known());
  }
  EXPECT_TRUE(WaitUntil([&] { return worker->Heartbeat(lease).ok() && is_known(); }));
}

class CallTimeoutTest : public CoordinatorJobsTest {
 protected:
  CallTimeoutTest() { options_.call_timeout = absl::Milliseconds(300); }
};

TEST_F(CallTimeoutTest, ACallWithoutADeadlineDoesNotWaitForAStoreThatHangs) {
  ASSERT_OK(Create(NewJob("a")));
  absl::Notification is_back;
  testing::FaultyDisk disk;
  disk.OnNextSync([&] { is_back.WaitForNotification(); });
  v1::CancelQuantizationJobRequest request;
  request.set_name("a");
  for (int i = 0; i < 2; ++i) {  // one waits for the disk, the other for the first
    grpc::ClientContext context;
    QuantizationJob job;
    const grpc::Status status = jobs_->CancelQuantizationJob(&context, request, &job);
    EXPECT_THAT(FromGrpcStatus(status),
                StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("300ms")));
  }
  is_back.Notify();
  EXPECT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::CANCELLED); }))
      << "the calls went on";
}

class ShortLeaseTest : public CoordinatorJobsTest {
 protected:
  ShortLeaseTest() { UseShortLeases(); }
};

TEST_F(ShortLeaseTest, ExpiredLeaseIsRequeuedWithAHigherToken) {
  const auto first = NewWorker("w1");
  const auto second = NewWorker("w2");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lost = first->MustAcquire();
  // w1 falls silent.
  const FakeWorker::Lease lease = second->MustAcquire();
  EXPECT_EQ(lease.job_name(), "quantizationJobs/a");
  EXPECT_GT(lease.fencing_token(), lost.fencing_token());
  EXPECT_THAT(first->Report(lost, QuantizationJob::PUBLISHING, 0.9),
              HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(first->Succeed(lost), HasCode(absl::StatusCode::kAborted));
  ASSERT_OK_AND_ASSIGN(const auto answer, first->Heartbeat(lost));
  EXPECT_FALSE(answer.lease_valid());
  ASSERT_OK(second->Succeed(lease));
  EXPECT_EQ(Get("a")->attempt(), 2);
}

TEST_F(ShortLeaseTest, HeartbeatsKeepTheLease) {
  Stop();
  options_.lease_duration = absl::Seconds(4);  // a pause of this process costs no lease
  Start();
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  const absl::Time end = absl::Now() + options_.lease_duration * 1.5;
  EXPECT_TRUE(WaitUntil([&] {
    const auto answer = worker->Heartbeat(lease);
    EXPECT_TRUE(answer.ok() && answer->lease_valid());
    return absl::Now() >= end;
  }));
  EXPECT_EQ(Get("a")->attempt(), 1);
}

TEST_F(CoordinatorJobsTest, GoodbyeReturnsTheJobAtOnce) {
  const auto first = NewWorker("w1");
  const auto second = NewWorker("w2");
  ASSERT_OK(Create(NewJob("a")));
  first->MustAcquire();
  const absl::Time start = absl::Now();
  ASSERT_OK(first->Deregister());
  EXPECT_EQ(second->MustAcquire().job_name(), "quantizationJobs/a");
  EXPECT_LT(absl::Now() - start, options_.lease_duration);
  EXPECT_THAT(first->Heartbeat(), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(CoordinatorJobsTest, CancelReachesTheWorker) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  ASSERT_OK_AND_ASSIGN(QuantizationJob job, Cancel("a"));
  EXPECT_EQ(job.state(), QuantizationJob::CANCELLING);
  ASSERT_OK_AND_ASSIGN(const auto answer, worker->Heartbeat(lease));
  EXPECT_TRUE(answer.lease_valid());
  EXPECT_TRUE(answer.cancel_job());
  EXPECT_THAT(worker->Report(lease, QuantizationJob::PUBLISHING, 0.9),
              HasCode(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK(worker->AcknowledgeCancel(lease));
  ASSERT_OK_AND_ASSIGN(job, Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::CANCELLED);
}

TEST_F(CoordinatorJobsTest, FailureIsReportedWithItsReason) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_OK(worker->Fail(worker->MustAcquire(), absl::StatusCode::kDataLoss, "BAD_CHECKPOINT"));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::FAILED);
  EXPECT_EQ(job.error().code(), static_cast<int>(absl::StatusCode::kDataLoss));
  EXPECT_EQ(job.error_reason(), "BAD_CHECKPOINT");
}

// -- Refusals

// A coordinator that has been up for its lease time, so that it knows who is there.
class SettledCoordinatorTest : public CoordinatorJobsTest {
 protected:
  SettledCoordinatorTest() { options_.lease_duration = absl::Seconds(5); }
  void SetUp() override {
    CoordinatorJobsTest::SetUp();
    const absl::Time settled = absl::Now() + options_.lease_duration;
    ASSERT_TRUE(WaitUntil([&] { return absl::Now() >= settled; }));
  }
};

TEST_F(SettledCoordinatorTest, AJobThatEveryWorkerRefusesFailsAtOnceWithTheFiguresOfEach) {
  ASSERT_OK(Create(NewJob("a")));  // nobody there to ask
  const auto first = NewWorker("w1");
  const auto second = NewWorker("w2");
  ASSERT_OK(first->Refuse(first->MustAcquire(), absl::StatusCode::kFailedPrecondition,
                          "100 bytes are needed, w1 has 80", "INSUFFICIENT_MEMORY"));
  EXPECT_TRUE(IsInState("a", QuantizationJob::QUEUED)) << "w2 is there";
  const FakeWorker::Lease lease = second->MustAcquire();
  EXPECT_EQ(lease.fencing_token(), 2);
  ASSERT_OK(second->Refuse(lease, absl::StatusCode::kFailedPrecondition,
                           "100 bytes are needed, w2 has 90", "INSUFFICIENT_MEMORY"));
  EXPECT_TRUE(WaitUntil([&] { return IsInState("a", QuantizationJob::FAILED); }));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Get("a"));
  EXPECT_EQ(job.error().code(), static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(job.error_reason(), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(job.error().message(),
            "no worker can run the job: workers/w1: 100 bytes are needed, w1 has 80; workers/w2: "
            "100 bytes are needed, w2 has 90");
}

// A rolling restart: the one that can run the job leaves for a moment.
TEST_F(SettledCoordinatorTest, AJobThatOthersRefusedWaitsForAWorkerThatRestarts) {
  ASSERT_OK(Create(NewJob("a")));  // nobody there to ask
  const auto small = NewWorker("w1");
  const auto large = NewWorker("w2");
  const auto refuse = [&] {
    return small->Refuse(small->MustAcquire(), absl::StatusCode::kUnimplemented, "head_dim 80", "");
  };
  ASSERT_OK(refuse());
  ASSERT_OK(large->Deregister());
  ASSERT_OK_AND_ASSIGN(const auto none, small->Acquire(absl::Seconds(1)));
  EXPECT_FALSE(none.has_value());
  EXPECT_TRUE(IsInState("a", QuantizationJob::QUEUED));
  const auto again = NewWorker("w3");
  ASSERT_OK(again->Succeed(again->MustAcquire()));
  EXPECT_TRUE(IsInState("a", QuantizationJob::SUCCEEDED));
  // This time for good.
  ASSERT_OK(Create(NewJob("b")));
  ASSERT_OK(refuse());
  ASSERT_OK(again->Deregister());
  EXPECT_TRUE(WaitUntil([&] {
    EXPECT_OK(small->Heartbeat());
    return IsInState("b", QuantizationJob::FAILED);
  }));
}

TEST_F(CoordinatorJobsTest, AJobThatABusyWorkerMightRunWaitsForItAndGoesRoundNowhere) {
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_OK(Create(NewJob("b")));
  const auto large = NewWorker("w2");
  const FakeWorker::Lease busy = large->MustAcquire();
  EXPECT_EQ(busy.job_name(), "quantizationJobs/a");
  const auto small = NewWorker("w1");
  ASSERT_OK(
      small->Refuse(small->MustAcquire(), absl::StatusCode::kUnimplemented, "head_dim 80", ""));
  ASSERT_OK_AND_ASSIGN(const auto none, small->Acquire(absl::Seconds(1)));
  EXPECT_FALSE(none.has_value());
  EXPECT_TRUE(IsInState("b", QuantizationJob::QUEUED));
  ASSERT_OK(large->Succeed(busy));
  const FakeWorker::Lease lease = large->MustAcquire();
  EXPECT_EQ(lease.job_name(), "quantizationJobs/b");
  ASSERT_OK(large->Succeed(lease));
  EXPECT_EQ(Get("b")->attempt(), 2);
  std::vector<QuantizationJobEvent> events;
  EXPECT_TRUE(Watch("b", 0, &events).ok());
  ASSERT_EQ(events.size(), 5u) << "queued, started, refused, started, succeeded";
  EXPECT_EQ(events[2].message(),
            "left to other workers, workers/w1 cannot run it: UNIMPLEMENTED: head_dim 80");
}

// The small worker is back first; the one that can run the job is on its way.
TEST_F(CoordinatorJobsTest, ARefusalJustAfterARestartIsNotTheLastWord) {
  ASSERT_OK(Create(NewJob("a")));
  const auto small = NewWorker("w1");
  const auto refuse = [&] {
    return small->Refuse(small->MustAcquire(), absl::StatusCode::kUnimplemented, "head_dim 80", "");
  };
  ASSERT_OK(refuse());
  Restart();
  ASSERT_TRUE(WaitUntil([&] { return small->Register().ok(); }));
  ASSERT_OK(refuse()) << "it is asked once more";
  ASSERT_OK_AND_ASSIGN(const auto none, small->Acquire(absl::Seconds(1)));
  EXPECT_FALSE(none.has_value());
  EXPECT_TRUE(IsInState("a", QuantizationJob::QUEUED));
  const auto large = NewWorker("w2");
  ASSERT_OK(large->Succeed(large->MustAcquire()));
  EXPECT_TRUE(IsInState("a", QuantizationJob::SUCCEEDED));
}

// -- Creation

TEST_F(CoordinatorJobsTest, WorkersVerdictIsPassedOn) {
  const auto worker = NewWorker("w1");
  worker->on_validate = [](const auto& request, auto*) {
    return ToGrpcStatus(NotFound("source_model", request.job().source_model()));
  };
  EXPECT_THAT(Create(NewJob("a")), StatusIs(absl::StatusCode::kNotFound, HasSubstr("tiny")));
  EXPECT_THAT(Get("a"), HasCode(absl::StatusCode::kNotFound)) << "nothing was stored";
  worker->on_validate = [](const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "architecture 'Mamba'");
  };
  EXPECT_THAT(Create(NewJob("a")), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("Mamba")));
}

TEST_F(CoordinatorJobsTest, ValidateOnlyStoresNothingAndShowsWhatAutoMeans) {
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.set_validate_only(true);
  EXPECT_THAT(Create(request), HasCode(absl::StatusCode::kUnavailable)) << "nobody can look";
  const auto worker = NewWorker("w1");
  worker->on_validate = [](const auto&, auto* response) {
    response->set_group_size(64);
    response->set_rotation_block_size(64);
    response->set_online_block_size(32);
    response->set_device("cuda:0 NVIDIA H200");
    response->set_memory_bytes_needed(11);
    response->set_memory_bytes_total(13);
    response->set_memory_bytes_free(12);
    response->set_device_memory_bytes_needed(21);
    response->set_device_memory_bytes_total(23);
    response->set_device_memory_bytes_free(22);
    response->set_disk_bytes_needed(31);
    response->set_disk_bytes_free(32);
    response->add_warnings("few tokens");
    return grpc::Status::OK;
  };
  request.mutable_quantization_job()->mutable_preflight()->set_worker("workers/mine");
  ASSERT_OK_AND_ASSIGN(QuantizationJob job, Create(request));
  const QuantizationJob::Preflight& preflight = job.preflight();
  EXPECT_EQ(preflight.worker(), "workers/w1") << "output only";
  EXPECT_EQ(preflight.device(), "cuda:0 NVIDIA H200");
  EXPECT_EQ(preflight.memory().bytes_needed(), 11);
  EXPECT_EQ(preflight.memory().bytes_free(), 12);
  EXPECT_EQ(preflight.memory().bytes_total(), 13);
  EXPECT_EQ(preflight.device_memory().bytes_needed(), 21);
  EXPECT_EQ(preflight.device_memory().bytes_free(), 22);
  EXPECT_EQ(preflight.device_memory().bytes_total(), 23);
  EXPECT_EQ(preflight.disk().bytes_needed(), 31);
  EXPECT_EQ(preflight.disk().bytes_free(), 32);
  ASSERT_EQ(preflight.warnings_size(), 1);
  EXPECT_EQ(preflight.warnings(0), "few tokens");
  EXPECT_EQ(job.name(), "");
  EXPECT_EQ(job.config().group_size(), 64);
  EXPECT_EQ(job.config().rotation().block_size(), 64);
  EXPECT_EQ(job.config().rotation().online_block_size(), 32);
  EXPECT_THAT(Get("a"), HasCode(absl::StatusCode::kNotFound));
  // A job that is created has none.
  request.set_validate_only(false);
  ASSERT_OK_AND_ASSIGN(job, Create(request));
  EXPECT_FALSE(job.has_preflight());
}

// One worker that can run it is enough, whichever is asked first.
TEST_F(CoordinatorJobsTest, AJobThatOneOfManyWorkersTakesIsAccepted) {
  const auto small = NewWorker("w1");
  const auto other = NewWorker("w2");
  const auto large = NewWorker("w3");
  small->on_validate = [](const auto&, auto*) {
    absl::Status refused = absl::FailedPreconditionError("100 bytes are needed, w1 has 80");
    SetErrorInfo(refused, "INSUFFICIENT_MEMORY");
    return ToGrpcStatus(refused);
  };
  other->on_validate = [](const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "head_dim 80");
  };
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.set_validate_only(true);
  ASSERT_OK_AND_ASSIGN(const QuantizationJob validated, Create(request));
  EXPECT_EQ(validated.preflight().worker(), "workers/w3");
  ASSERT_OK(Create(NewJob("a")));

  ASSERT_OK(large->Deregister());
  const absl::Status refused = Create(NewJob("b")).status();
  EXPECT_THAT(refused,
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       "no worker can run the job: workers/w1: 100 bytes are needed, w1 has 80; "
                       "workers/w2: head_dim 80"));
  EXPECT_EQ(ErrorReason(refused), "NO_SUITABLE_WORKER");
  EXPECT_THAT(Get("b"), HasCode(absl::StatusCode::kNotFound)) << "nothing was stored";
}

TEST_F(CoordinatorJobsTest, JobIsQueuedWhenTheWorkerIsLostDuringTheCheck) {
  const auto worker = NewWorker("w1");
  worker->Vanish();  // still registered, its address refuses
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Create(NewJob("a")));
  EXPECT_EQ(job.state(), QuantizationJob::QUEUED);
}

TEST_F(CoordinatorJobsTest, AWorkerThatIsLostDoesNotEndTheAsking) {
  const auto lost = NewWorker("w1");
  const auto there = NewWorker("w2");
  lost->Vanish();
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.set_validate_only(true);
  ASSERT_OK_AND_ASSIGN(const QuantizationJob validated, Create(request));
  EXPECT_EQ(validated.preflight().worker(), "workers/w2");
  // One that refuses it does not speak for the one that is lost.
  there->on_validate = [](const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "head_dim 80");
  };
  EXPECT_THAT(Create(request),
              StatusIs(absl::StatusCode::kUnavailable,
                       "1 of 2 workers cannot run the job, the others were not asked or gave no "
                       "answer: workers/w2: head_dim 80"));
  EXPECT_OK(Create(NewJob("a")));
  // What is wrong with the job itself is the last word.
  there->on_validate = [](const auto& create, auto*) {
    return ToGrpcStatus(NotFound("source_model", create.job().source_model()));
  };
  EXPECT_THAT(Create(NewJob("b")), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(CoordinatorJobsTest, OfALargeFleetOnlySomeAreAsked) {
  std::atomic<int> n_asked = 0;
  std::vector<std::unique_ptr<FakeWorker>> workers;
  for (int i = 0; i < 10; ++i) {
    workers.push_back(NewWorker("w" + std::to_string(i)));
    workers.back()->on_validate = [&](const auto&, auto*) {
      ++n_asked;
      return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "head_dim 80");
    };
  }
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Create(NewJob("a")));
  EXPECT_EQ(job.state(), QuantizationJob::QUEUED) << "the two others might run it";
  EXPECT_EQ(n_asked, 8);
}

class ShortValidationTest : public CoordinatorJobsTest {
 protected:
  ShortValidationTest() { options_.validation_max = absl::Seconds(2); }
};

TEST_F(ShortValidationTest, WorkersThatHangAreNotWaitedForOneAfterTheOther) {
  absl::Notification is_over;
  std::atomic<int> n_asked = 0;
  std::vector<std::unique_ptr<FakeWorker>> workers;
  for (int i = 0; i < 3; ++i) {
    workers.push_back(NewWorker("w" + std::to_string(i)));
    workers.back()->on_validate = [&](const auto&, auto*) {
      ++n_asked;
      is_over.WaitForNotificationWithTimeout(absl::Seconds(30));
      return grpc::Status::OK;
    };
  }
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Create(NewJob("a")));
  EXPECT_EQ(job.state(), QuantizationJob::QUEUED);
  EXPECT_EQ(n_asked, 1) << "it has used up the time of all";
  is_over.Notify();
}

TEST_F(CoordinatorJobsTest, AWorkerThatHangsHasLessTimeThanTheClient) {
  const auto worker = NewWorker("w");
  std::atomic<bool> is_cancelled = false;
  worker->on_call = [&](const std::string&, grpc::ServerContext* context) {
    is_cancelled = WaitUntil([&] { return context->IsCancelled(); });
  };
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job,
                       Send<QuantizationJob>(jobs_.get(), &JobStub::CreateQuantizationJob,
                                             NewJob("a"), absl::Seconds(3)));
  EXPECT_EQ(job.state(), QuantizationJob::QUEUED);
  EXPECT_TRUE(WaitUntil([&] { return is_cancelled.load(); }));
}

TEST_F(CoordinatorJobsTest, BadFieldsAndTakenNames) {
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.mutable_quantization_job()->mutable_config()->set_bits(5);
  EXPECT_THAT(Create(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("config.bits")));
  ASSERT_OK(Create(NewJob("a")));
  EXPECT_THAT(Create(NewJob("a")), HasCode(absl::StatusCode::kAlreadyExists));
  request = NewJob("b");
  request.mutable_quantization_job()->set_model_name("a-model");
  EXPECT_THAT(Create(request), HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(Get("B!"), HasCode(absl::StatusCode::kInvalidArgument));
}

// Protobuf refuses such a message before any handler sees it.
TEST_F(CoordinatorJobsTest, InvalidUtf8IsInvalidArgument) {
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.mutable_quantization_job()->set_display_name("half a character: \xe2\x82");
  EXPECT_THAT(Create(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  EXPECT_THAT(Get("\xff"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  std::vector<QuantizationJobEvent> events;
  EXPECT_EQ(Watch("\xff", 0, &events).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_OK(Create(NewJob("a"))) << "still alive";
}

TEST_F(CoordinatorJobsTest, RepeatedRequestIsOneJobAcrossARestart) {
  v1::CreateQuantizationJobRequest request = NewJob("");
  request.mutable_quantization_job()->set_model_name("m");
  request.set_request_id("r-1");
  constexpr int kThreads = 20;
  std::vector<std::string> names(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const auto job = Create(request);
      names[i] = job.ok() ? job->name() : job.status().ToString();
    });
  }
  for (std::thread& thread : threads) thread.join();
  Restart();
  names.push_back(Create(request)->name());
  for (const std::string& name : names) EXPECT_EQ(name, names[0]);
  request.mutable_quantization_job()->set_display_name("another body");
  EXPECT_THAT(Create(request), HasCode(absl::StatusCode::kAlreadyExists));
}

TEST_F(CoordinatorJobsTest, ListPagesThroughAll) {
  for (int i = 0; i < 7; ++i) ASSERT_OK(Create(NewJob("j" + std::to_string(i))));
  v1::ListQuantizationJobsRequest request;
  request.set_page_size(3);
  request.set_filter("state=QUEUED");
  std::vector<std::string> names;
  do {
    ASSERT_OK_AND_ASSIGN(const auto page,
                         Send<v1::ListQuantizationJobsResponse>(
                             jobs_.get(), &JobStub::ListQuantizationJobs, request));
    EXPECT_EQ(page.total_size(), 7);
    for (const auto& job : page.quantization_jobs()) names.push_back(job.name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_EQ(names.size(), 7u);
  EXPECT_EQ(names.front(), "quantizationJobs/j6");
  request.set_page_token("garbage");
  EXPECT_THAT(
      Send<v1::ListQuantizationJobsResponse>(jobs_.get(), &JobStub::ListQuantizationJobs, request),
      HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(CoordinatorJobsTest, DeleteOnlyWhatIsOver) {
  ASSERT_OK(Create(NewJob("a")));
  v1::DeleteQuantizationJobRequest request;
  request.set_name("quantizationJobs/a");
  const auto remove = [&] {
    return Send<google::protobuf::Empty>(jobs_.get(), &JobStub::DeleteQuantizationJob, request);
  };
  EXPECT_THAT(remove(), HasCode(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK(Cancel("a"));
  EXPECT_OK(remove());
  EXPECT_THAT(Get("a"), HasCode(absl::StatusCode::kNotFound));
}

// Both forms of a request are looked at by the worker; the first is told that the name is taken,
// by the second.
TEST_F(CoordinatorJobsTest, RepeatedRequestWinsOverTheNameThatItsTwinTook) {
  const auto worker = NewWorker("w1");
  std::atomic<int> n_asked{0};
  std::atomic<bool> is_stored{false};
  worker->on_validate = [&](const auto&, auto*) {
    if (n_asked++ > 0) return grpc::Status::OK;
    EXPECT_TRUE(WaitUntil([&] { return is_stored.load(); }));
    return grpc::Status(grpc::StatusCode::ALREADY_EXISTS, "the model exists");
  };
  v1::CreateQuantizationJobRequest request = NewJob("");
  request.mutable_quantization_job()->set_model_name("m");
  request.set_request_id("r-1");
  absl::StatusOr<QuantizationJob> first;
  std::thread waiting([&] { first = Create(request); });
  EXPECT_TRUE(WaitUntil([&] { return n_asked == 1; }));
  const absl::StatusOr<QuantizationJob> second = Create(request);
  is_stored = true;
  waiting.join();
  ASSERT_OK(second);
  ASSERT_OK(first);
  EXPECT_EQ(first->name(), second->name());
}

TEST_F(CoordinatorJobsTest, ValidateOnlyChecksAlsoUnderAKnownRequestId) {
  v1::CreateQuantizationJobRequest request = NewJob("a");
  request.set_request_id("r-1");
  ASSERT_OK(Create(request));
  request.set_validate_only(true);
  EXPECT_THAT(Create(request), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("taken")));
  request = NewJob("b");
  request.set_request_id("r-1");
  request.set_validate_only(true);
  const auto worker = NewWorker("w1");
  worker->on_validate = [](const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no such checkpoint");
  };
  EXPECT_THAT(Create(request), HasCode(absl::StatusCode::kNotFound));
}

// -- Restart

TEST_F(CoordinatorJobsTest, WorkerRegistersAgainAndGoesOnAfterARestart) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  Restart();
  // The channel needs a moment to find the new process.
  ASSERT_TRUE(WaitUntil([&] { return absl::IsNotFound(worker->Heartbeat(lease).status()); }));
  EXPECT_THAT(worker->Report(lease, QuantizationJob::LOADING, 0.5),
              HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(worker->Register());
  ASSERT_OK_AND_ASSIGN(const auto answer, worker->Heartbeat(lease));
  EXPECT_TRUE(answer.lease_valid());
  ASSERT_OK(worker->Report(lease, QuantizationJob::LOADING, 0.5));
  ASSERT_OK(worker->Succeed(lease));
  ASSERT_OK_AND_ASSIGN(const QuantizationJob job, Get("a"));
  EXPECT_EQ(job.state(), QuantizationJob::SUCCEEDED);
  EXPECT_EQ(job.attempt(), 1);
}

// -- Watch

TEST_F(CoordinatorJobsTest, WatchReplaysThenFollowsAndEnds) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  std::vector<QuantizationJobEvent> events;
  std::thread watcher([&] { EXPECT_TRUE(Watch("a", 0, &events).ok()); });
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(
        worker->Report(lease, QuantizationJob::QUANTIZING, i / 20.0, "layer " + std::to_string(i)));
  }
  ASSERT_OK(worker->Succeed(lease));
  watcher.join();
  ASSERT_EQ(events.size(), 23u);
  for (size_t i = 0; i < events.size(); ++i) EXPECT_EQ(events[i].sequence(), int64_t(i) + 1);
  EXPECT_EQ(events.back().state(), QuantizationJob::SUCCEEDED);

  std::vector<QuantizationJobEvent> rest;
  EXPECT_TRUE(Watch("a", 20, &rest).ok());
  EXPECT_EQ(rest.size(), 3u);
  rest.clear();
  EXPECT_TRUE(Watch("a", 23, &rest).ok()) << "nothing more, and OK";
  EXPECT_TRUE(rest.empty());
  EXPECT_EQ(Watch("a", 24, &rest).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(Watch("missing", 0, &rest).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(Watch("?", 0, &rest).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(CoordinatorJobsTest, WatchIsGaplessAcrossRestarts) {
  auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  std::vector<QuantizationJobEvent> events;
  std::thread watcher([&] {
    // What the client library does: come back with the last sequence until the job is over.
    while (true) {
      const int64_t after = events.empty() ? 0 : events.back().sequence();
      if (Watch("a", after, &events).ok()) break;
    }
  });
  for (int i = 0; i < 30; ++i) {
    if (i % 10 == 5) {
      Stop();
      // The stubs stay: a client does not know of the restart.
      absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options_);
      ASSERT_OK(server);
      server_ = *std::move(server);
      ASSERT_TRUE(WaitUntil([&] { return worker->Register().ok(); }));
    }
    ASSERT_OK(
        worker->Report(lease, QuantizationJob::QUANTIZING, i / 30.0, "layer " + std::to_string(i)));
  }
  ASSERT_OK(worker->Succeed(lease));
  watcher.join();
  ASSERT_EQ(events.size(), 33u);
  for (size_t i = 0; i < events.size(); ++i) EXPECT_EQ(events[i].sequence(), int64_t(i) + 1);
}

class WatchHeartbeatTest : public CoordinatorJobsTest {
 protected:
  WatchHeartbeatTest() { options_.watch_heartbeat = absl::Milliseconds(200); }
};

TEST_F(WatchHeartbeatTest, QuietWatchIsKeptAlive) {
  ASSERT_OK(Create(NewJob("a")));
  grpc::ClientContext context;
  v1::WatchQuantizationJobRequest request;
  request.set_name("a");
  const auto reader = jobs_->WatchQuantizationJob(&context, request);
  QuantizationJobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_FALSE(event.heartbeat());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(reader->Read(&event));
    EXPECT_TRUE(event.heartbeat());
    EXPECT_EQ(event.sequence(), 1) << "repeats the last one";
    EXPECT_EQ(event.state(), QuantizationJob::QUEUED);
  }
  context.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// What a terminal draws after a reconnect comes from heartbeats only.
TEST_F(WatchHeartbeatTest, QuietWatchThatResumesRepeatsTheLastEvent) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  ASSERT_OK(worker->Report(lease, QuantizationJob::QUANTIZING, 0.5, "half"));
  grpc::ClientContext context;
  v1::WatchQuantizationJobRequest request;
  request.set_name("a");
  request.set_after_sequence(3);
  const auto reader = jobs_->WatchQuantizationJob(&context, request);
  QuantizationJobEvent event;
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(reader->Read(&event));
    EXPECT_TRUE(event.heartbeat());
    EXPECT_EQ(event.sequence(), 3);
    EXPECT_EQ(event.state(), QuantizationJob::RUNNING);
    EXPECT_EQ(event.stage(), QuantizationJob::QUANTIZING);
    EXPECT_EQ(event.progress().fraction(), 0.5);
    EXPECT_EQ(event.attempt(), 1);
    EXPECT_EQ(event.message(), "");
  }
  ASSERT_OK(worker->Succeed(lease));
  do {
    ASSERT_TRUE(reader->Read(&event));
  } while (event.heartbeat());
  EXPECT_EQ(event.sequence(), 4);
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_TRUE(reader->Finish().ok());
}

class WatchStallTest : public CoordinatorJobsTest {
 protected:
  WatchStallTest() {
    options_.watch_heartbeat = absl::Milliseconds(200);
    options_.stream_stall_max = absl::Milliseconds(500);
  }
};

TEST_F(WatchStallTest, AWatcherThatTakesNothingIsGivenUp) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  const FakeWorker::Lease lease = worker->MustAcquire();
  // More than gRPC takes for a client that does not read.
  const std::string text(1000, 'x');
  for (int i = 0; i < 150; ++i) {
    ASSERT_OK(worker->Report(lease, QuantizationJob::QUANTIZING, 0.5, absl::StrCat(i, text)));
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // which would let that grow
  const auto stub = v1::QuantizationService::NewStub(grpc::CreateCustomChannel(
      server_->endpoints().at("grpc"), grpc::InsecureChannelCredentials(), arguments));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
  v1::WatchQuantizationJobRequest request;
  request.set_name("a");
  const auto n_given_up = [] {
    return testing::MetricValue(
        "grpc_server_handled_total",
        {R"(grpc_method="WatchQuantizationJob")", R"(grpc_code="ResourceExhausted")"});
  };
  const auto reader = stub->WatchQuantizationJob(&context, request);
  QuantizationJobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_TRUE(WaitUntil([&] { return n_given_up() > 0; }));
  while (reader->Read(&event)) {
  }
  EXPECT_LT(event.sequence(), 150) << "what it had not taken is gone";
  const absl::Status status = FromGrpcStatus(reader->Finish());
  EXPECT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(status), "SLOW_READER");
}

TEST_F(CoordinatorJobsTest, WatchWithABadNameEchoesItsRequestId) {
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "my-watch");
  v1::WatchQuantizationJobRequest request;
  request.set_name("?");
  const auto reader = jobs_->WatchQuantizationJob(&context, request);
  QuantizationJobEvent event;
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const auto it = context.GetServerInitialMetadata().find("x-request-id");
  ASSERT_NE(it, context.GetServerInitialMetadata().end());
  EXPECT_EQ(std::string(it->second.data(), it->second.size()), "my-watch");
}

TEST_F(CoordinatorJobsTest, HundredWatchersOfOneJob) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  constexpr int kWatchers = 100;
  std::vector<std::vector<QuantizationJobEvent>> events(kWatchers);
  std::vector<std::thread> watchers;
  for (int i = 0; i < kWatchers; ++i) {
    watchers.emplace_back([&, i] {
      // More streams than one connection carries.
      const auto channel = MakeChannel(server_->endpoints().at("grpc"), i / 50 + 1);
      const auto stub = v1::QuantizationService::NewStub(channel);
      grpc::ClientContext context;
      v1::WatchQuantizationJobRequest request;
      request.set_name("a");
      const auto reader = stub->WatchQuantizationJob(&context, request);
      QuantizationJobEvent event;
      while (reader->Read(&event)) events[i].push_back(event);
      EXPECT_TRUE(reader->Finish().ok());
    });
  }
  const FakeWorker::Lease lease = worker->MustAcquire();
  for (int i = 0; i < 10; ++i) {
    ASSERT_OK(worker->Report(lease, QuantizationJob::QUANTIZING, i / 10.0, std::to_string(i)));
  }
  ASSERT_OK(worker->Succeed(lease));
  for (std::thread& watcher : watchers) watcher.join();
  for (const auto& seen : events) EXPECT_EQ(seen.size(), 13u);
}

// -- Stopping

TEST_F(CoordinatorJobsTest, StopEndsWatchesAndWaitingWorkersAtOnce) {
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_OK(Cancel("a"));
  ASSERT_OK(Create(NewJob("b")));
  worker->MustAcquire();
  const auto idle = NewWorker("w2");
  grpc::ClientContext context;
  v1::WatchQuantizationJobRequest request;
  request.set_name("b");
  const auto reader = jobs_->WatchQuantizationJob(&context, request);
  QuantizationJobEvent event;
  ASSERT_TRUE(reader->Read(&event));
  std::thread waiting([&] {
    // An error, so that the worker does not ask again at once.
    const absl::Status stopping = idle->Acquire(absl::Seconds(30)).status();
    EXPECT_THAT(stopping, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(stopping), "STOPPING");
  });
  // Nothing shows from outside that a call waits; sooner, the test is only weaker.
  Pause(absl::Milliseconds(300));
  const absl::Time start = absl::Now();
  server_->Stop(absl::Seconds(20));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  waiting.join();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(CoordinatorJobsTest, DataFolderIsUsedByOneCoordinator) {
  ServerOptions second = options_;
  second.grpc_port = second.internal_port = second.http_port = second.metrics_port = 0;
  EXPECT_THAT(Server::Start(second).status(), HasCode(absl::StatusCode::kFailedPrecondition));
}

// Whether this machine has an IPv6 loopback.
bool HasIpv6() {
  const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const bool is_there = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  close(fd);
  return is_there;
}

class Ipv6Test : public CoordinatorJobsTest, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    if (!HasIpv6()) GTEST_SKIP() << "no IPv6 loopback here";
    const absl::Status http = HttpServer::Start({.host = GetParam()}).status();
    if (absl::IsUnimplemented(http)) GTEST_SKIP() << http;
    options_.host = GetParam();
    CoordinatorJobsTest::SetUp();
  }
};
INSTANTIATE_TEST_SUITE_P(WithAndWithoutBrackets, Ipv6Test, ::testing::Values("::1", "[::1]"));

TEST_P(Ipv6Test, ClientsAndWorkersFindTheirPorts) {
  for (const auto& [name, address] : server_->endpoints()) {
    EXPECT_THAT(address, StartsWith("[::1]:")) << name;
  }
  const auto worker = NewWorker("w1");
  ASSERT_OK(Create(NewJob("a")));
  ASSERT_OK(worker->Succeed(worker->MustAcquire()));
}

TEST_F(CoordinatorJobsTest, TakenPortIsAnError) {
  ServerOptions second = options_;
  second.data_dir = dir_ / "other";
  EXPECT_THAT(Server::Start(second).status(), HasCode(absl::StatusCode::kUnavailable));
}

}  // namespace
}  // namespace walsh
