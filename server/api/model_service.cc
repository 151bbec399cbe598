#include "server/api/model_service.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/model_moves.h"
#include "server/fleet/forwarding.h"
#include "server/fleet/placement.h"
#include "server/fleet/stream_proxy.h"
#include "server/jobs/page_token.h"

namespace walsh::api {
namespace {

constexpr char kModelsQuery[] = "models";

MoveLimits Limits(const grpc::CallbackServerContext& context, const Call& call) {
  return {.timeout = fleet::WorkerTimeout(context.deadline(), fleet::kLoadTimeoutDefault),
          .cancellation = call.cancellation()};
}

// Answers with the model as it is after a move.
Done AnswerWithModel(Core* core, const Call& call, std::string id, v1::Model* response) {
  return [core, call, id = std::move(id), response](absl::Status status) {
    if (status.ok()) {
      absl::StatusOr<v1::Model> model = core->catalog->Get(id);
      status = model.status();
      if (model.ok()) *response = *std::move(model);
    }
    call.Finish(status);
  };
}

// The id of the model that a request names, maybe by an alias.
absl::StatusOr<std::string> Resolve(const Core& core, const std::string& name) {
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("name", name));
  return core.catalog->Resolve(id);
}

// The worker that exports: any that has the model, the least busy first.
absl::StatusOr<fleet::WorkerAddress> WorkerWith(const Core& core, const std::string& id) {
  if (core.is_stopping) return Stopping();
  const std::vector<fleet::Replica> replicas = core.registry->Replicas(id);
  const fleet::Replica* chosen = fleet::ChooseForLoad(replicas);
  if (chosen == nullptr) return ModelNotHere(id);
  return chosen->worker;
}

// The worker that imports: the least busy one. The name is the import's from now on, if this
// succeeds.
absl::StatusOr<fleet::WorkerAddress> BeginImport(const Core& core,
                                                 const absl::StatusOr<std::string>& id) {
  WALSH_RETURN_IF_ERROR(id.status());
  if (core.is_stopping) return Stopping();
  const std::vector<fleet::WorkerAddress> workers = core.registry->Online();
  if (workers.empty()) return fleet::NoWorker();
  WALSH_RETURN_IF_ERROR(core.catalog->BeginImport(*id));
  return workers.front();
}

// Alive until the worker's call has ended.
template <typename Request>
struct Conversion {
  Request request;
  std::shared_ptr<fleet::WorkerClient> client;
};

// `method` is one of WorkerClient's; `done` gets the status of a call to a worker.
template <typename Response, typename Request, typename Method>
fleet::StreamReactor<Response>* ForwardConversion(
    grpc::CallbackServerContext* context, Core* core, const char* name,
    const absl::StatusOr<fleet::WorkerAddress>& worker, const Request& request, Method method,
    Done done = [](const absl::Status&) {}) {
  const std::string request_id = EchoRequestId(context);
  if (!worker.ok()) {
    LogEnd(name, request_id, worker.status());
    return new FailedStream<Response>(worker.status());
  }
  const auto call = std::make_shared<Conversion<Request>>(request, core->clients->Get(*worker));
  return fleet::ProxyStream<Response>(
      context, &core->calls,
      fleet::WorkerTimeout(context->deadline(), fleet::kConversionTimeoutDefault),
      core->stream_limits, core->executor,
      [call, method](grpc::ClientContext* client_context, fleet::StreamReader<Response>* reader) {
        ((*call->client).*method)(client_context, &call->request, reader);
      },
      [call, name, request_id, done = std::move(done)](const absl::Status& status) {
        done(status);
        LogEnd(name, request_id, status);
      });
}

}  // namespace

grpc::ServerUnaryReactor* ModelServiceImpl::ListModels(grpc::CallbackServerContext* context,
                                                       const v1::ListModelsRequest* request,
                                                       v1::ListModelsResponse* response) {
  const Call call(context, "ListModels", core_->call_timeout);
  return call.Run(core_->executor, [core = core_, request, response]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const int page_size, jobs::PageSize(request->page_size()));
    std::string after;
    if (!request->page_token().empty()) {
      WALSH_ASSIGN_OR_RETURN(after, jobs::ReadPageToken(kModelsQuery, request->page_token()));
    }
    std::vector<v1::Model> models = core->catalog->List(after, page_size + 1);
    if (static_cast<int>(models.size()) > page_size) {
      models.pop_back();
      response->set_next_page_token(
          jobs::MakePageToken(kModelsQuery, models.back().name().substr(kModelCollection.size())));
    }
    for (v1::Model& model : models) *response->add_models() = std::move(model);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::GetModel(grpc::CallbackServerContext* context,
                                                     const v1::GetModelRequest* request,
                                                     v1::Model* response) {
  const Call call(context, "GetModel", core_->call_timeout);
  return call.Run(core_->executor, [core = core_, request, response]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const std::string id, Resolve(*core, request->name()));
    WALSH_ASSIGN_OR_RETURN(*response, core->catalog->Get(id));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::LoadModel(grpc::CallbackServerContext* context,
                                                      const v1::LoadModelRequest* request,
                                                      v1::Model* response) {
  const Call call(context, "LoadModel", fleet::kLoadTimeoutDefault);
  const absl::StatusOr<std::string> id = ParseModelName("name", request->name());
  if (!id.ok()) return call.FinishNow(id.status());
  return call.RunAsync(
      core_->executor, [core = core_, call, id = *id, limits = Limits(*context, call), response] {
        api::LoadModel(core, id, limits, AnswerWithModel(core, call, id, response));
      });
}

grpc::ServerUnaryReactor* ModelServiceImpl::UnloadModel(grpc::CallbackServerContext* context,
                                                        const v1::UnloadModelRequest* request,
                                                        v1::Model* response) {
  const Call call(context, "UnloadModel", fleet::kLoadTimeoutDefault);
  const absl::StatusOr<std::string> id = ParseModelName("name", request->name());
  if (!id.ok()) return call.FinishNow(id.status());
  return call.RunAsync(
      core_->executor, [core = core_, call, id = *id, limits = Limits(*context, call), response] {
        api::UnloadModel(core, id, limits, AnswerWithModel(core, call, id, response));
      });
}

grpc::ServerUnaryReactor* ModelServiceImpl::DeleteModel(grpc::CallbackServerContext* context,
                                                        const v1::DeleteModelRequest* request,
                                                        google::protobuf::Empty*) {
  const Call call(context, "DeleteModel", fleet::kLoadTimeoutDefault);
  const absl::StatusOr<std::string> id = ParseModelName("name", request->name());
  if (!id.ok()) return call.FinishNow(id.status());
  return call.RunAsync(
      core_->executor, [core = core_, call, id = *id, limits = Limits(*context, call), request] {
        api::DeleteModel(core, id, request->force(), limits,
                         [call](const absl::Status& status) { call.Finish(status); });
      });
}

grpc::ServerWriteReactor<v1::ExportModelResponse>* ModelServiceImpl::ExportModel(
    grpc::CallbackServerContext* context, const v1::ExportModelRequest* request) {
  v1::ExportModelRequest forwarded = *request;
  absl::StatusOr<fleet::WorkerAddress> worker;
  if (const absl::StatusOr<std::string> id = Resolve(*core_, request->name()); id.ok()) {
    forwarded.set_name(*id);
    worker = WorkerWith(*core_, *id);
  } else {
    worker = id.status();
  }
  return ForwardConversion<v1::ExportModelResponse>(context, core_, "ExportModel", worker,
                                                    forwarded, &fleet::WorkerClient::ExportModel);
}

grpc::ServerWriteReactor<v1::ImportModelResponse>* ModelServiceImpl::ImportModel(
    grpc::CallbackServerContext* context, const v1::ImportModelRequest* request) {
  const absl::StatusOr<std::string> id = ParseModelName("model_name", request->model_name());
  return ForwardConversion<v1::ImportModelResponse>(
      context, core_, "ImportModel", BeginImport(*core_, id), *request,
      &fleet::WorkerClient::ImportModel, [core = core_, id](const absl::Status& status) {
        core->catalog->EndImport(*id, status.ok());
      });
}

grpc::ServerUnaryReactor* ModelServiceImpl::SetModelAlias(grpc::CallbackServerContext* context,
                                                          const v1::SetModelAliasRequest* request,
                                                          v1::ModelAlias* response) {
  const Call call(context, "SetModelAlias", core_->call_timeout);
  return call.Run(core_->executor, [core = core_, request, response]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const std::string alias, ParseAliasName("alias", request->alias()));
    WALSH_ASSIGN_OR_RETURN(const std::string model, ParseModelName("model", request->model()));
    WALSH_ASSIGN_OR_RETURN(*response, core->catalog->SetAlias(alias, model, request->force()));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::DeleteModelAlias(
    grpc::CallbackServerContext* context, const v1::DeleteModelAliasRequest* request,
    google::protobuf::Empty*) {
  const Call call(context, "DeleteModelAlias", core_->call_timeout);
  return call.Run(core_->executor, [core = core_, request]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const std::string alias, ParseAliasName("alias", request->alias()));
    return core->catalog->DeleteAlias(alias);
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::ListWorkers(grpc::CallbackServerContext* context,
                                                        const v1::ListWorkersRequest*,
                                                        v1::ListWorkersResponse* response) {
  const Call call(context, "ListWorkers");
  for (v1::Worker& worker : core_->registry->List()) {
    *response->add_workers() = std::move(worker);
  }
  return call.FinishNow(absl::OkStatus());
}

}  // namespace walsh::api
