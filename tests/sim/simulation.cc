#include "tests/sim/simulation.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/resource_name.h"
#include "tests/sim/memory_job_store.h"

namespace walsh::sim {
namespace {

constexpr absl::Duration kClientTimeout = absl::Seconds(10);
// Ten retries with the longest pauses take 43 minutes.
constexpr absl::Duration kSettlingMax = absl::Minutes(75);
constexpr int kEventsMax = 10000;
constexpr int kEventsBetweenReads = 16;
constexpr int kCancelTries = 5;
constexpr int kDeleteTries = 8;
constexpr char kClient[] = "client";

// Not one seed has all faults: what only some bring about others would hide.
constexpr double kFaultEnabled = 0.45;
constexpr double kNoFaultAtAll = 0.03;

History::Limits DrawLimits(uint64_t seed) {
  Random random(seed);
  return {.queued_jobs_max = random.Between(2, 8), .tenant_jobs_max = random.Between(2, 8)};
}

std::string IdOf(const v1::QuantizationJob& job) {
  return job.name().substr(kJobCollection.size());
}

bool MayPass(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsResourceExhausted(status);
}

}  // namespace

Simulation::Result Simulation::Run(const Options& options) { return Simulation(options).RunAll(); }

Simulation::Simulation(const Options& options)
    : options_(options), limits_(DrawLimits(options.seed)), world_(options.seed, limits_, [this] {
        if (world_.loop.n_events() % kEventsBetweenReads == 0) CheckDisk();
        if (!world_.history.violation().empty()) world_.loop.Stop();
      }) {}

Simulation::Result Simulation::RunAll() {
  faults_end_ = world_.random.Between(absl::Seconds(60), absl::Seconds(400));
  StartAll();
  PlanJobs();
  if (!world_.random.Chance(kNoFaultAtAll)) PlanFaults();
  world_.loop.RunUntil(faults_end_);
  EndFaults();
  Settle();
  const absl::Duration settling = world_.loop.now() - faults_end_;
  CheckEnds();
  const std::string& violation = world_.history.violation();
  return {.violation = violation,
          .trace = violation.empty() ? "" : world_.history.Trace(),
          .n_events = world_.loop.n_events(),
          .settling = settling,
          .faults = world_.faults,
          .figures = world_.history.figures()};
}

void Simulation::StartAll() {
  coordinator_ = std::make_unique<SimCoordinator>(
      &world_, SimCoordinator::Options{.limits = limits_,
                                       .open_disk = [this] { return OpenDisk(); },
                                       .has_ticks = options_.has_ticks});
  coordinator_->Start();
  const int n_machines = world_.random.Between(1, 4);
  for (int number = 0; number < n_machines; ++number) {
    machines_.push_back(std::make_unique<WorkerMachine>(&world_, coordinator_.get(), number,
                                                        /*is_big=*/world_.random.Chance(0.5)));
    world_.loop.After(world_.random.Between(absl::ZeroDuration(), absl::Seconds(5)),
                      [machine = machines_.back().get()] { machine->Start(); });
  }
}

jobs::JobStore* Simulation::OpenDisk() {
  if (disk_ != nullptr && !options_.reopens_disk) return disk_.get();
  disk_ = nullptr;
  disk_ = options_.open_disk == nullptr ? std::make_unique<MemoryJobStore>()
                                        : options_.open_disk(&world_.loop.clock());
  return disk_.get();
}

// I7.
void Simulation::Settle() {
  while (world_.history.violation().empty()) {
    const std::vector<std::string> unfinished = world_.history.Unfinished();
    if (n_unsubmitted_ == 0 && unfinished.empty()) return;
    if (world_.loop.now() > faults_end_ + kSettlingMax) {
      world_.history.Violate(absl::StrCat("I7: ", n_unsubmitted_,
                                          " jobs are not submitted, unfinished are ",
                                          absl::StrJoin(unfinished, ", ")));
    }
    world_.loop.RunUntil(world_.loop.now() + absl::Seconds(1));
  }
}

void Simulation::CheckEnds() {
  CheckDisk();
  for (const std::string& id : world_.history.Ids()) {
    if (!world_.history.violation().empty()) return;
    const auto events = disk_->Events(id, 0, kEventsMax);
    world_.history.CheckEnd(id, events.value_or(std::vector<v1::QuantizationJobEvent>()));
  }
}

void Simulation::CheckDisk() {
  for (const std::string& id : world_.history.Ids()) {
    absl::StatusOr<jobs::JobRecord> record = disk_->Get(id);
    world_.history.OnRead(id, record.ok() ? std::optional(*std::move(record)) : std::nullopt);
  }
}

// -- Clients

void Simulation::PlanJobs() {
  using Kind = JobPlan::Kind;
  n_unsubmitted_ = world_.random.Between(3, 12);
  for (int number = 0; number < n_unsubmitted_; ++number) {
    JobPlan plan;
    plan.n_layers = world_.random.Between(1, 5);
    plan.layer_time = world_.random.Between(absl::Milliseconds(200), absl::Seconds(12));
    plan.failing_layer = world_.random.Between(0, plan.n_layers - 1);
    plan.n_failures = world_.random.Chance(0.04) ? 20 : world_.random.Between(1, 3);
    const double kind = world_.random.Share();
    if (kind < 0.12) plan.kind = Kind::kMayPass;
    if (kind >= 0.12 && kind < 0.20) plan.kind = Kind::kFailsForEver;
    if (kind >= 0.20 && kind < 0.28) plan.kind = Kind::kKillsWorker;
    if (kind >= 0.28 && kind < 0.36) plan.kind = Kind::kNeedsBigWorker;
    world_.history.Plan(absl::StrCat("m", number), plan);
    world_.loop.After(world_.random.Between(absl::ZeroDuration(), faults_end_ * 0.7),
                      [this, number] { Submit(number); });
  }
}

void Simulation::Submit(int number) {
  const std::string request_id = absl::StrCat("r", number);
  v1::QuantizationJob job;
  job.set_source_model("/models/m");
  job.set_model_name(absl::StrCat("m", number));
  const std::string tenant = number % 3 == 0 ? "a" : "b";
  const jobs::RequestKey key = {
      .request_id = request_id, .body_sha256 = job.model_name(), .tenant = tenant};
  const std::string id = absl::StrCat("j", number, "-", n_ids_++);
  world_.network.Call<v1::QuantizationJob>(
      {.from = kClient, .to = kCoordinator, .job = ""}, kClientTimeout,
      [this, job, id, key, tenant](const auto& reply) {
        coordinator_->Submit(job, id, key, tenant, reply);
      },
      [this, number, request_id](const absl::StatusOr<v1::QuantizationJob>& answer) {
        if (!answer.ok() && MayPass(answer.status())) {
          return world_.loop.After(world_.random.Between(absl::Seconds(1), absl::Seconds(12)),
                                   [this, number] { Submit(number); });
        }
        --n_unsubmitted_;
        if (!answer.ok()) return world_.history.OnSubmitRefused(request_id, answer.status());
        world_.history.OnSubmitted(request_id, *answer);
        const std::string submitted = IdOf(*answer);
        const auto later = [this] {
          return world_.random.Between(absl::Milliseconds(1), absl::Seconds(60));
        };
        if (world_.random.Chance(cancels_)) {
          world_.loop.After(later(), [this, submitted] { Cancel(submitted, 1); });
        }
        if (world_.random.Chance(deletes_)) {
          world_.loop.After(later(), [this, submitted] { Delete(submitted, 1); });
        }
        if (!world_.is_quiet && world_.random.Chance(resubmits_)) {
          ++n_unsubmitted_;
          world_.loop.After(later(), [this, number, submitted] {
            world_.faults.Count(Fault::kSubmittedAgain, world_.history.PhaseOfJob(submitted));
            Submit(number);
          });
        }
      });
}

void Simulation::Cancel(const std::string& id, int tries) {
  world_.faults.Count(Fault::kCancel, world_.history.PhaseOfJob(id));
  world_.network.Call<v1::QuantizationJob>(
      {.from = kClient, .to = kCoordinator, .job = id}, kClientTimeout,
      [this, id](const auto& reply) { coordinator_->Cancel(id, reply); },
      [this, id, tries](const absl::StatusOr<v1::QuantizationJob>& answer) {
        if (answer.ok()) return world_.history.OnCancelled(id);
        if (!MayPass(answer.status()) || tries == kCancelTries) return;
        world_.loop.After(world_.random.Between(absl::Seconds(1), absl::Seconds(5)),
                          [this, id, tries] { Cancel(id, tries + 1); });
      });
}

void Simulation::Delete(const std::string& id, int tries) {
  world_.faults.Count(Fault::kDelete, world_.history.PhaseOfJob(id));
  world_.history.OnDeleteAsked(id);
  world_.network.Call<Empty>(
      {.from = kClient, .to = kCoordinator, .job = id}, kClientTimeout,
      [this, id](const auto& reply) { coordinator_->Delete(id, reply); },
      [this, id, tries](const absl::StatusOr<Empty>& answer) {
        if (answer.ok() || tries == kDeleteTries) return;
        world_.loop.After(world_.random.Between(absl::Seconds(2), absl::Seconds(30)),
                          [this, id, tries] { Delete(id, tries + 1); });
      });
}

// -- Faults

void Simulation::Again(absl::Duration gap_min, absl::Duration gap_max,
                       std::function<void()> strike) {
  world_.loop.After(world_.random.Between(gap_min, gap_max), [=, this] {
    if (world_.is_quiet) return;
    strike();
    Again(gap_min, gap_max, strike);
  });
}

void Simulation::Spell(absl::Duration time_max, std::function<void()> begin,
                       std::function<void()> end) {
  begin();
  world_.loop.After(world_.random.Between(absl::Milliseconds(500), time_max), std::move(end));
}

void Simulation::PlanFaults() {
  Random& random = world_.random;
  const auto is_enabled = [&] { return random.Chance(kFaultEnabled); };
  cancels_ = is_enabled() ? 0.4 : 0;
  deletes_ = is_enabled() ? 0.3 : 0;
  resubmits_ = is_enabled() ? 0.5 : 0;
  if (is_enabled()) {
    Again(absl::Seconds(10), absl::Seconds(120), [this] { coordinator_->Kill(); });
  }
  if (is_enabled()) {
    Again(absl::Seconds(10), absl::Seconds(120), [this] {
      Random& chance = world_.random;
      const absl::Duration jump =
          chance.Between(absl::Hours(-2), absl::Hours(2)) * (chance.Chance(0.2) ? 24 : 1);
      world_.faults.Count(Fault::kWallTimeJump, Phase::kNoJob);
      world_.history.Note(absl::StrCat("wall time jumps by ", absl::FormatDuration(jump)));
      world_.loop.clock().JumpWallTime(jump);
    });
  }
  PlanNetworkFaults();
  PlanDiskFaults();
  PlanWorkerFaults();
}

void Simulation::PlanNetworkFaults() {
  Random& random = world_.random;
  const auto is_enabled = [&] { return random.Chance(kFaultEnabled); };
  if (is_enabled()) world_.network.faults.lost = random.Share() * 0.2;
  if (is_enabled()) world_.network.faults.twice = random.Share() * 0.15;
  if (is_enabled()) world_.network.faults.late = random.Share() * 0.25;
  if (!is_enabled()) return;
  Again(absl::Seconds(15), absl::Seconds(90), [this] {
    WorkerProcess* worker = SomeWorker();
    if (worker == nullptr) return;
    const std::string address = worker->address();
    const Phase phase = world_.history.PhaseOfJob(worker->job_id());
    const int64_t direction = world_.random.Below(4);  // 0, 1: both
    world_.faults.Count(direction < 2 ? Fault::kPartition : Fault::kOneWayPartition, phase);
    world_.history.Note(absl::StrCat("network: cut ", direction, " of ", address));
    Spell(
        absl::Seconds(70),
        [&] {
          if (direction != 2) world_.network.Cut(address, kCoordinator);
          if (direction != 3) world_.network.Cut(kCoordinator, address);
        },
        [this, address] {
          world_.network.Heal(address, kCoordinator);
          world_.network.Heal(kCoordinator, address);
        });
  });
}

void Simulation::PlanDiskFaults() {
  Random& random = world_.random;
  DiskFaults& disk = world_.disk;
  const auto is_enabled = [&] { return random.Chance(kFaultEnabled); };
  const auto spells = [&](absl::Duration time_max, std::function<void()> begin,
                          std::function<void()> end) {
    Again(absl::Seconds(10), absl::Seconds(90),
          [this, time_max, begin = std::move(begin), end = std::move(end)] {
            Spell(time_max, begin, end);
          });
  };
  if (is_enabled()) {
    spells(
        absl::Seconds(40), [&disk] { disk.is_full = true; }, [&disk] { disk.is_full = false; });
  }
  if (is_enabled()) {
    spells(
        absl::Seconds(20), [&disk] { disk.write_error = 0.4; }, [&disk] { disk.write_error = 0; });
  }
  if (is_enabled()) {
    spells(
        absl::Seconds(20), [&disk] { disk.read_error = 0.3; }, [&disk] { disk.read_error = 0; });
  }
  if (is_enabled()) {
    disk.slow_max = random.Between(absl::Milliseconds(500), absl::Seconds(8));
    spells(
        absl::Seconds(40), [&disk] { disk.slow = 0.5; }, [&disk] { disk.slow = 0; });
  }
  if (is_enabled()) {
    Again(absl::Seconds(5), absl::Seconds(60), [this] {
      world_.disk.writes_until_kill = world_.random.Between(1, 6);
      world_.disk.kills_after_write = world_.random.Chance(0.5);
    });
  }
}

void Simulation::PlanWorkerFaults() {
  Random& random = world_.random;
  const auto is_enabled = [&] { return random.Chance(kFaultEnabled); };
  const auto strikes = [&](absl::Duration gap_max, Fault fault,
                           std::function<void(WorkerProcess*)> strike) {
    Again(absl::Seconds(8), gap_max, [this, fault, strike = std::move(strike)] {
      WorkerProcess* worker = SomeWorker();
      if (worker == nullptr) return;
      world_.faults.Count(fault, world_.history.PhaseOfJob(worker->job_id()));
      strike(worker);
    });
  };
  if (is_enabled()) {
    strikes(absl::Seconds(120), Fault::kWorkerKilled,
            [](WorkerProcess* worker) { worker->machine().Kill(); });
  }
  if (is_enabled()) {
    strikes(absl::Seconds(90), Fault::kWorkerPaused, [this](WorkerProcess* worker) {
      worker->Pause(world_.random.Between(absl::Seconds(1), absl::Seconds(90)));
    });
  }
  if (is_enabled()) {
    strikes(absl::Seconds(120), Fault::kWorkerDrained,
            [](WorkerProcess* worker) { worker->Drain(); });
  }
  if (is_enabled()) world_.pauses_in_rename = 0.4;
}

WorkerProcess* Simulation::SomeWorker() {
  return machines_[world_.random.Below(std::ssize(machines_))]->process();
}

void Simulation::EndFaults() {
  world_.history.Note("-- no more faults");
  world_.is_quiet = true;
  world_.network.faults = {};
  world_.network.HealAll();
  world_.disk = {};
  world_.pauses_in_rename = 0;
}

}  // namespace walsh::sim
