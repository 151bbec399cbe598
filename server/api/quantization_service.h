// walsh.v1.QuantizationService: jobs for clients.
#pragma once

#include "server/api/call.h"
#include "server/api/core.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh::api {

class QuantizationServiceImpl final : public v1::QuantizationService::CallbackService {
 public:
  explicit QuantizationServiceImpl(Core* core) : core_(core) {}

  grpc::ServerUnaryReactor* CreateQuantizationJob(grpc::CallbackServerContext* context,
                                                  const v1::CreateQuantizationJobRequest* request,
                                                  v1::QuantizationJob* response) override;
  grpc::ServerUnaryReactor* GetQuantizationJob(grpc::CallbackServerContext* context,
                                               const v1::GetQuantizationJobRequest* request,
                                               v1::QuantizationJob* response) override;
  grpc::ServerUnaryReactor* ListQuantizationJobs(
      grpc::CallbackServerContext* context, const v1::ListQuantizationJobsRequest* request,
      v1::ListQuantizationJobsResponse* response) override;
  grpc::ServerWriteReactor<v1::QuantizationJobEvent>* WatchQuantizationJob(
      grpc::CallbackServerContext* context,
      const v1::WatchQuantizationJobRequest* request) override;
  grpc::ServerUnaryReactor* CancelQuantizationJob(grpc::CallbackServerContext* context,
                                                  const v1::CancelQuantizationJobRequest* request,
                                                  v1::QuantizationJob* response) override;
  grpc::ServerUnaryReactor* DeleteQuantizationJob(grpc::CallbackServerContext* context,
                                                  const v1::DeleteQuantizationJobRequest* request,
                                                  google::protobuf::Empty* response) override;
  grpc::ServerUnaryReactor* ListSupportedArchitectures(
      grpc::CallbackServerContext* context, const v1::ListSupportedArchitecturesRequest* request,
      v1::ListSupportedArchitecturesResponse* response) override;
  grpc::ServerUnaryReactor* ListQuantizationPresets(
      grpc::CallbackServerContext* context, const v1::ListQuantizationPresetsRequest* request,
      v1::ListQuantizationPresetsResponse* response) override;

 private:
  Core* const core_;
};

}  // namespace walsh::api
