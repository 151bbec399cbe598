// Cancels a stream on which nothing arrives for too long.
//
// Keepalive finds dead connections, not a live server whose stream has been forgotten (a stuck
// thread there, a proxy between). The service promises heartbeats on watch streams, so silence is
// an error.
#pragma once

#include <grpcpp/client_context.h>

#include <thread>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace walsh::client {

class StreamWatchdog {
 public:
  // `context` must outlive the object.
  StreamWatchdog(grpc::ClientContext* context, absl::Duration silence_max);
  ~StreamWatchdog();
  StreamWatchdog(const StreamWatchdog&) = delete;
  StreamWatchdog& operator=(const StreamWatchdog&) = delete;
  // Something arrived.
  void Feed();
  // It has cancelled the stream.
  bool barked() const;

 private:
  void Run();

  grpc::ClientContext* const context_;
  const absl::Duration silence_max_;
  mutable absl::Mutex mu_;
  bool fed_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;
  bool barked_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace walsh::client
