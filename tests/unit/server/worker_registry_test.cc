#include "server/fleet/worker_registry.h"

#include <string>
#include <thread>
#include <vector>

#include "common/grpc_status.h"
#include "common/limits.h"
#include "tests/testing/status_matchers.h"

namespace walsh::fleet {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using v1::Model;
using v1::Worker;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;

class WorkerRegistryTest : public ::testing::Test {
 protected:
  static internal_v1::RegisterRequest Registration(const std::string& id,
                                                   const std::string& address,
                                                   Model::State state = Model::READY) {
    internal_v1::RegisterRequest request;
    request.set_worker_id(id);
    request.set_address(address);
    Model* model = request.add_models();
    model->set_name("models/m");
    model->set_state(state);
    return request;
  }
  absl::Status Beat(const std::string& id, Model::State state = Model::READY, int running = 0,
                    bool draining = false) {
    internal_v1::HeartbeatRequest request;
    request.set_worker_id(id);
    request.set_requests_running(running);
    request.set_draining(draining);
    Model* model = request.add_models();
    model->set_name("models/m");
    model->set_state(state);
    return registry_.Heartbeat(request);
  }
  Worker::State StateOf(const std::string& id) {
    for (const Worker& worker : registry_.List()) {
      if (worker.name() == "workers/" + id) return worker.state();
    }
    return Worker::STATE_UNSPECIFIED;
  }

  ManualClock clock_;
  WorkerRegistry registry_{&clock_, {}};
};

TEST_F(WorkerRegistryTest, UnknownWorkersMustRegister) {
  const absl::Status unknown = Beat("w1");
  EXPECT_THAT(unknown, HasCode(absl::StatusCode::kNotFound));
  EXPECT_EQ(ErrorReason(unknown), "WORKER_UNKNOWN");
  EXPECT_THAT(registry_.Touch("w1"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  EXPECT_OK(Beat("w1"));
}

TEST_F(WorkerRegistryTest, KnowsWhoHasAnArtifactStore) {
  ASSERT_OK(registry_.Register(Registration("plain", "h:1")));
  EXPECT_TRUE(registry_.WithArtifactStore().empty());
  for (const char* id : {"busy", "free", "leaving"}) {
    internal_v1::RegisterRequest request = Registration(id, std::string("h:") + id);
    request.set_has_artifact_store(true);
    ASSERT_OK(registry_.Register(request));
  }
  ASSERT_OK(Beat("busy", Model::READY, /*running=*/2));
  ASSERT_OK(registry_.Drain("leaving"));
  const std::vector<WorkerAddress> workers = registry_.WithArtifactStore();
  ASSERT_EQ(workers.size(), 2);
  EXPECT_EQ(workers[0].worker_id, "free");
  EXPECT_EQ(workers[1].worker_id, "busy");
}

TEST_F(WorkerRegistryTest, BadRegistrations) {
  for (const std::string& id :
       {std::string(), std::string("a/b"), std::string("a b"), std::string("\xff"),
        std::string(limits::kWorkerIdBytesMax + 1, 'x')}) {
    EXPECT_THAT(registry_.Register(Registration(id, "h:1")),
                HasCode(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_THAT(registry_.Register(Registration("w", "")),
              HasCode(absl::StatusCode::kInvalidArgument));
}

TEST_F(WorkerRegistryTest, SilenceIsOfflineThenForgotten) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  clock_.JumpWallTime(absl::Hours(5));
  EXPECT_THAT(registry_.Tick(), IsEmpty()) << "wall time does not count";
  clock_.Advance(absl::Seconds(29));
  EXPECT_THAT(registry_.Tick(), IsEmpty());
  clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(registry_.Tick(), ElementsAre("w1"));
  EXPECT_THAT(registry_.Tick(), IsEmpty()) << "told once";
  EXPECT_EQ(StateOf("w1"), Worker::OFFLINE);
  EXPECT_THAT(registry_.Replicas("m"), IsEmpty());
  EXPECT_THAT(registry_.Online(), IsEmpty());
  clock_.Advance(absl::Seconds(30));
  EXPECT_THAT(*registry_.TakingJobs(), IsEmpty());
  EXPECT_OK(Beat("w1"));
  EXPECT_EQ(StateOf("w1"), Worker::ONLINE);
  EXPECT_EQ(registry_.Replicas("m").size(), 1u);
  clock_.Advance(absl::Hours(1));
  registry_.Tick();
  EXPECT_THAT(registry_.List(), IsEmpty());
}

TEST_F(WorkerRegistryTest, NewProcessAtAnAddressReplacesTheOldOne) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  ASSERT_OK(registry_.Register(Registration("other", "h:2")));
  ASSERT_OK_AND_ASSIGN(const std::vector<std::string> replaced,
                       registry_.Register(Registration("w2", "h:1")));
  EXPECT_THAT(replaced, ElementsAre("w1"));
  EXPECT_EQ(registry_.List().size(), 2u);
  ASSERT_OK_AND_ASSIGN(const std::vector<std::string> none,
                       registry_.Register(Registration("w2", "h:1")));
  EXPECT_THAT(none, IsEmpty()) << "registering again replaces nobody";
}

// A heartbeat from before, and whatever comes after, does not bring it back.
TEST_F(WorkerRegistryTest, AWorkerThatSaidThatItDrainsIsSentNothingMore) {
  EXPECT_THAT(registry_.Drain("w1"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(registry_.Register(Registration("w1", "host:1")));
  ASSERT_OK(registry_.Register(Registration("w2", "host:2")));
  ASSERT_OK(registry_.BeginRequest("m"));  // w1
  ASSERT_OK(registry_.Drain("w1"));
  EXPECT_OK(Beat("w1", Model::READY, 0, /*draining=*/false));
  EXPECT_TRUE(registry_.IsDraining("w1"));
  EXPECT_EQ(registry_.RequestsOf("w1"), 1);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(registry_.BeginRequest("m")->worker_id, "w2");
  ASSERT_OK(registry_.Register(Registration("w1-restarted", "host:1")));
  EXPECT_EQ(registry_.BeginRequest("m")->worker_id, "w1-restarted");
}

TEST_F(WorkerRegistryTest, ARequestIsNotSentToThoseThatRefusedIt) {
  ASSERT_OK(registry_.Register(Registration("w1", "host:1")));
  ASSERT_OK(registry_.Register(Registration("w2", "host:2")));
  EXPECT_EQ(registry_.BeginRequest("m", {"w1"})->worker_id, "w2");
  EXPECT_EQ(registry_.BeginRequest("m", {"w2"})->worker_id, "w1");
  EXPECT_EQ(ErrorReason(registry_.BeginRequest("m", {"w1", "w2"}).status()), "NO_WORKER");
  EXPECT_EQ(registry_.RequestsOf("w1"), 1);
  EXPECT_EQ(registry_.RequestsOf("w2"), 1);
}

TEST_F(WorkerRegistryTest, DrainingWorkerTakesNothingNew) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  EXPECT_OK(Beat("w1", Model::READY, 0, /*draining=*/true));
  EXPECT_TRUE(registry_.IsDraining("w1"));
  EXPECT_THAT(registry_.Online(), IsEmpty());
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::DRAINING);
  EXPECT_TRUE(registry_.Replicas("m")[0].is_draining);
}

// As after a restart of the coordinator, ahead of the heartbeat that would say so.
TEST_F(WorkerRegistryTest, AWorkerThatDrainsRegistersAsDraining) {
  internal_v1::RegisterRequest request = Registration("w1", "h:1");
  request.set_draining(true);
  ASSERT_OK(registry_.Register(request));
  EXPECT_TRUE(registry_.IsDraining("w1"));
  EXPECT_THAT(registry_.Online(), IsEmpty());
  EXPECT_THAT(registry_.BeginRequest("m"), HasCode(absl::StatusCode::kUnavailable));
  // One that was on its way before it drained.
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  EXPECT_TRUE(registry_.IsDraining("w1"));
}

TEST_F(WorkerRegistryTest, CountsEvaluationsUntilTheyEnd) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  EXPECT_OK(Beat("w1"));
  registry_.BeginEvaluation("w1");
  EXPECT_EQ(registry_.Replicas("m")[0].evaluations, 1);
  registry_.EndEvaluation("w1");
  EXPECT_EQ(registry_.Replicas("m")[0].evaluations, 0);
  registry_.BeginEvaluation("nobody");
  registry_.EndEvaluation("nobody");
}

TEST_F(WorkerRegistryTest, OnlineWorkersAreListedTheLeastBusyFirst) {
  for (const char* id : {"w1", "w2", "w3"}) {
    ASSERT_OK(registry_.Register(Registration(id, std::string("h:") + id)));
  }
  EXPECT_OK(Beat("w1", Model::READY, 5));
  EXPECT_OK(Beat("w2", Model::READY, 2));
  EXPECT_OK(Beat("w3", Model::READY, 2));
  std::vector<std::string> ids;
  for (const WorkerAddress& worker : registry_.Online()) ids.push_back(worker.worker_id);
  EXPECT_THAT(ids, ElementsAre("w2", "w3", "w1"));
  EXPECT_EQ(registry_.Online()[2].address, "h:w1");
}

// A coordinator that has just started does not know who is still to come back.
TEST_F(WorkerRegistryTest, WhoTakesJobsCanBeToldOnceWorkersHadTimeToComeBack) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  clock_.Advance(absl::Seconds(29));
  EXPECT_FALSE(registry_.TakingJobs().has_value());
  ASSERT_OK(registry_.Register(Registration("w2", "h:2")));
  EXPECT_OK(Beat("w1"));
  clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(*registry_.TakingJobs(), ElementsAre("workers/w1", "workers/w2"));
}

// In a rolling restart the only worker that can run a job is away for a moment.
TEST_F(WorkerRegistryTest, WhoTakesJobsCannotBeToldWhileAWorkerMayBeRestarting) {
  const auto advance = [&](absl::Duration d) {
    clock_.Advance(d);
    EXPECT_OK(registry_.Touch("w1"));
  };
  // True once `offline_after` is over, and not before.
  const auto are_told_later = [&] {
    const bool is_known = registry_.TakingJobs().has_value();
    advance(absl::Seconds(29));
    const bool is_known_soon = registry_.TakingJobs().has_value();
    advance(absl::Seconds(1));
    return !is_known && !is_known_soon && registry_.TakingJobs().has_value();
  };
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  ASSERT_OK(registry_.Register(Registration("w2", "h:2")));
  EXPECT_TRUE(are_told_later()) << "the start";
  // It drains for as long as its requests run, then leaves.
  for (int i = 0; i < 10; ++i) {
    EXPECT_OK(Beat("w2", Model::READY, 1, /*draining=*/true));
    EXPECT_FALSE(registry_.TakingJobs().has_value());
    advance(absl::Seconds(10));
  }
  registry_.Deregister("w2");
  EXPECT_TRUE(are_told_later());
  EXPECT_THAT(*registry_.TakingJobs(), ElementsAre("workers/w1"));
  registry_.Deregister("w2");
  EXPECT_TRUE(registry_.TakingJobs().has_value()) << "nobody left";
  // A new one changes nothing; a new process in the place of an old one does.
  ASSERT_OK(registry_.Register(Registration("w3", "h:2")));
  EXPECT_THAT(*registry_.TakingJobs(), ElementsAre("workers/w1", "workers/w3"));
  ASSERT_OK(registry_.Register(Registration("w3", "h:2")));
  EXPECT_TRUE(registry_.TakingJobs().has_value()) << "the same process";
  ASSERT_OK(registry_.Register(Registration("w4", "h:2")));
  EXPECT_TRUE(are_told_later());
  // Silent for as long: it counts from when that is noticed.
  EXPECT_THAT(registry_.Tick(), ElementsAre("w4"));
  EXPECT_TRUE(are_told_later());
  EXPECT_THAT(*registry_.TakingJobs(), ElementsAre("workers/w1"));
}

TEST_F(WorkerRegistryTest, LoadIsWhatIsReportedOrSentWhicheverIsMore) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  for (int i = 0; i < 3; ++i) EXPECT_OK(registry_.BeginRequest("m"));
  EXPECT_EQ(registry_.Replicas("m")[0].load, 3);
  EXPECT_EQ(registry_.RequestsOf("w1", "m"), 3);
  EXPECT_EQ(registry_.RequestsOf("w1", "another"), 0);
  EXPECT_OK(Beat("w1", Model::READY, 5));
  EXPECT_EQ(registry_.Replicas("m")[0].load, 5);
  EXPECT_OK(Beat("w1", Model::READY, 0));
  for (int i = 0; i < 3; ++i) registry_.EndRequest("w1", "m");
  EXPECT_EQ(registry_.Replicas("m")[0].load, 0);
  EXPECT_EQ(registry_.RequestsOf("nobody", "m"), 0);
}

// Ends of requests from before a worker was forgotten are no ends of those that came after.
TEST_F(WorkerRegistryTest, AWorkerThatComesBackHasAllThatRunsThere) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  ASSERT_OK(registry_.BeginRequest("m"));
  registry_.CloseModel("w1", "m");
  registry_.BeginEvaluation("w1");
  registry_.Deregister("w1");
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  EXPECT_FALSE(registry_.BeginRequest("m").ok()) << "its unload goes on";
  registry_.OpenModel("w1", "m");
  ASSERT_OK(registry_.BeginRequest("m"));
  registry_.BeginEvaluation("w1");
  EXPECT_EQ(registry_.RequestsOf("w1", "m"), 2);
  registry_.EndRequest("w1", "m");
  registry_.EndEvaluation("w1");
  EXPECT_EQ(registry_.RequestsOf("w1", "m"), 1);
  EXPECT_EQ(registry_.Replicas("m")[0].load, 1);
  EXPECT_EQ(registry_.Replicas("m")[0].evaluations, 1);
}

TEST_F(WorkerRegistryTest, AClosedModelTakesNothingNewWhateverHeartbeatsSay) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1")));
  ASSERT_OK(registry_.BeginRequest("m"));
  registry_.CloseModel("w1", "m");
  registry_.CloseModel("w1", "m");
  EXPECT_OK(Beat("w1", Model::READY));
  EXPECT_EQ(ErrorReason(registry_.BeginRequest("m").status()), "MODEL_DRAINING");
  EXPECT_EQ(registry_.RequestsOf("w1", "m"), 1);
  registry_.OpenModel("w1", "m");
  EXPECT_FALSE(registry_.BeginRequest("m").ok()) << "closed by another, too";
  registry_.OpenModel("w1", "m");
  EXPECT_OK(registry_.BeginRequest("m"));
}

TEST_F(WorkerRegistryTest, ModelsFollowHeartbeatsAndCalls) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1", Model::UNLOADED)));
  registry_.SetModelState("w1", "m", Model::LOADING);
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::LOADING);
  EXPECT_OK(Beat("w1", Model::READY));
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::READY);
  registry_.RemoveModel("w1", "m");
  EXPECT_THAT(registry_.Replicas("m"), IsEmpty());
}

// A move that failed does not hide what a heartbeat has said meanwhile.
TEST_F(WorkerRegistryTest, StateIsReplacedOnlyWhileItIsTheExpectedOne) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1", Model::UNLOADED)));
  registry_.SetModelState("w1", "m", Model::LOADING);
  EXPECT_OK(Beat("w1", Model::FAILED));
  registry_.ReplaceModelState("w1", "m", Model::LOADING, Model::UNLOADED);
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::FAILED);
  registry_.SetModelState("w1", "m", Model::LOADING);
  registry_.ReplaceModelState("w1", "m", Model::LOADING, Model::UNLOADED);
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::UNLOADED);
  registry_.ReplaceModelState("w1", "other", Model::LOADING, Model::UNLOADED);
  registry_.ReplaceModelState("w2", "m", Model::LOADING, Model::UNLOADED);
}

// An unload that is over, while a heartbeat from its midst is on its way.
TEST_F(WorkerRegistryTest, HeartbeatsFromBeforeAnAnswerDoNotUndoIt) {
  ASSERT_OK(registry_.Register(Registration("w1", "h:1", Model::READY)));
  Model unloaded;
  unloaded.set_name("models/m");
  unloaded.set_state(Model::UNLOADED);
  unloaded.set_revision(5);
  registry_.SetModel("w1", unloaded);
  internal_v1::HeartbeatRequest late;
  late.set_worker_id("w1");
  late.set_models_revision(4);
  ASSERT_OK(registry_.Heartbeat(late));
  ASSERT_EQ(registry_.Replicas("m").size(), 1u) << "not listed yet";
  Model& unloading = *late.add_models();
  unloading = unloaded;
  unloading.set_state(Model::UNLOADING);
  unloading.set_revision(4);
  ASSERT_OK(registry_.Heartbeat(late));
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::UNLOADED);
  // The next one is taken whole.
  internal_v1::HeartbeatRequest next;
  next.set_worker_id("w1");
  next.set_models_revision(6);
  ASSERT_OK(registry_.Heartbeat(next));
  EXPECT_THAT(registry_.Replicas("m"), IsEmpty()) << "deleted";
  // A later answer of an older call.
  registry_.SetModel("w1", unloaded);
  unloaded.set_revision(4);
  unloaded.set_state(Model::READY);
  registry_.SetModel("w1", unloaded);
  EXPECT_EQ(registry_.Replicas("m")[0].model.state(), Model::UNLOADED);
}

TEST_F(WorkerRegistryTest, Threads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, id = "w" + std::to_string(t)] {
      for (int i = 0; i < 200; ++i) {
        EXPECT_OK(registry_.Register(Registration(id, "h:" + id)));
        EXPECT_OK(Beat(id));
        const absl::StatusOr<WorkerAddress> worker = registry_.BeginRequest("m");
        registry_.AllReplicas();
        registry_.Tick();
        registry_.List();
        if (worker.ok()) registry_.EndRequest(worker->worker_id, "m");
        registry_.Deregister(id);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(registry_.List(), IsEmpty());
}

// -- Placement

Replica ReplicaOn(const std::string& worker, Model::State state, int load = 0) {
  Replica replica;
  replica.worker = {.worker_id = worker, .address = worker + ":1"};
  replica.model.set_name("models/m");
  replica.model.set_state(state);
  replica.load = load;
  return replica;
}

TEST(PlacementTest, GenerationGoesToTheLeastBusyReadyReplica) {
  const std::vector<Replica> replicas = {
      ReplicaOn("a", Model::UNLOADED, 0), ReplicaOn("b", Model::READY, 3),
      ReplicaOn("c", Model::READY, 1), ReplicaOn("d", Model::LOADING, 0)};
  ASSERT_OK_AND_ASSIGN(const WorkerAddress worker, ChooseForGeneration("m", replicas));
  EXPECT_EQ(worker.worker_id, "c");
}

TEST(PlacementTest, ReasonsForNone) {
  const auto reason = [](std::vector<Replica> replicas) {
    return ErrorReason(ChooseForGeneration("m", replicas).status());
  };
  EXPECT_EQ(reason({}), "NO_WORKER");
  EXPECT_EQ(reason({ReplicaOn("a", Model::UNLOADED), ReplicaOn("b", Model::LOADING)}),
            "MODEL_LOADING");
  EXPECT_EQ(reason({ReplicaOn("a", Model::DRAINING)}), "MODEL_DRAINING");
  EXPECT_EQ(reason({ReplicaOn("a", Model::UNLOADING)}), "MODEL_DRAINING");
  EXPECT_EQ(reason({ReplicaOn("a", Model::UNLOADED)}), "MODEL_NOT_LOADED");
  EXPECT_EQ(reason({ReplicaOn("a", Model::FAILED)}), "MODEL_NOT_LOADED");
}

TEST(PlacementTest, EvaluationGoesToTheLeastBusyWorkerLoadedOrNot) {
  const std::vector<Replica> replicas = {ReplicaOn("a", Model::READY, 3),
                                         ReplicaOn("c", Model::UNLOADED, 1),
                                         ReplicaOn("b", Model::FAILED, 1)};
  ASSERT_OK_AND_ASSIGN(const WorkerAddress worker, ChooseForEvaluation("m", replicas));
  EXPECT_EQ(worker.worker_id, "b");
  EXPECT_EQ(ErrorReason(ChooseForEvaluation("m", {}).status()), "NO_WORKER");
}

TEST(PlacementTest, EvaluationPrefersWhoRunsNoneAndSkipsWhoDrains) {
  std::vector<Replica> replicas = {ReplicaOn("a", Model::READY, 0), ReplicaOn("b", Model::READY, 9),
                                   ReplicaOn("c", Model::UNLOADED, 0)};
  replicas[0].evaluations = 1;
  replicas[2].is_draining = true;
  ASSERT_OK_AND_ASSIGN(WorkerAddress worker, ChooseForEvaluation("m", replicas));
  EXPECT_EQ(worker.worker_id, "b");
  // Without another the one that is busy says when to come again.
  replicas[1].is_draining = true;
  ASSERT_OK_AND_ASSIGN(worker, ChooseForEvaluation("m", replicas));
  EXPECT_EQ(worker.worker_id, "a");
  replicas[0].is_draining = true;
  const absl::Status none = ChooseForEvaluation("m", replicas).status();
  EXPECT_EQ(ErrorReason(none), "NO_WORKER");
  EXPECT_THAT(none,
              testing::StatusIs(absl::StatusCode::kUnavailable, ::testing::HasSubstr("draining")));
}

TEST(PlacementTest, MergeShowsTheMostUsefulState) {
  Model row;
  row.set_name("models/m");
  row.set_bits(4);
  row.set_quantization_job("quantizationJobs/a");
  EXPECT_EQ(Merge(row, {}).state(), Model::UNLOADED);
  EXPECT_EQ(Merge(row, {}).bits(), 4);
  const std::vector<Replica> replicas = {ReplicaOn("a", Model::UNLOADED),
                                         ReplicaOn("b", Model::READY)};
  const Model merged = Merge(row, replicas);
  EXPECT_EQ(merged.state(), Model::READY);
  EXPECT_EQ(merged.worker(), "workers/b");
  EXPECT_EQ(merged.quantization_job(), "quantizationJobs/a");
  const std::vector<Replica> unloaded = {ReplicaOn("a", Model::UNLOADED)};
  EXPECT_EQ(Merge(row, unloaded).worker(), "") << "held by nobody when not loaded";
}

TEST(PlacementTest, LoadPrefersWhereItIsAlreadyOnItsWay) {
  const std::vector<Replica> replicas = {ReplicaOn("a", Model::UNLOADED, 0),
                                         ReplicaOn("b", Model::LOADING, 9)};
  EXPECT_EQ(ChooseForLoad(replicas)->worker.worker_id, "b");
  EXPECT_EQ(ChooseForLoad({}), nullptr);
}

TEST(PlacementTest, LoadGoesWhereItHasNotFailedAndNobodyLeaves) {
  std::vector<Replica> replicas = {ReplicaOn("a", Model::FAILED, 0),
                                   ReplicaOn("b", Model::UNLOADED, 9),
                                   ReplicaOn("c", Model::UNLOADING, 10)};
  EXPECT_EQ(ChooseForLoad(replicas)->worker.worker_id, "b");
  replicas[1].is_draining = true;
  EXPECT_EQ(ChooseForLoad(replicas)->worker.worker_id, "c");
  replicas[2].is_draining = true;
  EXPECT_EQ(ChooseForLoad(replicas)->worker.worker_id, "a");
}

}  // namespace
}  // namespace walsh::fleet
