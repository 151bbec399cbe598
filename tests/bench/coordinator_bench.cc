// What a coordinator takes to accept, hand out and remember jobs, and to hold streams.
//
//   coordinator_bench
//
// A walsh-coordinator process, with a data folder of its own, and workers of this process whose
// jobs and tokens cost nothing (FakeWorker). In this order:
//   submit    one client, one job after the other: from the call to its answer, which comes when
//             the job is on the disk. Beside it 4 KiB and fdatasync on the same disk.
//   refusal   jobs beyond the limit: until RESOURCE_EXHAUSTED
//   restart   SIGKILL with the queue full; until a client's GetJob is answered by the next process
//   claim     workers that acquire and complete jobs as fast as they are answered
//   streams   streams of all workers at once, a message of each every --interval-ms: memory and CPU
//             time of the coordinator, and how late messages come
//   lease     a worker dies just after a heartbeat; until its job is queued again, and that less
//             the lease, which is the service's own delay. Always on SQLite
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/client.h"
#include "common/command_line.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/bench/binaries.h"
#include "tests/bench/conditions.h"
#include "tests/testing/fake_worker.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/wait.h"

namespace walsh::bench {
namespace {

using testing::FakeWorker;
using testing::ServiceFixture;

struct Flags {
  int jobs = limits::kQueuedJobsMax;
  int timed_submits = 2000;
  int refusals = 1000;
  int workers = 8;
  int claims = 4000;
  int streams = 1000;
  double stream_seconds = 20;
  double interval_ms = 100;
  int lease_seconds = 30;
  std::string job_store = "";
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Durations in seconds, printed as quantiles in milliseconds.
struct Sample {
  std::vector<double> seconds;

  double Quantile(double q) const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    const double rank = q * static_cast<double>(sorted.size() - 1);
    return sorted.empty() ? 0 : sorted[static_cast<size_t>(rank + 0.5)];
  }
  void PrintRow(const std::string& what) const {
    std::printf("| %s | %d | %.2f | %.2f | %.2f |\n", what.c_str(),
                static_cast<int>(seconds.size()), 1e3 * Quantile(0.5), 1e3 * Quantile(0.99),
                1e3 * Quantile(1));
    std::fflush(stdout);
  }
};

// Appends of 4 KiB, each synced, as a database's log does.
absl::StatusOr<Sample> SyncedWrites(const std::string& path, int n) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return ErrnoStatus(errno, "opening a file to sync");
  const std::string block(4096, 'x');
  Sample sample;
  absl::Status status;
  for (int i = 0; i < n && status.ok(); ++i) {
    const double start = Now();
    if (write(fd, block.data(), block.size()) < 0 || fdatasync(fd) != 0) {
      status = ErrnoStatus(errno, "writing a file to sync");
    }
    sample.seconds.push_back(Now() - start);
  }
  close(fd);
  WALSH_RETURN_IF_ERROR(status);
  return sample;
}

double ResidentMib(pid_t pid) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(status, line);) {
    if (absl::StartsWith(line, "VmRSS:")) return std::atof(line.c_str() + 6) / 1024;
  }
  return 0;
}

v1::CreateQuantizationJobRequest NewJob(int i) {
  v1::CreateQuantizationJobRequest request;
  request.set_quantization_job_id(absl::StrCat("job-", i));
  request.mutable_quantization_job()->set_source_model("/models/none");
  request.mutable_quantization_job()->set_model_name(absl::StrCat("model-", i));
  return request;
}

class CoordinatorBench {
 public:
  explicit CoordinatorBench(const Flags& flags) : flags_(flags) {}

  absl::Status Run() {
    std::vector<std::string> coordinator_flags = {"--max-queued-jobs", absl::StrCat(flags_.jobs),
                                                  "--log-level", "warning"};
    if (!flags_.job_store.empty()) {
      coordinator_flags.insert(coordinator_flags.end(), {"--job-store", flags_.job_store});
    }
    // Silent workers of this process are not taken for dead.
    fixture_ = std::make_unique<ServiceFixture>(testing::ServiceOptions{
        .lease_seconds = 3600, .coordinator_flags = std::move(coordinator_flags)});
    WALSH_RETURN_IF_ERROR(fixture_->StartCoordinator());
    WALSH_RETURN_IF_ERROR(StartWorkers());
    std::printf(
        "\n| | samples | p50 ms | p99 ms | max ms |\n| --- | ---: | ---: | ---: | ---: |\n");
    WALSH_ASSIGN_OR_RETURN(const Sample synced,
                           SyncedWrites(fixture_->data_dir() + "/synced", 500));
    synced.PrintRow("4 KiB and fdatasync");
    WALSH_RETURN_IF_ERROR(MeasureSubmits());
    WALSH_RETURN_IF_ERROR(MeasureRefusals());
    WALSH_RETURN_IF_ERROR(MeasureRestart());
    WALSH_RETURN_IF_ERROR(MeasureClaims());
    WALSH_RETURN_IF_ERROR(MeasureStreams());
    return MeasureLeaseLoss();
  }

 private:
  absl::Status StartWorkers() {
    workers_.clear();
    for (int w = 0; w < flags_.workers; ++w) {
      workers_.push_back(std::make_unique<FakeWorker>(fixture_->endpoint("coordinator", "internal"),
                                                      absl::StrCat("bench-", w)));
      workers_.back()->SetModel("models/bench", v1::Model::READY);
      workers_.back()->on_stream = [this](auto* context, const auto&, auto* writer) {
        return Stream(context, writer);
      };
      WALSH_RETURN_IF_ERROR(workers_.back()->Register());
    }
    return absl::OkStatus();
  }

  absl::StatusOr<Sample> Submit(int first, int n) {
    Sample sample;
    for (int i = first; i < first + n; ++i) {
      const double start = Now();
      WALSH_RETURN_IF_ERROR(fixture_->client().CreateJob(NewJob(i)).status());
      sample.seconds.push_back(Now() - start);
    }
    return sample;
  }

  absl::Status MeasureSubmits() {
    const int n_before = flags_.jobs - flags_.timed_submits;
    WALSH_ASSIGN_OR_RETURN(const Sample first, Submit(0, flags_.timed_submits));
    first.PrintRow("submit, into an empty queue");
    // The last ones fill it.
    WALSH_RETURN_IF_ERROR(Submit(flags_.timed_submits, n_before - flags_.timed_submits).status());
    WALSH_ASSIGN_OR_RETURN(const Sample last, Submit(n_before, flags_.timed_submits));
    last.PrintRow(absl::StrCat("submit, beside ", n_before, " queued jobs"));
    return absl::OkStatus();
  }

  absl::Status MeasureRefusals() {
    client::Client once({.address = fixture_->client().address(), .attempts_max = 1});
    Sample sample;
    for (int i = 0; i < flags_.refusals; ++i) {
      const double start = Now();
      const absl::Status refused = once.CreateJob(NewJob(flags_.jobs + i)).status();
      sample.seconds.push_back(Now() - start);
      if (ErrorReason(refused) != "QUEUE_FULL") {
        return absl::InternalError(absl::StrCat("not refused: ", refused.ToString()));
      }
    }
    sample.PrintRow("refusal, the queue is full");
    return absl::OkStatus();
  }

  absl::Status MeasureRestart() {
    Sample sample;
    for (int i = 0; i < 5; ++i) {
      fixture_->KillCoordinator();
      const double start = Now();
      WALSH_RETURN_IF_ERROR(fixture_->StartCoordinator());
      WALSH_RETURN_IF_ERROR(fixture_->client().GetJob("job-0").status());
      sample.seconds.push_back(Now() - start);
    }
    sample.PrintRow(absl::StrCat("restart with ", flags_.jobs, " queued jobs"));
    return absl::OkStatus();
  }

  absl::Status MeasureClaims() {
    WALSH_RETURN_IF_ERROR(StartWorkers());  // the coordinator is another process
    std::atomic<int> n_left = std::min(flags_.claims, flags_.jobs);
    absl::Mutex mu;
    absl::Status failed;
    Sample claims;
    const double start = Now();
    const auto claim_all = [&](FakeWorker& worker) -> absl::Status {
      while (n_left-- > 0) {
        const double begin = Now();
        WALSH_ASSIGN_OR_RETURN(const auto lease, worker.Acquire());
        const double took = Now() - begin;
        if (!lease.has_value()) return absl::InternalError("no job was given");
        WALSH_RETURN_IF_ERROR(worker.Succeed(*lease));
        const absl::MutexLock lock(&mu);
        claims.seconds.push_back(took);
      }
      return absl::OkStatus();
    };
    std::vector<std::thread> threads;
    for (const auto& worker : workers_) {
      threads.emplace_back([&, worker = worker.get()] {
        const absl::Status status = claim_all(*worker);
        const absl::MutexLock lock(&mu);
        failed.Update(status);
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double seconds = Now() - start;
    WALSH_RETURN_IF_ERROR(failed);
    claims.PrintRow(absl::StrCat("claim, ", flags_.workers, " workers at once"));
    std::printf("\nclaimed and completed: %.0f jobs a second\n",
                static_cast<double>(claims.seconds.size()) / seconds);
    return absl::OkStatus();
  }

  // A message every interval until the time is over. Each says when it was sent.
  grpc::Status Stream(grpc::ServerContext* context, FakeWorker::StreamWriter* writer) const {
    double next = Now();
    while (Now() < end_streams_ && !context->IsCancelled()) {
      v1::GenerateStreamResponse message;
      message.mutable_delta()->set_text(absl::StrCat(absl::Dec(absl::ToUnixMicros(absl::Now()))));
      message.mutable_delta()->add_token_ids(1);
      if (!writer->Write(message)) break;
      next += flags_.interval_ms / 1e3;
      testing::Pause(absl::Seconds(next - Now()));
    }
    v1::GenerateStreamResponse last;
    last.mutable_finished()->set_finish_reason(v1::LENGTH);
    writer->Write(last);
    return grpc::Status::OK;
  }

  absl::Status MeasureStreams() {
    WALSH_RETURN_IF_ERROR(StartWorkers());
    const pid_t pid = fixture_->pid("coordinator");
    const double mib_before = ResidentMib(pid);
    const double cpu_before = CpuSecondsOf(pid);
    const double start = Now();
    end_streams_ = start + flags_.stream_seconds;
    absl::Mutex mu;
    absl::Status failed;
    Sample late;
    std::atomic<int> n_open = 0;
    std::vector<std::thread> clients;
    for (int i = 0; i < flags_.streams; ++i) {
      clients.emplace_back([&] {
        v1::GenerateRequest request;
        request.set_model("models/bench");
        request.set_prompt("x");
        request.mutable_sampling()->set_max_tokens(limits::kNewTokensMax);
        std::vector<double> own;
        const absl::Status status = fixture_->client().GenerateStream(
            request, [&](const v1::GenerateStreamResponse& event) {
              if (!event.has_delta()) return;
              if (own.empty()) ++n_open;
              own.push_back(1e-6 * (static_cast<double>(absl::ToUnixMicros(absl::Now())) -
                                    std::atof(event.delta().text().c_str())));
            });
        const absl::MutexLock lock(&mu);
        failed.Update(status);
        late.seconds.insert(late.seconds.end(), own.begin(), own.end());
      });
    }
    if (!testing::WaitUntil([&] { return n_open == flags_.streams; },
                            absl::Seconds(flags_.stream_seconds / 2))) {
      std::printf("\nNOT ALL STREAMS ARE OPEN:\n");
    }
    const double opened = Now() - start;
    const int n_opened = n_open;
    testing::Pause(absl::Seconds(end_streams_ - Now() - 1));
    const double mib_during = ResidentMib(pid);
    const double cpus = (CpuSecondsOf(pid) - cpu_before) / (Now() - start);
    for (std::thread& client : clients) client.join();
    WALSH_RETURN_IF_ERROR(failed);
    testing::Pause(absl::Seconds(2));
    std::printf(
        "\n%d of %d streams open after %.2f s, through %d connections; a message of each every "
        "%g ms\n",
        n_opened, flags_.streams, opened, fixture_->client().n_connections(), flags_.interval_ms);
    std::printf("coordinator: %.1f MiB before, %.1f with them, %.1f after; %.2f CPUs\n", mib_before,
                mib_during, ResidentMib(pid), cpus);
    std::printf("| | samples | p50 ms | p99 ms | max ms |\n| --- | ---: | ---: | ---: | ---: |\n");
    late.PrintRow("a message, from the worker's write to the client");
    return absl::OkStatus();
  }

  absl::Status MeasureLeaseLoss() {
    workers_.clear();
    fixture_ = std::make_unique<ServiceFixture>(
        testing::ServiceOptions{.lease_seconds = flags_.lease_seconds});
    WALSH_RETURN_IF_ERROR(fixture_->StartCoordinator());
    FakeWorker worker(fixture_->endpoint("coordinator", "internal"), "bench");
    WALSH_RETURN_IF_ERROR(worker.Register());
    WALSH_RETURN_IF_ERROR(fixture_->client().CreateJob(NewJob(0)).status());
    const FakeWorker::Lease lease = worker.MustAcquire();
    WALSH_RETURN_IF_ERROR(worker.Heartbeat(lease).status());
    const double start = Now();
    worker.Vanish();
    absl::Status status;
    const auto is_queued = [&] {
      const auto job = fixture_->client().GetJob("job-0");
      status = job.status();
      return !job.ok() || job->state() == v1::QuantizationJob::QUEUED;
    };
    if (!testing::WaitUntil(is_queued, absl::Seconds(2 * flags_.lease_seconds))) {
      return absl::DeadlineExceededError("the lease was not lost");
    }
    WALSH_RETURN_IF_ERROR(status);
    const double seconds = Now() - start;
    std::printf(
        "\na worker that dies just after a heartbeat: its job is queued again after %.2f s, "
        "%.2f s after the end of the lease\n",
        seconds, seconds - flags_.lease_seconds);
    return absl::OkStatus();
  }

  const Flags& flags_;
  std::unique_ptr<ServiceFixture> fixture_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
  std::atomic<double> end_streams_ = 0;
};

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("What a coordinator takes to accept, hand out and remember jobs, and hold streams");
  app.add_option("--jobs", flags.jobs, "The queue's length")
      ->check(CLI::Range(1, limits::kQueuedJobsMax))
      ->capture_default_str();
  app.add_option("--submits", flags.timed_submits, "Measured of them; at most half")
      ->capture_default_str();
  app.add_option("--claims", flags.claims)->capture_default_str();
  app.add_option("--workers", flags.workers)->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--streams", flags.streams)->check(CLI::Range(1, 4000))->capture_default_str();
  app.add_option("--seconds", flags.stream_seconds, "Of the streams")->capture_default_str();
  app.add_option("--interval-ms", flags.interval_ms, "Between two messages of a stream")
      ->capture_default_str();
  app.add_option("--lease-seconds", flags.lease_seconds)
      ->check(CLI::Range(3, 3600))
      ->capture_default_str();
  app.add_option("--job-store", flags.job_store,
                 "As walsh-coordinator's, an empty one; by default SQLite in the data folder");
  if (const auto exit_code = ParseCommandLine(app, argc, argv)) return *exit_code;
  flags.timed_submits = std::min(flags.timed_submits, flags.jobs / 2);
  setenv("WALSH_BIN_DIR", BinDir().c_str(), /*overwrite=*/0);
  const OtherLoad others;
  std::printf("%s\n", DescribeRun(static_cast<int>(std::thread::hardware_concurrency())).c_str());
  if (const absl::Status status = CoordinatorBench(flags).Run(); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return kExitFailed;
  }
  std::printf("\nother processes took %.1f %% of the CPUs\n", 100 * others.Share());
  return kExitOk;
}

}  // namespace
}  // namespace walsh::bench

int main(int argc, char** argv) { return walsh::bench::Main(argc, argv); }
