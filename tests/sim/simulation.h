// A coordinator, its disk, a few workers and clients, and what goes wrong between them, on one
// thread and from one seed.
//
// First all goes wrong that this seed has drawn; then nothing more does, and every job must end
// within a bounded time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "server/jobs/job_store.h"
#include "tests/sim/fault.h"
#include "tests/sim/history.h"
#include "tests/sim/sim_coordinator.h"
#include "tests/sim/sim_worker.h"
#include "tests/sim/world.h"

namespace walsh::sim {

class Simulation {
 public:
  struct Options {
    uint64_t seed = 1;
    // The disk: in memory by default. The clock outlives what is returned.
    std::function<std::unique_ptr<jobs::JobStore>(const Clock*)> open_disk;
    // A process that starts opens the disk anew; else it finds the one that there is.
    bool reopens_disk = false;
    bool has_ticks = true;
  };
  struct Result {
    std::string violation;  // empty: none
    std::string trace;
    int64_t n_events = 0;
    absl::Duration settling;  // from the last fault to the last job's end
    FaultCounts faults;
    History::Figures figures;
  };
  static Result Run(const Options& options);

 private:
  explicit Simulation(const Options& options);
  Result RunAll();
  void StartAll();
  jobs::JobStore* OpenDisk();
  void Settle();
  void CheckEnds();

  void PlanJobs();
  void PlanFaults();
  // Calls `strike` again and again while faults go on.
  void Again(absl::Duration gap_min, absl::Duration gap_max, std::function<void()> strike);
  // Switches something on and, a while later, off.
  void Spell(absl::Duration time_max, std::function<void()> begin, std::function<void()> end);
  void PlanNetworkFaults();
  void PlanDiskFaults();
  void PlanWorkerFaults();
  // One that runs, or null.
  WorkerProcess* SomeWorker();
  void EndFaults();

  void Submit(int number);
  void Cancel(const std::string& id, int tries);
  void Delete(const std::string& id, int tries);

  void CheckDisk();

  const Options options_;
  History::Limits limits_;
  World world_;
  std::unique_ptr<jobs::JobStore> disk_;
  std::unique_ptr<SimCoordinator> coordinator_;
  std::vector<std::unique_ptr<WorkerMachine>> machines_;
  absl::Duration faults_end_;
  int n_unsubmitted_ = 0;
  int64_t n_ids_ = 0;
  double cancels_ = 0;
  double deletes_ = 0;
  double resubmits_ = 0;
};

}  // namespace walsh::sim
