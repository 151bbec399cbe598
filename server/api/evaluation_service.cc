#include "server/api/evaluation_service.h"

#include <memory>
#include <string>
#include <utility>

#include "common/evaluation_limits.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/call.h"
#include "server/fleet/forwarding.h"
#include "server/fleet/placement.h"

namespace walsh::api {
namespace {

using fleet::WorkerAddress;
using v1::EvaluateModelResponse;

constexpr char kMethod[] = "EvaluateModel";

// The model that the request means.
absl::StatusOr<std::string> Resolve(const Core& core, const v1::EvaluateModelRequest& request) {
  WALSH_RETURN_IF_ERROR(ValidateEvaluation(request));
  WALSH_ASSIGN_OR_RETURN(const std::string name, ParseModelName("model", request.model()));
  if (core.is_stopping) return Stopping();
  return core.catalog->Resolve(name);
}

// An evaluation on its way to a worker; alive until it ends.
struct Forwarded {
  Forwarded(const v1::EvaluateModelRequest& r, std::shared_ptr<fleet::WorkerClient> c)
      : request(r), client(std::move(c)), connection(client->AcquireGeneration()) {}

  v1::EvaluateModelRequest request;
  const std::shared_ptr<fleet::WorkerClient> client;
  const fleet::WorkerClient::GenerationPool::Lease connection;
};

}  // namespace

grpc::ServerWriteReactor<EvaluateModelResponse>* EvaluationServiceImpl::EvaluateModel(
    grpc::CallbackServerContext* context, const v1::EvaluateModelRequest* request) {
  const std::string request_id = EchoRequestId(context);
  const absl::StatusOr<std::string> id = Resolve(*core_, *request);
  const absl::StatusOr<WorkerAddress> worker =
      id.ok() ? fleet::ChooseForEvaluation(*id, core_->registry->Replicas(*id)) : id.status();
  if (!worker.ok()) {
    LogEnd(kMethod, request_id, worker.status());
    return new FailedStream<EvaluateModelResponse>(worker.status());
  }
  auto call = std::make_shared<Forwarded>(*request, core_->clients->Get(*worker));
  call->request.set_model(*id);
  if (call->request.request_id().empty()) call->request.set_request_id(request_id);
  const fleet::StartStream<EvaluateModelResponse> start =
      [call](grpc::ClientContext* client_context,
             fleet::StreamReader<EvaluateModelResponse>* reader) {
        call->connection->evaluation->async()->EvaluateModel(client_context, &call->request,
                                                             reader);
      };
  core_->registry->BeginEvaluation(worker->worker_id);
  // `call` must outlive the worker's call, of which this is the end.
  const auto done = [core = core_, call, worker_id = worker->worker_id,
                     begin = core_->clock->Monotonic()](const absl::Status& status) {
    WALSH_LOG(Info, "call ended", {"method", kMethod}, {"request_id", call->request.request_id()},
              {"model", call->request.model()}, {"worker", WorkerName(worker_id)},
              {"status", status},
              {"seconds", absl::ToDoubleSeconds(core->clock->Monotonic() - begin)});
    core->registry->EndEvaluation(worker_id);
  };
  return fleet::ProxyStream<v1::EvaluateModelResponse>(
      context, &core_->calls,
      fleet::WorkerTimeout(context->deadline(), fleet::kEvaluateTimeout, fleet::kEvaluateTimeout),
      core_->stream_limits, core_->executor, start, done);
}

}  // namespace walsh::api
