#include "client/child_process.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

using ::walsh::testing::HasCode;
using ::walsh::testing::WaitUntil;

SpawnOptions Shell(const std::string& script) {
  SpawnOptions options;
  options.argv = {"/bin/sh", "-c", script};
  return options;
}

TEST(RunCommandTest, CapturesOutputErrorAndExitCode) {
  ASSERT_OK_AND_ASSIGN(const Output output, RunCommand(Shell("cat; echo problem >&2; exit 3"),
                                                       "some input", absl::Seconds(10)));
  EXPECT_EQ(output.out, "some input");
  EXPECT_EQ(output.err, "problem\n");
  EXPECT_EQ(output.exit_code, 3);
}

TEST(RunCommandTest, LargeInputAndOutputDoNotBlockEachOther) {
  const std::string input(4 << 20, 'x');
  ASSERT_OK_AND_ASSIGN(const Output output, RunCommand(Shell("cat"), input, absl::Seconds(30)));
  EXPECT_EQ(output.out.size(), input.size());
}

TEST(RunCommandTest, ACommandThatDoesNotReadItsInputIsNoError) {
  ASSERT_OK_AND_ASSIGN(
      const Output output,
      RunCommand(Shell("exec <&-; echo done"), std::string(1 << 20, 'x'), absl::Seconds(10)));
  EXPECT_EQ(output.out, "done\n");
}

TEST(RunCommandTest, KillsWhatTakesTooLong) {
  EXPECT_THAT(RunCommand(Shell("exec sleep 60"), "", absl::Milliseconds(100)).status(),
              HasCode(absl::StatusCode::kDeadlineExceeded));
}

TEST(RunCommandTest, NamesAMissingProgram) {
  SpawnOptions options;
  options.argv = {"/no/such/program"};
  EXPECT_THAT(
      RunCommand(options, "", absl::Seconds(1)).status(),
      testing::StatusIs(absl::StatusCode::kNotFound, ::testing::HasSubstr("/no/such/program")));
}

TEST(RunCommandTest, SetsAndReplacesEnvironmentVariables) {
  SpawnOptions options = Shell("echo $WALSH_X $HOME");
  options.environment = {{"WALSH_X", "1"}, {"HOME", "/nowhere"}};
  ASSERT_OK_AND_ASSIGN(const Output output, RunCommand(options, "", absl::Seconds(10)));
  EXPECT_EQ(output.out, "1 /nowhere\n");
}

TEST(ChildProcessTest, AppendsToItsLogAndReportsItsEnd) {
  const testing::TempDir dir;
  SpawnOptions options = Shell("echo line; echo error >&2; exit 7");
  options.stdout_path = dir / "log";
  options.stderr_path = dir / "log";
  for (int run = 0; run < 2; ++run) {
    ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(options));
    const auto status = child.Wait(absl::Seconds(10));
    ASSERT_TRUE(status.has_value());
    EXPECT_EQ(ExitCode(*status), 7);
    EXPECT_EQ(WaitStatusText(*status), "exit code 7");
  }
  ASSERT_OK_AND_ASSIGN(const std::string log, ReadFile(dir / "log", 1000));
  EXPECT_EQ(log, "line\nerror\nline\nerror\n");
}

TEST(ChildProcessTest, SignalsReachItAndAreNamed) {
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(Shell("exec sleep 60")));
  EXPECT_FALSE(child.Poll().has_value());
  child.Signal(SIGKILL);
  const auto status = child.Wait(absl::Seconds(10));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(ExitCode(*status), 128 + SIGKILL);
  EXPECT_EQ(WaitStatusText(*status), "killed by signal 9 (Killed)");
}

TEST(ChildProcessTest, DoesNotOutliveItsObject) {
  pid_t pid = 0;
  {
    ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(Shell("exec sleep 60")));
    pid = child.pid();
    EXPECT_EQ(kill(pid, 0), 0);
  }
  EXPECT_NE(kill(pid, 0), 0);
}

TEST(ChildProcessTest, SignalMaskAndIgnoredSignalsAreNotInherited) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(Shell("exec sleep 60")));
  child.Signal(SIGTERM);
  const auto status = child.Wait(absl::Seconds(10));
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(WTERMSIG(*status), SIGTERM);
}

// A parent that is killed takes its children with it. The shell in the middle cannot be the parent
// under test, so a fork of this process is.
TEST(ChildProcessTest, EndsWhenItsParentIsKilled) {
  const testing::TempDir dir;
  const std::string pid_path = dir / "pid";
  const pid_t parent = fork();
  ASSERT_GE(parent, 0);
  if (parent == 0) {
    auto child = ChildProcess::Spawn(Shell("echo $$ > " + pid_path + "; exec sleep 60"));
    if (!child.ok()) _exit(1);
    pause();
    _exit(0);
  }
  std::string text;
  ASSERT_TRUE(WaitUntil([&] {
    text = ReadFile(pid_path, 100).value_or("");
    return !text.empty() && text.back() == '\n';
  }));
  const pid_t child = static_cast<pid_t>(std::stol(text));
  ASSERT_EQ(kill(child, 0), 0);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  // The orphan is reaped by whoever adopted it; until then it is a zombie that holds nothing.
  EXPECT_TRUE(WaitUntil([&] {
    const auto stat = ReadFile("/proc/" + std::to_string(child) + "/stat", 4096);
    return !stat.ok() || stat->find(") Z ") != std::string::npos;
  }));
}

}  // namespace
}  // namespace walsh::client
