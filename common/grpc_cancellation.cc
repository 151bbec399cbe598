#include "common/grpc_cancellation.h"

namespace walsh {

void Cancellation::Cancel() {
  absl::MutexLock lock(&mu_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

bool Cancellation::cancelled() const {
  absl::MutexLock lock(&mu_);
  return cancelled_;
}

bool Cancellation::Sleep(absl::Duration duration) {
  absl::MutexLock lock(&mu_);
  return !mu_.AwaitWithTimeout(absl::Condition(&cancelled_), duration);
}

Cancellation::Call::Call(Cancellation* cancellation, grpc::ClientContext* context)
    : cancellation_(cancellation) {
  if (cancellation_ == nullptr) return;
  absl::MutexLock lock(&cancellation_->mu_);
  cancellation_->context_ = context;
  if (cancellation_->cancelled_) context->TryCancel();
}

Cancellation::Call::~Call() {
  if (cancellation_ == nullptr) return;
  absl::MutexLock lock(&cancellation_->mu_);
  cancellation_->context_ = nullptr;
}

}  // namespace walsh
