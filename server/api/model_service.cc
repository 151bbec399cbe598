#include "server/api/model_service.h"

#include <string>
#include <utility>
#include <vector>

#include "common/resource_name.h"
#include "common/status_macros.h"
#include "server/api/model_moves.h"
#include "server/fleet/forwarding.h"
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

}  // namespace

grpc::ServerUnaryReactor* ModelServiceImpl::ListModels(grpc::CallbackServerContext* context,
                                                       const v1::ListModelsRequest* request,
                                                       v1::ListModelsResponse* response) {
  const Call call(context, "ListModels");
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
  const Call call(context, "GetModel");
  return call.Run(core_->executor, [core = core_, request, response]() -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("name", request->name()));
    WALSH_ASSIGN_OR_RETURN(*response, core->catalog->Get(id));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::LoadModel(grpc::CallbackServerContext* context,
                                                      const v1::LoadModelRequest* request,
                                                      v1::Model* response) {
  const Call call(context, "LoadModel");
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
  const Call call(context, "UnloadModel");
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
  const Call call(context, "DeleteModel");
  const absl::StatusOr<std::string> id = ParseModelName("name", request->name());
  if (!id.ok()) return call.FinishNow(id.status());
  return call.RunAsync(
      core_->executor, [core = core_, call, id = *id, limits = Limits(*context, call), request] {
        api::DeleteModel(core, id, request->force(), limits,
                         [call](const absl::Status& status) { call.Finish(status); });
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
