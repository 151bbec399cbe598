// externalscaler.ExternalScaler: how many workers the jobs want, for KEDA
// (proto/externalscaler/externalscaler.proto).
#pragma once

#include <atomic>

#include "externalscaler/externalscaler.grpc.pb.h"
#include "server/api/call.h"
#include "server/api/core.h"

namespace walsh::api {

class ExternalScalerServiceImpl final : public externalscaler::ExternalScaler::CallbackService {
 public:
  explicit ExternalScalerServiceImpl(Core* core) : core_(core) {}

  grpc::ServerUnaryReactor* IsActive(grpc::CallbackServerContext* context,
                                     const externalscaler::ScaledObjectRef* request,
                                     externalscaler::IsActiveResponse* response) override;
  grpc::ServerWriteReactor<externalscaler::IsActiveResponse>* StreamIsActive(
      grpc::CallbackServerContext* context,
      const externalscaler::ScaledObjectRef* request) override;
  grpc::ServerUnaryReactor* GetMetricSpec(grpc::CallbackServerContext* context,
                                          const externalscaler::ScaledObjectRef* request,
                                          externalscaler::GetMetricSpecResponse* response) override;
  grpc::ServerUnaryReactor* GetMetrics(grpc::CallbackServerContext* context,
                                       const externalscaler::GetMetricsRequest* request,
                                       externalscaler::GetMetricsResponse* response) override;

 private:
  Core* const core_;
  std::atomic<int> n_streams_ = 0;
};

}  // namespace walsh::api
