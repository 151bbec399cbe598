// Goal:   `walsh up` is the whole service: it says when it is ready, keeps its daemons alive, and
//         takes them with it.
// Method: the real command as a process, its daemons found by the pids in their endpoints files.
#include <gtest/gtest.h>
#include <signal.h>

#include <map>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::TempDir;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

constexpr absl::Duration kPatience = absl::Seconds(60);

class UpTest : public ::testing::Test {
 protected:
  // `wrapper` goes before it on the command line.
  absl::StatusOr<client::ChildProcess> Up(
      const std::map<std::string, std::string>& environment = {},
      const std::vector<std::string>& wrapper = {}) const {
    client::SpawnOptions spawn;
    spawn.environment = environment;
    spawn.argv = wrapper;
    spawn.argv.insert(spawn.argv.end(),
                      {testing::BinaryPath("walsh"), "up", "--data-dir", dir_ / "data", "--port",
                       "0", "--model-root", dir_.path(), "--threads", "1"});
    spawn.stdout_path = dir_ / "out";
    spawn.stderr_path = dir_ / "err";
    return client::ChildProcess::Spawn(spawn);
  }

  std::string Out() const { return ReadFile(dir_ / "out", 1 << 20).value_or(""); }
  std::string Err() const { return ReadFile(dir_ / "err", 1 << 20).value_or(""); }
  bool WaitForBanner() const {
    return WaitUntil([&] { return Out().find("Ctrl-C stops") != std::string::npos; }, kPatience);
  }

  pid_t DaemonPid(const std::string& daemon) const {
    const auto endpoints = ReadEndpoints(dir_ / "data", daemon);
    int pid = 0;
    if (!endpoints.ok() || !absl::SimpleAtoi(endpoints->at("pid"), &pid)) return 0;
    return pid;
  }
  // A zombie still has a pid, and its parent may be slow to reap.
  static bool IsAlive(pid_t pid) {
    const auto stat = ReadFile("/proc/" + std::to_string(pid) + "/stat", 4096);
    return stat.ok() && stat->find(") Z ") == std::string::npos;
  }
  client::Client MakeClient() const {
    client::ClientOptions options;
    options.address = ReadEndpoints(dir_ / "data", "coordinator")->at("grpc");
    return client::Client(options);
  }

  const TempDir dir_;
};

TEST_F(UpTest, IsReadyWhenItSaysSoAndStopsEverythingWhenAsked) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up());
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  const pid_t coordinator = DaemonPid("coordinator");
  const pid_t worker = DaemonPid("worker");
  ASSERT_TRUE(IsAlive(coordinator) && IsAlive(worker));
  {
    client::SpawnOptions list;
    list.argv = {testing::BinaryPath("walsh"), "workers", "list", "--data-dir", dir_ / "data"};
    ASSERT_OK_AND_ASSIGN(const client::Output workers,
                         client::RunCommand(list, "", absl::Seconds(30)));
    EXPECT_THAT(workers.out, HasSubstr("ONLINE"));
  }
  up.Signal(SIGTERM);
  const auto status = up.Wait(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(client::ExitCode(*status), 0) << Err();
  EXPECT_FALSE(IsAlive(coordinator));
  EXPECT_FALSE(IsAlive(worker));
}

// One file with settings of the command and of either daemon: each takes what is its own.
TEST_F(UpTest, AConfigFileServesTheDaemonsToo) {
  ASSERT_OK(PublishFile(dir_ / "walsh.conf",
                        "log-format = json\nmax-num-seqs = 3\nmax-queued-jobs = 7\nlimit = 5\n"));
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up({{"WALSH_CONFIG", dir_ / "walsh.conf"}}));
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  for (const char* daemon : {"coordinator", "worker"}) {
    const std::string log =
        ReadFile(dir_ / ("data/log/" + std::string(daemon) + ".log"), 1 << 20).value_or("");
    EXPECT_THAT(log, HasSubstr("\"level\":")) << daemon << " did not read log-format";
  }
  up.Signal(SIGTERM);
  EXPECT_TRUE(up.Wait(kPatience).has_value());
}

TEST_F(UpTest, AnIgnoredHangupStaysIgnored) {
  // As nohup starts it.
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up,
                       Up({}, {"/bin/sh", "-c", "trap '' HUP; exec \"$@\"", "sh"}));
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  up.Signal(SIGHUP);
  // That it goes on minding its daemons shows that it has passed the signal by.
  const pid_t worker = DaemonPid("worker");
  kill(worker, SIGKILL);
  EXPECT_TRUE(WaitUntil(
      [&] {
        const pid_t next = DaemonPid("worker");
        return next != 0 && next != worker && IsAlive(next);
      },
      kPatience))
      << Err();
  up.Signal(SIGTERM);
  const auto status = up.Wait(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(client::ExitCode(*status), 0) << Err();
}

// The daemons have so long, and `up` waits for them; how jobs and requests share and how the KV
// cache is stored are the worker's.
TEST_F(UpTest, TheShutdownTimeoutReachesTheDaemons) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up({{"WALSH_SHUTDOWN_TIMEOUT", "77"},
                                                    {"WALSH_SERVE_WHILE_QUANTIZING", "preempt"},
                                                    {"WALSH_KV_CACHE_DTYPE", "int8"}}));
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  for (const char* daemon : {"coordinator", "worker"}) {
    const std::string path = absl::StrCat("/proc/", DaemonPid(daemon), "/cmdline");
    const std::string arguments = ReadFile(path, 1 << 20).value_or("");
    EXPECT_THAT(arguments, HasSubstr(std::string("--shutdown-timeout\00077", 21))) << daemon;
    EXPECT_EQ(
        arguments.find(std::string("--serve-while-quantizing\0preempt", 32)) != std::string::npos,
        std::string(daemon) == "worker");
    EXPECT_EQ(arguments.find(std::string("--kv-cache-dtype\0int8", 21)) != std::string::npos,
              std::string(daemon) == "worker");
  }
  up.Signal(SIGTERM);
  EXPECT_TRUE(up.Wait(kPatience).has_value());
}

TEST_F(UpTest, ADaemonThatDoesNotStopIsKilledAfterItsTime) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up({{"WALSH_SHUTDOWN_TIMEOUT", "0"}}));
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  const pid_t worker = DaemonPid("worker");
  kill(worker, SIGSTOP);
  up.Signal(SIGTERM);
  const auto status = up.Wait(absl::Seconds(35));  // the default would be 40 s
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(client::ExitCode(*status), 1);
  EXPECT_THAT(Err(), HasSubstr("killing walsh-worker"));
  EXPECT_FALSE(IsAlive(worker));
}

TEST_F(UpTest, ASecondOneOnTheSameFolderIsRefused) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up());
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  ASSERT_OK_AND_ASSIGN(client::ChildProcess second, Up());
  const auto status = second.Wait(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(client::ExitCode(*status), 1);
  EXPECT_THAT(Err(), HasSubstr("FAILED_PRECONDITION: another `walsh up` runs on"));
  EXPECT_TRUE(IsAlive(DaemonPid("worker")));
  up.Signal(SIGTERM);
  EXPECT_TRUE(up.Wait(kPatience).has_value());
}

TEST_F(UpTest, AJobSurvivesKilledDaemonsByItself) {
  TinyModel({.n_layers = 12}).WriteHf(dir_ / "tiny");
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up());
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  client::Client client = MakeClient();
  v1::CreateQuantizationJobRequest request;
  v1::QuantizationJob& job = *request.mutable_quantization_job();
  job.set_source_model(dir_ / "tiny");
  job.set_model_name("tiny");
  job.mutable_config()->mutable_calibration()->set_num_samples(64);
  job.mutable_config()->mutable_calibration()->set_sequence_length(128);
  job.mutable_config()->mutable_evaluation()->set_disable(true);
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob created, client.CreateJob(request));
  const pid_t worker = DaemonPid("worker");
  const pid_t coordinator = DaemonPid("coordinator");
  int n_kills = 0;
  client::WatchObserver observer;
  observer.on_event = [&](const v1::QuantizationJobEvent& event) {
    // One death each, at two places of the job.
    if (event.stage() == v1::QuantizationJob::QUANTIZING && n_kills == 0) {
      kill(worker, SIGKILL);
      ++n_kills;
    } else if (event.attempt() == 2 && n_kills == 1) {
      kill(coordinator, SIGKILL);
      ++n_kills;
    }
  };
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob finished,
                       client.WatchJob(created.name(), 0, observer));
  EXPECT_EQ(finished.state(), v1::QuantizationJob::SUCCEEDED) << finished.DebugString();
  EXPECT_EQ(n_kills, 2);
  EXPECT_NE(DaemonPid("worker"), worker);
  EXPECT_NE(DaemonPid("coordinator"), coordinator);
  EXPECT_THAT(Err(), HasSubstr("walsh-worker ended (killed by signal 9 (Killed)), starting it"));
  up.Signal(SIGTERM);
  EXPECT_TRUE(up.Wait(kPatience).has_value());
}

TEST_F(UpTest, DaemonsGoWithAKilledParent) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up());
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  const pid_t coordinator = DaemonPid("coordinator");
  const pid_t worker = DaemonPid("worker");
  up.Signal(SIGKILL);
  ASSERT_TRUE(up.Wait(kPatience).has_value());
  EXPECT_TRUE(WaitUntil([&] { return !IsAlive(coordinator) && !IsAlive(worker); }, kPatience));
}

TEST_F(UpTest, ADeviceThatIsNotThereIsNamed) {
  client::SpawnOptions spawn;
  spawn.argv = {testing::BinaryPath("walsh"),
                "up",
                "--data-dir",
                dir_ / "data",
                "--port",
                "0",
                "--device",
                "cuda:1000"};
  ASSERT_OK_AND_ASSIGN(const client::Output missing, client::RunCommand(spawn, "", kPatience));
  EXPECT_EQ(missing.exit_code, 1);
  EXPECT_THAT(missing.err, HasSubstr("walsh-worker ended while starting"));
  EXPECT_THAT(missing.err, HasSubstr("--device cuda:1000: "));
  spawn.argv.back() = "cuda:x";
  ASSERT_OK_AND_ASSIGN(const client::Output wrong, client::RunCommand(spawn, "", kPatience));
  EXPECT_EQ(wrong.exit_code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("'cuda:x' is not auto, cpu, cuda or cuda:N"));
}

TEST_F(UpTest, APortThatIsTakenIsNamed) {
  ASSERT_OK_AND_ASSIGN(client::ChildProcess up, Up());
  ASSERT_TRUE(WaitForBanner()) << Out() << Err();
  const std::string address = ReadEndpoints(dir_ / "data", "coordinator")->at("grpc");
  const std::string port = address.substr(address.rfind(':') + 1);
  client::SpawnOptions spawn;
  spawn.argv = {testing::BinaryPath("walsh"), "up", "--data-dir", dir_ / "other", "--port", port};
  ASSERT_OK_AND_ASSIGN(const client::Output output, client::RunCommand(spawn, "", kPatience));
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_THAT(output.err, HasSubstr("walsh-coordinator ended while starting"));
  EXPECT_THAT(output.err, HasSubstr(port));
  up.Signal(SIGTERM);
  EXPECT_TRUE(up.Wait(kPatience).has_value());
}

}  // namespace
}  // namespace walsh
