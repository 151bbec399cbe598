#include "tests/testing/fake_worker.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace walsh::testing {

namespace internal_v1 = walsh::internal::v1;

namespace {

constexpr absl::Duration kTimeout = absl::Seconds(20);

// One unary call of a stub's synchronous method.
template <typename Response, typename Stub, typename Request>
absl::StatusOr<Response> Send(Stub* stub,
                              grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                           Response*),
                              const Request& request, absl::Duration timeout = kTimeout) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  Response response;
  const grpc::Status status = (stub->*method)(&context, request, &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

using WorkerStub = internal_v1::WorkerService::Stub;

}  // namespace

class FakeWorker::Host : public internal_v1::ModelHostService::Service {
 public:
  explicit Host(FakeWorker* worker) : worker_(worker) {}

  grpc::Status ValidateJob(grpc::ServerContext* context,
                           const internal_v1::ValidateJobRequest* request,
                           internal_v1::ValidateJobResponse* response) override {
    worker_->Tell("ValidateJob", context);
    return worker_->on_validate ? worker_->on_validate(*request, response) : grpc::Status::OK;
  }
  grpc::Status LoadModel(grpc::ServerContext* context, const internal_v1::HostModelRequest* request,
                         v1::Model* response) override {
    worker_->Tell("LoadModel", context);
    if (worker_->on_load) {
      const grpc::Status status = worker_->on_load(context, request->model());
      if (!status.ok()) return status;
    }
    return Change(request->model(), v1::Model::READY, response);
  }
  grpc::Status UnloadModel(grpc::ServerContext* context,
                           const internal_v1::HostModelRequest* request,
                           v1::Model* response) override {
    worker_->Tell("UnloadModel", context);
    if (worker_->on_unload) {
      const grpc::Status status = worker_->on_unload(request->model());
      if (!status.ok()) return status;
    }
    return Change(request->model(), v1::Model::UNLOADED, response);
  }
  grpc::Status DeleteModel(grpc::ServerContext* context,
                           const internal_v1::HostModelRequest* request,
                           google::protobuf::Empty*) override {
    worker_->Tell("DeleteModel", context);
    const absl::MutexLock lock(&worker_->mu_);
    const auto erased = std::erase_if(
        worker_->models_, [&](const v1::Model& m) { return m.name() == request->model(); });
    return erased == 1 ? grpc::Status::OK : ToGrpcStatus(NotFound("model", request->model()));
  }

 private:
  grpc::Status Change(const std::string& name, v1::Model::State state, v1::Model* response) {
    if (!worker_->ModelState(name).has_value()) return ToGrpcStatus(NotFound("model", name));
    worker_->SetModel(name, state);
    response->set_name(name);
    response->set_state(state);
    return grpc::Status::OK;
  }

  FakeWorker* const worker_;
};

class FakeWorker::Generation : public v1::GenerationService::Service {
 public:
  explicit Generation(FakeWorker* worker) : worker_(worker) {}

  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        v1::GenerateResponse* response) override {
    worker_->Tell("Generate", context);
    if (!worker_->on_generate) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
    return worker_->on_generate(context, *request, response);
  }
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest* request,
                              StreamWriter* writer) override {
    if (!worker_->on_stream) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
    return worker_->on_stream(context, *request, writer);
  }
  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    worker_->Tell("Tokenize", context);
    for (const char c : request->text()) response->add_token_ids(c);
    return grpc::Status::OK;
  }
  grpc::Status Detokenize(grpc::ServerContext* context, const v1::DetokenizeRequest* request,
                          v1::DetokenizeResponse* response) override {
    worker_->Tell("Detokenize", context);
    std::string text;
    for (const int id : request->token_ids()) text.push_back(static_cast<char>(id));
    response->set_text(text);
    return grpc::Status::OK;
  }

 private:
  FakeWorker* const worker_;
};

FakeWorker::FakeWorker(const std::string& coordinator, const std::string& id)
    : id_(id), stub_(internal_v1::WorkerService::NewStub(MakeChannel(coordinator))) {
  host_ = std::make_unique<Host>(this);
  generation_ = std::make_unique<Generation>(this);
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(host_.get());
  builder.RegisterService(generation_.get());
  server_ = builder.BuildAndStart();
  WALSH_CHECK(server_ != nullptr);
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakeWorker::~FakeWorker() { Vanish(); }

void FakeWorker::Vanish() {
  if (server_ != nullptr) server_->Shutdown(absl::ToChronoTime(absl::Now()));
  server_.reset();
}

absl::Status FakeWorker::Register() {
  internal_v1::RegisterRequest request;
  request.set_worker_id(id_);
  request.set_address(address_);
  request.set_version("fake");
  request.set_device("fake");
  {
    const absl::MutexLock lock(&mu_);
    for (const v1::Model& model : models_) *request.add_models() = model;
  }
  return Send<internal_v1::RegisterResponse>(stub_.get(), &WorkerStub::Register, request).status();
}

absl::StatusOr<std::optional<FakeWorker::Lease>> FakeWorker::Acquire(absl::Duration wait) {
  internal_v1::AcquireLeaseRequest request;
  request.set_worker_id(id_);
  request.mutable_wait()->set_seconds(absl::ToInt64Seconds(wait));
  request.mutable_wait()->set_nanos(
      static_cast<int>(absl::ToInt64Nanoseconds(wait % absl::Seconds(1))));
  WALSH_ASSIGN_OR_RETURN(
      auto response, Send<internal_v1::AcquireLeaseResponse>(stub_.get(), &WorkerStub::AcquireLease,
                                                             request, wait + kTimeout));
  if (!response.has_lease()) return std::nullopt;
  return response.lease();
}

FakeWorker::Lease FakeWorker::MustAcquire() {
  absl::StatusOr<std::optional<Lease>> lease = Acquire(absl::Seconds(15));
  WALSH_CHECK(lease.ok());
  WALSH_CHECK(lease->has_value());
  return **lease;
}

internal_v1::HeartbeatRequest FakeWorker::HeartbeatRequest() const {
  internal_v1::HeartbeatRequest request;
  request.set_worker_id(id_);
  request.set_requests_running(running_);
  request.set_requests_waiting(waiting_);
  request.set_draining(draining_);
  const absl::MutexLock lock(&mu_);
  for (const v1::Model& model : models_) *request.add_models() = model;
  return request;
}

absl::StatusOr<internal_v1::HeartbeatResponse> FakeWorker::Heartbeat() {
  return Send<internal_v1::HeartbeatResponse>(stub_.get(), &WorkerStub::Heartbeat,
                                              HeartbeatRequest());
}

absl::StatusOr<internal_v1::HeartbeatResponse> FakeWorker::Heartbeat(const Lease& lease) {
  internal_v1::HeartbeatRequest request = HeartbeatRequest();
  request.set_job_name(lease.job_name());
  request.set_fencing_token(lease.fencing_token());
  return Send<internal_v1::HeartbeatResponse>(stub_.get(), &WorkerStub::Heartbeat, request);
}

absl::Status FakeWorker::Report(const Lease& lease, Stage stage, double fraction,
                                const std::string& message) {
  internal_v1::ReportProgressRequest request;
  request.set_worker_id(id_);
  request.set_job_name(lease.job_name());
  request.set_fencing_token(lease.fencing_token());
  request.mutable_event()->set_stage(stage);
  request.mutable_event()->set_layer(-1);
  request.mutable_event()->set_message(message);
  request.mutable_event()->mutable_progress()->set_fraction(fraction);
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::ReportProgress, request).status();
}

namespace {

internal_v1::CompleteJobRequest Completion(const std::string& worker_id,
                                           const FakeWorker::Lease& lease) {
  internal_v1::CompleteJobRequest request;
  request.set_worker_id(worker_id);
  request.set_job_name(lease.job_name());
  request.set_fencing_token(lease.fencing_token());
  return request;
}

}  // namespace

absl::Status FakeWorker::Succeed(const Lease& lease) {
  internal_v1::CompleteJobRequest request = Completion(id_, lease);
  request.mutable_result()->set_perplexity_before(10);
  request.mutable_result()->set_perplexity_after(11);
  const std::string model = "models/" + lease.job().model_name();
  request.mutable_model()->set_name(model);
  request.mutable_model()->set_bits(lease.job().config().bits());
  request.mutable_model()->set_state(v1::Model::UNLOADED);
  request.mutable_model()->set_size_bytes(kModelBytes);
  absl::Status status =
      Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::CompleteJob, request).status();
  if (status.ok()) SetModel(model, v1::Model::UNLOADED);
  return status;
}

absl::Status FakeWorker::Fail(const Lease& lease, absl::StatusCode code,
                              const std::string& reason) {
  internal_v1::CompleteJobRequest request = Completion(id_, lease);
  request.mutable_error()->set_code(static_cast<int>(code));
  request.mutable_error()->set_message("scripted failure");
  request.set_error_reason(reason);
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::CompleteJob, request).status();
}

absl::Status FakeWorker::Refuse(const Lease& lease, absl::StatusCode code,
                                const std::string& message, const std::string& reason) {
  internal_v1::CompleteJobRequest request = Completion(id_, lease);
  request.mutable_error()->set_code(static_cast<int>(code));
  request.mutable_error()->set_message(message);
  request.set_error_reason(reason);
  request.set_refused(true);
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::CompleteJob, request).status();
}

absl::Status FakeWorker::AcknowledgeCancel(const Lease& lease) {
  internal_v1::CompleteJobRequest request = Completion(id_, lease);
  request.mutable_cancelled();
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::CompleteJob, request).status();
}

absl::Status FakeWorker::Drain() {
  internal_v1::DrainRequest request;
  request.set_worker_id(id_);
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::Drain, request).status();
}

absl::Status FakeWorker::Deregister() {
  internal_v1::DeregisterRequest request;
  request.set_worker_id(id_);
  return Send<google::protobuf::Empty>(stub_.get(), &WorkerStub::Deregister, request).status();
}

void FakeWorker::SetModel(const std::string& name, v1::Model::State state) {
  const absl::MutexLock lock(&mu_);
  for (v1::Model& model : models_) {
    if (model.name() == name) return model.set_state(state);
  }
  v1::Model& model = models_.emplace_back();
  model.set_name(name);
  model.set_state(state);
}

std::optional<v1::Model::State> FakeWorker::ModelState(const std::string& name) const {
  const absl::MutexLock lock(&mu_);
  for (const v1::Model& model : models_) {
    if (model.name() == name) return model.state();
  }
  return std::nullopt;
}

void FakeWorker::Tell(const char* method, grpc::ServerContext* context) const {
  if (on_call) on_call(method, context);
}

void FakeWorker::set_load(int running, int waiting) {
  running_ = running;
  waiting_ = waiting;
}

}  // namespace walsh::testing
