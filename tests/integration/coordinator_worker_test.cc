// A real coordinator and a real worker's services in one process, with a fake model behind a real
// engine: what happens between the two when a worker is full or stops.

#include <google/protobuf/text_format.h>
#include <grpcpp/server.h>

#include <atomic>
#include <functional>
#include <future>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/str_replace.h"
#include "common/grpc_connection_pool.h"
#include "common/publish.h"
#include "common/tenant_header.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/recording_sink.h"
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
    worker_address_ = "127.0.0.1:" + std::to_string(port);
    Register(worker_address_);
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
  std::string worker_address_;
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
  const std::shared_ptr<engine::Engine> engine = *store_->FindEngine("n");
  std::thread drain([&] { store_->DrainAll(absl::ZeroDuration()); });
  // Steps are quick: the request must not end before the engine drains.
  EXPECT_TRUE(WaitUntil([&] {
    return absl::IsUnavailable(
        engine->Submit({.id = "late", .prompt = {1}}, std::make_shared<testing::RecordingSink>()));
  }));
  is_open_ = true;
  v1::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  drain.join();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("stopping")));
  EXPECT_EQ(ErrorReason(status), "WORKER_STOPPING");
}

// Row F2 of the fault matrix. A value of a numeric field that nobody takes: what is set beside the
// rest of a good request, in protobuf's text format.
struct BadValue {
  const char* field;
  const char* set;
};
constexpr BadValue kBadSampling[] = {
    {"sampling.max_tokens", "max_tokens: 0"},
    {"sampling.max_tokens", "max_tokens: -1"},
    {"sampling.max_tokens", "max_tokens: 32769"},
    {"sampling.max_tokens", "max_tokens: 2147483647"},
    {"sampling.max_tokens", "max_tokens: -2147483648"},
    {"sampling.min_tokens", "min_tokens: -1"},
    {"sampling.min_tokens", "min_tokens: 257"},
    {"sampling.min_tokens", "min_tokens: 2147483647"},
    {"sampling.temperature", "temperature: -0.1"},
    {"sampling.temperature", "temperature: 2.1"},
    {"sampling.temperature", "temperature: nan"},
    {"sampling.temperature", "temperature: inf"},
    {"sampling.top_p", "top_p: 0"},
    {"sampling.top_p", "top_p: -0.1"},
    {"sampling.top_p", "top_p: 1.1"},
    {"sampling.top_p", "top_p: nan"},
    {"sampling.top_k", "top_k: -1"},
    {"sampling.top_k", "top_k: -2147483648"},
    {"sampling.min_p", "min_p: -0.1"},
    {"sampling.min_p", "min_p: 1"},
    {"sampling.min_p", "min_p: nan"},
    {"sampling.repetition_penalty", "repetition_penalty: 0"},
    {"sampling.repetition_penalty", "repetition_penalty: -1"},
    {"sampling.repetition_penalty", "repetition_penalty: 10.1"},
    {"sampling.repetition_penalty", "repetition_penalty: nan"},
    {"sampling.presence_penalty", "presence_penalty: -2.1"},
    {"sampling.presence_penalty", "presence_penalty: 2.1"},
    {"sampling.presence_penalty", "presence_penalty: nan"},
    {"sampling.frequency_penalty", "frequency_penalty: -inf"},
    {"sampling.frequency_penalty", "frequency_penalty: 2.1"},
    {"sampling.frequency_penalty", "frequency_penalty: nan"},
    {"sampling.stop_token_ids", "stop_token_ids: -1"},
    {"sampling.stop_token_ids", "stop_token_ids: 1048576"},
    {"sampling.stop_token_ids", "stop_token_ids: 2147483647"},
    {"sampling.top_logprobs", "logprobs: true top_logprobs: -1"},
    {"sampling.top_logprobs", "logprobs: true top_logprobs: 21"},
    {"sampling.top_logprobs", "logprobs: true top_logprobs: 2147483647"},
};
constexpr BadValue kBadConfigs[] = {
    {"config.method", "method: 99"},
    {"config.bits", "bits: 1"},
    {"config.bits", "bits: 5"},
    {"config.bits", "bits: 16"},
    {"config.bits", "bits: -2147483648"},
    {"config.group_size", "group_size: -2"},
    {"config.group_size", "group_size: 16"},
    {"config.group_size", "group_size: 2147483647"},
    {"config.column_order", "column_order: 99"},
    {"config.damp_percent", "damp_percent: -0.1"},
    {"config.damp_percent", "damp_percent: 1.1"},
    {"config.damp_percent", "damp_percent: nan"},
    {"config.rotation.kind", "rotation { kind: 99 }"},
    {"config.rotation.block_size", "rotation { block_size: -16 }"},
    {"config.rotation.block_size", "rotation { block_size: 8 }"},
    {"config.rotation.block_size", "rotation { block_size: 24 }"},
    {"config.rotation.block_size", "rotation { block_size: 65536 }"},
    {"config.rotation.block_size", "rotation { block_size: -2147483648 }"},
    {"config.rotation.block_size", "rotation { kind: WALSH block_size: 32 }"},
    {"config.rotation.signs", "rotation { signs: 99 }"},
    {"config.rotation.online_kind", "rotation { online_kind: 99 }"},
    {"config.rotation.online_block_size", "rotation { online_kind: GSR online_block_size: 8 }"},
    {"config.rotation.online_block_size", "rotation { online_kind: GSR online_block_size: -1 }"},
    {"config.rotation.online_block_size", "rotation { online_block_size: 32 }"},
    {"config.calibration.num_samples", "calibration { num_samples: -1 }"},
    {"config.calibration.num_samples", "calibration { num_samples: 8193 }"},
    {"config.calibration.sequence_length", "calibration { sequence_length: 31 }"},
    {"config.calibration.sequence_length", "calibration { sequence_length: 32769 }"},
    {"config.evaluation.max_windows", "evaluation { max_windows: -1 }"},
    {"config.evaluation.max_windows", "evaluation { max_windows: 8193 }"},
    {"config.evaluation.sequence_length", "evaluation { sequence_length: -2147483648 }"},
    {"config.evaluation.sequence_length", "evaluation { sequence_length: 32769 }"},
    {"config.evaluation.format", "evaluation { uri: 'a' format: 99 }"},
    {"config.evaluation.stride", "evaluation { stride: -1 }"},
    {"config.evaluation.stride", "evaluation { sequence_length: 64 stride: 65 }"},
    {"config.evaluation.tasks.limit", "evaluation { tasks { uri: 'a' limit: -1 } }"},
    {"config.evaluation.tasks.limit", "evaluation { tasks { uri: 'a' limit: 100001 } }"},
    {"config.error_propagation", "error_propagation: -0.1"},
    {"config.error_propagation", "error_propagation: 1.1"},
    {"config.error_propagation", "error_propagation: nan"},
    {"config.gptaq_alpha", "method: GPTAQ gptaq_alpha: -0.1"},
    {"config.gptaq_alpha", "method: GPTAQ gptaq_alpha: inf"},
    {"config.gptaq_alpha", "method: GPTAQ gptaq_alpha: nan"},
    {"config.overrides.bits", "overrides { pattern: '*' }"},
    {"config.overrides.bits", "overrides { pattern: '*' bits: 16 }"},
    {"config.overrides.bits", "overrides { pattern: '*' bits: -4 }"},
    {"config.grid", "grid: 99"},
    {"config.zero_point", "zero_point: 99"},
    {"config.activation_quantization.bits", "activation_quantization { bits: 2 }"},
    {"config.activation_quantization.bits", "activation_quantization { bits: -8 }"},
    {"config.activation_quantization.group_size",
     "activation_quantization { bits: 8 group_size: 1 }"},
    {"config.activation_quantization.clip_ratio",
     "activation_quantization { bits: 8 clip_ratio: 0.001 }"},
    {"config.activation_quantization.clip_ratio",
     "activation_quantization { bits: 8 clip_ratio: nan }"},
    {"config.kv_cache_quantization.bits", "kv_cache_quantization { bits: 3 }"},
    {"config.kv_cache_quantization.group_size", "kv_cache_quantization { bits: 4 group_size: -1 }"},
    {"config.kv_cache_quantization.clip_ratio",
     "kv_cache_quantization { bits: 4 clip_ratio: 1.1 }"},
    {"config.kv_cache_quantization.clip_ratio",
     "kv_cache_quantization { bits: 4 clip_ratio: nan }"},
    {"config.quality_gate.max_perplexity_ratio", "quality_gate { max_perplexity_ratio: 0.9 }"},
    {"config.quality_gate.max_perplexity_ratio", "quality_gate { max_perplexity_ratio: nan }"},
    {"config.quality_gate.max_perplexity_ratio", "quality_gate { max_perplexity_ratio: inf }"},
    {"config.quality_gate.max_kl_divergence", "quality_gate { max_kl_divergence: 0 }"},
    {"config.quality_gate.max_kl_divergence", "quality_gate { max_kl_divergence: nan }"},
    {"config.quality_gate.max_kl_divergence", "quality_gate { max_kl_divergence: inf }"},
};

// Every number and enumeration in a message, as the above name them.
void AddNumericFields(const google::protobuf::Descriptor& message, const std::string& prefix,
                      std::set<std::string>* fields) {
  using Field = google::protobuf::FieldDescriptor;
  for (int i = 0; i < message.field_count(); ++i) {
    const Field& field = *message.field(i);
    const std::string name = prefix + "." + field.name();
    switch (field.cpp_type()) {
      case Field::CPPTYPE_MESSAGE:
        AddNumericFields(*field.message_type(), name, fields);
        break;
      case Field::CPPTYPE_STRING:
      case Field::CPPTYPE_BOOL:
        break;
      default:
        fields->insert(name);
    }
  }
}

TEST_F(CoordinatorWorkerTest, EachRefusesBadNumbersAlone) {
  std::set<std::string> missing = {};
  AddNumericFields(*v1::SamplingParams::descriptor(), "sampling", &missing);
  AddNumericFields(*v1::QuantizationConfig::descriptor(), "config", &missing);
  for (const char* any_will_do : {"sampling.seed", "config.seed"}) missing.erase(any_will_do);

  const auto expect_refused = [](const absl::Status& status, const BadValue& bad,
                                 const std::string& who) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument)
        << who << " and '" << bad.set << "': " << status;
    EXPECT_THAT(absl::StrReplaceAll(status.message(), {{"[0]", ""}}), HasSubstr(bad.field)) << who;
  };
  const auto try_all = [&](const std::string& who, const std::string& generation_address,
                           const std::function<absl::Status(const v1::QuantizationJob&)>& submit) {
    const auto generation = v1::GenerationService::NewStub(MakeChannel(generation_address));
    for (const BadValue& bad : kBadSampling) {
      missing.erase(bad.field);
      v1::GenerateRequest generate;
      generate.set_model("m");
      generate.set_prompt("Once");
      ASSERT_TRUE(
          google::protobuf::TextFormat::MergeFromString(bad.set, generate.mutable_sampling()));
      v1::ChatRequest chat;
      chat.set_model("m");
      v1::ChatMessage& message = *chat.add_messages();
      message.set_role("user");
      message.set_content("Once");
      *chat.mutable_sampling() = generate.sampling();
      expect_refused(
          Send<v1::GenerateResponse>(generation.get(), &GenerationStub::Generate, generate)
              .status(),
          bad, who);
      expect_refused(
          Send<v1::GenerateResponse>(generation.get(), &GenerationStub::Chat, chat).status(), bad,
          who);
    }
    v1::GenerateRequest of_ids;
    of_ids.set_model("m");
    of_ids.mutable_token_ids()->add_ids(-1);
    expect_refused(
        Send<v1::GenerateResponse>(generation.get(), &GenerationStub::Generate, of_ids).status(),
        {"token_ids", "-1"}, who);
    for (const BadValue& bad : kBadConfigs) {
      missing.erase(bad.field);
      v1::QuantizationJob job = NewJob("j").quantization_job();
      ASSERT_TRUE(google::protobuf::TextFormat::MergeFromString(bad.set, job.mutable_config()));
      expect_refused(submit(job), bad, who);
    }
  };

  const auto host = internal::v1::ModelHostService::NewStub(MakeChannel(worker_address_));
  try_all("worker", worker_address_, [&](const v1::QuantizationJob& job) {
    internal::v1::ValidateJobRequest request;
    *request.mutable_job() = job;
    return Send<internal::v1::ValidateJobResponse>(
               host.get(), &internal::v1::ModelHostService::Stub::ValidateJob, request)
        .status();
  });
  worker_server_->Shutdown(std::chrono::system_clock::now());
  try_all("coordinator", server_->endpoints().at("grpc"), [&](const v1::QuantizationJob& job) {
    v1::CreateQuantizationJobRequest request;
    *request.mutable_quantization_job() = job;
    return Create(request).status();
  });
  EXPECT_THAT(missing, ::testing::IsEmpty()) << "fields of which no bad value is tried";
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
