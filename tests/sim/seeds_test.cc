// Many seeds of the simulation. $WALSH_SIM_SEEDS says how many, from $WALSH_SEED on, which alone
// repeats one.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <thread>
#include <vector>

#include "common/log.h"
#include "tests/sim/simulation.h"
#include "tests/sim/sqlite_disk.h"

namespace walsh::sim {
namespace {

constexpr uint64_t kSeedsDefault = 2000;
constexpr uint64_t kSeedsOfOneOnSqlite = 20;
constexpr int kTracesShown = 3;

uint64_t Number(const char* variable, uint64_t otherwise) {
  const char* given = std::getenv(variable);
  return given == nullptr ? otherwise : std::strtoull(given, nullptr, 10);
}

// What all seeds together came to.
struct Sum {
  std::mutex mu;
  int n_failed = 0;
  int64_t n_events = 0;
  FaultCounts faults;
  History::Figures figures;
  std::vector<absl::Duration> settling;
};

void Add(uint64_t seed, const Simulation::Result& result, Sum* sum) {
  const std::lock_guard lock(sum->mu);
  sum->n_events += result.n_events;
  sum->faults.Add(result.faults);
  sum->settling.push_back(result.settling);
  sum->figures.Add(result.figures);
  if (result.violation.empty()) return;
  ADD_FAILURE() << "WALSH_SEED=" << seed << "  " << result.violation << "\n"
                << (++sum->n_failed > kTracesShown ? "" : result.trace);
}

void Print(uint64_t n_seeds, Sum* sum) {
  std::sort(sum->settling.begin(), sum->settling.end());
  const History::Figures& figures = sum->figures;
  std::cout << n_seeds << " seeds, " << sum->n_events << " events, " << figures.jobs << " jobs, "
            << figures.attempts << " attempts, " << figures.checkpoints << " checkpoints, "
            << figures.artifacts << " artifacts (second ones of a job " << figures.second_artifacts
            << ", late ones " << figures.late_artifacts << ")\nsettled within "
            << sum->settling[sum->settling.size() / 2] << " (half), "
            << sum->settling[sum->settling.size() * 99 / 100] << " (99 %), " << sum->settling.back()
            << " (all)\n";
  for (const auto& [end, n] : figures.ends) std::cout << end << ": " << n << "\n";
  std::cout << sum->faults.Table();
}

TEST(SeedsTest, InvariantsHold) {
  log::Configure("sim", log::Format::kText, log::Level::kError);
  const bool is_one = std::getenv("WALSH_SEED") != nullptr;
  const uint64_t first = Number("WALSH_SEED", 1);
  const uint64_t n_seeds = Number("WALSH_SIM_SEEDS", is_one ? 1 : kSeedsDefault);
  Sum sum;
  std::atomic<uint64_t> next = first;
  std::vector<std::thread> threads;
  const unsigned n_threads = std::max(1u, std::thread::hardware_concurrency());
  for (unsigned i = 0; i < n_threads; ++i) {
    threads.emplace_back([&] {
      for (uint64_t seed = next++; seed < first + n_seeds; seed = next++) {
        const bool is_on_sqlite = seed % kSeedsOfOneOnSqlite == 0;
        Add(seed, is_on_sqlite ? RunOnSqlite(seed) : Simulation::Run({.seed = seed}), &sum);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(sum.n_failed, 0);
  Print(n_seeds, &sum);
}

}  // namespace
}  // namespace walsh::sim
