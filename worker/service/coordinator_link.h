// The worker's connection to the coordinator's internal port.
//
//   coordinator->Heartbeat(&context, request, &response);
//
// A channel keeps the credentials that it was made with. So each call looks whether others are
// current, as when certificates are renewed, and begins a connection with them; calls that run end
// on the one that they have.
//
// Threads: safe.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/grpc_security.h"
#include "walsh/internal/v1/worker.grpc.pb.h"

namespace walsh::service {

class CoordinatorLink {
 public:
  using Stub = internal::v1::WorkerService::Stub;
  using Security = std::function<ChannelSecurity()>;
  explicit CoordinatorLink(
      std::string address, Security security = [] { return ChannelSecurity(); });

  std::shared_ptr<Stub> operator->();

 private:
  const std::string address_;
  const Security security_;
  absl::Mutex mu_;
  ChannelSecurity current_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Stub> stub_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh::service
