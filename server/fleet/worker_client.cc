#include "server/fleet/worker_client.h"

#include <grpcpp/client_context.h>

#include <optional>
#include <utility>

#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"

namespace walsh::fleet {
namespace {

// Of a worker's connections; those from kFirstGenerationConnection on are opened as needed.
constexpr absl::Duration kRefusedRetry = absl::Seconds(5);
constexpr int kHostConnection = 0;
constexpr int kFirstGenerationConnection = 1;

// Everything that a unary call needs until it is done.
template <typename Request, typename Response>
struct UnaryCall {
  grpc::ClientContext context;
  std::shared_ptr<Cancellation> cancellation;
  std::optional<Cancellation::Call> cancellable;  // while it runs
  Request request;
  Response response;
  WorkerClient::Callback<Response> done;
};

template <typename Response, typename Method, typename Request>
void Start(Method method, Request request, absl::Duration timeout,
           WorkerClient::CancellationPtr cancellation, WorkerClient::Callback<Response> done) {
  auto* call = new UnaryCall<Request, Response>;
  call->request = std::move(request);
  call->done = std::move(done);
  call->context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  call->cancellation = std::move(cancellation);
  call->cancellable.emplace(call->cancellation.get(), &call->context);
  method(&call->context, &call->request, &call->response, [call](const grpc::Status& status) {
    const std::unique_ptr<UnaryCall<Request, Response>> owner(call);
    owner->cancellable.reset();  // what follows `done` may be cancelled by the same object
    if (status.ok()) {
      owner->done(std::move(owner->response));
    } else {
      owner->done(FromWorker(status));
    }
  });
}

internal_v1::HostModelRequest HostRequest(const std::string& model) {
  internal_v1::HostModelRequest request;
  request.set_model(model);
  return request;
}

}  // namespace

bool GaveNoAnswer(const absl::Status& status) {
  const std::string reason = ErrorReason(status);
  return absl::IsDeadlineExceeded(status) || reason == "WORKER_LOST" || reason == "WORKER_REFUSES";
}

absl::Status FromWorker(const grpc::Status& status) {
  absl::Status converted = FromGrpcStatus(status);
  // It is the coordinator that was refused, and not the client, whose call had passed.
  if (status.error_details().empty() &&
      (absl::IsUnauthenticated(converted) || absl::IsPermissionDenied(converted))) {
    WALSH_LOG(Error, "a worker does not know this coordinator: see --worker-token-file",
              {"error", converted});
    converted = absl::UnavailableError("the worker does not take calls of this service now");
    SetErrorInfo(converted, "WORKER_REFUSES");
    SetRetryDelay(converted, kRefusedRetry);
    return converted;
  }
  // Our workers send UNAVAILABLE with a reason only, and never UNKNOWN: these are the connection's.
  const bool is_connection = status.error_details().empty() &&
                             (absl::IsUnavailable(converted) || absl::IsUnknown(converted));
  if (!is_connection) return converted;
  converted = absl::UnavailableError("the worker was lost while it answered; try again");
  SetErrorInfo(converted, "WORKER_LOST");
  SetRetryDelay(converted, absl::Seconds(1));
  return converted;
}

bool IsLeaving(const absl::Status& status) {
  if (!absl::IsUnavailable(status)) return false;
  const std::string reason = ErrorReason(status);
  return reason == "WORKER_STOPPING" || reason == "MODEL_UNLOADING";
}

WorkerClient::WorkerClient(const std::string& address, const ChannelSecurity& security)
    : host_(
          internal_v1::ModelHostService::NewStub(MakeChannel(address, kHostConnection, security))),
      generation_(address, limits::kConcurrentStreamsMax, security, kFirstGenerationConnection) {}

void WorkerClient::ValidateJob(const internal_v1::ValidateJobRequest& request,
                               absl::Duration timeout, CancellationPtr cancellation,
                               Callback<internal_v1::ValidateJobResponse> done) {
  const auto method = [this](auto&&... args) { host_->async()->ValidateJob(args...); };
  Start<internal_v1::ValidateJobResponse>(method, request, timeout, std::move(cancellation),
                                          std::move(done));
}

void WorkerClient::LoadModel(const std::string& model, absl::Duration timeout,
                             CancellationPtr cancellation, Callback<v1::Model> done) {
  const auto method = [this](auto&&... args) { host_->async()->LoadModel(args...); };
  Start<v1::Model>(method, HostRequest(model), timeout, std::move(cancellation), std::move(done));
}

void WorkerClient::UnloadModel(const std::string& model, absl::Duration timeout,
                               CancellationPtr cancellation, Callback<v1::Model> done) {
  const auto method = [this](auto&&... args) { host_->async()->UnloadModel(args...); };
  Start<v1::Model>(method, HostRequest(model), timeout, std::move(cancellation), std::move(done));
}

void WorkerClient::DeleteModel(const std::string& model, absl::Duration timeout,
                               CancellationPtr cancellation,
                               Callback<google::protobuf::Empty> done) {
  const auto method = [this](auto&&... args) { host_->async()->DeleteModel(args...); };
  Start<google::protobuf::Empty>(method, HostRequest(model), timeout, std::move(cancellation),
                                 std::move(done));
}

void WorkerClient::ExportModel(grpc::ClientContext* context, const v1::ExportModelRequest* request,
                               grpc::ClientReadReactor<v1::ExportModelResponse>* reader) {
  host_->async()->ExportModel(context, request, reader);
}

void WorkerClient::ImportModel(grpc::ClientContext* context, const v1::ImportModelRequest* request,
                               grpc::ClientReadReactor<v1::ImportModelResponse>* reader) {
  host_->async()->ImportModel(context, request, reader);
}

std::shared_ptr<WorkerClient> WorkerClients::Get(const WorkerAddress& worker) {
  ChannelSecurity security = security_();
  const absl::MutexLock lock(&mu_);
  Entry& entry = clients_[worker.worker_id];
  if (entry.client == nullptr || entry.address != worker.address || entry.security != security) {
    auto client = std::make_shared<WorkerClient>(worker.address, security);
    entry = {
        .address = worker.address, .security = std::move(security), .client = std::move(client)};
  }
  return entry.client;
}

void WorkerClients::Forget(const std::string& worker_id) {
  const absl::MutexLock lock(&mu_);
  clients_.erase(worker_id);
}

void WorkerClients::KeepOnly(const std::set<std::string>& worker_ids) {
  const absl::MutexLock lock(&mu_);
  std::erase_if(clients_, [&](const auto& known) { return !worker_ids.contains(known.first); });
}

}  // namespace walsh::fleet
