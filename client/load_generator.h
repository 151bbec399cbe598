// Requests to a service at a chosen load, and when what of each arrived.
//
//   closed loop  `concurrency` streams, each of which sends its next request when its last one has
//                ended
//   open loop    requests at `rate` a second with exponential gaps (a Poisson process), whatever
//                the service does, at most `concurrency` at once. One that finds all of these busy
//                waits, and its times count from when it was due: a slow service does not thin out
//                its own measurement. Those that were due and not sent are counted.
//
// Threads: Run is called once and starts a thread for each stream; Stop is safe from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/grpc_cancellation.h"

namespace walsh::client {

struct LoadOptions {
  int concurrency = 1;     // streams at once, at least 1
  double rate = 0;         // requests a second; 0: closed loop
  int64_t n_requests = 1;  // in all
  // Nothing is sent later than this; what is on its way then ends by itself.
  absl::Duration duration_max = absl::InfiniteDuration();
  uint64_t seed = 0;  // of the gaps
};

// One request; times count from the beginning of the run.
struct RequestRecord {
  absl::Status status;
  absl::Duration due;
  absl::Duration first_token = absl::InfiniteDuration();
  absl::Duration last_token = absl::InfiniteDuration();
  absl::Duration end;
  int64_t n_prompt_tokens = 0;
  int64_t n_output_tokens = 0;
  // Of each message with tokens after the first: the time since the one before it, shared among its
  // tokens.
  struct TokenGap {
    float seconds = 0;  // of one token
    int32_t n_tokens = 0;
  };
  std::vector<TokenGap> token_gaps;
};

// What tells the generator what arrived.
class RequestRecorder {
 public:
  RequestRecorder(Clock* clock, absl::Duration start, RequestRecord* record)
      : clock_(clock), start_(start), record_(record) {}
  void OnTokens(int64_t n_tokens);
  void SetPromptTokens(int64_t n_tokens) { record_->n_prompt_tokens = n_tokens; }

 private:
  Clock* const clock_;
  const absl::Duration start_;
  RequestRecord* const record_;
};

// Sends request `index` and returns when it has ended.
using SendRequest =
    std::function<absl::Status(int64_t index, RequestRecorder& recorder, Cancellation& stop)>;

struct LoadResult {
  std::vector<RequestRecord> requests;  // those that were sent, in the order in which they were due
  absl::Duration elapsed;               // to the end of the last
  int concurrency_peak = 0;
  int64_t n_unsent = 0;     // due before the end and not sent, in an open loop
  bool is_stopped = false;  // by Stop, before all were sent
};

class LoadGenerator {
 public:
  LoadGenerator(const LoadOptions& options, Clock* clock);
  // RESOURCE_EXHAUSTED when the system has no threads for so many streams.
  absl::StatusOr<LoadResult> Run(const SendRequest& send);
  // Cancels what is on its way and sends nothing more.
  void Stop();

 private:
  // When requests are due; empty in a closed loop.
  std::vector<absl::Duration> Arrivals() const;

  const LoadOptions options_;
  Clock* const clock_;
  std::atomic<bool> is_stopped_ = false;
  std::vector<std::unique_ptr<Cancellation>> streams_;  // each cancels one call at a time
};

}  // namespace walsh::client
