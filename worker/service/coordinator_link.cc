#include "worker/service/coordinator_link.h"

#include <utility>

#include "common/grpc_server.h"

namespace walsh::service {

CoordinatorLink::CoordinatorLink(std::string address, Security security)
    : address_(std::move(address)), security_(std::move(security)) {}

std::shared_ptr<CoordinatorLink::Stub> CoordinatorLink::operator->() {
  ChannelSecurity security = security_();
  const absl::MutexLock lock(&mu_);
  if (stub_ == nullptr || security != current_) {
    stub_ = std::make_shared<Stub>(MakeChannel(address_, /*connection=*/0, security));
    current_ = std::move(security);
  }
  return stub_;
}

}  // namespace walsh::service
