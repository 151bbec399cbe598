// The calls to workers that run in clients' names, so that a coordinator that stops can end them.
//
// Threads: safe.
#pragma once

#include <grpcpp/client_context.h>

#include <optional>
#include <set>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace walsh::fleet {

class ForwardedCalls {
 public:
  // A call with its context, which must outlive this object.
  class Call {
   public:
    Call(ForwardedCalls* calls, grpc::ClientContext* context);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    ForwardedCalls* const calls_;
    grpc::ClientContext* const context_;
  };

  // Cancels those that run and those that are begun later; their clients get `why`.
  void EndAll(const absl::Status& why);
  // What a call that ended so means to its client.
  absl::Status Meaning(const absl::Status& ended) const;
  void WaitForNone() const;

 private:
  mutable absl::Mutex mu_;
  std::set<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mu_);
  std::optional<absl::Status> why_ ABSL_GUARDED_BY(mu_);  // once ended
};

}  // namespace walsh::fleet
