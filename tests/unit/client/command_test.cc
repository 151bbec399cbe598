// The `walsh` command as a process against the fake service: output, errors, exit codes, Ctrl-C.
#include <gtest/gtest.h>
#include <signal.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "client/child_process.h"
#include "common/endpoints.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/fake_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"

namespace walsh::client {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::FakeServer;
using ::walsh::testing::WaitUntil;

constexpr char kJob[] = "quantizationJobs/j";

v1::QuantizationJobEvent Event(v1::QuantizationJob::State state) {
  v1::QuantizationJobEvent event;
  event.set_state(state);
  return event;
}

class CommandTest : public ::testing::Test {
 protected:
  SpawnOptions Command(std::vector<std::string> arguments) const {
    const char* bin_dir = std::getenv("WALSH_BIN_DIR");
    SpawnOptions options;
    options.argv = {std::string(bin_dir == nullptr ? "." : bin_dir) + "/walsh"};
    options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
    options.environment = {{"WALSH_SERVER", server_.address()}, {"WALSH_DATA_DIR", dir_.path()}};
    return options;
  }

  Output Run(std::vector<std::string> arguments, const std::string& input = "") const {
    auto output = RunCommand(Command(std::move(arguments)), input, absl::Seconds(60));
    EXPECT_OK(output);
    return output.ok() ? *output : Output{};
  }

  FakeServer server_;
  testing::TempDir dir_;
};

TEST_F(CommandTest, UsageErrorsEndWithTwo) {
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {},
           {"fly"},
           {"jobs"},
           {"jobs", "get"},
           {"quantize", "m"},
           {"quantize", "m", "--name", "n", "--bits", "many"},
           {"quantize", "m", "--name", "n", "--group-size", "big"},
           {"quantize", "m", "--name", "n", "--rotation", "sideways"},
           {"quantize", "m", "--preset", "best"},
           {"models", "list", "--output", "yaml"},
           {"up", "--port", "70000"}}) {
    const Output output = Run(arguments);
    EXPECT_EQ(output.exit_code, 2) << (arguments.empty() ? "nothing" : arguments.back());
    EXPECT_NE(output.err, "");
    EXPECT_EQ(output.out, "");
  }
}

TEST_F(CommandTest, HelpAndVersionEndWithZero) {
  EXPECT_THAT(Run({"--help"}).out, HasSubstr("quantize"));
  EXPECT_EQ(Run({"quantize", "--help"}).exit_code, 0);
  EXPECT_THAT(Run({"version"}).out, HasSubstr("walsh "));
  EXPECT_TRUE(json::parse(Run({"version", "--output", "json"}).out).contains("revision"));
}

TEST_F(CommandTest, PresetsAreListedAsATableAndJson) {
  const Output table = Run({"quantize", "--list-presets"});
  EXPECT_EQ(table.exit_code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("PRESET"));
  EXPECT_THAT(table.out, HasSubstr("fake-w2"));
  const Output presets = Run({"quantize", "--list-presets", "--output", "json"});
  EXPECT_EQ(json::parse(presets.out)["presets"][0]["config"]["bits"], 2);
  EXPECT_TRUE(server_.create_requests().empty());
}

TEST_F(CommandTest, AServiceErrorIsOneClearLineAndEndsWithOne) {
  const Output output = Run({"models", "get", "nobody"});
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_EQ(output.out, "");
  EXPECT_EQ(output.err, "error: NOT_FOUND: model 'models/nobody' does not exist\n");
}

TEST_F(CommandTest, ModelsAndWorkersAsTablesAndJson) {
  v1::Model model;
  model.set_name("models/demo");
  model.set_state(v1::Model::READY);
  model.set_bits(2);
  model.set_group_size(64);
  model.set_size_bytes(151'000'000);
  server_.AddModel(model);
  v1::Model mixed = model;
  mixed.set_name("models/mixed");
  mixed.set_method("gptq");
  mixed.set_rotation("gsr");
  mixed.add_override_bits(4);
  mixed.add_override_bits(8);
  mixed.set_bits_per_weight(2.8125);
  mixed.set_grid("codebook");
  mixed.set_activation_bits(4);
  mixed.set_kv_cache_bits(8);
  server_.AddModel(mixed);
  v1::Worker worker;
  worker.set_name("workers/w1");
  worker.set_state(v1::Worker::ONLINE);
  worker.set_device("cpu");
  worker.add_models("models/demo");
  server_.AddWorker(worker);

  EXPECT_THAT(Run({"models", "list"}).out, HasSubstr("demo   READY"));
  EXPECT_THAT(Run({"models", "get", "demo"}).out, HasSubstr("151 MB"));
  EXPECT_THAT(Run({"models", "get", "demo"}).out, Not(HasSubstr("at run time")));
  EXPECT_THAT(Run({"models", "list"}).out, HasSubstr("2/4/8 A4 KV8"));
  EXPECT_THAT(Run({"models", "get", "mixed"}).out,
              AllOf(HasSubstr("2 (4 and 8 in some linears), 2.81 a weight, codebooks, group 64, "
                              "gptq, rotation gsr\n"),
                    HasSubstr("activations 4 bits, KV cache 8 bits\n")));
  EXPECT_THAT(Run({"workers", "list"}).out, HasSubstr("w1      ONLINE  cpu"));
  EXPECT_EQ(json::parse(Run({"models", "list", "--output", "json"}).out)["models"][0]["name"],
            "models/demo");
  EXPECT_EQ(json::parse(Run({"--output", "json", "workers", "list"}).out)["workers"][0]["device"],
            "cpu");
  EXPECT_THAT(Run({"models", "unload", "models/demo"}).out, HasSubstr("UNLOADED"));
  EXPECT_THAT(Run({"models", "load", "demo"}).out, HasSubstr("READY"));
  EXPECT_EQ(Run({"models", "delete", "demo"}).exit_code, 0);
  EXPECT_EQ(Run({"models", "delete", "mixed"}).exit_code, 0);
  EXPECT_THAT(Run({"models", "list"}).err, HasSubstr("no models"));
}

TEST_F(CommandTest, JobsAreListedShownCancelledAndDeleted) {
  server_.AddEvent(kJob, Event(v1::QuantizationJob::RUNNING));
  EXPECT_THAT(Run({"jobs", "list"}).out, HasSubstr("j    RUNNING"));
  EXPECT_THAT(Run({"jobs", "get", "j"}).out, HasSubstr("job j: RUNNING"));
  EXPECT_EQ(json::parse(Run({"jobs", "get", "j", "--output", "json"}).out)["state"], "RUNNING");
  EXPECT_EQ(Run({"jobs", "cancel", "j"}).out, "j: CANCELLING\n");
  EXPECT_EQ(Run({"jobs", "delete", "j"}).exit_code, 0);
  EXPECT_EQ(Run({"jobs", "get", "j"}).exit_code, 1);
}

TEST_F(CommandTest, QuantizeFollowsTheJobAndPrintsTheReport) {
  for (int layer = 0; layer < 2; ++layer) {
    v1::QuantizationJobEvent event = Event(v1::QuantizationJob::RUNNING);
    event.set_stage(v1::QuantizationJob::QUANTIZING);
    event.set_layer(layer);
    event.mutable_progress()->set_layers_total(2);
    event.mutable_progress()->set_fraction(0.4 * (layer + 1));
    event.mutable_progress()->mutable_eta()->set_seconds(5);
    server_.AddEvent("quantizationJobs/job1", event);
  }
  server_.AddEvent("quantizationJobs/job1", Event(v1::QuantizationJob::SUCCEEDED));
  // The fake names the first created job by the number of those it has.
  server_.mutable_job("quantizationJobs/job1")->mutable_result()->set_bits_per_weight(2.28);
  FakeServer& server = server_;
  const Output watched = Run({"jobs", "watch", "job1"});
  EXPECT_EQ(watched.exit_code, 0);
  EXPECT_EQ(watched.err,
            "QUANTIZING layer 1/2, 40 %, ETA 0:05\n"
            "QUANTIZING layer 2/2, 80 %, ETA 0:05\n"
            "SUCCEEDED, 0 %\n");
  EXPECT_THAT(watched.out, HasSubstr("2.280 bits a weight"));

  const Output events = Run({"jobs", "watch", "job1", "--after-sequence", "2", "--output", "json"});
  EXPECT_EQ(events.exit_code, 0);
  EXPECT_EQ(json::parse(events.out)["sequence"], "3");
  EXPECT_EQ(server.watched_after().back(), 2);
}

TEST_F(CommandTest, QuantizeSendsItsFlagsAndDetaches) {
  const Output output = Run({"quantize", "tiny", "--name", "demo", "--bits", "2", "--group-size",
                             "channel", "--detach", "--request-id", "r1"});
  EXPECT_EQ(output.exit_code, 0);
  EXPECT_EQ(output.out, "job1\n");
  // The same key finds the same job.
  EXPECT_EQ(Run({"quantize", "tiny", "--name", "demo", "--bits", "2", "--group-size", "channel",
                 "--detach", "--request-id", "r1"})
                .out,
            "job1\n");
  const auto requests = server_.create_requests();
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[0].quantization_job().config().bits(), 2);
  EXPECT_EQ(requests[0].quantization_job().source_model()[0], '/');
  EXPECT_EQ(requests[0].request_id(), "r1");
}

TEST_F(CommandTest, FlagsHaveEnvironmentTwins) {
  SpawnOptions command = Command({"quantize", "tiny", "--name", "demo", "--detach"});
  command.environment["WALSH_BITS"] = "3";
  ASSERT_OK(RunCommand(command, "", absl::Seconds(60)));
  ASSERT_EQ(server_.create_requests().size(), 1u);
  EXPECT_EQ(server_.create_requests()[0].quantization_job().config().bits(), 3);
}

TEST_F(CommandTest, AModelIsLoadedByDefaultWhereOneLocalWorkerRuns) {
  v1::Worker worker;
  worker.set_state(v1::Worker::ONLINE);
  server_.AddWorker(worker);
  Run({"quantize", "tiny", "--name", "a", "--detach"});
  Run({"quantize", "tiny", "--name", "a", "--detach", "--no-load"});
  server_.AddWorker(worker);
  Run({"quantize", "tiny", "--name", "a", "--detach"});
  Run({"quantize", "tiny", "--name", "a", "--detach", "--load"});
  std::vector<bool> auto_load;
  for (const auto& request : server_.create_requests()) {
    auto_load.push_back(request.quantization_job().config().has_auto_load());
  }
  EXPECT_EQ(auto_load, (std::vector<bool>{true, false, false, true}));
}

TEST_F(CommandTest, AFailedJobEndsWithOneAndItsError) {
  server_.AddEvent(kJob, Event(v1::QuantizationJob::FAILED));
  v1::QuantizationJob& job = *server_.mutable_job(kJob);
  job.mutable_error()->set_code(15);
  job.mutable_error()->set_message("tensor 'x' holds NaN");
  job.set_error_reason("NON_FINITE_WEIGHTS");
  const Output output = Run({"jobs", "watch", "j"});
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_THAT(output.err, HasSubstr("error: DATA_LOSS: tensor 'x' holds NaN\n"
                                    "  reason: NON_FINITE_WEIGHTS\n"));
}

TEST_F(CommandTest, CtrlCLeavesTheJobRunningAndSaysHowToComeBack) {
  server_.AddEvent(kJob, Event(v1::QuantizationJob::RUNNING));
  SpawnOptions command = Command({"jobs", "watch", "j"});
  command.stderr_path = dir_ / "err";
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(command));
  const auto error = [&] { return ReadFile(dir_ / "err", 10000).value_or(""); };
  ASSERT_TRUE(WaitUntil([&] { return error().find("RUNNING") != std::string::npos; }));
  child.Signal(SIGINT);
  const auto status = child.Wait(absl::Seconds(10));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(ExitCode(*status), 1);
  EXPECT_THAT(error(), HasSubstr("goes on with job j"));
  EXPECT_THAT(error(), HasSubstr("walsh --server " + server_.address() + " jobs watch j\n"));
  EXPECT_EQ(server_.Calls("CancelQuantizationJob"), 0);
}

TEST_F(CommandTest, CtrlCBeforeTheAnswerSaysHowToFindTheJob) {
  absl::Status busy = absl::UnavailableError("later");
  SetRetryDelay(busy, absl::Seconds(30));
  server_.FailNext("CreateQuantizationJob", 1, ToGrpcStatus(busy));
  SpawnOptions command = Command({"quantize", "/m", "--name", "n", "--no-load"});
  command.stderr_path = dir_ / "err";
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(command));
  ASSERT_TRUE(WaitUntil([&] { return server_.Calls("CreateQuantizationJob") == 1; }));
  child.Signal(SIGINT);
  const auto status = child.Wait(absl::Seconds(20));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(ExitCode(*status), 1);
  const std::string error = ReadFile(dir_ / "err", 10000).value_or("");
  EXPECT_THAT(error, HasSubstr("may have accepted the job"));
  EXPECT_THAT(error, HasSubstr("walsh --server " + server_.address() +
                               " jobs list --filter model_name=n\n"));
  const std::string request_id = server_.create_requests()[0].request_id();
  EXPECT_THAT(error, HasSubstr("--request-id " + request_id));
}

TEST_F(CommandTest, HintsNameAFolderThatIsNotTheUsualOne) {
  ASSERT_OK(WriteEndpoints(dir_ / "my data", "coordinator", {{"grpc", server_.address()}}));
  server_.AddEvent(kJob, Event(v1::QuantizationJob::RUNNING));
  SpawnOptions command = Command({"--data-dir", dir_ / "my data", "jobs", "watch", "j"});
  command.environment["WALSH_SERVER"] = "";
  command.stderr_path = dir_ / "err";
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(command));
  const auto error = [&] { return ReadFile(dir_ / "err", 10000).value_or(""); };
  ASSERT_TRUE(WaitUntil([&] { return error().find("RUNNING") != std::string::npos; }));
  child.Signal(SIGINT);
  ASSERT_TRUE(child.Wait(absl::Seconds(20)).has_value());
  EXPECT_THAT(error(), HasSubstr("walsh --data-dir '" + dir_ / "my data" + "' jobs watch j\n"));
}

TEST_F(CommandTest, UpSaysWhichSettingsItDoesNotTake) {
  const Output output = Run({"up", "--help"});
  EXPECT_THAT(output.out, HasSubstr("--shutdown-timeout"));
  EXPECT_THAT(output.out, HasSubstr("--grpc-port"));
  EXPECT_THAT(output.out, HasSubstr("WALSH_MODEL_ROOT"));
}

TEST_F(CommandTest, GenerateStreamsAndTellsItsSpeed) {
  const Output output = Run({"generate", "m", "Once", "--max-tokens", "5", "--temperature", "0",
                             "--stop", "a", "--stop", "b", "--stats"});
  EXPECT_EQ(output.exit_code, 0);
  EXPECT_EQ(output.out, "Hello, world\n");
  EXPECT_EQ(output.err,
            "[3 tokens after 3 of prompt, 31.2 tokens/s, first token after 0.35 s, EOS]\n");
  const auto requests = server_.generate_requests();
  ASSERT_EQ(requests.size(), 1u);
  EXPECT_EQ(requests[0].prompt(), "Once");
  EXPECT_EQ(requests[0].sampling().max_tokens(), 5);
  EXPECT_TRUE(requests[0].sampling().has_temperature());
  EXPECT_FALSE(requests[0].sampling().has_top_p());
  EXPECT_EQ(requests[0].sampling().stop_size(), 2);
  EXPECT_FALSE(requests[0].skip_bos());
}

TEST_F(CommandTest, GenerateReadsItsPromptFromAPipe) {
  EXPECT_EQ(Run({"generate", "models/m", "--raw", "--output", "json"}, "From a pipe").exit_code, 0);
  ASSERT_EQ(server_.generate_requests().size(), 1u);
  EXPECT_EQ(server_.generate_requests()[0].prompt(), "From a pipe");
  EXPECT_EQ(server_.generate_requests()[0].model(), "m");
  EXPECT_TRUE(server_.generate_requests()[0].skip_bos());
  const Output invalid = Run({"generate", "m"}, "\xff\xfe");
  EXPECT_EQ(invalid.exit_code, 1);
  EXPECT_EQ(invalid.err, "error: INVALID_ARGUMENT: the prompt is not UTF-8\n");
}

TEST_F(CommandTest, ABrokenStreamKeepsWhatCameAndFails) {
  server_.CutStreamAfter(2, {grpc::StatusCode::UNAVAILABLE, "the worker is gone"});
  const Output output = Run({"generate", "m", "Once"});
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_EQ(output.out, "Hello, \n");
  EXPECT_EQ(output.err, "error: UNAVAILABLE: the worker is gone\n");
}

TEST_F(CommandTest, CtrlCCancelsAStream) {
  server_.SetStream({"slow", "er"}, absl::Seconds(30));
  SpawnOptions command = Command({"generate", "m", "Once"});
  command.stdout_path = dir_ / "out";
  command.stderr_path = dir_ / "err";
  ASSERT_OK_AND_ASSIGN(ChildProcess child, ChildProcess::Spawn(command));
  ASSERT_TRUE(WaitUntil([&] { return server_.n_streams() == 1; }));
  child.Signal(SIGINT);
  const auto status = child.Wait(absl::Seconds(10));
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(ExitCode(*status), 1);
  EXPECT_TRUE(WaitUntil([&] { return server_.n_streams_cancelled() == 1; }));
  EXPECT_THAT(ReadFile(dir_ / "err", 1000).value_or(""), HasSubstr("error: CANCELLED"));
}

TEST_F(CommandTest, ChatTakesOneMessageFromAPipeOrAFlag) {
  EXPECT_EQ(Run({"chat", "m", "--system", "Be brief.", "--seed", "7"}, "Hi there").out,
            "Hello, world\n");
  EXPECT_EQ(Run({"chat", "m", "--message", "Flagged"}).out, "Hello, world\n");
  const auto requests = server_.chat_requests();
  ASSERT_EQ(requests.size(), 2u);
  ASSERT_EQ(requests[0].messages_size(), 2);
  EXPECT_EQ(requests[0].messages(0).role(), "system");
  EXPECT_EQ(requests[0].messages(1).content(), "Hi there");
  EXPECT_EQ(requests[0].sampling().seed(), 7u);
  EXPECT_EQ(requests[1].messages(0).content(), "Flagged");
  const auto answer = json::parse(Run({"chat", "m", "--message", "x", "--output", "json"}).out);
  EXPECT_EQ(answer["text"], "Hello, world");
}

TEST_F(CommandTest, TokenizeAndBack) {
  EXPECT_EQ(Run({"tokenize", "m", "AB"}).out, "65 66\n");
  EXPECT_EQ(Run({"tokenize", "m"}, "C").out, "67\n");
  EXPECT_EQ(Run({"detokenize", "m", "65", "66"}).out, "AB\n");
  EXPECT_EQ(json::parse(Run({"tokenize", "m", "A", "--output", "json"}).out)["token_ids"][0], 65);
}

TEST_F(CommandTest, DoctorReportsWithoutAWorkerBinaryOrAFolder) {
  SpawnOptions command = Command({"doctor", "--output", "json"});
  command.environment["WALSH_DATA_DIR"] = "/proc/no/such/folder";
  ASSERT_OK_AND_ASSIGN(const Output output, RunCommand(command, "", absl::Seconds(90)));
  EXPECT_EQ(output.exit_code, 1);
  const json findings = json::parse(output.out);
  EXPECT_FALSE(findings["data_dir"]["writable"].get<bool>());
  EXPECT_TRUE(findings["service"]["running"].get<bool>());
  EXPECT_EQ(findings["ports"].size(), 6u);
  EXPECT_THAT(Run({"doctor"}).out, HasSubstr("usual ports"));
  EXPECT_TRUE(ReadFile(dir_ / ".walsh-doctor", 10).status().code() == absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace walsh::client
