// Gives the requests of a worker's models the device while a job runs (--serve-while-quantizing):
// the job's side of `share` and `preempt`.
//
// A job asks at the end of each step. While no request runs or waits that costs it the reading of
// an atomic and of the clock. While one does, the job waits until none is left; with `share` for
// kWaitPerWork times as long as it has worked since its last wait at most, and between kWaitMin and
// kWaitMax. So traffic has the device for 80 % of the time at least, and a job is slowed down five
// times at most, by traffic that never ends. Work of less than kWaitMin / kWaitPerWork goes on to
// the next step, or steps of microseconds would be followed by waits of milliseconds.
//
// Requests that wait count as those that run: where none runs they will within a step.
//
// Threads: used by the job's thread
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "common/serve_while_quantizing.h"
#include "worker/engine/request_count.h"
#include "worker/pipeline/yield.h"

namespace walsh::service {

class TrafficGate final : public pipeline::Yield {
 public:
  // A decoding step takes 1 to 5 ms on a device, and more on the CPU: a wait of 10 ms holds some of
  // them, so that a slice of the job delays few. The longest wait bounds what one long step of a
  // job costs it afterwards.
  static constexpr int kWaitPerWork = 4;
  static constexpr absl::Duration kWaitMin = absl::Milliseconds(10);
  static constexpr absl::Duration kWaitMax = absl::Seconds(1);
  // How often a waiting job asks whether it should stop.
  static constexpr absl::Duration kAskInterval = absl::Milliseconds(50);

  struct Traffic {
    std::function<int()> n_requests;  // that run or wait
    // Returns once there are none, or after this time.
    std::function<void(absl::Duration at_most)> wait_until_none;
  };
  static Traffic TrafficOf(engine::RequestCount* requests);

  // For one job, from its start. With `policy` kExclusive there are no requests, and it never
  // waits.
  TrafficGate(ServeWhileQuantizing policy, Traffic traffic, const Clock* clock);

  bool IsWanted() override;
  absl::Status Wait(const KeepGoing& keep_going) override;

 private:
  // How long the job may be kept waiting after work that took so long.
  absl::Duration Longest(absl::Duration work) const;

  const ServeWhileQuantizing policy_;
  const Traffic traffic_;
  const Clock* const clock_;
  absl::Duration work_start_;  // monotonic; of the work that the next wait is for
};

}  // namespace walsh::service
