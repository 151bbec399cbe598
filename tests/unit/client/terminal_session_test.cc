// The `walsh` command on a pseudo-terminal: what a person sees and types.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

#include "client/child_process.h"
#include "tests/testing/fake_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::FakeServer;
using ::walsh::testing::WaitUntil;

constexpr char kJob[] = "quantizationJobs/j";

// A process whose three standard streams are a terminal of 60 columns.
class TerminalSession {
 public:
  TerminalSession(const FakeServer& server, std::vector<std::string> arguments) {
    winsize size = {};
    size.ws_col = 60;
    size.ws_row = 24;
    std::array<char, 256> name;
    EXPECT_EQ(openpty(&controller_, &terminal_, name.data(), nullptr, &size), 0);
    fcntl(controller_, F_SETFL, O_NONBLOCK);
    SpawnOptions options;
    const char* bin_dir = std::getenv("WALSH_BIN_DIR");
    options.argv = {std::string(bin_dir == nullptr ? "." : bin_dir) + "/walsh"};
    options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
    options.environment = {{"WALSH_SERVER", server.address()}};
    options.stdin_path = name.data();
    options.stdout_path = name.data();
    options.stderr_path = name.data();
    auto child = ChildProcess::Spawn(options);
    EXPECT_OK(child);
    child_ = std::make_unique<ChildProcess>(*std::move(child));
  }

  ~TerminalSession() {
    child_.reset();
    close(controller_);
    close(terminal_);
  }

  void Type(const std::string& keys) {
    EXPECT_EQ(write(controller_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  }
  void Interrupt() { child_->Signal(SIGINT); }

  // Everything shown so far.
  const std::string& Screen() {
    std::array<char, 4096> buffer;
    for (ssize_t n; (n = read(controller_, buffer.data(), buffer.size())) > 0;) {
      screen_.append(buffer.data(), static_cast<size_t>(n));
    }
    return screen_;
  }
  bool WaitFor(const std::string& text) {
    return WaitUntil([&] { return Screen().find(text) != std::string::npos; });
  }
  int ExitCodeOfChild() {
    const auto status = child_->Wait(absl::Seconds(10));
    return status.has_value() ? ExitCode(*status) : -1;
  }

 private:
  int controller_ = -1;
  int terminal_ = -1;
  std::unique_ptr<ChildProcess> child_;
  std::string screen_;
};

v1::QuantizationJobEvent LayerEvent(int layer) {
  v1::QuantizationJobEvent event;
  event.set_state(v1::QuantizationJob::RUNNING);
  event.set_stage(v1::QuantizationJob::QUANTIZING);
  event.set_layer(layer);
  event.mutable_progress()->set_layers_total(30);
  event.mutable_progress()->set_fraction(layer / 30.0);
  return event;
}

TEST(TerminalSessionTest, ProgressIsOneLineThatFits) {
  FakeServer server;
  for (int layer = 0; layer < 3; ++layer) server.AddEvent(kJob, LayerEvent(layer));
  v1::QuantizationJobEvent last;
  last.set_state(v1::QuantizationJob::SUCCEEDED);
  server.AddEvent(kJob, last);
  TerminalSession session(server, {"jobs", "watch", "j"});
  ASSERT_EQ(session.ExitCodeOfChild(), 0);
  const std::string& screen = session.Screen();
  const size_t report = screen.find("job j: SUCCEEDED");
  ASSERT_NE(report, std::string::npos) << screen;
  const std::string progress = screen.substr(0, report);
  EXPECT_EQ(progress.find('\n'), std::string::npos) << progress;
  size_t begin = 0;
  int n_draws = 0;
  for (size_t end; (end = progress.find("\r\033[K", begin)) != std::string::npos; ++n_draws) {
    EXPECT_LT(end - begin, 60u);
    begin = end + 4;
  }
  EXPECT_GE(n_draws, 4);
  EXPECT_THAT(progress, HasSubstr("layer 3/30 [#"));
}

TEST(TerminalSessionTest, CtrlCAsksAndCancelsOnlyWhenTold) {
  FakeServer server;
  server.AddEvent(kJob, LayerEvent(0));
  {
    TerminalSession session(server, {"jobs", "watch", "j"});
    ASSERT_TRUE(session.WaitFor("layer 1/30"));
    session.Interrupt();
    ASSERT_TRUE(session.WaitFor("cancel the job? [y/N]"));
    session.Type("\n");
    EXPECT_EQ(session.ExitCodeOfChild(), 1);
    EXPECT_EQ(server.Calls("CancelQuantizationJob"), 0);
  }
  {
    TerminalSession session(server, {"jobs", "watch", "j"});
    ASSERT_TRUE(session.WaitFor("layer 1/30"));
    session.Interrupt();
    ASSERT_TRUE(session.WaitFor("cancel the job? [y/N]"));
    session.Interrupt();  // the second one leaves
    EXPECT_EQ(session.ExitCodeOfChild(), 1);
    EXPECT_EQ(server.Calls("CancelQuantizationJob"), 0);
  }
  {
    TerminalSession session(server, {"jobs", "watch", "j"});
    ASSERT_TRUE(session.WaitFor("layer 1/30"));
    session.Interrupt();
    ASSERT_TRUE(session.WaitFor("cancel the job? [y/N]"));
    session.Type("y\n");
    EXPECT_EQ(session.ExitCodeOfChild(), 1);
    EXPECT_EQ(server.Calls("CancelQuantizationJob"), 1);
    EXPECT_THAT(session.Screen(), HasSubstr("job j: CANCELLING"));
  }
}

TEST(TerminalSessionTest, AChatKeepsItsHistoryUntilItIsReset) {
  FakeServer server;
  server.SetStream({"An answer."}, absl::ZeroDuration());
  TerminalSession session(server, {"chat", "m", "--system", "S"});
  ASSERT_TRUE(session.WaitFor("> "));
  session.Type("first\n");
  ASSERT_TRUE(WaitUntil([&] { return server.chat_requests().size() == 1; }));
  ASSERT_TRUE(session.WaitFor("An answer."));
  session.Type("second\n");
  ASSERT_TRUE(WaitUntil([&] { return server.chat_requests().size() == 2; }));
  session.Type("/reset\nthird\n/exit\n");
  EXPECT_EQ(session.ExitCodeOfChild(), 0);
  const auto requests = server.chat_requests();
  ASSERT_EQ(requests.size(), 3u);
  ASSERT_EQ(requests[1].messages_size(), 4);
  EXPECT_EQ(requests[1].messages(2).role(), "assistant");
  EXPECT_EQ(requests[1].messages(2).content(), "An answer.");
  ASSERT_EQ(requests[2].messages_size(), 2);
  EXPECT_EQ(requests[2].messages(0).content(), "S");
  EXPECT_EQ(requests[2].messages(1).content(), "third");
}

TEST(TerminalSessionTest, CtrlCInAChatStopsTheAnswerAndASecondLeaves) {
  FakeServer server;
  server.SetStream({"never", "comes"}, absl::Seconds(60));
  TerminalSession session(server, {"chat", "m"});
  ASSERT_TRUE(session.WaitFor("> "));
  session.Type("hello\n");
  ASSERT_TRUE(WaitUntil([&] { return server.n_streams() == 1; }));
  session.Interrupt();
  ASSERT_TRUE(WaitUntil([&] { return server.n_streams_cancelled() == 1; }));
  // Back at the prompt: the conversation goes on without the turn that was stopped.
  server.SetStream({"fine"}, absl::ZeroDuration());
  session.Type("again\n");
  ASSERT_TRUE(session.WaitFor("fine"));
  EXPECT_EQ(server.chat_requests().back().messages_size(), 1);
  ASSERT_TRUE(WaitUntil([&] {
    const std::string& screen = session.Screen();
    return screen.size() > 2 && screen.compare(screen.size() - 2, 2, "> ") == 0;
  }));
  session.Interrupt();
  EXPECT_EQ(session.ExitCodeOfChild(), 0);
}

TEST(TerminalSessionTest, CtrlCEndsTheWaitForALoad) {
  FakeServer server;
  server.HangLoads();
  TerminalSession session(server, {"models", "load", "m"});
  ASSERT_TRUE(WaitUntil([&] { return server.Calls("LoadModel") == 1; }));
  session.Interrupt();
  EXPECT_EQ(session.ExitCodeOfChild(), 1);
  EXPECT_THAT(session.Screen(), HasSubstr("walsh --server " + server.address() + " models get m"));
}

TEST(TerminalSessionTest, AModelCannotMoveTheCursor) {
  FakeServer server;
  server.SetStream({"a\x1b[2Jb"}, absl::ZeroDuration());
  TerminalSession session(server, {"generate", "m", "x"});
  ASSERT_EQ(session.ExitCodeOfChild(), 0);
  EXPECT_THAT(session.Screen(), HasSubstr("a\uFFFD[2Jb"));
  EXPECT_THAT(session.Screen(), Not(HasSubstr("\x1b")));
}

}  // namespace
}  // namespace walsh::client
