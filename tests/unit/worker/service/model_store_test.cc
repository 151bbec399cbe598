#include "worker/service/model_store.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "common/grpc_status.h"
#include "common/metrics.h"
#include "common/out_of_memory.h"
#include "common/publish.h"
#include "tests/testing/recording_sink.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"
#include "tests/unit/worker/service/store_fixture.h"
#include "tests/unit/worker/service/watched_store.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using v1::Model;
using walsh::testing::HasCode;
using walsh::testing::RecordingSink;
using walsh::testing::StatusIs;
using walsh::testing::WaitUntil;

class ModelStoreTest : public StoreFixture {
 protected:
  void Publish(const std::string& id) {
    const std::string directory = store_->TemporaryDirectory("j", 3);
    WriteFakeArtifact(directory);
    ASSERT_OK(store_->Publish(directory, id, "quantizationJobs/j"));
  }
};

TEST_F(ModelStoreTest, ListsArtifactsAndLeavesTheRestAlone) {
  AddArtifact("good");
  fs::create_directories(root_ + "/not-an-artifact");
  fs::create_directories(root_ + "/Bad Name");
  fs::create_directories(root_ + "/broken");
  std::ofstream(root_ + "/broken/walsh.json") << "{";
  std::ofstream(root_ + "/readme.txt") << "x";
  fs::create_directories(root_ + "/.tmp-job-3");
  fs::create_directories(root_ + "/.deleted-x-1");
  fs::create_directories(root_ + "/.unknown");
  fs::create_directories(root_ + "/.origins");
  std::ofstream(root_ + "/.origins/.m.tmp-1-2") << "quantizationJobs/j";
  OpenStore();
  const std::vector<Model> models = store_->List().models;
  ASSERT_EQ(models.size(), 1u);
  EXPECT_EQ(models[0].name(), "models/good");
  EXPECT_EQ(models[0].state(), Model::UNLOADED);
  EXPECT_EQ(models[0].bits(), 4);
  EXPECT_EQ(models[0].bits_per_weight(), 4.5);
  ASSERT_EQ(models[0].override_bits_size(), 1);
  EXPECT_EQ(models[0].override_bits(0), 8);
  EXPECT_EQ(models[0].grid(), "float-zero");
  EXPECT_EQ(models[0].activation_bits(), 8);
  EXPECT_EQ(models[0].kv_cache_bits(), 2);
  EXPECT_EQ(models[0].rotation(), "gsr");
  EXPECT_EQ(models[0].architecture(), "LlamaForCausalLM");
  EXPECT_EQ(models[0].max_model_len(), 256);
  EXPECT_EQ(models[0].sha256().size(), 64u);
  EXPECT_FALSE(fs::exists(root_ + "/.tmp-job-3"));
  EXPECT_FALSE(fs::exists(root_ + "/.deleted-x-1"));
  EXPECT_FALSE(fs::exists(root_ + "/.origins/.m.tmp-1-2"));
  for (const char* kept :
       {"/not-an-artifact", "/Bad Name", "/broken", "/readme.txt", "/.unknown"}) {
    EXPECT_TRUE(fs::exists(root_ + kept)) << kept;
  }
}

TEST_F(ModelStoreTest, PublishedModelSurvivesARestartWithItsJob) {
  OpenStore();
  Publish("m");
  EXPECT_EQ(store_->Get("m")->quantization_job(), "quantizationJobs/j");
  OpenStore();
  EXPECT_EQ(store_->Get("m")->quantization_job(), "quantizationJobs/j");
}

TEST_F(ModelStoreTest, PublishDoesNotReplace) {
  AddArtifact("m");
  OpenStore();
  const std::string directory = store_->TemporaryDirectory("k", 1);
  WriteFakeArtifact(directory);
  EXPECT_THAT(store_->Publish(directory, "m", "quantizationJobs/k"),
              HasCode(absl::StatusCode::kAlreadyExists));
  EXPECT_EQ(store_->Get("m")->quantization_job(), "");
}

TEST_F(ModelStoreTest, LoadServesAndUnloadStops) {
  AddArtifact("m");
  OpenStore();
  std::vector<Model::State> states;
  store_->set_listener([&](const Model& model) { states.push_back(model.state()); });
  EXPECT_THAT(store_->FindEngine("m"), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(ErrorReason(store_->FindEngine("m").status()), "MODEL_NOT_LOADED");
  ASSERT_OK_AND_ASSIGN(const Model loaded, store_->Load("m"));
  EXPECT_EQ(loaded.state(), Model::READY);
  EXPECT_EQ(loaded.worker(), "workers/w-1");
  EXPECT_OK(store_->FindEngine("m"));
  EXPECT_OK(store_->Load("m"));
  EXPECT_THAT(store_->Delete("m"), HasCode(absl::StatusCode::kFailedPrecondition));
  EXPECT_EQ(loaded.revision(), store_->List().revision);
  ASSERT_OK_AND_ASSIGN(const Model unloaded, store_->Unload("m"));
  EXPECT_EQ(unloaded.state(), Model::UNLOADED);
  EXPECT_GT(unloaded.revision(), loaded.revision());
  EXPECT_EQ(unloaded.worker(), "");
  EXPECT_OK(store_->Unload("m"));
  EXPECT_THAT(states, ElementsAre(Model::LOADING, Model::READY, Model::DRAINING, Model::UNLOADING,
                                  Model::UNLOADED));
  EXPECT_OK(store_->Delete("m"));
  EXPECT_GT(store_->List().revision, unloaded.revision()) << "a list without it is newer";
  EXPECT_FALSE(fs::exists(root_ + "/m"));
  EXPECT_THAT(store_->Load("m"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("models/m")));
}

TEST_F(ModelStoreTest, LoadsWhatOnlyTheArtifactStoreHas) {
  artifacts_ = std::make_unique<ArtifactStore>(objects::OpenDirectoryStore(dir_ / "store").value());
  OpenStore();
  Publish("m");
  ASSERT_OK(store_->Keep("m", {.job_name = "quantizationJobs/j", .fencing_token = 3}, {}));
  store_.reset();
  fs::remove_all(root_);  // another machine
  OpenStore();
  EXPECT_THAT(store_->Load("n"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(store_->Get("m"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK_AND_ASSIGN(const Model loaded, store_->Load("m"));
  EXPECT_EQ(loaded.state(), Model::READY);
  EXPECT_EQ(loaded.quantization_job(), "quantizationJobs/j");

  ASSERT_OK(store_->Unload("m"));
  ASSERT_OK(store_->Delete("m"));
  EXPECT_THAT(artifacts_->Find("m"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(store_->Delete("m"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(ModelStoreTest, DeletesAModelThatOnlyTheArtifactStoreHas) {
  artifacts_ = std::make_unique<ArtifactStore>(objects::OpenDirectoryStore(dir_ / "store").value());
  WriteFakeArtifact(dir_ / "elsewhere");
  ASSERT_OK(artifacts_->Keep("m", dir_ / "elsewhere", {}, {}));
  OpenStore();
  ASSERT_OK(store_->Delete("m"));
  EXPECT_THAT(artifacts_->Find("m"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(ModelStoreTest, AFetchThatFailsLeavesNothing) {
  artifacts_ = std::make_unique<ArtifactStore>(objects::OpenDirectoryStore(dir_ / "store").value());
  WriteFakeArtifact(dir_ / "elsewhere");
  ASSERT_OK(artifacts_->Keep("m", dir_ / "elsewhere", {}, {}));
  for (const auto& object : fs::directory_iterator(dir_ / "store/models/m/objects")) {
    std::ofstream(object.path()) << "others";
  }
  OpenStore();
  EXPECT_THAT(store_->Load("m"), HasCode(absl::StatusCode::kDataLoss));
  EXPECT_TRUE(store_->List().models.empty());
  for (const auto& entry : fs::directory_iterator(root_)) {
    EXPECT_EQ(entry.path().filename(), ".origins");
  }
}

// A model that cannot be read would hold its name.
TEST_F(ModelStoreTest, WhatIsFetchedIsReadBeforeItIsPublished) {
  artifacts_ = std::make_unique<ArtifactStore>(objects::OpenDirectoryStore(dir_ / "store").value());
  WriteFakeArtifact(dir_ / "elsewhere");
  ASSERT_OK(PublishFile(dir_ / "elsewhere/walsh.json", "{}"));
  ASSERT_OK(artifacts_->Keep("m", dir_ / "elsewhere", {}, {}));
  OpenStore();
  EXPECT_FALSE(store_->Load("m").ok());
  EXPECT_OK(store_->CheckNameIsFree("m"));
}

// The store has models m and n, and m cannot be read before `may_read`.
class SlowFetchTest : public ModelStoreTest {
 protected:
  void SetUp() override {
    artifacts_ = std::make_unique<ArtifactStore>(std::make_unique<WatchedStore>(
        objects::OpenDirectoryStore(dir_ / "store").value(), &on_read_));
    for (const char* id : {"m", "n"}) {
      WriteFakeArtifact(dir_ / "elsewhere");
      ASSERT_OK(artifacts_->Keep(id, dir_ / "elsewhere", {}, {}));
    }
    on_read_ = [this](const std::string& key, size_t, const KeepGoing& keep_going) {
      if (!key.starts_with("models/m/")) return absl::OkStatus();
      if (!is_reading_.HasBeenNotified()) is_reading_.Notify();
      absl::Status stop;
      EXPECT_TRUE(
          WaitUntil([&] { return may_read_.HasBeenNotified() || !(stop = Ask(keep_going)).ok(); }));
      return stop;
    };
    OpenStore();
  }

  WatchedStore::OnRead on_read_;
  absl::Notification is_reading_, may_read_;
};

TEST_F(SlowFetchTest, OtherModelsDoNotWaitForIt) {
  std::thread fetching([&] { EXPECT_OK(store_->Fetch("m")); });
  is_reading_.WaitForNotification();
  EXPECT_OK(store_->Fetch("n"));
  EXPECT_THAT(store_->Fetch("absent"), HasCode(absl::StatusCode::kNotFound));
  const auto no_longer = [] { return absl::CancelledError("nobody waits for it"); };
  EXPECT_THAT(store_->Fetch("m", {}, no_longer), HasCode(absl::StatusCode::kCancelled));
  may_read_.Notify();
  fetching.join();
}

TEST_F(SlowFetchTest, EndsWithItsCaller) {
  const auto while_new = [&] {
    return is_reading_.HasBeenNotified() ? absl::AbortedError("the lease is lost")
                                         : absl::OkStatus();
  };
  EXPECT_THAT(store_->Fetch("m", {}, while_new), HasCode(absl::StatusCode::kAborted));
  EXPECT_OK(store_->CheckNameIsFree("m"));
}

TEST_F(SlowFetchTest, TheModelIsNotDeletedMeanwhile) {
  std::thread fetching([&] { EXPECT_OK(store_->Fetch("m")); });
  is_reading_.WaitForNotification();
  const absl::Status refused = store_->Delete("m");
  EXPECT_THAT(refused, HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(ErrorReason(refused), "MODEL_LOADING");
  may_read_.Notify();
  fetching.join();
  EXPECT_OK(store_->Delete("m"));
  EXPECT_THAT(store_->Fetch("m"), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(ModelStoreTest, NothingIsDeletedWhileTheArtifactStoreIsAway) {
  AddArtifact("m");
  artifacts_ = std::make_unique<ArtifactStore>(StoreThatIsAway());
  OpenStore();
  EXPECT_THAT(store_->Delete("m"), HasCode(absl::StatusCode::kUnavailable));
  EXPECT_OK(store_->Load("m")) << "it is here, and needs nothing of the store";
}

TEST_F(ModelStoreTest, FailedLoadIsToldAndCanBeRepeated) {
  AddArtifact("m");
  bool is_broken = true;
  loader_ = [&](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    if (is_broken) return absl::DataLossError("file 'x' differs from its digest");
    return testing::FakeModel::Create({});
  };
  OpenStore();
  EXPECT_THAT(store_->Load("m"), HasCode(absl::StatusCode::kDataLoss));
  EXPECT_EQ(store_->Get("m")->state(), Model::FAILED);
  EXPECT_THAT(store_->Get("m")->error().message(), HasSubstr("digest"));
  is_broken = false;
  ASSERT_OK_AND_ASSIGN(const Model model, store_->Load("m"));
  EXPECT_FALSE(model.has_error());
}

// Whatever becomes of a load, the next job knows.
TEST_F(ModelStoreTest, LoadsAndJobsTakeTurns) {
  AddArtifact("m");
  AddArtifact("broken");
  loader_ =
      [](const std::string& directory) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    if (directory.ends_with("broken")) return absl::DataLossError("a file differs");
    return testing::FakeModel::Create({});
  };
  ExclusiveUse use;
  exclusive_ = &use;
  OpenStore();
  use.BeginJob("quantizationJobs/j");
  std::vector<Model::State> states;
  store_->set_listener([&](const Model& model) { states.push_back(model.state()); });
  EXPECT_THAT(store_->Load("m"),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("quantizationJobs/j")));
  EXPECT_EQ(store_->Get("m")->state(), Model::UNLOADED);
  EXPECT_THAT(states, ElementsAre()) << "it was not even begun";
  use.EndJob();
  constexpr absl::Duration kSoon = absl::Milliseconds(1);
  EXPECT_FALSE(store_->Load("broken").ok());
  EXPECT_TRUE(use.BeginAsking(kSoon));
  use.EndJob();
  ASSERT_OK(store_->Load("m"));
  ASSERT_OK(store_->Load("m"));
  EXPECT_FALSE(use.BeginAsking(kSoon));
  use.BeginJob("quantizationJobs/k");
  EXPECT_OK(store_->Load("m")) << "it is there already";
  use.EndJob();
  ASSERT_OK(store_->Unload("m"));
  ASSERT_OK(store_->Unload("m"));
  EXPECT_TRUE(use.BeginAsking(kSoon));
  store_.reset();
}

// An import and a job, whose names are given apart.
TEST_F(ModelStoreTest, OfTwoThatPublishOneNameTheFirstHasIt) {
  OpenStore();
  constexpr int kRounds = 20;
  for (int round = 0; round < kRounds; ++round) {
    const std::string id = absl::StrCat("m", round);
    std::map<std::string, absl::Status> ended = {{"", {}}, {"quantizationJobs/j", {}}};
    std::vector<std::thread> threads;
    for (auto& [job, status] : ended) {
      const std::string from = absl::StrCat(root_, "/.tmp-", round, job.empty() ? "a" : "b");
      WriteFakeArtifact(from);
      threads.emplace_back([this, from, id, job = &job, status = &status] {
        *status = store_->Publish(from, id, *job).status();
      });
    }
    for (std::thread& thread : threads) thread.join();
    const std::string winner = ended[""].ok() ? "" : "quantizationJobs/j";
    for (const auto& [job, status] : ended) {
      if (job == winner) {
        EXPECT_OK(status);
      } else {
        EXPECT_THAT(status, HasCode(absl::StatusCode::kAlreadyExists));
      }
    }
    EXPECT_EQ(store_->Get(id)->quantization_job(), winner);
  }
}

// A call's handler may have found the engine just before: "unloaded" must not be said while its
// weights are there.
TEST_F(ModelStoreTest, UnloadWaitsForWhoFoundTheEngineBefore) {
  AddArtifact("m");
  std::atomic<bool> is_destroyed = false;
  loader_ = [&](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    return std::shared_ptr<engine::LoadedModel>(new testing::FakeModel, [&](auto* model) {
      delete model;
      is_destroyed = true;
    });
  };
  OpenStore();
  ASSERT_OK(store_->Load("m"));
  ASSERT_OK_AND_ASSIGN(std::shared_ptr<engine::Engine> held, store_->FindEngine("m"));
  std::thread unload([&] {
    EXPECT_OK(store_->Unload("m"));
    EXPECT_TRUE(is_destroyed);
  });
  EXPECT_TRUE(WaitUntil([&] { return store_->Get("m")->state() == Model::UNLOADING; }));
  std::thread load([&] { EXPECT_OK(store_->Load("m")); });  // comes after the unload
  // What a handler does then: it is refused with the reason, and lets go.
  const absl::Status refused = held->Submit({.id = "late", .prompt = {1}}, nullptr);
  EXPECT_THAT(refused, HasCode(absl::StatusCode::kUnavailable));
  EXPECT_EQ(ErrorReason(refused), "MODEL_UNLOADING");
  EXPECT_EQ(store_->Get("m")->state(), Model::UNLOADING);
  EXPECT_FALSE(is_destroyed);
  held.reset();
  unload.join();
  load.join();
  store_->TotalStats();
  EXPECT_THAT(metrics::Render(),
              HasSubstr("walsh_scheduler_heartbeat_age_seconds{model_name=\"m\"}"));
  store_.reset();  // its model's end is told to this test
}

// As a kernel does that never completes: the thread is there, and nothing comes of it.
TEST_F(ModelStoreTest, AnEngineThatHangsIsFoundAndOneThatIsIdleIsNot) {
  clock_ = &manual_clock_;
  std::atomic<bool> is_in_step = false, may_go_on = false;
  behaviour_.before_forward = [&](const auto&) {
    is_in_step = true;
    EXPECT_TRUE(WaitUntil([&] { return may_go_on.load(); }));
    return absl::OkStatus();
  };
  AddArtifact("m");
  AddArtifact("idle");
  OpenStore();
  ASSERT_OK(store_->Load("m"));
  ASSERT_OK(store_->Load("idle"));
  manual_clock_.Advance(absl::Hours(1));
  EXPECT_TRUE(WaitUntil([&] { return store_->CheckEngines().ok(); })) << "idle engines turn";
  const auto sink = std::make_shared<RecordingSink>();
  ASSERT_OK(store_->FindEngine("m").value()->Submit(
      {.id = "a", .prompt = {1}, .sampling = {.max_tokens = 1}}, sink));
  ASSERT_TRUE(WaitUntil([&] { return is_in_step.load(); }));
  manual_clock_.Advance(absl::Seconds(59));
  EXPECT_OK(store_->CheckEngines());
  manual_clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(store_->CheckEngines(), StatusIs(absl::StatusCode::kUnavailable,
                                               HasSubstr("an engine has not turned for 60 s")));
  may_go_on = true;
  sink->WaitForEnd();
  EXPECT_TRUE(WaitUntil([&] { return store_->CheckEngines().ok(); }));
}

// More requests than run at once, and steps that take most of what a hung engine is given.
TEST_F(ModelStoreTest, AnEngineThatIsSaturatedIsNotTakenForHung) {
  clock_ = &manual_clock_;
  std::atomic<int> n_steps = 0, n_failures = 0;
  behaviour_.before_forward = [&](const auto&) {
    manual_clock_.Advance(absl::Seconds(50));
    if (!store_->CheckEngines().ok()) ++n_failures;
    ++n_steps;
    return absl::OkStatus();
  };
  AddArtifact("m");
  OpenStore();
  ASSERT_OK(store_->Load("m"));
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < engine_options_.max_waiting; ++i) {
    sinks.push_back(std::make_shared<RecordingSink>());
    ASSERT_OK(store_->FindEngine("m").value()->Submit(
        {.id = std::to_string(i), .prompt = {1}, .sampling = {.max_tokens = 8}}, sinks.back()));
  }
  for (const auto& sink : sinks) sink->WaitForEnd();
  store_.reset();
  EXPECT_GE(n_steps, 8);
  EXPECT_EQ(n_failures, 0);
}

// 32 bytes for a token of the fake model, whose context is 256.
TEST_F(ModelStoreTest, KvCacheIsBoundedByTheMemoryThatIsLeft) {
  AddArtifact("a");
  AddArtifact("b");
  AddArtifact("c");
  engine_options_.kv_cache_tokens = 1024;
  int64_t free_bytes = 48000;
  free_memory_ = [&] { return free_bytes; };
  OpenStore();
  ASSERT_OK(store_->Load("a"));
  EXPECT_EQ(store_->FindEngine("a").value()->stats().kv_tokens_total, 1024);
  // The first may come to use 32 KiB of it.
  ASSERT_OK(store_->Load("b"));
  const int64_t n_tokens = store_->FindEngine("b").value()->stats().kv_tokens_total;
  EXPECT_LE(n_tokens, (48000 - 32768) * 9 / 10 / 32);
  EXPECT_GT(n_tokens, (48000 - 32768) * 9 / 10 / 32 - 16);
  const absl::Status refused = store_->Load("c").status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("8192 bytes")));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_MEMORY");
  EXPECT_EQ(store_->Get("c")->state(), Model::FAILED);
  ASSERT_OK(store_->Unload("a"));
  EXPECT_OK(store_->Load("c"));
  free_bytes = 0;  // the system does not tell
  EXPECT_OK(store_->Load("a"));
}

// What takes the memory, and what helps.
TEST_F(ModelStoreTest, AShortageNamesWhatIsLoadedAndTheFlags) {
  AddArtifact("a");
  AddArtifact("b");
  behaviour_.memory_bytes = 65536;
  free_memory_ = [] { return int64_t{40000}; };
  OpenStore();
  ASSERT_OK(store_->Load("a"));
  const absl::Status refused = store_->Load("b").status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                AllOf(HasSubstr("models/a (weights 65536, KV cache 32768 bytes)"),
                                      HasSubstr("--kv-cache-memory-bytes"),
                                      HasSubstr("--kv-cache-free-memory-fraction"))));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_MEMORY");
}

TEST_F(ModelStoreTest, WhatElseIsExhaustedIsNoShortageOfMemory) {
  AddArtifact("a");
  loader_ = [](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::ServedModel>> {
    return absl::ResourceExhaustedError("too many open files");
  };
  OpenStore();
  const absl::Status refused = store_->Load("a").status();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, "too many open files"));
  EXPECT_EQ(ErrorReason(refused), "");
}

// Memory of a device that all its models share: what one has taken, the next does not find.
class DeviceModel final : public engine::ServedModel {
 public:
  static constexpr int64_t kWeightBytes = 10000;
  explicit DeviceModel(int64_t* free_bytes) : free_bytes_(free_bytes) {
    *free_bytes_ -= kWeightBytes;
  }
  ~DeviceModel() override { *free_bytes_ += kWeightBytes + kv_bytes_; }
  const ModelConfig& config() const override { return host_->config(); }
  const ArtifactInfo& info() const override { return host_->info(); }
  const Tokenizer& tokenizer() const override { return host_->tokenizer(); }
  const ChatTemplate* chat_template() const override { return nullptr; }
  int64_t memory_bytes() const override { return kWeightBytes; }
  int64_t packed_bytes_per_token() const override { return 0; }
  absl::StatusOr<std::unique_ptr<engine::ModelRunner>> MakeRunner(
      const RunnerLimits& limits) const override {
    auto runner = host_->MakeRunner(limits);
    if (runner.ok()) {
      kv_bytes_ = (*runner)->kv_cache_bytes();
      *free_bytes_ -= kv_bytes_;
    }
    return runner;
  }
  int64_t kv_token_bytes() const override { return host_->kv_token_bytes(); }
  int64_t step_bytes(const RunnerLimits&) const override { return 0; }
  std::optional<int64_t> free_device_bytes() const override { return *free_bytes_; }

 private:
  const std::shared_ptr<testing::FakeModel> host_ = testing::FakeModel::Create({});
  int64_t* const free_bytes_;
  mutable int64_t kv_bytes_ = 0;
};

// By default the first model's KV cache takes nine tenths of what its weights leave; with either
// flag a second one finds its place, and unloading brings all of it back.
TEST_F(ModelStoreTest, TwoModelsShareADevice) {
  constexpr int64_t kDeviceBytes = 80000;
  AddArtifact("a");
  AddArtifact("b");
  engine_options_.kv_cache_tokens = 100000;
  const auto load_both = [&](const engine::Options& options) {
    int64_t free_bytes = kDeviceBytes;
    engine_options_ = options;
    loader_ = [&](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::ServedModel>> {
      if (free_bytes < DeviceModel::kWeightBytes) {
        return OutOfMemoryError("10000 bytes of the device");
      }
      return std::make_shared<DeviceModel>(&free_bytes);
    };
    OpenStore();
    EXPECT_OK(store_->Load("a"));
    const absl::Status second = store_->Load("b").status();
    if (second.ok()) {
      EXPECT_OK(store_->Unload("b"));
    }
    EXPECT_OK(store_->Unload("a"));
    EXPECT_EQ(free_bytes, kDeviceBytes);
    store_.reset();
    return second;
  };
  engine::Options options = engine_options_;
  const absl::Status refused = load_both(options);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted,
                                AllOf(HasSubstr("10000 bytes of the device"), HasSubstr("models/a"),
                                      HasSubstr("--kv-cache-memory-bytes"))));
  EXPECT_EQ(ErrorReason(refused), "INSUFFICIENT_MEMORY");
  options.kv_cache_bytes = 16384;
  EXPECT_OK(load_both(options));
  options.kv_cache_bytes = 0;
  options.kv_memory_fraction = 0.4;
  EXPECT_OK(load_both(options));
}

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0;
  int64_t resident = 0;
  file >> size >> resident;
  return resident * 4096;
}

// Each model is 16 MiB in 64 KiB pieces, which malloc does not give back by itself: fifty that
// leaked would be 800 MiB.
TEST_F(ModelStoreTest, FiftyLoadsAndFiftyFailuresLeaveNoMemoryBehind) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer keeps freed memory back; it finds leaks by itself";
#endif
  AddArtifact("m");
  int n_loads = 0;
  loader_ = [&](const std::string&) -> absl::StatusOr<std::shared_ptr<engine::LoadedModel>> {
    auto model = testing::FakeModel::Create({.memory_bytes = 16 << 20});
    if (++n_loads % 2 == 0) return absl::DataLossError("the last tensor is damaged");
    return model;
  };
  OpenStore();
  const auto cycle = [this] {
    EXPECT_OK(store_->Load("m"));
    EXPECT_OK(store_->Unload("m"));
    EXPECT_FALSE(store_->Load("m").ok());
  };
  cycle();
  const int64_t baseline = ResidentBytes();
  for (int i = 0; i < 50; ++i) cycle();
  EXPECT_LT(ResidentBytes() - baseline, 16 << 20);
}

}  // namespace
}  // namespace walsh::service
