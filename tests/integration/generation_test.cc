// Goal:   a user's first hour on a small real model: quantize it through gRPC, see the figures,
// load
//         it, stream text from it, talk about its tokens, cancel a stream.
// Method: TinyStories-656K (a random model without the test data) at 2 bits with GSR and GPTQ,
//         calibrated on real stories; the real daemons and the client library. One job serves all
//         tests of the suite.
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "common/grpc_status.h"
#include "common/utf8.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_model.h"
#include "tests/testing/wait.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TestModel;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

constexpr char kModel[] = "tinystories-2bit";

class GenerationTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model_ = new TestModel;
    testing::ServiceOptions options;
    options.model_roots = {model_->root()};
    service_ = new ServiceFixture(options);
    ASSERT_OK(service_->Start());
    v1::CreateQuantizationJobRequest request;
    Job& job = *request.mutable_quantization_job();
    job.set_source_model(model_->path());
    job.set_model_name(kModel);
    v1::QuantizationConfig& config = *job.mutable_config();
    config.set_bits(2);
    config.set_method(v1::QuantizationConfig::GPTQ);
    config.mutable_rotation()->set_kind(v1::Rotation::GSR);
    config.mutable_calibration()->set_uri(model_->text_path());
    config.mutable_calibration()->set_num_samples(16);
    config.mutable_calibration()->set_sequence_length(256);
    config.mutable_evaluation()->set_uri(model_->text_path());
    config.mutable_evaluation()->set_max_windows(4);
    config.mutable_evaluation()->set_sequence_length(256);
    config.mutable_auto_load();
    ASSERT_OK_AND_ASSIGN(const Job created, service_->client().CreateJob(request));
    client::WatchObserver observer;
    observer.on_event = [](const v1::QuantizationJobEvent& event) { events_->push_back(event); };
    ASSERT_OK_AND_ASSIGN(const Job finished,
                         service_->client().WatchJob(created.name(), 0, observer));
    *job_ = finished;
    ASSERT_EQ(finished.state(), Job::SUCCEEDED) << finished.DebugString();
  }

  static void TearDownTestSuite() {
    delete service_;
    delete model_;
  }

  void SetUp() override { ASSERT_EQ(job_->state(), Job::SUCCEEDED); }

  static client::Client& client() { return service_->client(); }

  static v1::GenerateRequest Prompt(const std::string& prompt, int max_tokens) {
    v1::GenerateRequest request;
    request.set_model(kModel);
    request.set_prompt(prompt);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    request.mutable_sampling()->set_temperature(0);
    return request;
  }

  // Requests that the worker runs now, as the coordinator tells it.
  static int Running() {
    const auto workers = client().ListWorkers();
    int n = 0;
    if (!workers.ok()) return -1;
    for (const auto& worker : workers->workers()) n += worker.requests_running();
    return n;
  }

  static TestModel* model_;
  static ServiceFixture* service_;
  static std::vector<v1::QuantizationJobEvent>* const events_;
  static Job* const job_;
};

TestModel* GenerationTest::model_ = nullptr;
ServiceFixture* GenerationTest::service_ = nullptr;
std::vector<v1::QuantizationJobEvent>* const GenerationTest::events_ =
    new std::vector<v1::QuantizationJobEvent>;
Job* const GenerationTest::job_ = new Job;

TEST_F(GenerationTest, EventsHaveNoGapAndCoverEveryStageAndLayer) {
  ASSERT_FALSE(events_->empty());
  int64_t expected = 1;
  std::set<Job::Stage> stages;
  std::set<int> layers;
  double fraction = 0;
  for (const auto& event : *events_) {
    if (event.heartbeat()) continue;
    EXPECT_EQ(event.sequence(), expected++);
    if (event.stage() != Job::STAGE_UNSPECIFIED) stages.insert(event.stage());
    if (event.stage() == Job::QUANTIZING) layers.insert(event.layer());
    EXPECT_GE(event.progress().fraction(), fraction - 1e-9) << event.ShortDebugString();
    fraction = event.progress().fraction();
  }
  EXPECT_EQ(events_->back().state(), Job::SUCCEEDED);
  for (const Job::Stage stage : {Job::LOADING, Job::ROTATING, Job::CALIBRATING, Job::QUANTIZING,
                                 Job::EVALUATING, Job::PUBLISHING}) {
    EXPECT_TRUE(stages.count(stage) != 0) << Job::Stage_Name(stage);
  }
  ASSERT_EQ(static_cast<int>(layers.size()), model_->n_layers());
  EXPECT_EQ(*layers.begin(), 0);
  EXPECT_EQ(*layers.rbegin(), model_->n_layers() - 1);
}

TEST_F(GenerationTest, AWatchThatStartsLateReplaysTheRest) {
  const int64_t last = events_->back().sequence();
  std::vector<int64_t> sequences;
  client::WatchObserver observer;
  observer.on_event = [&](const v1::QuantizationJobEvent& event) {
    sequences.push_back(event.sequence());
  };
  ASSERT_OK(client().WatchJob(job_->name(), last - 2, observer));
  EXPECT_EQ(sequences, (std::vector<int64_t>{last - 1, last}));
}

TEST_F(GenerationTest, TheReportHasFiguresThatMakeSense) {
  const Job::Result& result = job_->result();
  EXPECT_EQ(job_->attempt(), 1);
  EXPECT_EQ(result.group_size(), 128);
  EXPECT_EQ(result.rotation_block_size(), 128);
  EXPECT_GT(result.bits_per_weight(), 2.0);
  EXPECT_LT(result.bits_per_weight(), 2.5);
  EXPECT_GT(result.linear_bytes_before(), 6 * result.linear_bytes_after());
  EXPECT_GT(result.size_bytes(), 0);
  EXPECT_GT(result.perplexity_before(), 1.0);
  if (model_->is_real()) {
    EXPECT_GT(result.perplexity_after(), result.perplexity_before());
    EXPECT_LT(result.perplexity_after(), 100 * result.perplexity_before());
  }
  EXPECT_GT(result.rotation_gate(), 0.0);
  EXPECT_LE(result.rotation_gate(), 1e-4);
  EXPECT_EQ(result.per_layer_size(), model_->n_layers() * 7);
  EXPECT_EQ(result.calibration().windows(), 16);
  EXPECT_EQ(result.calibration().tokens(), 16 * 256);
  EXPECT_EQ(result.calibration().fingerprint().size(), 64u);
  EXPECT_EQ(result.sha256().size(), 64u);
  EXPECT_GT(result.stage_times_size(), 4);
}

TEST_F(GenerationTest, TheModelIsLoadedAndListed) {
  ASSERT_OK_AND_ASSIGN(const v1::Model model, client().GetModel(kModel));
  EXPECT_EQ(model.name(), std::string("models/") + kModel);
  EXPECT_EQ(model.state(), v1::Model::READY);
  EXPECT_EQ(model.bits(), 2);
  EXPECT_EQ(model.quantization_job(), job_->name());
  EXPECT_GT(model.memory_bytes(), 0);
  EXPECT_EQ(model.sha256(), job_->result().sha256());
  ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, client().ListModels());
  EXPECT_EQ(models.models_size(), 1);
}

TEST_F(GenerationTest, StreamedTextIsTheWholeAnswersText) {
  const v1::GenerateRequest request = Prompt("Once upon a time", 40);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse whole, client().Generate(request));
  EXPECT_GT(whole.usage().completion_tokens(), 0);
  EXPECT_LE(whole.usage().completion_tokens(), 40);
  EXPECT_EQ(whole.usage().total_tokens(),
            whole.usage().prompt_tokens() + whole.usage().completion_tokens());
  EXPECT_FALSE(whole.text().empty());

  std::string text;
  std::vector<std::string> order;
  v1::GenerateStreamResponse::Finished finished;
  ASSERT_OK(client().GenerateStream(request, [&](const v1::GenerateStreamResponse& event) {
    if (event.has_started()) order.push_back("started");
    if (event.has_delta()) {
      EXPECT_TRUE(IsValidUtf8(event.delta().text()));
      text += event.delta().text();
      if (order.back() != "delta") order.push_back("delta");
    }
    if (event.has_finished()) {
      order.push_back("finished");
      finished = event.finished();
    }
  }));
  EXPECT_EQ(order, (std::vector<std::string>{"started", "delta", "finished"}));
  EXPECT_EQ(text, whole.text());
  EXPECT_EQ(finished.usage().completion_tokens(), whole.usage().completion_tokens());
  EXPECT_EQ(finished.finish_reason(), whole.finish_reason());
  EXPECT_GT(finished.timings().tokens_per_second(), 0.0);
}

TEST_F(GenerationTest, OneSeedGivesOneText) {
  v1::GenerateRequest request = Prompt("Once upon a time", 30);
  request.mutable_sampling()->set_temperature(1.0);
  request.mutable_sampling()->set_seed(7);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse first, client().Generate(request));
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse second, client().Generate(request));
  EXPECT_EQ(first.text(), second.text());
  EXPECT_EQ(first.seed(), 7u);
  request.mutable_sampling()->set_seed(8);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse other, client().Generate(request));
  EXPECT_NE(first.text(), other.text());
}

TEST_F(GenerationTest, StopStringsEndTheTextAndAreNotInIt) {
  if (!model_->is_real()) GTEST_SKIP() << "a random model's text is no words";
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse free,
                       client().Generate(Prompt("Once upon a time", 40)));
  const std::string stop = free.text().substr(free.text().size() / 2, 3);
  v1::GenerateRequest request = Prompt("Once upon a time", 40);
  request.mutable_sampling()->add_stop(stop);
  std::string text;
  v1::GenerateStreamResponse::Finished finished;
  ASSERT_OK(client().GenerateStream(request, [&](const v1::GenerateStreamResponse& event) {
    text += event.delta().text();
    if (event.has_finished()) finished = event.finished();
  }));
  EXPECT_EQ(text, free.text().substr(0, free.text().find(stop)));
  EXPECT_EQ(finished.finish_reason(), v1::STOP_SEQUENCE);
  EXPECT_EQ(finished.stop_sequence(), stop);
}

TEST_F(GenerationTest, TokenizeAndDetokenizeAreInverse) {
  v1::TokenizeRequest tokenize;
  tokenize.set_model(kModel);
  tokenize.set_text("Once upon a time there was a little dog.");
  ASSERT_OK_AND_ASSIGN(const v1::TokenizeResponse tokens, client().Tokenize(tokenize));
  EXPECT_GT(tokens.token_ids_size(), 4);
  EXPECT_GT(tokens.max_model_len(), 0);
  v1::DetokenizeRequest detokenize;
  detokenize.set_model(kModel);
  *detokenize.mutable_token_ids() = tokens.token_ids();
  ASSERT_OK_AND_ASSIGN(const v1::DetokenizeResponse text, client().Detokenize(detokenize));
  EXPECT_EQ(text.text(), tokenize.text());

  // The ids are a prompt too, and give the same answer as the text.
  v1::GenerateRequest by_ids = Prompt("", 10);
  *by_ids.mutable_token_ids()->mutable_ids() = tokens.token_ids();
  v1::GenerateRequest by_text = Prompt(tokenize.text(), 10);
  by_text.set_skip_bos(true);
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse from_ids, client().Generate(by_ids));
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse from_text, client().Generate(by_text));
  EXPECT_EQ(from_ids.text(), from_text.text());
}

TEST_F(GenerationTest, AModelWithoutAChatTemplateSaysSo) {
  if (!model_->is_real()) GTEST_SKIP() << "the random model has a template";
  v1::ChatRequest request;
  request.set_model(kModel);
  auto* message = request.add_messages();
  message->set_role("user");
  message->set_content("Hello");
  EXPECT_THAT(client().Chat(request),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("chat template")));
}

TEST_F(GenerationTest, SeveralStreamsAtOnceDoNotMix) {
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse alone,
                       client().Generate(Prompt("Once upon a time", 30)));
  constexpr int kStreams = 6;
  std::vector<std::string> texts(kStreams);
  std::vector<absl::Status> statuses(kStreams);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] {
      const auto collect = [&, i](const v1::GenerateStreamResponse& event) {
        texts[i] += event.delta().text();
      };
      statuses[i] = client().GenerateStream(
          Prompt(i % 2 == 0 ? "Once upon a time" : "The big red ball", 30), collect);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_OK(statuses[i]);
    EXPECT_EQ(texts[i], i % 2 == 0 ? alone.text() : texts[1]) << i;
  }
  EXPECT_NE(texts[0], texts[1]);
}

TEST_F(GenerationTest, ACancelledStreamFreesItsSlot) {
  ASSERT_TRUE(WaitUntil([] { return Running() == 0; }));
  const std::string metrics = service_->endpoint("worker", "metrics");
  // The engine's own counts, without the heartbeat's delay; -1 when there is none.
  const auto metric = [&](const std::string& name) {
    const std::string text = testing::HttpGet(metrics, "/metrics").value_or("");
    const size_t begin = text.find("\n" + name + "{");
    return begin == std::string::npos ? -1.0 : std::atof(text.c_str() + text.find(' ', begin));
  };
  const double n_cancelled = metric("walsh_request_cancelled_total");
  ASSERT_GE(n_cancelled, 0);
  v1::GenerateRequest request = Prompt("Once upon a time", 400);
  request.mutable_sampling()->set_ignore_eos(true);
  // On a busy machine it may have ended by itself before the test hears of its beginning.
  absl::Status status;
  for (int i = 0; status.ok() && i < 50; ++i) {
    Cancellation cancellation;
    status = client().GenerateStream(
        request,
        [&](const v1::GenerateStreamResponse& event) {
          if (event.has_delta()) cancellation.Cancel();
        },
        &cancellation);
  }
  EXPECT_THAT(status, HasCode(absl::StatusCode::kCancelled));
  // Had it ended by itself, it would not be counted here.
  EXPECT_TRUE(WaitUntil([&] { return metric("walsh_request_cancelled_total") > n_cancelled; }));
  EXPECT_EQ(metric("walsh_request_cancelled_total"), n_cancelled + 1);
  EXPECT_EQ(metric("walsh_num_requests_running"), 0);
  EXPECT_TRUE(WaitUntil([] { return Running() == 0; }));
}

TEST_F(GenerationTest, ADeadlineEndsAStream) {
  v1::GenerateRequest request = Prompt("Once upon a time", 400);
  request.mutable_sampling()->set_ignore_eos(true);
  // So short that no machine writes 400 tokens in it (14 ms were seen). The worker, whose deadline
  // is a little earlier, may still say so itself before the call ends.
  v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED;
  const absl::Status status = client().GenerateStream(
      request,
      [&](const v1::GenerateStreamResponse& event) {
        if (event.has_finished()) reason = event.finished().finish_reason();
      },
      nullptr, absl::Milliseconds(4));
  EXPECT_TRUE(absl::IsDeadlineExceeded(status) || reason == v1::DEADLINE)
      << status << " " << v1::FinishReason_Name(reason);
  EXPECT_TRUE(WaitUntil([] { return Running() == 0; }));
}

TEST_F(GenerationTest, BadRequestsAreNamed) {
  EXPECT_THAT(client().Generate([] {
    v1::GenerateRequest request = Prompt("x", 5);
    request.set_model("nobody");
    return request;
  }()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("nobody")));

  v1::GenerateRequest hot = Prompt("x", 5);
  hot.mutable_sampling()->set_temperature(7);
  EXPECT_THAT(client().Generate(hot),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("temperature")));
}

TEST_F(GenerationTest, APromptLongerThanTheContextIsNamedWithBothLengths) {
  std::string long_prompt;
  for (int i = 0; i < 20000; ++i) long_prompt += "once ";
  v1::TokenizeRequest tokenize;
  tokenize.set_model(kModel);
  tokenize.set_text(long_prompt);
  tokenize.set_add_special_tokens(true);
  ASSERT_OK_AND_ASSIGN(const v1::TokenizeResponse tokens, client().Tokenize(tokenize));
  const std::string n_tokens = std::to_string(tokens.token_ids_size());
  const std::string n_max = std::to_string(tokens.max_model_len());
  const absl::Status refused = client().Generate(Prompt(long_prompt, 5)).status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kInvalidArgument,
                                AllOf(HasSubstr(n_tokens + " tokens"), HasSubstr(n_max))));
  EXPECT_EQ(ErrorReason(refused), "CONTEXT_LENGTH_EXCEEDED");
  std::string text;
  const absl::Status stream = client().GenerateStream(
      Prompt(long_prompt, 5),
      [&](const v1::GenerateStreamResponse& event) { text += event.delta().text(); });
  EXPECT_EQ(stream.code(), refused.code());
  EXPECT_EQ(text, "");
  // What a person reads.
  ASSERT_OK_AND_ASSIGN(const client::Output output,
                       service_->RunWalsh({"generate", kModel, "-"}, long_prompt));
  EXPECT_EQ(output.exit_code, 1);
  EXPECT_THAT(output.err, HasSubstr("error: INVALID_ARGUMENT: "));
  EXPECT_THAT(output.err, HasSubstr(n_max));
}

TEST_F(GenerationTest, UnloadingAndLoadingAgainKeepsTheAnswers) {
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse before,
                       client().Generate(Prompt("Once upon a time", 20)));
  ASSERT_OK_AND_ASSIGN(const v1::Model unloaded, client().UnloadModel(kModel));
  EXPECT_EQ(unloaded.state(), v1::Model::UNLOADED);
  const absl::Status refused = client().Generate(Prompt("Once", 5)).status();
  EXPECT_THAT(refused, ::testing::AnyOf(HasCode(absl::StatusCode::kFailedPrecondition),
                                        HasCode(absl::StatusCode::kUnavailable),
                                        HasCode(absl::StatusCode::kNotFound)));
  ASSERT_OK(client().UnloadModel(kModel));  // again is OK
  ASSERT_OK_AND_ASSIGN(const v1::Model loaded, client().LoadModel(kModel));
  EXPECT_EQ(loaded.state(), v1::Model::READY);
  ASSERT_OK(client().LoadModel(kModel));
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse after,
                       client().Generate(Prompt("Once upon a time", 20)));
  EXPECT_EQ(before.text(), after.text());
}

TEST_F(GenerationTest, TheCommandStreamsChatsAndReports) {
  ASSERT_OK_AND_ASSIGN(const client::Output generated,
                       service_->RunWalsh({"generate", kModel, "Once upon a time", "--max-tokens",
                                           "20", "--temperature", "0", "--stats"}));
  EXPECT_EQ(generated.exit_code, 0) << generated.err;
  EXPECT_FALSE(generated.out.empty());
  EXPECT_THAT(generated.err, HasSubstr("tokens/s"));
  ASSERT_OK_AND_ASSIGN(const client::Output shown,
                       service_->RunWalsh({"jobs", "get", job_->name()}));
  EXPECT_THAT(shown.out, HasSubstr("SUCCEEDED"));
  EXPECT_THAT(shown.out, HasSubstr("worst linears"));
  ASSERT_OK_AND_ASSIGN(const client::Output workers,
                       service_->RunWalsh({"workers", "list", "--output", "json"}));
  EXPECT_THAT(workers.out, HasSubstr("\"ONLINE\""));
}

TEST_F(GenerationTest, TheCommandMeasuresALoad) {
  for (const std::vector<std::string>& load :
       {std::vector<std::string>{"--concurrency", "3"}, {"--rate", "50", "--concurrency", "4"}}) {
    std::vector<std::string> arguments = {"bench",           kModel, "--requests",      "9",
                                          "--prompt-tokens", "20",   "--output-tokens", "8",
                                          "--output",        "json"};
    arguments.insert(arguments.end(), load.begin(), load.end());
    ASSERT_OK_AND_ASSIGN(const client::Output output, service_->RunWalsh(arguments));
    ASSERT_EQ(output.exit_code, 0) << output.err;
    const auto json = nlohmann::json::parse(output.out);
    EXPECT_EQ(json["requests"], 9);
    EXPECT_EQ(json["failed"], 0);
    EXPECT_EQ(json["prompt_tokens"], 9 * 20);
    EXPECT_EQ(json["output_tokens"], 9 * 8);
    EXPECT_LE(json["concurrency_peak"].get<int>(), 4);
    EXPECT_GT(json["time_to_first_token_seconds"]["p50"].get<double>(), 0);
    EXPECT_LE(json["time_to_first_token_seconds"]["max"], json["request_latency_seconds"]["max"]);
  }
}

TEST_F(GenerationTest, ALoadThatCannotRunIsRefusedBefore) {
  ASSERT_OK_AND_ASSIGN(const client::Output too_long,
                       service_->RunWalsh({"bench", kModel, "--prompt-tokens", "1000000"}));
  EXPECT_EQ(too_long.exit_code, 1);
  EXPECT_THAT(too_long.err, HasSubstr("the model's context is "));
  ASSERT_OK_AND_ASSIGN(const client::Output unknown, service_->RunWalsh({"bench", "nobody"}));
  EXPECT_EQ(unknown.exit_code, 1);
  EXPECT_THAT(unknown.err, HasSubstr("NOT_FOUND"));
}

TEST_F(GenerationTest, ALoadedModelIsDeletedOnlyByForce) {
  EXPECT_THAT(client().DeleteModel(kModel, false), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_OK(client().GetModel(kModel));
}

// 4-bit weights, 8-bit activations and caches, rotated where they are: through the command, the
// coordinator and the worker to text.
TEST_F(GenerationTest, AModelThatRotatesAndRoundsAtRunTimeIsServed) {
  ASSERT_OK_AND_ASSIGN(const client::Output quantized, service_->RunWalsh({"quantize",
                                                                           model_->path(),
                                                                           "--name",
                                                                           "w4a8kv8",
                                                                           "--bits",
                                                                           "4",
                                                                           "--act-bits",
                                                                           "8",
                                                                           "--kv-bits",
                                                                           "8",
                                                                           "--online-rotation",
                                                                           "gsr",
                                                                           "--error-propagation",
                                                                           "0",
                                                                           "--calibration",
                                                                           model_->text_path(),
                                                                           "--num-samples",
                                                                           "8",
                                                                           "--seq-len",
                                                                           "256",
                                                                           "--eval-text",
                                                                           model_->text_path(),
                                                                           "--eval-windows",
                                                                           "4",
                                                                           "--load"}));
  EXPECT_EQ(quantized.exit_code, 0) << quantized.err;
  EXPECT_THAT(
      quantized.out,
      HasSubstr("online GSR rotation in blocks of 128, activations 8 bits, KV cache 8 bits"));
  v1::GenerateRequest request = Prompt("Once upon a time", 20);
  request.set_model("w4a8kv8");
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse generated, client().Generate(request));
  EXPECT_GT(generated.usage().completion_tokens(), 0);

  ASSERT_OK_AND_ASSIGN(
      const client::Output refused,
      service_->RunWalsh({"quantize", model_->path(), "--name", "other", "--qk-rotation", "on"}));
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, HasSubstr("config.rotation.query_key"));
}

}  // namespace
}  // namespace walsh
