// Carries one stream of messages from a worker to a client: of generated tokens, of an evaluation,
// or the progress of an export.
//
// Between them is a buffer of at most kStreamChunksMax messages. When it is full nothing more is
// read from the worker, whose own writes then wait: a slow client slows its own stream down and
// nothing else. A client that takes nothing for `stall_max` is given up. One write is in flight at
// a time and no thread is held.
//
// A call that a worker ends before its first message may be made again, to another worker.
//
// The stream ends exactly once: with the worker's status after everything the worker sent;
// CANCELLED when the client has gone (the worker's call is cancelled with it); RESOURCE_EXHAUSTED
// (ErrorInfo SLOW_READER) after a stall; UNAVAILABLE (WORKER_LOST) when the worker's connection
// broke; what ForwardedCalls::EndAll says.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/executor.h"
#include "common/limits.h"
#include "server/fleet/forwarded_calls.h"
#include "server/fleet/worker_client.h"

namespace walsh::fleet {

struct StreamLimits {
  int chunks_max = limits::kStreamChunksMax;
  absl::Duration stall_max = absl::Seconds(limits::kStreamStallSecondsMax);
};

// What a stream ends with whose client has stalled: RESOURCE_EXHAUSTED (SLOW_READER), with
// RetryInfo.
absl::Status SlowReader();
// The status waits behind the message that the client does not read. One that does not come back
// for it in this time must not hold the stream for ever.
inline constexpr absl::Duration kSlowReaderGrace = absl::Seconds(30);

template <typename Response>
using StreamReactor = grpc::ServerWriteReactor<Response>;
template <typename Response>
using StreamReader = grpc::ClientReadReactor<Response>;

// Starts the worker's call, with its request.
template <typename Response>
using StartStream = std::function<void(grpc::ClientContext*, StreamReader<Response>*)>;

// What a worker's call failed with before its first message: whether the stream shall be started
// once more, for another worker.
using GoElsewhere = std::function<bool(const absl::Status&)>;

// Returns the reactor of the client's call, which gRPC owns from there. `done` runs once, when the
// last worker's call has ended, with the status that the client gets. There is one for each kind of
// message that a worker streams.
template <typename Response>
StreamReactor<Response>* ProxyStream(grpc::CallbackServerContext* context, ForwardedCalls* calls,
                                     absl::Duration timeout, const StreamLimits& limits,
                                     Executor* executor, const StartStream<Response>& start,
                                     std::function<void(const absl::Status&)> done,
                                     GoElsewhere go_elsewhere = nullptr);

}  // namespace walsh::fleet
