// What everybody in a simulation shares: chance, time, the network, the disk's moods, the folder of
// checkpoints, and the history of it all.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/time/time.h"
#include "tests/sim/event_loop.h"
#include "tests/sim/fault.h"
#include "tests/sim/history.h"
#include "tests/sim/network.h"
#include "tests/sim/random.h"

namespace walsh::sim {

// Of the coordinator's disk.
struct DiskFaults {
  bool is_full = false;
  double write_error = 0;
  double read_error = 0;
  double slow = 0;
  absl::Duration slow_max = absl::Seconds(2);
  int writes_until_kill = 0;  // the coordinator dies at this one; 0: at none
  bool kills_after_write = false;
};

// As worker/pipeline/checkpoint_store.h: the largest token decides who may write.
struct Checkpoint {
  int64_t token = 0;
  int n_layers = 0;
};

struct World {
  World(uint64_t seed, const History::Limits& limits, std::function<void()> after_each)
      : random(seed),
        loop(std::move(after_each)),
        history(&loop.clock(), limits),
        network(&random, &loop, &history, &faults) {}

  Random random;
  EventLoop loop;
  History history;
  FaultCounts faults;
  Network network;
  DiskFaults disk;
  std::map<std::string, Checkpoint> checkpoints;  // by job id
  std::map<std::string, int> failures;            // so far, of jobs that fail; by model name
  int64_t n_calls = 0;                            // for a job
  double pauses_in_rename = 0;
  bool is_quiet = false;  // no more faults
};

}  // namespace walsh::sim
