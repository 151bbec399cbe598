// Ends calls that this process makes from another thread: for Ctrl-C, and for a client that has
// gone while the coordinator asks a worker in its name.
//
// One object serves one thing that somebody waits for: it cancels the call that runs (one at a
// time), wakes a pause between two attempts, and makes later calls with it fail at once.
//
// Threads: every method may be called from any thread; Cancel() must not be called from a signal
//          handler (it locks).
#pragma once

#include <grpcpp/client_context.h>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh {

class Cancellation {
 public:
  void Cancel();
  bool cancelled() const;
  // False when cancelled before `duration` had passed.
  bool Sleep(absl::Duration duration);

  // Registers a call for its lifetime. A call that begins after Cancel() is cancelled at once.
  class Call {
   public:
    Call(Cancellation* cancellation, grpc::ClientContext* context);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    Cancellation* const cancellation_;  // may be null
  };

 private:
  mutable absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace walsh
