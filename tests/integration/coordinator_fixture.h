// A coordinator in this process, on free ports of the loopback, with clients of its services.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "server/server.h"
#include "tests/testing/fake_worker.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "walsh/v1/model.grpc.pb.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh {

class CoordinatorFixture : public ::testing::Test {
 protected:
  using JobStub = v1::QuantizationService::Stub;
  using ModelStub = v1::ModelService::Stub;
  using GenerationStub = v1::GenerationService::Stub;

  CoordinatorFixture() {
    options_.grpc_port = options_.internal_port = options_.http_port = options_.metrics_port = 0;
    options_.data_dir = dir_ / "data";
    // Scripted workers send heartbeats only when told to, and the machine may be busy. Tests of
    // silence use UseShortLeases.
    options_.lease_duration = absl::Minutes(5);
    options_.heartbeat_interval = absl::Milliseconds(500);
  }
  void SetUp() override { Start(); }
  // For tests in which leases run out; before the server starts.
  void UseShortLeases() { options_.lease_duration = absl::Seconds(2); }

  void Start() {
    absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = MakeChannel(server_->endpoints().at("grpc"));
    jobs_ = v1::QuantizationService::NewStub(channel_);
    models_ = v1::ModelService::NewStub(channel_);
    generation_ = v1::GenerationService::NewStub(channel_);
    // A restart keeps the ports, as a service does.
    options_.grpc_port = PortOf("grpc");
    options_.internal_port = PortOf("internal");
  }
  void Stop(absl::Duration timeout = absl::ZeroDuration()) {
    server_->Stop(timeout);
    server_.reset();
  }
  void Restart() {
    Stop();
    Start();
  }
  int PortOf(const std::string& name) const {
    const std::string& address = server_->endpoints().at(name);
    return std::stoi(address.substr(address.rfind(':') + 1));
  }

  std::unique_ptr<testing::FakeWorker> NewWorker(const std::string& id) {
    auto worker = std::make_unique<testing::FakeWorker>(server_->endpoints().at("internal"), id);
    EXPECT_OK(worker->Register());
    return worker;
  }
  // A registered worker that has models/{model}, READY.
  std::unique_ptr<testing::FakeWorker> NewWorkerWithModel(const std::string& id,
                                                          const std::string& model) {
    auto worker = std::make_unique<testing::FakeWorker>(server_->endpoints().at("internal"), id);
    worker->SetModel("models/" + model, v1::Model::READY);
    EXPECT_OK(worker->Register());
    return worker;
  }

  // An API key of one role.
  struct Key {
    std::string secret;
    std::string role;
    std::string tenant = "t";
  };
  // The service's keys: before it starts, or while it follows the file. `tenants` in JSON.
  void WriteKeys(const std::vector<Key>& keys, const std::string& tenants = "{}") {
    options_.api_keys_file = dir_ / "keys.json";
    std::vector<std::string> entries;
    for (const Key& key : keys) {
      entries.push_back(absl::StrCat(R"({"id": ")", key.tenant, "-", key.role, R"(", "tenant": ")",
                                     key.tenant, R"(", "sha256": ")", Sha256Hex(key.secret),
                                     R"(", "roles": [")", key.role, R"("]})"));
    }
    ASSERT_OK(PublishFile(options_.api_keys_file,
                          absl::StrCat(R"({"keys": [)", absl::StrJoin(entries, ","),
                                       R"(], "tenants": )", tenants, "}")));
  }
  // To the public port with a key.
  std::shared_ptr<grpc::Channel> ChannelOf(const std::string& secret) {
    return MakeChannel(server_->endpoints().at("grpc"), /*connection=*/0, {.secret = secret});
  }

  template <typename Response, typename Stub, typename Request>
  absl::StatusOr<Response> Send(
      Stub* stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
      const Request& request, absl::Duration timeout = absl::Seconds(20)) {
    grpc::ClientContext context;
    context.set_wait_for_ready(true);
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (!status.ok()) return FromGrpcStatus(status);
    return response;
  }

  static v1::CreateQuantizationJobRequest NewJob(const std::string& id) {
    v1::CreateQuantizationJobRequest request;
    request.set_quantization_job_id(id);
    request.mutable_quantization_job()->set_source_model("/models/tiny");
    request.mutable_quantization_job()->set_model_name(id + "-model");
    return request;
  }
  absl::StatusOr<v1::QuantizationJob> Create(const v1::CreateQuantizationJobRequest& request) {
    return Send<v1::QuantizationJob>(jobs_.get(), &JobStub::CreateQuantizationJob, request);
  }
  absl::StatusOr<v1::QuantizationJob> Get(const std::string& id) {
    v1::GetQuantizationJobRequest request;
    request.set_name("quantizationJobs/" + id);
    return Send<v1::QuantizationJob>(jobs_.get(), &JobStub::GetQuantizationJob, request);
  }
  absl::StatusOr<v1::QuantizationJob> Cancel(const std::string& id) {
    v1::CancelQuantizationJobRequest request;
    request.set_name(id);
    return Send<v1::QuantizationJob>(jobs_.get(), &JobStub::CancelQuantizationJob, request);
  }

  testing::TempDir dir_;
  ServerOptions options_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<JobStub> jobs_;
  std::unique_ptr<ModelStub> models_;
  std::unique_ptr<GenerationStub> generation_;
};

}  // namespace walsh
