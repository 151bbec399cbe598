// Calls between clients, coordinator and workers over a network that loses, delays, repeats and
// cuts.
//
// As gRPC's: a call ends with its answer, with UNAVAILABLE when its connection breaks, or with
// DEADLINE_EXCEEDED, whichever is first; the other side may have done its part all the same.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "tests/sim/event_loop.h"
#include "tests/sim/fault.h"
#include "tests/sim/history.h"
#include "tests/sim/random.h"

namespace walsh::sim {

template <typename Response>
using Reply = std::function<void(absl::StatusOr<Response>)>;

struct NetworkFaults {
  double lost = 0;
  double twice = 0;
  double late = 0;
  absl::Duration late_max = absl::Seconds(8);
};

class Network {
 public:
  // All outlive the object.
  Network(Random* random, EventLoop* loop, History* history, FaultCounts* counts)
      : random_(*random), loop_(*loop), history_(*history), counts_(*counts) {}

  NetworkFaults faults;

  // Nothing goes from one to the other until Heal.
  void Cut(const std::string& from, const std::string& to) { cuts_.insert({from, to}); }
  void Heal(const std::string& from, const std::string& to) { cuts_.erase({from, to}); }
  void HealAll() { cuts_.clear(); }

  struct Route {
    std::string from, to;
    std::string job;  // whom a fault concerns; empty: none
    Route back() const { return {.from = to, .to = from, .job = job}; }
  };
  // `serve` runs where and when the request arrives; `done` once, at the caller.
  template <typename Response>
  void Call(const Route& route, absl::Duration timeout, std::function<void(Reply<Response>)> serve,
            Reply<Response> done) {
    const auto finish = [is_done = std::make_shared<bool>(false),
                         done = std::move(done)](absl::StatusOr<Response> answer) {
      if (!std::exchange(*is_done, true)) done(std::move(answer));
    };
    const auto reset = [finish] { finish(absl::UnavailableError("the connection broke")); };
    loop_.After(timeout, [finish] { finish(absl::DeadlineExceededError("no answer in time")); });
    const Reply<Response> reply = [this, route, finish, reset](absl::StatusOr<Response> answer) {
      Deliver(
          route.back(), Fault::kAnswerLost, [finish, answer] { finish(answer); }, reset);
    };
    Deliver(
        route, Fault::kRequestLost, [serve = std::move(serve), reply] { serve(reply); }, reset);
  }
  // Without an answer.
  void Send(const Route& route, std::function<void()> arrive) {
    Deliver(route, Fault::kRequestLost, std::move(arrive), [] {});
  }

 private:
  void Deliver(const Route& route, Fault loss, std::function<void()> arrive,
               std::function<void()> reset);

  Random& random_;
  EventLoop& loop_;
  History& history_;
  FaultCounts& counts_;
  std::set<std::pair<std::string, std::string>> cuts_;
};

}  // namespace walsh::sim
