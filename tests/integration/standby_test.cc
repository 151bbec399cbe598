// Goal:   of two coordinators on one PostgreSQL database one leads at a time; whatever becomes of
//         it the other goes on, nothing that was accepted is lost, and a former leader that comes
//         back changes nothing.
// Method: real processes, at two addresses of the loopback with equal ports, so that workers and
//         clients know both beforehand.
#include <grpcpp/client_context.h>
#include <signal.h>

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "common/grpc_server.h"
#include "common/http_server.h"
#include "common/publish.h"
#include "tests/testing/daemon_process.h"
#include "tests/testing/http_get.h"
#include "tests/testing/postgres_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/test_model.h"
#include "tests/testing/wait.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::DaemonProcess;
using ::walsh::testing::HttpGet;
using ::walsh::testing::IsOk;
using ::walsh::testing::PostgresServer;
using ::walsh::testing::TestModel;
using ::walsh::testing::WaitUntil;
using Job = v1::QuantizationJob;

constexpr absl::Duration kTakeOverMax = absl::Seconds(15);

class StandbyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_POSTGRES();
    uri_ = PostgresServer::Shared().NewDatabase();
    first_ = StartCoordinator(kFirst);
    ASSERT_OK_AND_ASSIGN(const Endpoints endpoints, first_->WaitUntilReady());
    for (const auto& [name, address] : endpoints) {
      ports_[name] = address.substr(address.rfind(':') + 1);
    }
    second_ = StartCoordinator(kSecond);
    client::ClientOptions options;
    options.address = OfBoth("grpc");
    client_ = std::make_unique<client::Client>(options);
  }

  std::unique_ptr<DaemonProcess> StartCoordinator(const std::string& host) {
    std::vector<std::string> arguments = {
        "--host", host, "--job-store", uri_, "--job-lease-seconds", "60", "--heartbeat-seconds",
        "1"};
    for (const char* name : {"grpc", "internal", "http", "metrics"}) {
      const auto port = ports_.find(name);
      arguments.push_back(absl::StrCat("--", name, "-port"));
      arguments.push_back(port == ports_.end() ? "0" : port->second);
    }
    return std::make_unique<DaemonProcess>("coordinator", dir_ / host, arguments);
  }
  std::string OfBoth(const std::string& name) const {
    return absl::StrCat("ipv4:", kFirst, ":", ports_.at(name), ",", kSecond, ":", ports_.at(name));
  }
  std::string Address(const std::string& host, const std::string& name) const {
    return absl::StrCat(host, ":", ports_.at(name));
  }
  absl::Status Get(const std::string& host, const std::string& page) const {
    return HttpGet(Address(host, "http"), page).status();
  }
  bool Leads(const std::string& host) const { return Get(host, "/readyz").ok(); }
  bool StandsBy(const std::string& host) const {
    return Get(host, "/livez").ok() && absl::StrContains(Get(host, "/readyz").message(), "standby");
  }

  static constexpr char kFirst[] = "127.0.0.1";
  static constexpr char kSecond[] = "127.0.0.2";
  const testing::TempDir dir_;
  std::string uri_;
  std::map<std::string, std::string> ports_;  // of both
  std::unique_ptr<DaemonProcess> first_;
  std::unique_ptr<DaemonProcess> second_;
  std::unique_ptr<client::Client> client_;
};

TEST_F(StandbyTest, TheOtherGoesOnWithTheJobsOfOneThatWasKilledOrStopped) {
  const TestModel model;
  DaemonProcess worker(
      "worker", dir_ / "worker",
      {"--coordinator", OfBoth("internal"), "--host", kFirst, "--grpc-port", "0", "--metrics-port",
       "0", "--threads", "1", "--device", "cpu", "--model-root", model.root()});
  ASSERT_OK(worker.WaitUntilReady());
  ASSERT_TRUE(WaitUntil([&] { return StandsBy(kSecond); }));
  EXPECT_TRUE(Leads(kFirst));

  std::vector<std::string> names;
  for (const char* name : {"a", "b", "c"}) {
    v1::CreateQuantizationJobRequest request;
    Job& job = *request.mutable_quantization_job();
    job.set_source_model(model.path());
    job.set_model_name(name);
    job.mutable_config()->set_bits(2);
    job.mutable_config()->mutable_calibration()->set_uri(model.text_path());
    job.mutable_config()->mutable_calibration()->set_num_samples(16);
    job.mutable_config()->mutable_calibration()->set_sequence_length(64);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    ASSERT_OK_AND_ASSIGN(const Job created, client_->CreateJob(request));
    names.push_back(created.name());
  }
  ASSERT_TRUE(WaitUntil([&] {
    const absl::StatusOr<Job> job = client_->GetJob(names[0]);
    return job.ok() && job->state() == Job::RUNNING;
  }));
  first_->Kill();
  EXPECT_TRUE(WaitUntil([&] { return Leads(kSecond); }, kTakeOverMax));
  for (const std::string& name : names) {
    ASSERT_OK_AND_ASSIGN(const Job ended, client_->WatchJob(name, 0, {}));
    EXPECT_EQ(ended.state(), Job::SUCCEEDED) << ended.DebugString();
    EXPECT_EQ(ended.attempt(), 1) << "the worker went on";
  }

  first_ = StartCoordinator(kFirst);
  ASSERT_TRUE(WaitUntil([&] { return StandsBy(kFirst); }));
  EXPECT_TRUE(Leads(kSecond));
  second_->Signal(SIGTERM);
  EXPECT_TRUE(WaitUntil([&] { return Leads(kFirst); }, absl::Seconds(5))) << "it need not wait";
  ASSERT_OK_AND_ASSIGN(const int exit_code, second_->Wait());
  EXPECT_EQ(exit_code, 0);
  ASSERT_OK_AND_ASSIGN(const auto jobs, client_->ListJobs("", "", 10));
  EXPECT_EQ(jobs.quantization_jobs_size(), 3);
}

TEST_F(StandbyTest, AFormerLeaderThatWakesChangesNothingAndEnds) {
  // A connection from before, over which the former leader is asked while it sleeps.
  const auto former =
      v1::QuantizationService::NewStub(MakeChannel(Address(kFirst, "grpc"), /*connection=*/1));
  v1::CreateQuantizationJobRequest request;
  request.mutable_quantization_job()->set_source_model("/models/tiny");
  const auto create = [&](const std::string& id) {
    request.set_quantization_job_id(id);
    request.mutable_quantization_job()->set_model_name(id);
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(1)));
    Job job;
    return former->CreateQuantizationJob(&context, request, &job).error_code();
  };
  ASSERT_EQ(create("before"), grpc::StatusCode::OK);
  first_->Signal(SIGSTOP);
  grpc::StatusCode late = grpc::StatusCode::OK;
  std::thread client([&] { late = create("late"); });
  EXPECT_TRUE(WaitUntil([&] { return Leads(kSecond); }, kTakeOverMax));
  first_->Signal(SIGCONT);
  client.join();
  EXPECT_EQ(late, grpc::StatusCode::UNAVAILABLE);
  ASSERT_OK_AND_ASSIGN(const int exit_code, first_->Wait(absl::Seconds(15)));
  EXPECT_EQ(exit_code, 1) << "for its supervisor to start it anew";
  EXPECT_THAT(ReadFile(dir_ / std::string(kFirst) + "/coordinator.log", 1 << 20).value_or(""),
              HasSubstr("no longer leads"));
  EXPECT_TRUE(Leads(kSecond));
  ASSERT_OK_AND_ASSIGN(const auto jobs, client_->ListJobs("", "", 10));
  ASSERT_EQ(jobs.quantization_jobs_size(), 1);
  EXPECT_EQ(jobs.quantization_jobs(0).name(), "quantizationJobs/before");
}

TEST_F(StandbyTest, OneThatCannotServeLetsTheNextLeadAtOnce) {
  ASSERT_TRUE(WaitUntil([&] { return StandsBy(kSecond); }));
  const auto page = [] { return absl::OkStatus(); };
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<HttpServer> on_its_port,
      HttpServer::Start(
          {.host = kSecond, .port = std::stoi(ports_.at("grpc")), .live = page, .ready = page}));
  first_->Signal(SIGTERM);
  ASSERT_OK_AND_ASSIGN(const int exit_code, second_->Wait());
  EXPECT_EQ(exit_code, 1) << "it led, and could not listen";
  first_ = StartCoordinator(kFirst);
  EXPECT_TRUE(WaitUntil([&] { return Leads(kFirst); }, absl::Seconds(5))) << "it need not wait";
}

// Reads and serving go on without the database, and so do writes when it is back.
TEST_F(StandbyTest, TheLeaderOutlivesARestartOfTheDatabase) {
  ASSERT_TRUE(WaitUntil([&] { return StandsBy(kSecond); }));
  PostgresServer::Shared().Crash();
  v1::CreateQuantizationJobRequest request;
  request.set_request_id("once");
  request.mutable_quantization_job()->set_source_model("/models/tiny");
  request.mutable_quantization_job()->set_model_name("m");
  EXPECT_FALSE(client_->CreateJob(request).ok());
  EXPECT_OK(client_->ListModels());
  PostgresServer::Shared().Start();
  EXPECT_OK(client_->CreateJob(request));
  EXPECT_TRUE(Leads(kFirst));
  EXPECT_TRUE(StandsBy(kSecond));
  second_->Signal(SIGTERM);
  ASSERT_OK_AND_ASSIGN(const int exit_code, second_->Wait());
  EXPECT_EQ(exit_code, 0) << "its turn never came";
  EXPECT_TRUE(Leads(kFirst));
}

}  // namespace
}  // namespace walsh
