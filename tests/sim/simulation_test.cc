// The simulation itself: that a seed repeats its run, that bugs are found, and that those which
// were found stay away. Many seeds are in seeds_test.cc.
#include "tests/sim/simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "common/log.h"
#include "tests/sim/memory_job_store.h"
#include "tests/sim/sqlite_disk.h"

namespace walsh::sim {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr uint64_t kSeeds = 20;

class SimulationTest : public ::testing::Test {
 protected:
  SimulationTest() { log::Configure("sim", log::Format::kText, log::Level::kError); }
};

TEST_F(SimulationTest, ASeedIsOneRun) {
  const Simulation::Result first = Simulation::Run({.seed = 3});
  const Simulation::Result second = Simulation::Run({.seed = 3});
  EXPECT_GT(first.n_events, 0);
  EXPECT_EQ(first.n_events, second.n_events);
  EXPECT_EQ(first.settling, second.settling);
  EXPECT_EQ(first.faults.Table(), second.faults.Table());
  EXPECT_NE(first.n_events, Simulation::Run({.seed = 4}).n_events);
}

TEST_F(SimulationTest, InvariantsHold) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const Simulation::Result result = Simulation::Run({.seed = seed});
    EXPECT_THAT(result.violation, IsEmpty()) << "WALSH_SEED=" << seed << "\n" << result.trace;
  }
}

TEST_F(SimulationTest, TheSameRunOnSqlite) {
  const Simulation::Result in_memory = Simulation::Run({.seed = 3});
  const Simulation::Result on_sqlite = RunOnSqlite(3);
  EXPECT_THAT(on_sqlite.violation, IsEmpty()) << on_sqlite.trace;
  EXPECT_EQ(on_sqlite.n_events, in_memory.n_events);
}

// -- Bugs that were found. Each of these seeds failed before its fix.

class RegressionTest : public SimulationTest, public ::testing::WithParamInterface<uint64_t> {};

TEST_P(RegressionTest, InvariantsHold) {
  const Simulation::Result result = Simulation::Run({.seed = GetParam()});
  EXPECT_THAT(result.violation, IsEmpty()) << result.trace;
}

INSTANTIATE_TEST_SUITE_P(StageWentBackFromPublishing, RegressionTest, ::testing::Values(6, 15, 27));
INSTANTIATE_TEST_SUITE_P(WriteFailedAndWasStored, RegressionTest,
                         ::testing::Values(26, 28, 41, 196));

// -- Bugs that are put in: the invariants see them.

// The first violation among the seeds; empty: none.
std::string FirstViolation(Simulation::Options options) {
  for (options.seed = 1; options.seed <= kSeeds; ++options.seed) {
    const Simulation::Result result = Simulation::Run(options);
    if (!result.violation.empty()) return result.violation;
  }
  return "";
}

template <typename Store>
Simulation::Options On() {
  return {.open_disk = [](const Clock*) { return std::make_unique<Store>(); }};
}

class LosesAJob : public MemoryJobStore {
 public:
  absl::Status Insert(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                      const jobs::RequestKey& key) override {
    return ++n_inserts_ == 3 ? absl::OkStatus() : MemoryJobStore::Insert(record, event, key);
  }

 private:
  int n_inserts_ = 0;
};

TEST_F(SimulationTest, FindsAnAcknowledgedJobThatIsLost) {
  EXPECT_THAT(FirstViolation(On<LosesAJob>()), HasSubstr("I1: "));
}

class ForgetsRequests : public MemoryJobStore {
 public:
  absl::StatusOr<std::optional<jobs::StoredRequest>> FindRequest(
      const std::string&) const override {
    return std::nullopt;
  }
};

TEST_F(SimulationTest, FindsARequestThatIsNotRecognized) {
  EXPECT_THAT(FirstViolation(On<ForgetsRequests>()), HasSubstr("I1: request "));
}

class LosesGrants : public MemoryJobStore {
 public:
  absl::Status Update(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                      const v1::Model* published) override {
    jobs::JobRecord stored = record;
    if (record.fencing_token > 1) --stored.fencing_token;
    return MemoryJobStore::Update(stored, event, published);
  }
};

TEST_F(SimulationTest, FindsATokenThatDoesNotGrow) {
  EXPECT_THAT(FirstViolation(On<LosesGrants>()), HasSubstr("the disk has "));
}

class LosesEnds : public MemoryJobStore {
 public:
  absl::Status Update(const jobs::JobRecord& record, const v1::QuantizationJobEvent& event,
                      const v1::Model* published) override {
    if (jobs::IsTerminal(record.job.state())) return absl::OkStatus();
    return MemoryJobStore::Update(record, event, published);
  }
};

TEST_F(SimulationTest, FindsAnEndThatIsLost) {
  EXPECT_THAT(FirstViolation(On<LosesEnds>()), HasSubstr("the disk has "));
}

TEST_F(SimulationTest, FindsJobsThatNobodyTakesFromAVanishedWorker) {
  EXPECT_THAT(FirstViolation({.has_ticks = false}), HasSubstr("I7: "));
}

}  // namespace
}  // namespace walsh::sim
