// Goal:   what an operator and a stranger's tool rely on: standard health, reflection, HTTP health
//         routes, the promised metric names.
// Method: the real daemons; raw gRPC where a generated stub would hide what is on the wire.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <set>

#include "absl/strings/str_split.h"
#include "common/config_keys.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TempDir;
using ::walsh::testing::TinyModel;

class SurfaceTest : public ::testing::Test {
 protected:
  // A service with one finished job and one loaded model that has answered.
  static void SetUpTestSuite() {
    root_ = new TempDir;
    TinyModel({}).WriteHf(*root_ / "tiny");
    testing::ServiceOptions options;
    options.model_roots = {root_->path()};
    service_ = new ServiceFixture(options);
    ASSERT_OK(service_->Start());
    v1::CreateQuantizationJobRequest request;
    v1::QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(*root_ / "tiny");
    job.set_model_name("tiny");
    job.mutable_config()->mutable_calibration()->set_num_samples(4);
    job.mutable_config()->mutable_calibration()->set_sequence_length(64);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    job.mutable_config()->mutable_auto_load();
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob created, service_->client().CreateJob(request));
    ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob finished,
                         service_->client().WatchJob(created.name(), 0, {}));
    ASSERT_EQ(finished.state(), v1::QuantizationJob::SUCCEEDED) << finished.DebugString();
    v1::GenerateRequest generate;
    generate.set_model("tiny");
    generate.set_prompt("Hello");
    generate.mutable_sampling()->set_max_tokens(8);
    ASSERT_OK(service_->client().Generate(generate));
  }

  static void TearDownTestSuite() {
    delete service_;
    delete root_;
  }

  static std::string Metrics(const std::string& daemon) {
    const auto text = testing::HttpGet(service_->endpoint(daemon, "metrics"), "/metrics");
    EXPECT_OK(text);
    return text.value_or("");
  }

  static TempDir* root_;
  static ServiceFixture* service_;
};

TempDir* SurfaceTest::root_ = nullptr;
ServiceFixture* SurfaceTest::service_ = nullptr;

TEST_F(SurfaceTest, HealthAnswersForTheServerItsServicesAndItsModels) {
  for (const char* name : {"", "walsh.v1.QuantizationService", "walsh.v1.ModelService",
                           "walsh.v1.GenerationService", "model/tiny"}) {
    // The coordinator learns of a loaded model with its next look at the fleet.
    EXPECT_TRUE(testing::WaitUntil(
        [&] { return service_->client().CheckHealth(name, absl::Seconds(10)).ok(); },
        absl::Seconds(10)))
        << name;
  }
  EXPECT_FALSE(service_->client().CheckHealth("model/nobody", absl::Seconds(10)).ok());
}

// Asks grpc.reflection.v1alpha for the list of services; the answer's bytes, or how the call ended
// (a server without reflection ends it at once, before or after the write: either is no answer).
absl::StatusOr<std::string> ListServices(const std::string& address) {
  grpc::GenericStub stub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  const auto wait = [&] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  // ServerReflectionRequest{list_services: "*"}: field 7, length 1.
  const grpc::Slice slice("\x3a\x01*");
  grpc::ByteBuffer answer;
  bool answered = false;
  call->StartCall(nullptr);
  if (wait()) {
    call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
    if (wait()) {
      call->Read(&answer, nullptr);
      answered = wait();
    }
  }
  if (answered) context.TryCancel();
  grpc::Status status;
  call->Finish(&status, nullptr);
  wait();
  queue.Shutdown();
  if (!answered) return FromGrpcStatus(status);
  std::vector<grpc::Slice> slices;
  if (!answer.Dump(&slices).ok()) return absl::InternalError("an answer without bytes");
  std::string bytes;
  for (const grpc::Slice& part : slices) {
    bytes.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  return bytes;
}

TEST_F(SurfaceTest, ReflectionListsThePublicServices) {
  ASSERT_OK_AND_ASSIGN(const std::string services,
                       ListServices(service_->endpoint("coordinator", "grpc")));
  for (const char* name :
       {"walsh.v1.QuantizationService", "walsh.v1.ModelService", "walsh.v1.GenerationService",
        "walsh.v1.EvaluationService", "grpc.health.v1.Health"}) {
    EXPECT_THAT(services, HasSubstr(name));
  }
  EXPECT_THAT(ListServices(service_->endpoint("coordinator", "internal")),
              HasCode(absl::StatusCode::kUnimplemented))
      << "workers do not need it";
  EXPECT_THAT(ListServices(service_->endpoint("worker", "grpc")),
              HasCode(absl::StatusCode::kUnimplemented));
}

TEST(ReflectionTest, IsOffWhenTheFlagSaysSo) {
  testing::ServiceOptions options;
  options.coordinator_flags = {"--enable-reflection", "false"};
  ServiceFixture service(options);
  ASSERT_OK(service.StartCoordinator());
  EXPECT_THAT(ListServices(service.endpoint("coordinator", "grpc")),
              HasCode(absl::StatusCode::kUnimplemented));
}

TEST_F(SurfaceTest, SupportedArchitecturesAreListed) {
  ASSERT_OK_AND_ASSIGN(const v1::ListSupportedArchitecturesResponse response,
                       service_->client().ListSupportedArchitectures());
  EXPECT_THAT(response.architectures(),
              ::testing::ElementsAre("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
                                     "Qwen3ForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM",
                                     "llama", "qwen2", "qwen3", "phi3", "gemma3"));
}

TEST_F(SurfaceTest, HttpRoutesAnswer) {
  const std::string http = service_->endpoint("coordinator", "http");
  for (const char* path : {"/livez", "/readyz", "/health", "/version", "/metrics"}) {
    EXPECT_OK(testing::HttpGet(http, path)) << path;
  }
  EXPECT_FALSE(testing::HttpGet(http, "/no/such/route").ok());
}

TEST_F(SurfaceTest, CoordinatorMetricsHaveTheirNames) {
  const std::string metrics = Metrics("coordinator");
  for (const char* name :
       {"walsh_build_info{", "walsh_quantization_jobs{", "walsh_quantization_jobs_finished_total{",
        "walsh_quantization_job_queue_seconds_bucket{",
        "walsh_quantization_job_duration_seconds_bucket{",
        "walsh_quantization_stage_seconds_bucket{stage=\"QUANTIZING\"",
        "walsh_quantization_stage_seconds_bucket{stage=\"PUBLISHING\"", "walsh_workers{",
        "walsh_models{", "walsh_worker_lease_expirations_total", "grpc_server_started_total{",
        "grpc_server_handled_total{", "grpc_server_msg_received_total{",
        "grpc_server_msg_sent_total{", "grpc_server_handling_seconds_bucket{"}) {
    EXPECT_THAT(metrics, HasSubstr(std::string("\n") + name));
  }
}

TEST_F(SurfaceTest, WorkerMetricsHaveTheirNames) {
  const std::string metrics = Metrics("worker");
  for (const char* name :
       {"walsh_build_info{", "walsh_num_requests_running", "walsh_num_requests_waiting",
        "walsh_kv_cache_usage_perc", "walsh_prompt_tokens_total", "walsh_generation_tokens_total",
        "walsh_prefix_cache_hit_tokens_total", "walsh_num_preemptions_total",
        "walsh_request_success_total{", "walsh_time_to_first_token_seconds_bucket{",
        "walsh_inter_token_latency_seconds_bucket{", "walsh_e2e_request_latency_seconds_bucket{",
        "walsh_request_queue_time_seconds_bucket{", "walsh_quantization_layer_seconds",
        "walsh_quantization_calibration_tokens_total"}) {
    EXPECT_THAT(metrics, HasSubstr(std::string("\n") + name));
  }
  EXPECT_THAT(metrics, Not(HasSubstr("walsh_quantization_stage_seconds"))) << "the coordinator's";
}

// The long flags in the help of a command and, for `walsh`, of its verbs.
void CollectFlags(const std::vector<std::string>& command, std::set<std::string>* flags) {
  client::SpawnOptions spawn;
  spawn.argv = command;
  spawn.argv.push_back("--help");
  ASSERT_OK_AND_ASSIGN(const client::Output help, client::RunCommand(spawn, "", absl::Seconds(60)));
  bool is_subcommand = false;
  const std::vector<std::string> lines = absl::StrSplit(help.out, '\n');
  for (const std::string& line : lines) {
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" ,"), absl::SkipEmpty());
    if (words.empty()) continue;
    if (line.front() != ' ') {
      is_subcommand = words[0] == "Subcommands:";
      continue;
    }
    // Continued descriptions are indented further.
    if (line.size() < 3 || line[2] == ' ') continue;
    if (is_subcommand) {
      std::vector<std::string> verb = command;
      verb.push_back(words[0]);
      CollectFlags(verb, flags);
      continue;
    }
    for (const std::string& word : words) {
      // "--no-load{false}" is the flag's negative.
      if (word.starts_with("--")) flags->insert(word.substr(2, word.find('{') - 2));
      if (!word.starts_with("-")) break;
    }
  }
}

// A key that a binary does not take must be known to be another's.
TEST_F(SurfaceTest, ConfigKeysAreTheFlagsOfAllBinaries) {
  std::set<std::string> flags;
  for (const char* binary : {"walsh", "walsh-coordinator", "walsh-worker"}) {
    CollectFlags({testing::BinaryPath(binary)}, &flags);
  }
  for (const char* builtin : {"help", "version", "config"}) flags.erase(builtin);
  const std::set<std::string> keys(ConfigKeys().begin(), ConfigKeys().end());
  EXPECT_THAT(flags, ::testing::ContainerEq(keys));
}

TEST_F(SurfaceTest, DoctorDescribesThisMachine) {
  ASSERT_OK_AND_ASSIGN(const client::Output output, service_->RunWalsh({"doctor"}));
  EXPECT_EQ(output.exit_code, 0) << output.out << output.err;
  EXPECT_THAT(output.out, HasSubstr("this machine, as a worker sees it"));
  EXPECT_THAT(output.out, ::testing::ContainsRegex("jobs on +(cpu|cuda:0 )"));
  EXPECT_THAT(output.out, ::testing::ContainsRegex("generation on +cpu\n"));
  EXPECT_THAT(output.out, ::testing::ContainsRegex("available +(yes|no)\n"));
}

TEST_F(SurfaceTest, DaemonsStopCleanly) {
  ServiceFixture service;
  ASSERT_OK(service.Start());
  EXPECT_OK(service.StopWorker());
  EXPECT_OK(service.StopCoordinator());
  EXPECT_FALSE(ReadEndpoints(service.data_dir(), "coordinator").ok());
  EXPECT_FALSE(ReadEndpoints(service.data_dir(), "worker").ok());
}

}  // namespace
}  // namespace walsh
