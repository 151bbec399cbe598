#include "tests/sim/network.h"

namespace walsh::sim {
namespace {

constexpr absl::Duration kDelayMin = absl::Milliseconds(1);
constexpr absl::Duration kDelayMax = absl::Milliseconds(20);
// Of lost messages, whose connection is known to be broken.
constexpr double kResets = 0.4;

}  // namespace

void Network::Deliver(const Route& route, Fault loss, std::function<void()> arrive,
                      std::function<void()> reset) {
  if (cuts_.contains({route.from, route.to})) return;
  const auto count = [&](Fault fault) { counts_.Count(fault, history_.PhaseOfJob(route.job)); };
  absl::Duration delay = random_.Between(kDelayMin, kDelayMax);
  if (random_.Chance(faults.lost)) {
    count(loss);
    if (random_.Chance(kResets)) loop_.After(delay, std::move(reset));
    return;
  }
  if (random_.Chance(faults.twice)) {
    count(Fault::kMessageTwice);
    loop_.After(delay + random_.Between(kDelayMin, faults.late_max / 4), arrive);
  }
  if (random_.Chance(faults.late)) {
    count(Fault::kMessageLate);
    delay += random_.Between(kDelayMin, faults.late_max);
  }
  loop_.After(delay, std::move(arrive));
}

}  // namespace walsh::sim
