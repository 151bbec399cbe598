// A real coordinator and a real worker's services in one process, with a fake model behind a real
// engine: what happens between the two when a worker is full or stops.

#include <grpcpp/server.h>

#include <atomic>
#include <future>
#include <thread>
#include <vector>

#include "common/grpc_connection_pool.h"
#include "common/publish.h"
#include "common/tenant_header.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "walsh/internal/v1/worker.grpc.pb.h"
#include "worker/service/generation_service.h"
#include "worker/service/model_host_service.h"

namespace walsh {
namespace {

using service::GenerationService;
using service::ModelHostService;
using service::ModelStore;
using ::testing::HasSubstr;
using v1::Model;
using ::walsh::testing::FakeModel;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

constexpr int kRunningMax = 16;
constexpr int kWaitingMax = 64;

class CoordinatorWorkerTest : public CoordinatorFixture {
 protected:
  CoordinatorWorkerTest() {
    options_.lease_duration = absl::Minutes(5);  // nobody sends heartbeats
    options_.heartbeat_interval = absl::Minutes(1);
  }

  void SetUp() override {
    CoordinatorFixture::SetUp();
    for (const char* id : {"m", "n", "damaged"}) service::WriteFakeArtifact(root_ + "/" + id);
    ASSERT_OK(PublishFile(root_ + "/damaged/walsh.json", "{"));
    auto store = ModelStore::Open(
        {.root = root_,
         .worker_id = "w-1",
         .engine = {.max_sequences = kRunningMax, .max_waiting = kWaitingMax, .n_threads = 1},
         .drain_timeout = absl::Seconds(30),
         .loader = [this](const std::string&) { return FakeModel::Create(behaviour_); }},
        Clock::Real());
    ASSERT_OK(store);
    store_ = *std::move(store);
    ASSERT_OK(store_->Load("m"));
    generation_service_ = std::make_unique<GenerationService>(store_.get(), Clock::Real());
    host_ = std::make_unique<ModelHostService>(
        ModelHostService::Options{
            .data_dir = dir_.path(),
            .resolve = [](std::string_view path) { return std::string(path); },
            .plan = [](const pipeline::JobSpec&) { return pipeline::JobPlan(); },
            .memory = [] { return service::WorkerMemory(); },
            .on_device_broken = [](const absl::Status&) {}},
        store_.get(), /*conversions=*/nullptr);
    grpc::ServerBuilder builder;
    ApplyServerLimits(builder);
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(generation_service_.get());
    builder.RegisterService(host_.get());
    worker_server_ = builder.BuildAndStart();
    ASSERT_NE(worker_server_, nullptr);
    Register("127.0.0.1:" + std::to_string(port));
  }

  void TearDown() override {
    is_open_ = true;
    server_->Stop(absl::ZeroDuration());
    worker_server_->Shutdown(std::chrono::system_clock::now());
  }

  void Register(const std::string& address) {
    const auto stub =
        internal::v1::WorkerService::NewStub(MakeChannel(server_->endpoints().at("internal")));
    internal::v1::RegisterRequest request;
    request.set_worker_id("w-1");
    request.set_address(address);
    for (const Model& model : store_->List().models) *request.add_models() = model;
    internal::v1::RegisterResponse response;
    grpc::ClientContext context;
    ASSERT_TRUE(stub->Register(&context, request, &response).ok());
  }

  absl::StatusOr<Model> Load(const std::string& name) {
    v1::LoadModelRequest request;
    request.set_name(name);
    return Send<Model>(models_.get(), &ModelStub::LoadModel, request, absl::Seconds(30));
  }

  const std::string root_ = dir_ / "models";
  std::atomic<bool> is_open_ = false;  // the model's steps wait for it
  FakeModel::Behaviour behaviour_{.before_forward = [this](const auto&) {
    const bool is_open = WaitUntil([this] { return is_open_.load(); }, absl::Minutes(2));
    return is_open ? absl::OkStatus() : absl::InternalError("the gate stayed shut");
  }};
  std::unique_ptr<ModelStore> store_;
  std::unique_ptr<GenerationService> generation_service_;
  std::unique_ptr<ModelHostService> host_;
  std::unique_ptr<grpc::Server> worker_server_;
};

// More streams than one HTTP/2 connection carries, and more than the worker takes.
TEST_F(CoordinatorWorkerTest, AFullWorkerRefusesAtOnceAndStillLoadsAndValidates) {
  constexpr int kStreams = kRunningMax + kWaitingMax + 10;
  struct Stubs {
    explicit Stubs(const std::shared_ptr<grpc::Channel>& channel)
        : generation(v1::GenerationService::NewStub(channel)) {}
    const std::unique_ptr<v1::GenerationService::Stub> generation;
  };
  // Apart from the connection of the fixture's other calls.
  ConnectionPool<Stubs> pool(server_->endpoints().at("grpc"), limits::kConcurrentStreamsMax,
                             ChannelSecurity(), /*first_connection=*/1);
  std::atomic<int> n_refused = 0;
  std::atomic<int> n_finished = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < kStreams; ++i) {
    clients.emplace_back([&] {
      const auto connection = pool.Acquire();
      v1::GenerateRequest request;
      request.set_model("m");
      request.set_prompt("Once");
      request.mutable_sampling()->set_max_tokens(2);
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(2)));
      const auto reader = connection->generation->GenerateStream(&context, request);
      v1::GenerateStreamResponse response;
      while (reader->Read(&response)) {
      }
      const absl::Status status = FromGrpcStatus(reader->Finish());
      if (absl::IsResourceExhausted(status)) {
        ++n_refused;
      } else {
        EXPECT_OK(status);
        ++n_finished;
      }
    });
  }
  EXPECT_TRUE(WaitUntil([&] {
    const engine::Stats stats = store_->TotalStats();
    return stats.running + stats.waiting == kRunningMax + kWaitingMax && n_refused == 10;
  })) << n_refused
      << " were refused";
  EXPECT_EQ(n_finished, 0);

  // The worker's other calls do not stand behind the streams.
  EXPECT_OK(Load("n"));
  v1::CreateQuantizationJobRequest job = NewJob("j");
  job.set_validate_only(true);
  EXPECT_OK(Create(job));

  is_open_ = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(n_finished, kRunningMax + kWaitingMax);
}

// What a worker that drains says is its own answer, not a connection that was lost.
TEST_F(CoordinatorWorkerTest, ARequestThatADrainEndsIsToldWhy) {
  behaviour_.max_position = 40000;  // it will not end by itself
  ASSERT_OK(Load("n"));
  const auto stub = v1::GenerationService::NewStub(MakeChannel(server_->endpoints().at("grpc")));
  v1::GenerateRequest request;
  request.set_model("n");
  request.set_prompt("Once");
  request.mutable_sampling()->set_max_tokens(30000);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(2)));
  const auto reader = stub->GenerateStream(&context, request);
  EXPECT_TRUE(WaitUntil([&] { return store_->TotalStats().running == 1; }));
  std::thread drain([&] { store_->DrainAll(absl::ZeroDuration()); });
  EXPECT_TRUE(WaitUntil([&] { return store_->Get("n")->state() == Model::DRAINING; }));
  is_open_ = true;
  v1::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  drain.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("stopping")));
  EXPECT_EQ(ErrorReason(status), "WORKER_STOPPING");
}

class TenantsTest : public CoordinatorWorkerTest {
 protected:
  void SetUp() override {
    WriteKeys({{kOfA, "serve", "a"}, {kOfB, "serve", "b"}});
    CoordinatorWorkerTest::SetUp();
    is_open_ = true;
  }
  static constexpr char kOfA[] = "a-key-of-tenant-a";
  static constexpr char kOfB[] = "a-key-of-tenant-b";
};

// Row F7 of the fault matrix: what one tenant has asked is not told by what another's costs.
TEST_F(TenantsTest, TheirPrefixCachesAreApart) {
  const auto cached_tokens = [this](const std::string& secret, bool streams) {
    const auto stub = v1::GenerationService::NewStub(ChannelOf(secret));
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt(std::string(40, 'x'));
    request.mutable_sampling()->set_max_tokens(1);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(30)));
    context.AddMetadata(kTenantHeader, "a");  // which is not the client's to say
    if (!streams) {
      v1::GenerateResponse response;
      EXPECT_OK(FromGrpcStatus(stub->Generate(&context, request, &response)));
      return response.usage().cached_tokens();
    }
    const auto reader = stub->GenerateStream(&context, request);
    int n_cached = -1;
    v1::GenerateStreamResponse response;
    while (reader->Read(&response)) {
      if (response.has_finished()) n_cached = response.finished().usage().cached_tokens();
    }
    EXPECT_OK(FromGrpcStatus(reader->Finish()));
    return n_cached;
  };
  EXPECT_EQ(cached_tokens(kOfA, /*streams=*/false), 0);
  EXPECT_EQ(cached_tokens(kOfB, /*streams=*/false), 0);
  for (const char* secret : {kOfA, kOfB}) {
    for (const bool streams : {false, true}) EXPECT_EQ(cached_tokens(secret, streams), 32);
  }
}

// It is not listed, so only the worker knows.
TEST_F(CoordinatorWorkerTest, ANameTakenByADamagedArtifactIsRefusedAtOnce) {
  ASSERT_FALSE(store_->Get("damaged").ok());
  v1::CreateQuantizationJobRequest job = NewJob("j");
  job.mutable_quantization_job()->set_model_name("damaged");
  const absl::Status refused = Create(job).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("models/damaged")));
  EXPECT_EQ(ErrorReason(refused), "MODEL_EXISTS");
}

}  // namespace
}  // namespace walsh
