// Goal:   rows J3 to J7 of the fault matrix: what a client sends neither forges a log line, nor
//         leads a worker to another host or file, nor grows what is measured; and what it is told
//         names no path, address or host.
// Method: the real daemons, logging all that they have in JSON; every string field of every request
//         of the public services, by their descriptors.
#include <arpa/inet.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor_database.h>
#include <google/protobuf/message.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "tests/testing/call_by_name.h"
#include "tests/testing/http_get.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace walsh {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::HasCode;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::TempDir;
using ::walsh::testing::TinyModel;

class HostileClientTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    root_ = new TempDir;
    TinyModel({}).WriteHf(*root_ / "tiny");
    testing::ServiceOptions options;
    options.model_roots = {root_->path()};
    options.worker_flags = {"--log-format", "json", "--log-level", "debug"};
    options.coordinator_flags = options.worker_flags;
    service_ = new ServiceFixture(options);
    ASSERT_OK(service_->Start());
  }
  static void TearDownTestSuite() {
    delete service_;
    delete root_;
  }

  static std::string PublicAddress() { return service_->endpoint("coordinator", "grpc"); }

  // As it stands on the wire, since client libraries check what they send.
  static grpc::Status Call(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                           const Message& message, const std::string& request_id = "") {
    return testing::CallByName(channel, method, message.SerializeAsString(), request_id);
  }

  // Calls `use` with each method of the public services and an empty request of it.
  static void ForEachMethod(const std::function<void(const std::string&, const Message&)>& use) {
    std::vector<std::string> files;
    google::protobuf::DescriptorPool::internal_generated_database()->FindAllFileNames(&files);
    for (const std::string& name : files) {
      const auto* file = google::protobuf::DescriptorPool::generated_pool()->FindFileByName(name);
      if (file == nullptr || file->package() != "walsh.v1") continue;
      for (int s = 0; s < file->service_count(); ++s) {
        for (int m = 0; m < file->service(s)->method_count(); ++m) {
          const auto& method = *file->service(s)->method(m);
          use(absl::StrCat("/", method.service()->full_name(), "/", method.name()),
              *google::protobuf::MessageFactory::generated_factory()->GetPrototype(
                  method.input_type()));
        }
      }
    }
  }

  // Sets every string field of `message` and of the messages in it, `depth` deep.
  static void SetStrings(const std::string& text, int depth, Message* message) {
    const auto* reflection = message->GetReflection();
    for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
      const FieldDescriptor* field = message->GetDescriptor()->field(i);
      if (field->type() == FieldDescriptor::TYPE_STRING) {
        if (field->is_repeated()) {
          reflection->AddString(message, field, text);
        } else {
          reflection->SetString(message, field, text);
        }
      } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && depth > 0) {
        SetStrings(text, depth - 1,
                   field->is_repeated() ? reflection->AddMessage(message, field)
                                        : reflection->MutableMessage(message, field));
      }
    }
  }

  // The same with one field at a time, beside a name that is good.
  static void ForEachString(const Message& empty, const std::string& text,
                            const std::function<void(const Message&)>& use) {
    const Descriptor& descriptor = *empty.GetDescriptor();
    for (int i = 0; i < descriptor.field_count(); ++i) {
      const FieldDescriptor* field = descriptor.field(i);
      if (field->type() != FieldDescriptor::TYPE_STRING || field->is_repeated()) continue;
      const std::unique_ptr<Message> message(empty.New());
      for (const char* name : {"model", "name"}) {
        const FieldDescriptor* good = descriptor.FindFieldByName(name);
        if (good != nullptr) message->GetReflection()->SetString(message.get(), good, "absent");
      }
      message->GetReflection()->SetString(message.get(), field, text);
      use(*message);
    }
  }

  static v1::CreateQuantizationJobRequest NewJob(const std::string& source) {
    v1::CreateQuantizationJobRequest request;
    request.mutable_quantization_job()->set_source_model(source);
    request.mutable_quantization_job()->set_model_name("made");
    request.set_validate_only(true);
    return request;
  }
  static absl::Status Create(const std::string& source) {
    return service_->client().CreateJob(NewJob(source)).status();
  }

  static TempDir* root_;
  static ServiceFixture* service_;
};

TempDir* HostileClientTest::root_ = nullptr;
ServiceFixture* HostileClientTest::service_ = nullptr;

TEST_F(HostileClientTest, ForgesNoLogLine) {
  const std::string kTexts[] = {"a\r\n{\"level\":\"error\",\"message\":\"forged\"}",
                                "\x1b[31mred\x1b]0;title\x07",
                                "\u202egnirts\u2066\u200f",
                                "{} %n%s%x {0:>1000000}",
                                "\", \"level\": \"error",
                                std::string(size_t{1} << 20, 'x')};
  // Straight to the worker, too, which serves some of them.
  for (const char* daemon : {"coordinator", "worker"}) {
    const size_t n_before = service_->Log(daemon).size();
    const auto channel = MakeChannel(service_->endpoint(daemon, "grpc"));
    ForEachMethod([&](const std::string& method, const Message& empty) {
      for (const std::string& text : kTexts) {
        const std::unique_ptr<Message> all(empty.New());
        // A megabyte in each field of a job would not fit a message.
        if (text.size() < 1000) SetStrings(text, /*depth=*/3, all.get());
        Call(channel, method, *all, "{}%n%s");
        ForEachString(empty, text, [&](const Message& one) { Call(channel, method, one); });
      }
    });
    const std::string log = service_->Log(daemon).substr(n_before);
    const std::vector<std::string> lines = absl::StrSplit(log, '\n', absl::SkipEmpty());
    EXPECT_GT(lines.size(), 20u) << daemon;
    for (const std::string& line : lines) {
      const nlohmann::json parsed = nlohmann::json::parse(line, nullptr, false);
      ASSERT_TRUE(parsed.is_object()) << daemon << ": " << line.substr(0, 1000);
      EXPECT_EQ(parsed.value("component", ""), daemon);
      EXPECT_NE(parsed.value("message", ""), "forged");
      EXPECT_LT(line.size(), size_t{8} << 10);
      for (const char* mark : {"\x1b", "\u202e", "\u2066", "\u200f", "\x07"}) {
        EXPECT_THAT(line, Not(HasSubstr(mark)));
      }
    }
    EXPECT_THAT(log, HasSubstr("{}%n%s")) << daemon << " logs some of it, escaped";
  }
  EXPECT_OK(service_->client().ListModels().status()) << "it goes on";
}

// Where a status repeats what its client has sent, that is no secret; so nothing is sent here that
// looks like what is sought.
TEST_F(HostileClientTest, IsToldNoPathAddressOrHost) {
  std::vector<grpc::Status> statuses;
  const auto channel = MakeChannel(PublicAddress());
  ForEachMethod([&](const std::string& method, const Message& empty) {
    statuses.push_back(Call(channel, method, empty));
    for (const char* text : {"absent", "models/absent", "quantizationJobs/absent", "Not A Name"}) {
      const std::unique_ptr<Message> all(empty.New());
      SetStrings(text, /*depth=*/3, all.get());
      statuses.push_back(Call(channel, method, *all));
      ForEachString(empty, text,
                    [&](const Message& one) { statuses.push_back(Call(channel, method, one)); });
    }
  });
  // Of files: what a worker says who has read them.
  const std::string broken = *root_ / "broken";
  TinyModel({}).WriteHf(broken);
  ASSERT_EQ(truncate((broken + "/model.safetensors").c_str(), 100), 0);
  TinyModel({}).WriteHf(*root_ / "unreadable");
  ASSERT_EQ(unlink((*root_ / "unreadable/config.json").c_str()), 0);
  ASSERT_EQ(symlink("/etc", (*root_ / "escape").c_str()), 0);
  for (const char* source : {"absent", "broken", "unreadable", "escape", "../x", "tiny"}) {
    v1::CreateQuantizationJobRequest request = NewJob(source);
    statuses.push_back(
        Call(channel, "/walsh.v1.QuantizationService/CreateQuantizationJob", request));
    request.mutable_quantization_job()->mutable_config()->mutable_calibration()->set_uri("absent");
    statuses.push_back(
        Call(channel, "/walsh.v1.QuantizationService/CreateQuantizationJob", request));
    v1::ImportModelRequest import;
    import.set_source_model(source);
    import.set_model_name("imported");
    statuses.push_back(Call(channel, "/walsh.v1.ModelService/ImportModel", import));
  }
  int n_errors = 0;
  for (const grpc::Status& status : statuses) {
    n_errors += status.ok() ? 0 : 1;
    // Details are messages in binary, with strings as they are.
    const std::string told =
        absl::StrReplaceAll(absl::StrCat(status.error_message(), " ", status.error_details()),
                            {{"type.googleapis.com/", ""}, {std::string(1, '\0'), "?"}});
    EXPECT_THAT(told, Not(ContainsRegex("/[A-Za-z0-9_.-]+/"))) << "a path";
    EXPECT_THAT(told, Not(ContainsRegex("[0-9]+\\.[0-9]+\\.[0-9]+\\.[0-9]+"))) << "an address";
    EXPECT_THAT(told, Not(ContainsRegex("localhost|0x[0-9a-f]{6}"))) << "a host or a pointer";
  }
  EXPECT_GT(n_errors, 100);
}

// Prompts and keys of requests that fail; tests/integration/tls_test.cc has those that succeed.
TEST_F(HostileClientTest, HearsAndLeavesNoSecret) {
  constexpr char kSecret[] = "canary-of-a-prompt-and-of-a-key";
  for (const char* daemon : {"coordinator", "worker"}) {
    const auto channel =
        MakeChannel(service_->endpoint(daemon, "grpc"), /*connection=*/0, {.secret = kSecret});
    int n_refused = 0;
    ForEachMethod([&](const std::string& method, const Message& empty) {
      if (method.find("GenerationService") == std::string::npos) return;
      for (const char* model : {"", "absent", "Not A Name"}) {
        const std::unique_ptr<Message> request(empty.New());
        SetStrings(kSecret, /*depth=*/3, request.get());
        const auto* reflection = request->GetReflection();
        reflection->SetString(request.get(), empty.GetDescriptor()->FindFieldByName("model"),
                              model);
        const FieldDescriptor* id = empty.GetDescriptor()->FindFieldByName("request_id");
        if (id != nullptr) reflection->ClearField(request.get(), id);
        const grpc::Status status = Call(channel, method, *request);
        n_refused += status.ok() ? 0 : 1;
        EXPECT_THAT(status.error_message() + status.error_details(), Not(HasSubstr(kSecret)))
            << method;
      }
    });
    EXPECT_EQ(n_refused, 6 * 3);
    EXPECT_THAT(service_->Log(daemon), Not(HasSubstr(kSecret)));
    EXPECT_THAT(testing::HttpGet(service_->endpoint(daemon, "metrics"), "/metrics").value_or(""),
                AllOf(HasSubstr("grpc_server_handled_total"), Not(HasSubstr(kSecret))));
  }
}

// Listens on the loopback, and tells whether anybody came.
class Lure {
 public:
  Lure() : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    EXPECT_EQ(bind(fd_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(fd_, 16), 0);
    EXPECT_EQ(getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~Lure() { close(fd_); }
  Lure(const Lure&) = delete;
  Lure& operator=(const Lure&) = delete;

  int port() const { return port_; }
  bool was_visited() const {
    pollfd wanted = {.fd = fd_, .events = POLLIN, .revents = 0};
    return poll(&wanted, 1, /*timeout=*/0) != 0;
  }

 private:
  const int fd_;
  int port_ = 0;
};

TEST_F(HostileClientTest, LeadsAWorkerNowhere) {
  const Lure lure;
  const std::string port = absl::StrCat(lure.port());
  for (const std::string& source :
       {"http://127.0.0.1:" + port + "/model", "https://localhost:" + port,
        "HTTP://2130706433:" + port, "http://0x7f.1:" + port, "http://[::ffff:127.0.0.1]:" + port,
        "ftp://127.1:" + port, std::string("file:///etc/passwd"), std::string("file:/etc/passwd"),
        std::string("//127.0.0.1/etc/passwd"), std::string("/etc/passwd"),
        std::string("gopher://a")}) {
    EXPECT_THAT(Create(source), HasCode(absl::StatusCode::kInvalidArgument)) << source;
    v1::CreateQuantizationJobRequest request = NewJob("tiny");
    request.mutable_quantization_job()->mutable_config()->mutable_calibration()->set_uri(source);
    EXPECT_THAT(service_->client().CreateJob(request), HasCode(absl::StatusCode::kInvalidArgument))
        << source;
  }
  EXPECT_FALSE(lure.was_visited());
  EXPECT_OK(Create("tiny"));
}

TEST_F(HostileClientTest, GrowsNoMetrics) {
  constexpr int kNames = 10'000;
  constexpr int kThreads = 4;
  const auto count_series = [](const std::string& daemon) {
    const auto text = testing::HttpGet(service_->endpoint(daemon, "metrics"), "/metrics");
    EXPECT_OK(text);
    return std::vector<std::string>(absl::StrSplit(text.value_or(""), '\n')).size();
  };
  // Straight to the worker, too: it must not lean on the coordinator.
  for (const char* daemon : {"coordinator", "worker"}) {
    const auto ask = [&](const std::string& model) {
      v1::GenerateRequest request;
      request.set_model(model);
      request.set_prompt("a");
      const auto channel = MakeChannel(service_->endpoint(daemon, "grpc"));
      EXPECT_EQ(Call(channel, "/walsh.v1.GenerationService/Generate", request).error_code(),
                grpc::StatusCode::NOT_FOUND);
      v1::TokenizeRequest tokenize;
      tokenize.set_model(model);
      tokenize.set_text("a");
      EXPECT_EQ(Call(channel, "/walsh.v1.GenerationService/Tokenize", tokenize).error_code(),
                grpc::StatusCode::NOT_FOUND);
    };
    ask("first");
    const size_t n_before = count_series(daemon);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = t; i < kNames / 2; i += kThreads) ask(absl::StrCat("absent-", i));
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_LE(count_series(daemon), n_before + 10) << daemon;
  }
}

}  // namespace
}  // namespace walsh
