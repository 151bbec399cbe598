// walsh.internal.v1.WorkerService: what workers call.
#pragma once

#include "server/api/call.h"
#include "server/api/core.h"
#include "walsh/internal/v1/worker.grpc.pb.h"

namespace walsh::api {

namespace internal_v1 = walsh::internal::v1;

class WorkerServiceImpl final : public internal_v1::WorkerService::CallbackService {
 public:
  explicit WorkerServiceImpl(Core* core) : core_(core) {}

  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context,
                                     const internal_v1::RegisterRequest* request,
                                     internal_v1::RegisterResponse* response) override;
  grpc::ServerUnaryReactor* AcquireLease(grpc::CallbackServerContext* context,
                                         const internal_v1::AcquireLeaseRequest* request,
                                         internal_v1::AcquireLeaseResponse* response) override;
  grpc::ServerUnaryReactor* Heartbeat(grpc::CallbackServerContext* context,
                                      const internal_v1::HeartbeatRequest* request,
                                      internal_v1::HeartbeatResponse* response) override;
  grpc::ServerUnaryReactor* ReportProgress(grpc::CallbackServerContext* context,
                                           const internal_v1::ReportProgressRequest* request,
                                           google::protobuf::Empty* response) override;
  grpc::ServerUnaryReactor* CompleteJob(grpc::CallbackServerContext* context,
                                        const internal_v1::CompleteJobRequest* request,
                                        google::protobuf::Empty* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const internal_v1::DrainRequest* request,
                                  google::protobuf::Empty* response) override;
  grpc::ServerUnaryReactor* Deregister(grpc::CallbackServerContext* context,
                                       const internal_v1::DeregisterRequest* request,
                                       google::protobuf::Empty* response) override;

 private:
  Core* const core_;
};

}  // namespace walsh::api
