// Goal:   row J1 of the fault matrix: no method of the public port is served to whoever may not
// call
//         it, and keys follow their file.
// Method: a coordinator in this process; every method of every linked service, called raw.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor_database.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "common/publish.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "server/access/access_rules.h"
#include "tests/integration/coordinator_fixture.h"
#include "tests/testing/call_by_name.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using ::walsh::testing::WaitUntil;

constexpr char kServer[] = "a-key-of-role-serve";
constexpr char kSubmitter[] = "a-key-of-role-submit";
constexpr char kAdmin[] = "a-key-of-role-admin";

class CoordinatorAccessTest : public CoordinatorFixture {
 protected:
  void SetUp() override {
    WriteKeys({{kServer, "serve"}, {kSubmitter, "submit"}, {kAdmin, "admin"}});
    Start();
  }
  // An empty message, which every request type takes; how the call ends.
  absl::Status Call(const std::string& method, const std::string& secret) {
    return FromGrpcStatus(testing::CallByName(ChannelOf(secret), method, ""));
  }
};

TEST_F(CoordinatorAccessTest, NoMethodIsServedToWhoeverMayNotCallIt) {
  std::vector<std::string> files;
  google::protobuf::DescriptorPool::internal_generated_database()->FindAllFileNames(&files);
  int n_methods = 0;
  int n_refused_to_role = 0;
  for (const std::string& name : files) {
    const auto* file = google::protobuf::DescriptorPool::generated_pool()->FindFileByName(name);
    if (file == nullptr || file->package() != "walsh.v1") continue;
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        const std::string method = absl::StrCat("/", file->service(s)->full_name(), "/",
                                                file->service(s)->method(m)->name());
        ++n_methods;
        EXPECT_NE(access::FindRule(method), nullptr) << method << " needs a rule";
        for (const char* secret : {"", "a-key-that-nobody-knows"}) {
          EXPECT_THAT(Call(method, secret), HasCode(absl::StatusCode::kUnauthenticated)) << method;
        }
        for (const char* secret : {kServer, kSubmitter, kAdmin}) {
          const absl::Status status = Call(method, secret);
          EXPECT_FALSE(absl::IsUnauthenticated(status)) << method << ": " << status;
          n_refused_to_role += absl::IsPermissionDenied(status) ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GE(n_methods, 25);
  // 20 methods are of one role, which the two other keys have not.
  EXPECT_EQ(n_refused_to_role, 2 * 20);
}

TEST_F(CoordinatorAccessTest, HealthNeedsNoKey) {
  const auto health = grpc::health::v1::Health::NewStub(channel_);
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckResponse response;
  EXPECT_OK(FromGrpcStatus(health->Check(&context, {}, &response)));
  EXPECT_EQ(response.status(), grpc::health::v1::HealthCheckResponse::SERVING);
}

TEST_F(CoordinatorAccessTest, ANewerClientLearnsThatAMethodDoesNotExist) {
  EXPECT_THAT(Call("/walsh.v1.ModelService/NoSuchMethod", kAdmin),
              HasCode(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(Call("/walsh.v1.ModelService/NoSuchMethod", ""),
              HasCode(absl::StatusCode::kUnauthenticated));
}

TEST_F(CoordinatorAccessTest, KeysFollowTheirFile) {
  constexpr char kMethod[] = "/walsh.v1.ModelService/ListModels";
  EXPECT_OK(Call(kMethod, kServer));
  EXPECT_THAT(Call(kMethod, "a-key-to-come-later"), HasCode(absl::StatusCode::kUnauthenticated));
  // A bad file changes nothing; the next good one does.
  ASSERT_OK(PublishFile(options_.api_keys_file, "{"));
  WriteKeys({{kAdmin, "admin"}, {"a-key-to-come-later", "serve"}});
  EXPECT_TRUE(WaitUntil([&] { return Call(kMethod, "a-key-to-come-later").ok(); }));
  EXPECT_THAT(Call(kMethod, kServer), HasCode(absl::StatusCode::kUnauthenticated));
  EXPECT_OK(Call(kMethod, kAdmin));
}

// Row F7 of the fault matrix, on the wire; the queue's own tests go further.
TEST_F(CoordinatorAccessTest, AnotherTenantsJobDoesNotExist) {
  constexpr char kOther[] = "a-key-of-another-tenant";
  WriteKeys({{kSubmitter, "submit"}, {kOther, "submit", "u"}});
  const auto mine = v1::QuantizationService::NewStub(ChannelOf(kSubmitter));
  const auto other = v1::QuantizationService::NewStub(ChannelOf(kOther));
  ASSERT_OK(Send<v1::QuantizationJob>(mine.get(), &JobStub::CreateQuantizationJob, NewJob("mine")));
  v1::GetQuantizationJobRequest get;
  get.set_name("quantizationJobs/mine");
  EXPECT_OK(Send<v1::QuantizationJob>(mine.get(), &JobStub::GetQuantizationJob, get));
  ASSERT_TRUE(WaitUntil([&] {
    return absl::IsNotFound(
        Send<v1::QuantizationJob>(other.get(), &JobStub::GetQuantizationJob, get).status());
  })) << "when the other key is there";
  v1::CancelQuantizationJobRequest cancel;
  cancel.set_name("quantizationJobs/mine");
  EXPECT_THAT(Send<v1::QuantizationJob>(other.get(), &JobStub::CancelQuantizationJob, cancel),
              HasCode(absl::StatusCode::kNotFound));
  v1::DeleteQuantizationJobRequest remove;
  remove.set_name("quantizationJobs/mine");
  EXPECT_THAT(Send<google::protobuf::Empty>(other.get(), &JobStub::DeleteQuantizationJob, remove),
              HasCode(absl::StatusCode::kNotFound));
  v1::WatchQuantizationJobRequest watch;
  watch.set_name("quantizationJobs/mine");
  grpc::ClientContext context;
  const auto events = other->WatchQuantizationJob(&context, watch);
  v1::QuantizationJobEvent event;
  EXPECT_FALSE(events->Read(&event));
  EXPECT_EQ(events->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
  ASSERT_OK_AND_ASSIGN(const auto listed, (Send<v1::ListQuantizationJobsResponse>(
                                              other.get(), &JobStub::ListQuantizationJobs, {})));
  EXPECT_EQ(listed.total_size(), 0);
  ASSERT_OK_AND_ASSIGN(const auto own, (Send<v1::ListQuantizationJobsResponse>(
                                           mine.get(), &JobStub::ListQuantizationJobs, {})));
  EXPECT_EQ(own.total_size(), 1);
}

TEST_F(CoordinatorAccessTest, ATenantsModelsAreCountedUntilTheyAreGone) {
  Stop();
  WriteKeys({{kSubmitter, "submit"}, {"a-key-of-another-tenant", "submit", "u"}, {kAdmin, "admin"}},
            R"({"t": {"stored_bytes": 2000}, "u": {"stored_bytes": 1}})");
  Start();
  const auto mine = v1::QuantizationService::NewStub(ChannelOf(kSubmitter));
  const auto other = v1::QuantizationService::NewStub(ChannelOf("a-key-of-another-tenant"));
  const auto create = [this](JobStub* stub, const std::string& id) {
    return Send<v1::QuantizationJob>(stub, &JobStub::CreateQuantizationJob, NewJob(id)).status();
  };
  const auto worker = NewWorker("w");
  for (const char* id : {"one", "two"}) {
    ASSERT_OK(create(mine.get(), id));
    ASSERT_OK(worker->Succeed(worker->MustAcquire()));
  }
  const absl::Status full = create(mine.get(), "three");
  EXPECT_THAT(full,
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("2000 bytes of models stored"), HasSubstr("at most 2000"))));
  EXPECT_EQ(ErrorReason(full), "TENANT_LIMIT");
  EXPECT_OK(create(other.get(), "of-another"));
  Stop();
  Start();
  EXPECT_THAT(create(mine.get(), "three"), HasCode(absl::StatusCode::kResourceExhausted));

  // Who forgets the job has the model still.
  v1::DeleteQuantizationJobRequest forget;
  forget.set_name("quantizationJobs/one");
  const auto forget_one = [&] {
    return Send<google::protobuf::Empty>(mine.get(), &JobStub::DeleteQuantizationJob, forget)
        .status();
  };
  EXPECT_THAT(forget_one(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("models/one-model")));
  ASSERT_OK(worker->Register());
  v1::DeleteModelRequest remove;
  remove.set_name("models/one-model");
  ASSERT_OK(Send<google::protobuf::Empty>(v1::ModelService::NewStub(ChannelOf(kAdmin)).get(),
                                          &ModelStub::DeleteModel, remove));
  EXPECT_OK(create(mine.get(), "three"));
  EXPECT_OK(forget_one());
}

TEST_F(CoordinatorAccessTest, PromptsAndNewTokensOfATenantsRequestsAreSummed) {
  Stop();
  WriteKeys({{kServer, "serve"}},
            R"({"t": {"running_prompt_bytes": 10, "running_new_tokens": 5}})");
  Start();
  const auto worker = NewWorkerWithModel("w", "m");
  absl::Notification may_end;
  absl::Notification has_begun;
  worker->on_generate = [&](grpc::ServerContext*, const v1::GenerateRequest& request,
                            v1::GenerateResponse*) {
    if (request.prompt() != "first") return grpc::Status::OK;
    has_begun.Notify();
    may_end.WaitForNotification();
    return grpc::Status::OK;
  };
  const auto stub = v1::GenerationService::NewStub(ChannelOf(kServer));
  const auto generate = [&](const std::string& prompt, int max_tokens) {
    v1::GenerateRequest request;
    request.set_model("m");
    request.set_prompt(prompt);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    return Send<v1::GenerateResponse>(stub.get(), &GenerationStub::Generate, request).status();
  };
  std::thread first([&] { EXPECT_OK(generate("first", 3)); });
  has_begun.WaitForNotification();
  EXPECT_THAT(generate("123456", 1), StatusIs(absl::StatusCode::kResourceExhausted,
                                              HasSubstr("5 bytes of prompts running and asks")));
  EXPECT_THAT(generate("12345", 3), StatusIs(absl::StatusCode::kResourceExhausted,
                                             HasSubstr("3 new tokens running and asks for 3")));
  EXPECT_OK(generate("12345", 2));
  may_end.Notify();
  first.join();
  EXPECT_OK(generate("1234567890", 5));
}

TEST_F(CoordinatorAccessTest, AServiceDoesNotStartWithABadFile) {
  Stop();
  ASSERT_OK(PublishFile(options_.api_keys_file, R"({"keys": [{}]})"));
  EXPECT_THAT(Server::Start(options_).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--api-keys-file: keys[0]")));
}

}  // namespace
}  // namespace walsh
