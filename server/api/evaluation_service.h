// walsh.v1.EvaluationService: checks a request, finds a worker that has the model's artifact, and
// passes the call on.
#pragma once

#include "server/api/core.h"
#include "walsh/v1/evaluation.grpc.pb.h"

namespace walsh::api {

class EvaluationServiceImpl final : public v1::EvaluationService::CallbackService {
 public:
  explicit EvaluationServiceImpl(Core* core) : core_(core) {}

  grpc::ServerWriteReactor<v1::EvaluateModelResponse>* EvaluateModel(
      grpc::CallbackServerContext* context, const v1::EvaluateModelRequest* request) override;

 private:
  Core* const core_;
};

}  // namespace walsh::api
