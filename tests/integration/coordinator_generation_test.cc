// Generation and models over the wire: a real coordinator between a client and scripted workers.

#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/integration/coordinator_fixture.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using v1::GenerateStreamResponse;
using v1::Model;
using ::walsh::testing::FakeWorker;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::Pause;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

class CoordinatorGenerationTest : public CoordinatorFixture {
 protected:
  static v1::GenerateRequest Prompt(const std::string& model) {
    v1::GenerateRequest request;
    request.set_model(model);
    request.set_prompt("Once");
    return request;
  }
  static GenerateStreamResponse Delta(const std::string& text) {
    GenerateStreamResponse response;
    response.mutable_delta()->set_text(text);
    return response;
  }
  absl::StatusOr<v1::GenerateResponse> Generate(const v1::GenerateRequest& request,
                                                absl::Duration timeout = absl::Seconds(20)) {
    return Send<v1::GenerateResponse>(generation_.get(), &GenerationStub::Generate, request,
                                      timeout);
  }
  absl::StatusOr<Model> GetModel(const std::string& name) {
    v1::GetModelRequest request;
    request.set_name(name);
    return Send<Model>(models_.get(), &ModelStub::GetModel, request);
  }
  absl::StatusOr<Model> Load(const std::string& name) {
    v1::LoadModelRequest request;
    request.set_name(name);
    return Send<Model>(models_.get(), &ModelStub::LoadModel, request);
  }
  absl::StatusOr<Model> Unload(const std::string& name) {
    v1::UnloadModelRequest request;
    request.set_name(name);
    return Send<Model>(models_.get(), &ModelStub::UnloadModel, request);
  }
  absl::Status Delete(const std::string& name, bool force) {
    v1::DeleteModelRequest request;
    request.set_name(name);
    request.set_force(force);
    return Send<google::protobuf::Empty>(models_.get(), &ModelStub::DeleteModel, request).status();
  }
  absl::StatusOr<v1::ModelAlias> SetAlias(const std::string& alias, const std::string& model,
                                          bool force = false) {
    v1::SetModelAliasRequest request;
    request.set_alias(alias);
    request.set_model(model);
    request.set_force(force);
    return Send<v1::ModelAlias>(models_.get(), &ModelStub::SetModelAlias, request);
  }
  absl::Status DeleteAlias(const std::string& alias) {
    v1::DeleteModelAliasRequest request;
    request.set_alias(alias);
    return Send<google::protobuf::Empty>(models_.get(), &ModelStub::DeleteModelAlias, request)
        .status();
  }
  // The text of all deltas, and the status.
  absl::Status ReadAll(const v1::GenerateRequest& request, std::string* text) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    const auto reader = generation_->GenerateStream(&context, request);
    GenerateStreamResponse response;
    while (reader->Read(&response)) *text += response.delta().text();
    return FromGrpcStatus(reader->Finish());
  }
};

TEST_F(CoordinatorGenerationTest, StreamArrivesWholeAndInOrder) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_stream = [](auto*, const auto&, auto* writer) {
    for (int i = 0; i < 2000; ++i) writer->Write(Delta(std::to_string(i) + " "));
    return grpc::Status::OK;
  };
  std::string text;
  EXPECT_OK(ReadAll(Prompt("models/m"), &text));
  std::string expected;
  for (int i = 0; i < 2000; ++i) expected += std::to_string(i) + " ";
  EXPECT_EQ(text, expected);
}

TEST_F(CoordinatorGenerationTest, UnaryCallsArePassedOn) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::string request_id;
  worker->on_generate = [&](auto*, const auto& request, auto* response) {
    request_id = request.request_id();
    response->set_text("upon a time");
    return grpc::Status::OK;
  };
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse response, Generate(Prompt("m")));
  EXPECT_EQ(response.text(), "upon a time");
  EXPECT_NE(request_id, "") << "drawn by the coordinator";

  v1::TokenizeRequest tokenize;
  tokenize.set_model("m");
  tokenize.set_text("ab");
  ASSERT_OK_AND_ASSIGN(
      const auto tokens,
      Send<v1::TokenizeResponse>(generation_.get(), &GenerationStub::Tokenize, tokenize));
  EXPECT_EQ(tokens.token_ids_size(), 2);
  v1::DetokenizeRequest detokenize;
  detokenize.set_model("m");
  *detokenize.mutable_token_ids() = tokens.token_ids();
  ASSERT_OK_AND_ASSIGN(
      const auto back,
      Send<v1::DetokenizeResponse>(generation_.get(), &GenerationStub::Detokenize, detokenize));
  EXPECT_EQ(back.text(), "ab");
}

TEST_F(CoordinatorGenerationTest, BadRequestsDoNotReachAWorker) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_generate = [](auto*, const auto&, auto*) -> grpc::Status {
    ADD_FAILURE() << "must not be called";
    return grpc::Status::OK;
  };
  v1::GenerateRequest request = Prompt("m");
  request.mutable_sampling()->set_temperature(3);
  EXPECT_THAT(Generate(request),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("temperature")));
  std::string text;
  EXPECT_THAT(ReadAll(request, &text), HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(CoordinatorGenerationTest, EveryWayToHaveNoModel) {
  EXPECT_THAT(Generate(Prompt("m")), HasCode(absl::StatusCode::kNotFound));
  auto worker = NewWorkerWithModel("w1", "m");
  worker->SetModel("models/m", Model::LOADING);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_EQ(ErrorReason(Generate(Prompt("m")).status()), "MODEL_LOADING");
  EXPECT_THAT(Generate(Prompt("m")), HasCode(absl::StatusCode::kUnavailable));
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_THAT(Generate(Prompt("m")), HasCode(absl::StatusCode::kFailedPrecondition));
  worker->SetModel("models/m", Model::READY);
  worker->set_draining(true);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_THAT(Generate(Prompt("m")), HasCode(absl::StatusCode::kUnavailable));
  ASSERT_OK(worker->Deregister());
  EXPECT_EQ(ErrorReason(Generate(Prompt("m")).status()), "NO_WORKER");
  std::string text;
  EXPECT_THAT(ReadAll(Prompt("m"), &text), HasCode(absl::StatusCode::kUnavailable));
}

// How a worker refuses that leaves, or unloads the model.
class LeavingWorkerTest : public CoordinatorGenerationTest,
                          public ::testing::WithParamInterface<const char*> {
 protected:
  static grpc::Status Leaving(const std::string& reason = GetParam()) {
    absl::Status status = absl::UnavailableError("leaving");
    SetErrorInfo(status, reason);
    return ToGrpcStatus(status);
  }
};
INSTANTIATE_TEST_SUITE_P(Reasons, LeavingWorkerTest,
                         ::testing::Values("WORKER_STOPPING", "MODEL_UNLOADING"));

TEST_P(LeavingWorkerTest, ARequestThatItRefusesGoesToTheNextOne) {
  std::vector<std::unique_ptr<FakeWorker>> workers;
  std::atomic<int> n_refusals = 0;
  for (const char* id : {"w1", "w2", "w3"}) {
    workers.push_back(NewWorkerWithModel(id, "m"));
    const bool is_leaving = id != std::string("w3");
    workers.back()->on_generate = [&, is_leaving](auto*, const auto&, auto* response) {
      if (is_leaving) ++n_refusals;
      if (is_leaving) return Leaving();
      response->set_text("here");
      return grpc::Status::OK;
    };
    workers.back()->on_stream = [&, is_leaving](auto*, const auto&, auto* writer) {
      if (is_leaving) ++n_refusals;
      if (is_leaving) return Leaving();
      writer->Write(Delta("here"));
      return grpc::Status::OK;
    };
  }
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse response, Generate(Prompt("m")));
  EXPECT_EQ(response.text(), "here");
  std::string text;
  EXPECT_OK(ReadAll(Prompt("m"), &text));
  EXPECT_EQ(text, "here");
  EXPECT_EQ(n_refusals, 4);
  ASSERT_OK(workers.back()->Deregister());
  n_refusals = 0;
  EXPECT_EQ(ErrorReason(Generate(Prompt("m")).status()), GetParam());
  EXPECT_EQ(n_refusals, 2) << "each of those that remain is asked once";
}

// Its beginning has been passed on.
TEST_P(LeavingWorkerTest, AStreamThatHasBegunDoesNotGoElsewhere) {
  const auto leaving = NewWorkerWithModel("w1", "m");
  const auto other = NewWorkerWithModel("w2", "m");
  leaving->on_stream = [&](auto*, const auto&, auto* writer) {
    writer->Write(Delta("Once"));
    return Leaving();
  };
  std::string text;
  EXPECT_EQ(ErrorReason(ReadAll(Prompt("m"), &text)), GetParam());
  EXPECT_EQ(text, "Once");
}

TEST_P(LeavingWorkerTest, OtherRefusalsAreTheClients) {
  const auto broken = NewWorkerWithModel("w1", "m");
  const auto other = NewWorkerWithModel("w2", "m");
  broken->on_generate = [&](auto*, const auto&, auto*) { return Leaving("DEVICE_BROKEN"); };
  EXPECT_EQ(ErrorReason(Generate(Prompt("m")).status()), "DEVICE_BROKEN");
}

// What is on its way to a worker has arrived when it is told that nothing more comes.
TEST_F(CoordinatorGenerationTest, ADrainIsAnsweredWhenWhatWasSentHasEndedOrArrived) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<bool> is_sent = false, may_end = false;
  worker->on_generate = [&](auto*, const auto&, auto*) {
    is_sent = true;
    EXPECT_TRUE(WaitUntil([&] { return may_end.load(); }));
    return grpc::Status::OK;
  };
  std::thread client([&] { EXPECT_OK(Generate(Prompt("m"))); });
  ASSERT_TRUE(WaitUntil([&] { return is_sent.load(); }));
  const absl::Time start = absl::Now();
  std::thread drain([&] { EXPECT_OK(worker->Drain()); });
  ASSERT_TRUE(WaitUntil([&] { return GetModel("m")->state() == Model::DRAINING; }));
  EXPECT_EQ(ErrorReason(Generate(Prompt("m")).status()), "MODEL_DRAINING");
  EXPECT_THAT(Load("m"), HasCode(absl::StatusCode::kUnavailable)) << "not on a worker that leaves";
  drain.join();
  EXPECT_GE(absl::Now() - start, absl::Seconds(1)) << "the request still runs";
  may_end = true;
  client.join();
  const absl::Time again = absl::Now();
  EXPECT_OK(worker->Drain());
  EXPECT_LT(absl::Now() - again, absl::Seconds(1)) << "nothing is on its way";
}

class SilentWorkerTest : public CoordinatorGenerationTest {
 protected:
  SilentWorkerTest() { UseShortLeases(); }
};

TEST_F(SilentWorkerTest, IsOfflineAndItsModelsAreNotReady) {
  const auto worker = NewWorkerWithModel("w1", "m");
  ASSERT_TRUE(WaitUntil([&] { return GetModel("m")->state() == Model::UNLOADED; }));
  ASSERT_OK_AND_ASSIGN(const auto workers,
                       Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                                     v1::ListWorkersRequest()));
  ASSERT_EQ(workers.workers_size(), 1);
  EXPECT_EQ(workers.workers(0).state(), v1::Worker::OFFLINE);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_EQ(GetModel("m")->state(), Model::READY);
}

TEST_F(CoordinatorGenerationTest, LeastBusyWorkerIsAsked) {
  const auto busy = NewWorkerWithModel("w1", "m");
  const auto idle = NewWorkerWithModel("w2", "m");
  busy->set_load(3, 2);
  ASSERT_OK(busy->Heartbeat());
  std::atomic<int> n_idle{0};
  idle->on_generate = [&](auto*, const auto&, auto*) {
    ++n_idle;
    return grpc::Status::OK;
  };
  for (int i = 0; i < 3; ++i) ASSERT_OK(Generate(Prompt("m")));
  EXPECT_EQ(n_idle, 3);
  idle->set_load(4, 2);
  ASSERT_OK(idle->Heartbeat());
  EXPECT_THAT(Generate(Prompt("m")), HasCode(absl::StatusCode::kUnimplemented)) << "w1 now";
}

// -- Cancellation, deadlines, slow readers, dead workers

TEST_F(CoordinatorGenerationTest, CancelReachesTheWorker) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<bool> saw_cancel{false};
  worker->on_stream = [&](grpc::ServerContext* context, const auto&, auto* writer) {
    while (!context->IsCancelled()) {
      writer->Write(Delta("x"));
      Pause(absl::Milliseconds(5));
    }
    saw_cancel = true;
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  context.TryCancel();
  EXPECT_TRUE(WaitUntil([&] { return saw_cancel.load(); }, absl::Seconds(5)));
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(CoordinatorGenerationTest, CancelOfAUnaryCallReachesTheWorker) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<bool> is_running{false};
  std::atomic<bool> saw_cancel{false};
  worker->on_generate = [&](grpc::ServerContext* context, const auto&, auto*) {
    is_running = true;
    saw_cancel = WaitUntil([&] { return context->IsCancelled(); });
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  std::thread canceller([&] {
    EXPECT_TRUE(WaitUntil([&] { return is_running.load(); }));
    context.TryCancel();
  });
  v1::GenerateResponse response;
  EXPECT_EQ(generation_->Generate(&context, Prompt("m"), &response).error_code(),
            grpc::StatusCode::CANCELLED);
  canceller.join();
  EXPECT_TRUE(WaitUntil([&] { return saw_cancel.load(); }));
}

TEST_F(CoordinatorGenerationTest, WorkerGetsTheDeadlineLessFivePercent) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<double> seconds{0};
  worker->on_generate = [&](grpc::ServerContext* context, const auto&, auto*) {
    seconds = absl::ToDoubleSeconds(absl::FromChrono(context->deadline()) - absl::Now());
    return grpc::Status::OK;
  };
  ASSERT_OK(Generate(Prompt("m"), absl::Seconds(100)));
  EXPECT_NEAR(seconds, 95, 2);
  ASSERT_OK(Generate(Prompt("m"), absl::Hours(100)));
  EXPECT_NEAR(seconds, 3600 * 0.95, 15) << "gRPC sends three digits";
  grpc::ClientContext without_deadline;
  v1::GenerateResponse response;
  ASSERT_TRUE(generation_->Generate(&without_deadline, Prompt("m"), &response).ok());
  EXPECT_NEAR(seconds, 600, 2);
}

// What a worker may take of a client that named no deadline, or one beyond reason.
TEST_F(CoordinatorGenerationTest, EveryCallToAWorkerHasADeadline) {
  const auto worker = NewWorker("w1");
  std::map<std::string, double> seconds;  // by method, of the last call
  worker->on_call = [&](const std::string& method, grpc::ServerContext* context) {
    seconds[method] = absl::ToDoubleSeconds(absl::FromChrono(context->deadline()) - absl::Now());
  };
  worker->on_generate = [](auto*, const auto&, auto*) { return grpc::Status::OK; };
  const auto call = [](auto* stub, auto method, const auto& request, auto response,
                       absl::Duration timeout) {
    grpc::ClientContext context;
    if (timeout != absl::InfiniteDuration()) {
      context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    }
    EXPECT_OK(FromGrpcStatus((stub->*method)(&context, request, &response)));
  };
  const auto call_all = [&](const std::string& id, absl::Duration timeout) {
    worker->SetModel("models/" + id, Model::READY);
    EXPECT_OK(worker->Register());
    v1::TokenizeRequest tokenize;
    tokenize.set_model(id);
    tokenize.set_text("a");
    v1::DetokenizeRequest detokenize;
    detokenize.set_model(id);
    v1::LoadModelRequest load;
    load.set_name(id);
    v1::UnloadModelRequest unload;
    unload.set_name(id);
    v1::DeleteModelRequest remove;
    remove.set_name(id);
    call(generation_.get(), &GenerationStub::Generate, Prompt(id), v1::GenerateResponse(), timeout);
    call(generation_.get(), &GenerationStub::Tokenize, tokenize, v1::TokenizeResponse(), timeout);
    call(generation_.get(), &GenerationStub::Detokenize, detokenize, v1::DetokenizeResponse(),
         timeout);
    call(models_.get(), &ModelStub::UnloadModel, unload, Model(), timeout);
    call(models_.get(), &ModelStub::LoadModel, load, Model(), timeout);
    call(models_.get(), &ModelStub::UnloadModel, unload, Model(), timeout);
    call(models_.get(), &ModelStub::DeleteModel, remove, google::protobuf::Empty(), timeout);
    call(jobs_.get(), &JobStub::CreateQuantizationJob, NewJob(id), v1::QuantizationJob(), timeout);
  };
  const auto expect = [&](double generation, double tokens, double moves, double validation) {
    const std::pair<const char*, double> expected[] = {
        {"Generate", generation},   {"Tokenize", tokens},   {"Detokenize", tokens},
        {"LoadModel", moves},       {"UnloadModel", moves}, {"DeleteModel", moves},
        {"ValidateJob", validation}};
    for (const auto& [method, value] : expected) {
      EXPECT_LE(seconds[method], 1.01 * value) << method << "; gRPC sends three digits";
      EXPECT_GE(seconds[method], 0.9 * value - 2) << method;
    }
  };
  call_all("a", absl::InfiniteDuration());
  expect(600, 10, 600, 10);
  call_all("b", absl::Hours(100));
  expect(3420, 3420, 3420, 10);
  call_all("c", absl::Seconds(8));
  expect(7.6, 7.6, 7.6, 7.6);
}

TEST_F(CoordinatorGenerationTest, AWorkerThatNeverAnswersIsLeftAtTheDeadline) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<int> n_cancelled = 0;
  worker->on_call = [&](const std::string&, grpc::ServerContext* context) {
    n_cancelled += WaitUntil([&] { return context->IsCancelled(); }) ? 1 : 0;
  };
  v1::TokenizeRequest request;
  request.set_model("m");
  request.set_text("a");
  const absl::Time start = absl::Now();
  EXPECT_THAT(Send<v1::TokenizeResponse>(generation_.get(), &GenerationStub::Tokenize, request,
                                         absl::Seconds(1)),
              HasCode(absl::StatusCode::kDeadlineExceeded));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE(WaitUntil([&] { return n_cancelled == 1; }));
}

TEST_F(CoordinatorGenerationTest, PassedDeadlineStopsTheWorker) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<bool> stopped{false};
  worker->on_stream = [&](grpc::ServerContext* context, const auto&, auto* writer) {
    writer->Write(Delta("x"));
    stopped = WaitUntil([&] { return context->IsCancelled(); });
    return grpc::Status::CANCELLED;
  };
  // A first stream, so that both connections are there when the deadline begins to run.
  {
    grpc::ClientContext context;
    const auto reader = generation_->GenerateStream(&context, Prompt("m"));
    GenerateStreamResponse response;
    ASSERT_TRUE(reader->Read(&response));
    context.TryCancel();
    EXPECT_TRUE(WaitUntil([&] { return stopped.exchange(false); }));
  }
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(3)));
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response)) << "the worker has it";
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(WaitUntil([&] { return stopped.load(); }));
}

TEST_F(CoordinatorGenerationTest, DeadWorkerIsUnavailableOnceAndNamesNoHost) {
  auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<int> n_written{0};
  worker->on_stream = [&](grpc::ServerContext* context, const auto&, auto* writer) {
    for (; n_written < 5; ++n_written) writer->Write(Delta("x"));
    EXPECT_TRUE(WaitUntil([&] { return context->IsCancelled(); }));
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  std::string text;
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(reader->Read(&response));
    text += response.delta().text();
  }
  std::thread killer([&] { worker->Vanish(); });
  while (reader->Read(&response)) text += response.delta().text();
  killer.join();
  const absl::Status status = FromGrpcStatus(reader->Finish());
  EXPECT_EQ(text, "xxxxx");
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, Not(HasSubstr("127.0.0.1"))));
  // And before it was asked at all.
  EXPECT_THAT(Generate(Prompt("m")),
              StatusIs(absl::StatusCode::kUnavailable, Not(HasSubstr("127.0.0.1"))));
}

class SlowReaderTest : public CoordinatorGenerationTest {
 protected:
  SlowReaderTest() { options_.stream_stall_max = absl::Seconds(1); }
};

// A reader that stops reading slows its worker down, holds a bounded number of messages, is told
// so, and does not disturb another stream.
TEST_F(SlowReaderTest, StalledReaderIsGivenUp) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<int> n_written{0};
  std::atomic<bool> stopped{false};
  worker->on_stream = [&](grpc::ServerContext* context, const auto& request, auto* writer) {
    if (request.prompt() == "fast") {
      for (int i = 0; i < 100; ++i) writer->Write(Delta("y"));
      return grpc::Status::OK;
    }
    const std::string large(60'000, 'x');
    while (!context->IsCancelled() && writer->Write(Delta(large))) ++n_written;
    stopped = true;
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  v1::GenerateRequest fast = Prompt("m");
  fast.set_prompt("fast");
  std::string text;
  EXPECT_OK(ReadAll(fast, &text));
  EXPECT_EQ(text.size(), 100u);
  EXPECT_TRUE(WaitUntil([&] { return stopped.load(); })) << "the worker is freed";
  // Our buffer and what two connections take, whose windows gRPC lets grow to 16 MiB, on both ends.
  constexpr int kWindowMessages = (16 << 20) / 60'000;
  EXPECT_LT(n_written, limits::kStreamChunksMax + 4 * kWindowMessages);
  while (reader->Read(&response)) {
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  EXPECT_THAT(status, HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ErrorReason(status), "SLOW_READER");
}

// Pauses in which the stall is looked at, and a limit that a busy machine does not reach.
class PausingReaderTest : public CoordinatorGenerationTest {
 protected:
  PausingReaderTest() { options_.stream_stall_max = absl::Seconds(8); }
};

TEST_F(PausingReaderTest, GetsEverything) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_stream = [&](auto*, const auto&, auto* writer) {
    const std::string large(60'000, 'x');
    for (int i = 0; i < 300; ++i) writer->Write(Delta(large));
    return grpc::Status::OK;
  };
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  int n = 0;
  while (reader->Read(&response)) {
    if (n++ % 100 == 0) Pause(options_.stream_stall_max / 6);
  }
  EXPECT_EQ(n, 300);
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(CoordinatorGenerationTest, StopEndsCallsAfterItsTimeoutAndSaysWhy) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_stream = [&](grpc::ServerContext* context, const auto&, auto* writer) {
    writer->Write(Delta("x"));
    EXPECT_TRUE(WaitUntil([&] { return context->IsCancelled(); }));
    return grpc::Status::CANCELLED;
  };
  std::atomic<bool> is_unary_sent = false;
  worker->on_generate = [&](grpc::ServerContext* context, const auto&, auto*) {
    is_unary_sent = true;
    EXPECT_TRUE(WaitUntil([&] { return context->IsCancelled(); }));
    return grpc::Status::CANCELLED;
  };
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  absl::Status unary;
  std::thread unary_client([&] { unary = Generate(Prompt("m")).status(); });
  EXPECT_TRUE(WaitUntil([&] { return is_unary_sent.load(); }));
  const absl::Time start = absl::Now();
  Stop(absl::Milliseconds(500));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  unary_client.join();
  EXPECT_FALSE(reader->Read(&response));
  for (const absl::Status& ended : {FromGrpcStatus(reader->Finish()), unary}) {
    EXPECT_THAT(ended, HasCode(absl::StatusCode::kUnavailable));
    EXPECT_EQ(ErrorReason(ended), "STOPPING");
  }
}

TEST_F(CoordinatorGenerationTest, StopLetsRunningStreamsFinish) {
  const auto worker = NewWorkerWithModel("w1", "m");
  std::atomic<bool> may_end{false};
  worker->on_stream = [&](auto*, const auto&, auto* writer) {
    writer->Write(Delta("begin "));
    EXPECT_TRUE(WaitUntil([&] { return may_end.load(); }));
    writer->Write(Delta("end"));
    return grpc::Status::OK;
  };
  grpc::ClientContext context;
  const auto reader = generation_->GenerateStream(&context, Prompt("m"));
  GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  std::thread stopping([&] { server_->Stop(absl::Seconds(20)); });
  const auto is_refused = [&] {
    return !Send<v1::ListWorkersResponse>(models_.get(), &ModelStub::ListWorkers,
                                          v1::ListWorkersRequest(), absl::Milliseconds(200))
                .ok();
  };
  EXPECT_TRUE(WaitUntil(is_refused)) << "nothing new is taken";
  may_end = true;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.delta().text(), "end");
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_TRUE(reader->Finish().ok());
  stopping.join();
}

// -- Models

TEST_F(CoordinatorGenerationTest, LoadUnloadDelete) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  ASSERT_OK_AND_ASSIGN(Model model, Load("models/m"));
  EXPECT_EQ(model.state(), Model::READY);
  EXPECT_EQ(model.worker(), "workers/w1");
  EXPECT_OK(Load("m")) << "loading a loaded model";
  EXPECT_THAT(Delete("m", /*force=*/false), HasCode(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK_AND_ASSIGN(model, Unload("m"));
  EXPECT_EQ(model.state(), Model::UNLOADED);
  EXPECT_OK(Unload("m")) << "unloading an unloaded model";
  EXPECT_OK(Delete("m", /*force=*/false));
  EXPECT_FALSE(worker->ModelState("models/m").has_value());
  EXPECT_THAT(GetModel("m"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Load("m"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(Delete("m", true), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(CoordinatorGenerationTest, ForcedDeleteUnloadsFirstAndLateHeartbeatsDoNotBringItBack) {
  const auto worker = NewWorkerWithModel("w1", "m");
  EXPECT_OK(Delete("m", /*force=*/true));
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_THAT(GetModel("m"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(CoordinatorGenerationTest, FailedLoadKeepsItsReason) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  worker->on_load = [](auto*, const std::string&) {
    absl::Status damaged = absl::DataLossError("model.safetensors: SHA-256 differs");
    SetErrorInfo(damaged, "ARTIFACT_DAMAGED");
    return ToGrpcStatus(damaged);
  };
  const absl::Status status = Load("m").status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("SHA-256")));
  EXPECT_EQ(ErrorReason(status), "ARTIFACT_DAMAGED");
}

TEST_F(CoordinatorGenerationTest, FailedMovesLeaveTheStateThatTheWorkerTold) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_unload = [](const std::string&) {
    return grpc::Status(grpc::StatusCode::INTERNAL, "cannot unload");
  };
  EXPECT_THAT(Unload("m"), HasCode(absl::StatusCode::kInternal));
  EXPECT_EQ(GetModel("m")->state(), Model::READY) << "as before";
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  // The heartbeat overtakes the answer.
  worker->on_load = [&](auto*, const std::string& name) {
    worker->SetModel(name, Model::FAILED);
    EXPECT_OK(worker->Heartbeat());
    return grpc::Status(grpc::StatusCode::DATA_LOSS, "damaged");
  };
  EXPECT_THAT(Load("m"), HasCode(absl::StatusCode::kDataLoss));
  EXPECT_EQ(GetModel("m")->state(), Model::FAILED);
}

// A worker whose loads end with their call only.
class HangingLoadTest : public CoordinatorGenerationTest {
 protected:
  void SetUp() override {
    CoordinatorGenerationTest::SetUp();
    worker_ = NewWorkerWithModel("w1", "m");
    worker_->SetModel("models/m", Model::UNLOADED);
    ASSERT_OK(worker_->Heartbeat());
    worker_->on_load = [this](grpc::ServerContext* context, const std::string&) {
      is_loading_ = true;
      is_cancelled_ = WaitUntil([&] { return context->IsCancelled(); });
      return grpc::Status::CANCELLED;
    };
  }

  std::unique_ptr<FakeWorker> worker_;
  std::atomic<bool> is_loading_{false};
  std::atomic<bool> is_cancelled_{false};
};

TEST_F(HangingLoadTest, CancelledLoadReachesTheWorker) {
  v1::LoadModelRequest request;
  request.set_name("m");
  grpc::ClientContext context;
  std::thread canceller([&] {
    EXPECT_TRUE(WaitUntil([&] { return is_loading_.load(); }));
    context.TryCancel();
  });
  Model model;
  EXPECT_EQ(models_->LoadModel(&context, request, &model).error_code(),
            grpc::StatusCode::CANCELLED);
  canceller.join();
  EXPECT_TRUE(WaitUntil([&] { return is_cancelled_.load(); }));
  EXPECT_EQ(GetModel("m")->state(), Model::LOADING) << "until the worker says otherwise";
}

TEST_F(HangingLoadTest, StopDoesNotWaitForIt) {
  absl::Status status;
  std::thread loading([&] { status = Load("m").status(); });
  EXPECT_TRUE(WaitUntil([&] { return is_loading_.load(); }));
  const absl::Time start = absl::Now();
  Stop(absl::Milliseconds(500));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10)) << "the load's deadline is 20 s";
  loading.join();
  EXPECT_FALSE(status.ok());
  EXPECT_TRUE(WaitUntil([&] { return is_cancelled_.load(); }));
}

TEST_F(CoordinatorGenerationTest, ModelsSurviveTheirWorkerAndARestart) {
  auto worker = NewWorkerWithModel("w1", "m");
  ASSERT_OK(worker->Deregister());
  Restart();
  EXPECT_EQ(GetModel("m")->state(), Model::UNLOADED);
  EXPECT_THAT(Load("m"), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_THAT(Delete("m", /*force=*/false), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_OK(Delete("m", /*force=*/true));
}

TEST_F(CoordinatorGenerationTest, ListModelsPages) {
  const auto worker = NewWorkerWithModel("w1", "a");
  for (const char* name : {"models/b", "models/c", "models/d", "models/e"}) {
    worker->SetModel(name, Model::UNLOADED);
  }
  ASSERT_OK(worker->Heartbeat());
  // They are stored after the heartbeat was answered, in their order.
  ASSERT_TRUE(WaitUntil([&] { return GetModel("e").ok(); }));
  v1::ListModelsRequest request;
  request.set_page_size(2);
  std::vector<std::string> names;
  do {
    ASSERT_OK_AND_ASSIGN(const auto page, Send<v1::ListModelsResponse>(
                                              models_.get(), &ModelStub::ListModels, request));
    for (const Model& model : page.models()) names.push_back(model.name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_EQ(names,
            (std::vector<std::string>{"models/a", "models/b", "models/c", "models/d", "models/e"}));
}

// -- Aliases

TEST_F(CoordinatorGenerationTest, AnAliasIsServedByTheModelThatItPointsAt) {
  const auto worker = NewWorkerWithModel("w1", "a");
  worker->SetModel("models/b", Model::READY);
  ASSERT_OK(worker->Heartbeat());
  ASSERT_TRUE(WaitUntil([&] { return GetModel("b").ok(); }));
  worker->on_generate = [](auto*, const auto& request, auto* response) {
    response->set_model(request.model());
    return grpc::Status::OK;
  };
  worker->on_stream = [](auto*, const auto& request, auto* writer) {
    writer->Write(Delta(request.model()));
    return grpc::Status::OK;
  };
  EXPECT_THAT(Generate(Prompt("prod")), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK_AND_ASSIGN(const v1::ModelAlias alias, SetAlias("aliases/prod", "models/a"));
  EXPECT_EQ(alias.name(), "aliases/prod");
  EXPECT_EQ(Generate(Prompt("prod"))->model(), "a");
  EXPECT_EQ(Generate(Prompt("models/prod"))->model(), "a");
  ASSERT_OK(SetAlias("prod", "b"));
  std::string text;
  ASSERT_OK(ReadAll(Prompt("prod"), &text));
  EXPECT_EQ(text, "b");
  EXPECT_EQ(GetModel("prod")->name(), "models/b");
  v1::TokenizeRequest tokenize;
  tokenize.set_model("prod");
  tokenize.set_text("ab");
  EXPECT_OK(Send<v1::TokenizeResponse>(generation_.get(), &GenerationStub::Tokenize, tokenize));
  ASSERT_OK_AND_ASSIGN(
      const auto listed,
      Send<v1::ListModelsResponse>(models_.get(), &ModelStub::ListModels, v1::ListModelsRequest()));
  ASSERT_EQ(listed.models_size(), 2);
  EXPECT_EQ(listed.models(0).aliases_size(), 0);
  ASSERT_EQ(listed.models(1).aliases_size(), 1);
  EXPECT_EQ(listed.models(1).aliases(0), "prod");
  Restart();
  EXPECT_EQ(GetModel("prod")->name(), "models/b") << "it is stored";
  ASSERT_OK(DeleteAlias("aliases/prod"));
  EXPECT_THAT(GetModel("prod"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_OK(GetModel("b"));
}

TEST_F(CoordinatorGenerationTest, BadAliasesAreRefusedByName) {
  const auto worker = NewWorkerWithModel("w1", "a");
  worker->SetModel("models/b", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  ASSERT_TRUE(WaitUntil([&] { return GetModel("b").ok(); }));
  ASSERT_OK(SetAlias("prod", "a"));
  for (const std::string& bad : {std::string(), std::string("Prod"), std::string("a/b"),
                                 std::string("x..y"), std::string(65, 'x')}) {
    EXPECT_THAT(SetAlias(bad, "a"),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         ::testing::AllOf(HasSubstr("alias"), HasSubstr("'" + bad + "'"),
                                          HasSubstr("[a-z0-9][a-z0-9._-]{0,63}"))));
    EXPECT_THAT(DeleteAlias(bad), HasCode(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_THAT(SetAlias("x", "B!"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'B!'")));
  EXPECT_THAT(SetAlias("x", "nobody"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(SetAlias("a", "a"), HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(SetAlias("x", "prod"), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(DeleteAlias("nobody"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("alias 'nobody'")));
  const absl::Status unloaded = SetAlias("prod", "b").status();
  EXPECT_THAT(unloaded,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("walsh models load b")));
  EXPECT_EQ(GetModel("prod")->name(), "models/a");
  ASSERT_OK(SetAlias("prod", "b", /*force=*/true));
  EXPECT_EQ(ErrorReason(Generate(Prompt("prod")).status()), "MODEL_NOT_LOADED");
  // What moves a model takes the model.
  for (const absl::Status& moved :
       {Load("prod").status(), Unload("prod").status(), Delete("prod", /*force=*/true)}) {
    EXPECT_THAT(moved, StatusIs(absl::StatusCode::kNotFound, HasSubstr("alias of model 'b'")));
  }
  for (const bool force : {false, true}) {
    const absl::Status kept = Delete("b", force);
    EXPECT_THAT(kept, StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("alias 'prod'")));
    EXPECT_EQ(ErrorReason(kept), "MODEL_HAS_ALIAS");
  }
  v1::CreateQuantizationJobRequest job = NewJob("j");
  job.mutable_quantization_job()->set_model_name("prod");
  EXPECT_THAT(Create(job), HasCode(absl::StatusCode::kAlreadyExists));
  ASSERT_OK(DeleteAlias("prod"));
  EXPECT_OK(Delete("b", /*force=*/false));
}

// A request that was accepted may still be on its way when its model is unloaded.
// Model a of a worker, with a request that ends when it is told to.
class CoordinatorUnloadTest : public CoordinatorGenerationTest {
 protected:
  void SetUp() override {
    CoordinatorGenerationTest::SetUp();
    worker_ = NewWorkerWithModel("w1", "a");
    worker_->on_generate = [this](auto*, const auto&, auto*) {
      is_sent_ = true;
      EXPECT_TRUE(WaitUntil([&] { return may_end_.load(); }));
      EXPECT_FALSE(is_unloaded_);
      return grpc::Status::OK;
    };
    worker_->on_unload = [this](const auto&) {
      is_unloaded_ = true;
      return grpc::Status::OK;
    };
    client_ = std::thread([this] { EXPECT_OK(Generate(Prompt("a"))); });
    ASSERT_TRUE(WaitUntil([&] { return is_sent_.load(); }));
  }
  void TearDown() override {
    EndRequest();
    CoordinatorGenerationTest::TearDown();
  }
  void EndRequest() {
    may_end_ = true;
    if (client_.joinable()) client_.join();
  }

  std::atomic<bool> is_sent_ = false, may_end_ = false, is_unloaded_ = false;
  std::unique_ptr<testing::FakeWorker> worker_;
  std::thread client_;
};

TEST_F(CoordinatorUnloadTest, ComesAfterTheRequestsThatWereSentBefore) {
  std::thread unload([&] { EXPECT_OK(Unload("a")); });
  EXPECT_TRUE(WaitUntil([&] { return GetModel("a")->state() == Model::DRAINING; }));
  EXPECT_OK(worker_->Heartbeat()) << "which still says READY";
  EXPECT_EQ(ErrorReason(Generate(Prompt("a")).status()), "MODEL_DRAINING");
  EndRequest();
  unload.join();
  EXPECT_TRUE(is_unloaded_);
}

// Whoever does not wait for it any more has not unloaded the model.
TEST_F(CoordinatorUnloadTest, ThatIsLeftBeforeTheWorkerIsAskedChangesNothing) {
  v1::UnloadModelRequest request;
  request.set_name("a");
  EXPECT_THAT(Send<Model>(models_.get(), &ModelStub::UnloadModel, request, absl::Milliseconds(300)),
              HasCode(absl::StatusCode::kDeadlineExceeded));
  EXPECT_TRUE(WaitUntil([&] { return GetModel("a")->state() == Model::READY; }));
  EndRequest();
  EXPECT_OK(Generate(Prompt("a")));
  EXPECT_FALSE(is_unloaded_);
}

TEST_F(CoordinatorGenerationTest, AnImportUnderATakenNameIsRefused) {
  const auto worker = NewWorkerWithModel("w1", "a");
  ASSERT_TRUE(WaitUntil([&] { return GetModel("a").ok(); }));
  ASSERT_OK(SetAlias("prod", "a"));
  for (const char* name : {"a", "prod"}) {
    v1::ImportModelRequest request;
    request.set_model_name(name);
    grpc::ClientContext context;
    const auto reader = models_->ImportModel(&context, request);
    v1::ImportModelResponse response;
    EXPECT_FALSE(reader->Read(&response));
    const absl::Status refused = FromGrpcStatus(reader->Finish());
    EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr(name)));
    EXPECT_EQ(ErrorReason(refused), "NAME_TAKEN");
  }
}

// -- Health, request ids, reflection

TEST_F(CoordinatorGenerationTest, HealthPerServiceAndModel) {
  const auto health = grpc::health::v1::Health::NewStub(channel_);
  const auto check = [&](const std::string& service) {
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckResponse response;
    const grpc::Status status = health->Check(&context, request, &response);
    return status.ok() ? static_cast<int>(response.status()) : -1;
  };
  for (const char* service : {"", "walsh.v1.QuantizationService", "walsh.v1.ModelService",
                              "walsh.v1.GenerationService"}) {
    EXPECT_EQ(check(service), 1) << service;
  }
  EXPECT_EQ(check("model/m"), -1) << "unknown";
  const auto worker = NewWorkerWithModel("w1", "m");
  EXPECT_TRUE(WaitUntil([&] { return check("model/m") == 1; }));
  ASSERT_OK(SetAlias("prod", "m"));
  EXPECT_TRUE(WaitUntil([&] { return check("model/prod") == 1; }));
  worker->SetModel("models/m", Model::UNLOADED);
  ASSERT_OK(worker->Heartbeat());
  EXPECT_TRUE(WaitUntil([&] { return check("model/m") == 2; }));
  EXPECT_TRUE(WaitUntil([&] { return check("model/prod") == 2; }));
}

TEST_F(CoordinatorGenerationTest, RequestIdIsEchoed) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_generate = [](auto*, const auto& request, auto* response) {
    response->set_request_id(request.request_id());
    return grpc::Status::OK;
  };
  for (const std::string& sent : {std::string("my-request-1"), std::string()}) {
    grpc::ClientContext context;
    if (!sent.empty()) context.AddMetadata("x-request-id", sent);
    v1::GenerateResponse response;
    ASSERT_TRUE(generation_->Generate(&context, Prompt("m"), &response).ok());
    const auto it = context.GetServerInitialMetadata().find("x-request-id");
    ASSERT_NE(it, context.GetServerInitialMetadata().end());
    const std::string echoed(it->second.data(), it->second.size());
    if (!sent.empty()) {
      EXPECT_EQ(echoed, sent);
    }
    EXPECT_EQ(response.request_id(), echoed);
  }
}

TEST_F(CoordinatorGenerationTest, EveryForwardedCallLeavesALineInTheLog) {
  const auto worker = NewWorkerWithModel("w1", "m");
  worker->on_generate = [](auto*, const auto&, auto*) { return grpc::Status::OK; };
  worker->on_stream = [](auto*, const auto&, auto*) {
    return grpc::Status(grpc::StatusCode::DATA_LOSS, "bad weights");
  };
  ::testing::internal::CaptureStderr();
  v1::GenerateRequest request = Prompt("models/m");
  request.set_request_id("id-of-the-request");
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "id-of-a-call");
  v1::GenerateResponse response;
  EXPECT_TRUE(generation_->Generate(&context, request, &response).ok());
  std::string text;
  EXPECT_THAT(ReadAll(Prompt("m"), &text), HasCode(absl::StatusCode::kDataLoss));
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(log,
              ::testing::ContainsRegex(
                  "call ended.*method=Generate .*request_id=id-of-the-request.*"
                  "model=models/m.*served_by=models/m.*worker=workers/w1.*status=OK.*seconds="));
  EXPECT_THAT(log, ::testing::ContainsRegex("method=GenerateStream .*bad weights"));
}

}  // namespace
}  // namespace walsh
