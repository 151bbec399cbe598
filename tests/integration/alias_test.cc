// Goal:   the model behind a name is exchanged while clients use the name, and nobody notices: no
//         request fails, each answer comes wholly from one model, and the worker's memory is what
//         it was.
// Method: two small models whose greedy answers differ; the real daemons and the client library
//         without retries, which would hide a refused request. Several threads stream from the
//         alias without a pause while it is switched to and fro; after each switch the model before
//         is unloaded at once.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_artifact.h"
#include "tests/testing/tiny_model.h"
#include "tests/testing/wait.h"
#include "worker/io/checkpoint.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using v1::Model;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TinyModel;
using ::walsh::testing::WaitUntil;

constexpr char kAlias[] = "prod";
constexpr std::array<const char*, 2> kModels = {"old", "new"};
constexpr int kThreads = 4;
constexpr int kSwitches = 20;
// What leaks with every load would be twenty times a model's 4 MB.
constexpr int64_t kLeakMax = 24 << 20;

class AliasTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string models = service_.worker_data_dir() + "/models/";
    std::filesystem::create_directories(models);
    for (size_t i = 0; i < kModels.size(); ++i) {
      const std::string source = dir_ / kModels[i];
      TinyModel({.seed = i + 1,
                 .hidden = 256,
                 .intermediate = 1024,
                 .n_layers = 6,
                 .n_heads = 8,
                 .n_kv_heads = 4,
                 .head_dim = 32})
          .WriteHf(source);
      ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(source));
      ASSERT_OK(testing::WriteTinyArtifact(*checkpoint, models + kModels[i]));
    }
    ASSERT_OK(service_.Start());
    client::ClientOptions options{.address = service_.endpoint("coordinator", "grpc")};
    options.attempts_max = 1;
    client_ = std::make_unique<client::Client>(options);
    // A registered worker's models are stored a moment later.
    ASSERT_TRUE(WaitUntil([&] {
      const auto known = client_->ListModels();
      return known.ok() && known->models_size() == static_cast<int>(kModels.size());
    }));
  }

  static v1::GenerateRequest Prompt(const std::string& model) {
    v1::GenerateRequest request;
    request.set_model(model);
    request.set_prompt("Once upon a time");
    request.mutable_sampling()->set_max_tokens(24);
    request.mutable_sampling()->set_temperature(0);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }

  struct Answer {
    std::string model;
    std::vector<int32_t> tokens;
  };
  absl::StatusOr<Answer> Stream(const std::string& model) {
    Answer answer;
    const absl::Status status = client_->GenerateStream(Prompt(model), [&](const auto& event) {
      if (event.has_started()) answer.model = event.started().model();
      for (const int32_t token : event.delta().token_ids()) answer.tokens.push_back(token);
    });
    if (!status.ok()) return status;
    return answer;
  }

  int64_t WorkerBytes() const {
    std::ifstream endpoints(service_.worker_data_dir() + "/run/worker.json");
    const int pid = nlohmann::json::parse(endpoints).at("pid");
    std::ifstream file("/proc/" + std::to_string(pid) + "/statm");
    int64_t size = 0;
    int64_t resident = 0;
    file >> size >> resident;
    return resident * 4096;
  }

  const testing::TempDir dir_;
  ServiceFixture service_{{.worker_flags = {"--kv-cache-memory-bytes", "4MiB"}}};
  std::unique_ptr<client::Client> client_;
};

TEST_F(AliasTest, AModelIsExchangedUnderLoadWithoutAFailedRequest) {
  std::map<std::string, std::vector<int32_t>> expected;
  for (const char* model : kModels) {
    ASSERT_OK(client_->LoadModel(model));
    ASSERT_OK_AND_ASSIGN(const Answer answer, Stream(model));
    ASSERT_EQ(answer.model, std::string("models/") + model);
    ASSERT_EQ(answer.tokens.size(), 24u);
    expected[answer.model] = answer.tokens;
  }
  ASSERT_NE(expected["models/old"], expected["models/new"]) << "or nothing is told apart";
  ASSERT_OK(client_->SetModelAlias(kAlias, kModels[0], /*force=*/false));

  std::atomic<bool> is_over = false;
  std::array<std::atomic<int>, 2> n_answers = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      while (!is_over) {
        const absl::StatusOr<Answer> answer = Stream(kAlias);
        ASSERT_OK(answer);
        ASSERT_TRUE(expected.contains(answer->model)) << answer->model;
        ASSERT_EQ(answer->tokens, expected[answer->model]) << "of " << answer->model;
        ++n_answers[answer->model == "models/new" ? 1 : 0];
      }
    });
  }
  int64_t baseline = 0;
  for (int i = 1; i <= kSwitches; ++i) {
    const int to = i % 2;
    EXPECT_OK(client_->LoadModel(kModels[to]));
    EXPECT_OK(client_->SetModelAlias(kAlias, kModels[to], /*force=*/false));
    // Its requests are still running, and some are on their way.
    EXPECT_OK(client_->UnloadModel(kModels[1 - to]));
    const int n_before = n_answers[to];
    EXPECT_TRUE(WaitUntil([&] { return n_answers[to] > n_before + kThreads; })) << "switch " << i;
    if (i == 4) baseline = WorkerBytes();
  }
  is_over = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(WorkerBytes() - baseline, kLeakMax);
  ASSERT_OK_AND_ASSIGN(const std::string metrics,
                       testing::HttpGet(service_.endpoint("worker", "metrics"), "/metrics"));
  EXPECT_THAT(metrics, Not(HasSubstr("\"prod\""))) << "labels are models' names";
  EXPECT_THAT(metrics, Not(HasSubstr("walsh_model_memory_bytes{model_name=\"new\"}")));
}

TEST_F(AliasTest, TheCommandLineShowsAndSetsAliases) {
  const auto walsh = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "models");
    const auto output = service_.RunWalsh(std::move(arguments));
    EXPECT_OK(output);
    return output.value_or(client::Output());
  };
  client::Output refused = walsh({"alias", kAlias, "old"});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, HasSubstr("walsh models load old"));
  EXPECT_EQ(walsh({"load", "old"}).exit_code, 0);
  EXPECT_EQ(walsh({"alias", kAlias, "old"}).out, "alias prod: old\n");
  EXPECT_THAT(walsh({"list"}).out, HasSubstr("prod"));
  EXPECT_THAT(walsh({"get", kAlias}).out, HasSubstr("model old: READY"));
  ASSERT_OK_AND_ASSIGN(const v1::GenerateResponse answer, client_->Generate(Prompt(kAlias)));
  EXPECT_EQ(answer.model(), "models/old");
  refused = walsh({"unload", kAlias});
  EXPECT_THAT(refused.err, HasSubstr("alias of model 'old'"));
  EXPECT_EQ(walsh({"alias", kAlias, "new", "--force"}).out, "alias prod: new\n");
  // It outlives the process that knows it.
  service_.KillCoordinator();
  ASSERT_OK(service_.StartCoordinator());
  ASSERT_OK_AND_ASSIGN(const Model model,
                       client::Client({.address = client_->address()}).GetModel(kAlias));
  EXPECT_EQ(model.name(), "models/new");
  EXPECT_EQ(walsh({"unalias", kAlias}).exit_code, 0);
  refused = walsh({"unalias", kAlias});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, HasSubstr("alias 'prod'"));
}

}  // namespace
}  // namespace walsh
