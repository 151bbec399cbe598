#include "server/fleet/forwarded_calls.h"

namespace walsh::fleet {

ForwardedCalls::Call::Call(ForwardedCalls* calls, grpc::ClientContext* context)
    : calls_(calls), context_(context) {
  const absl::MutexLock lock(&calls_->mu_);
  calls_->contexts_.insert(context_);
  if (calls_->why_.has_value()) context_->TryCancel();
}

ForwardedCalls::Call::~Call() {
  const absl::MutexLock lock(&calls_->mu_);
  calls_->contexts_.erase(context_);
}

void ForwardedCalls::EndAll(const absl::Status& why) {
  const absl::MutexLock lock(&mu_);
  why_ = why;
  for (grpc::ClientContext* context : contexts_) context->TryCancel();
}

absl::Status ForwardedCalls::Meaning(const absl::Status& ended) const {
  const absl::MutexLock lock(&mu_);
  return absl::IsCancelled(ended) ? why_.value_or(ended) : ended;
}

void ForwardedCalls::WaitForNone() const {
  const absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(
      +[](const std::set<grpc::ClientContext*>* contexts) { return contexts->empty(); },
      &contexts_));
}

}  // namespace walsh::fleet
