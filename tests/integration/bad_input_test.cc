// Goal:   bad input ends with the right code and a message that names the thing, at the client's
//         end of the real service.
// Method: damaged tiny models and wrong flags through the `walsh` command; its exit code and the
//         line that a person reads.
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/publish.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tiny_model.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using ::walsh::testing::Damage;
using ::walsh::testing::ServiceFixture;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TempDir;
using ::walsh::testing::TinyModel;

void WriteText(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// A few thousand tokens of plain text.
std::string SomeText() {
  std::string text;
  for (int i = 0; i < 400; ++i) {
    absl::StrAppend(&text, "Sentence number ", i, " says that ", i * i, " is a square. ");
  }
  return text;
}

class BadInputTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    root_ = new TempDir;
    TinyModel({}).WriteHf(*root_ / "good");
    WriteText(*root_ / "text.txt", SomeText());
    testing::ServiceOptions options;
    options.model_roots = {root_->path()};
    service_ = new ServiceFixture(options);
    ASSERT_OK(service_->Start());
  }

  static void TearDownTestSuite() {
    delete service_;
    delete root_;
  }

  // Quantizes and expects the error line.
  static void ExpectError(const std::string& model, const std::vector<std::string>& flags,
                          const std::string& code, const std::string& text) {
    std::vector<std::string> arguments = {"quantize",  *root_ / model, "--num-samples",
                                          "4",         "--seq-len",    "64",
                                          "--no-eval", "--no-load"};
    const auto add_unless_given = [&](const std::string& flag, const std::string& value) {
      if (std::find(flags.begin(), flags.end(), flag) != flags.end()) return;
      arguments.insert(arguments.end(), {flag, value});
    };
    add_unless_given("--name", "m");
    add_unless_given("--calibration", *root_ / "text.txt");
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    ASSERT_OK_AND_ASSIGN(const client::Output output, service_->RunWalsh(arguments));
    EXPECT_EQ(output.exit_code, 1) << output.out;
    EXPECT_THAT(output.err, HasSubstr(absl::StrCat("error: ", code, ": ")));
    EXPECT_THAT(output.err, HasSubstr(text));
    // Nothing of a failed job is left to be served.
    ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, service_->client().ListModels());
    EXPECT_EQ(models.models_size(), 0);
  }

  static void ExpectDamageError(Damage damage, const std::string& code, const std::string& text) {
    const std::string name = absl::StrCat("damaged-", static_cast<int>(damage));
    TinyModel({}).WriteHf(*root_ / name, damage);
    ExpectError(name, {}, code, text);
  }

  static TempDir* root_;
  static ServiceFixture* service_;
};

TempDir* BadInputTest::root_ = nullptr;
ServiceFixture* BadInputTest::service_ = nullptr;

TEST_F(BadInputTest, NoSuchFile) { ExpectError("nothing-here", {}, "NOT_FOUND", "nothing-here"); }

TEST_F(BadInputTest, OutsideTheModelRoots) {
  ExpectError("../../../etc", {}, "INVALID_ARGUMENT", "--model-root");
}

TEST_F(BadInputTest, TruncatedSafetensors) {
  ExpectDamageError(Damage::kTruncated, "DATA_LOSS", "model.safetensors");
}

TEST_F(BadInputTest, OverlappingTensors) {
  ExpectDamageError(Damage::kOverlap, "INVALID_ARGUMENT", "overlap");
}

TEST_F(BadInputTest, GappedTensors) { ExpectDamageError(Damage::kGap, "INVALID_ARGUMENT", "gap"); }

TEST_F(BadInputTest, HeaderOf2To63Bytes) {
  ExpectDamageError(Damage::kHugeHeader, "INVALID_ARGUMENT", "9223372036854775808");
}

TEST_F(BadInputTest, WrongDtype) {
  ExpectDamageError(Damage::kWrongDtype, "UNIMPLEMENTED", testing::kDamagedTensor);
}

TEST_F(BadInputTest, MissingTensor) {
  ExpectDamageError(Damage::kMissingTensor, "INVALID_ARGUMENT", testing::kDamagedTensor);
}

TEST_F(BadInputTest, WrongShape) {
  ExpectDamageError(Damage::kWrongShape, "INVALID_ARGUMENT", testing::kDamagedTensor);
}

TEST_F(BadInputTest, UnknownArchitecture) {
  ExpectDamageError(Damage::kUnknownArchitecture, "UNIMPLEMENTED",
                    "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, ");
}

TEST_F(BadInputTest, NanInTheWeights) {
  ExpectDamageError(Damage::kNan, "DATA_LOSS", testing::kDamagedTensor);
}

TEST_F(BadInputTest, GroupThatDoesNotDivide) {
  // Inputs of the tiny model are 64 and 128 wide.
  ExpectError("good", {"--group-size", "128"}, "INVALID_ARGUMENT", "128");
}

TEST_F(BadInputTest, GroupThatIsNoneOfTheOffered) {
  ExpectError("good", {"--group-size", "48"}, "INVALID_ARGUMENT", "48");
}

TEST_F(BadInputTest, FiveBits) { ExpectError("good", {"--bits", "5"}, "INVALID_ARGUMENT", "bits"); }

TEST_F(BadInputTest, OverrideThatMatchesNothing) {
  ExpectError("good", {"--override", "*=4", "--override", "layers.{7-9}.*=4"}, "INVALID_ARGUMENT",
              "override 'layers.{7-9}.*' matches no linear");
}

TEST_F(BadInputTest, OptionsThatExcludeEachOther) {
  ExpectError("good", {"--method", "gptaq", "--error-propagation", "0.5"}, "INVALID_ARGUMENT",
              "only GPTQ has it");
  ExpectError("good", {"--grid", "codebook", "--bits", "3"}, "INVALID_ARGUMENT", "bits is 3");
  ExpectError("good", {"--zero-point", "float", "--symmetric"}, "INVALID_ARGUMENT", "FLOAT_ZERO");
}

TEST_F(BadInputTest, RotationBlockThatIsNoPowerOfTwo) {
  ExpectError("good", {"--rotation-block", "24"}, "INVALID_ARGUMENT", "24");
}

TEST_F(BadInputTest, BadNames) {
  ExpectError("good", {"--name", "../up"}, "INVALID_ARGUMENT", "model_name");
}

TEST_F(BadInputTest, EmptyCalibration) {
  WriteText(*root_ / "empty.txt", "");
  ExpectError("good", {"--calibration", *root_ / "empty.txt"}, "INVALID_ARGUMENT", "calibration");
}

TEST_F(BadInputTest, MissingCalibration) {
  ExpectError("good", {"--calibration", *root_ / "nowhere.txt"}, "NOT_FOUND", "nowhere.txt");
}

TEST_F(BadInputTest, CalibrationThatIsNoJson) {
  WriteText(*root_ / "broken.jsonl", "{\"text\": \"fine\"}\n{broken\n");
  ExpectError("good", {"--calibration", *root_ / "broken.jsonl"}, "INVALID_ARGUMENT", "line 2");
}

TEST_F(BadInputTest, ValidateOnlyFindsTheSameAndStartsNothing) {
  ExpectError("good", {"--group-size", "128", "--validate-only"}, "INVALID_ARGUMENT", "128");
  std::vector<std::string> command = {"quantize",
                                      *root_ / "good",
                                      "--name",
                                      "m",
                                      "--validate-only",
                                      "--num-samples",
                                      "4",
                                      "--seq-len",
                                      "64",
                                      "--calibration",
                                      *root_ / "text.txt"};
  ASSERT_OK_AND_ASSIGN(const client::Output valid, service_->RunWalsh(command));
  EXPECT_EQ(valid.exit_code, 0) << valid.err;
  EXPECT_THAT(valid.out, HasSubstr("valid: bits "));
  EXPECT_THAT(valid.out, ContainsRegex("memory  .* needed, .* of .* free"));
  EXPECT_THAT(valid.out, ContainsRegex("disk  .* needed, .* free"));
  command.insert(command.end(), {"--output", "json"});
  ASSERT_OK_AND_ASSIGN(const client::Output described, service_->RunWalsh(command));
  const nlohmann::json preflight = nlohmann::json::parse(described.out)["preflight"];
  EXPECT_EQ(preflight["device"], "cpu");
  EXPECT_THAT(preflight["worker"].get<std::string>(), StartsWith("workers/"));
  EXPECT_GT(std::stoll(preflight["memory"]["bytes_needed"].get<std::string>()), 0);
  EXPECT_GT(std::stoll(preflight["memory"]["bytes_total"].get<std::string>()), 0);
  EXPECT_GT(std::stoll(preflight["disk"]["bytes_needed"].get<std::string>()), 0);
  EXPECT_FALSE(preflight.contains("device_memory")) << "jobs run on the CPU";
  ASSERT_OK_AND_ASSIGN(const v1::ListQuantizationJobsResponse jobs,
                       service_->client().ListJobs("model_name=m AND state=QUEUED", "", 10));
  EXPECT_EQ(jobs.quantization_jobs_size(), 0);
}

TEST_F(BadInputTest, UnknownModelAndJob) {
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"generate", "nobody", "x"},
                                             {"chat", "nobody", "--message", "x"},
                                             {"tokenize", "nobody", "x"},
                                             {"models", "get", "nobody"},
                                             {"models", "load", "nobody"},
                                             {"models", "delete", "nobody"},
                                             {"jobs", "get", "nobody"},
                                             {"jobs", "cancel", "nobody"},
                                             {"jobs", "watch", "nobody"},
                                             {"jobs", "delete", "nobody"}}) {
    ASSERT_OK_AND_ASSIGN(const client::Output output, service_->RunWalsh(arguments));
    EXPECT_EQ(output.exit_code, 1) << arguments[0] << " " << arguments[1];
    EXPECT_THAT(output.err, HasSubstr("error: NOT_FOUND: "));
    EXPECT_THAT(output.err, HasSubstr("nobody"));
  }
}

// A folder in memory with a size limit, or read-only; only root may make one.
class SmallFileSystem {
 public:
  explicit SmallFileSystem(const char* size) {
    mounted_ =
        mount("tmpfs", dir_.path().c_str(), "tmpfs", 0, absl::StrCat("size=", size).c_str()) == 0;
  }
  ~SmallFileSystem() {
    if (read_only_) umount2(dir_.path().c_str(), MNT_DETACH);
    if (mounted_) umount2(dir_.path().c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }

  // Lays a read-only view of the folder over itself. A file system on which a file is open for
  // writing cannot be made read-only, and the worker holds one open.
  void MakeReadOnly() {
    const char* path = dir_.path().c_str();
    read_only_ = mount(path, path, nullptr, MS_BIND, nullptr) == 0;
    ASSERT_TRUE(read_only_);
    ASSERT_EQ(mount(nullptr, path, nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY, nullptr), 0);
  }
  // Takes all that is free, and gives it back.
  void Fill() const {
    for (const size_t n_bytes : {size_t{1} << 20, size_t{4096}}) {
      std::ofstream filler(FillerPath(), std::ios::binary | std::ios::app);
      const std::string block(n_bytes, 'x');
      while (filler.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) {
      }
    }
  }
  void Free() const { std::filesystem::remove(FillerPath()); }
  const std::string& path() const { return dir_.path(); }

 private:
  std::string FillerPath() const { return dir_ / "filler"; }

  TempDir dir_;
  bool mounted_ = false;
  bool read_only_ = false;
};

class FullDiskTest : public ::testing::Test {
 protected:
  // A job of some seconds whose worker keeps its artifacts in `folder`.
  static absl::StatusOr<v1::QuantizationJob> RunJob(SmallFileSystem& folder,
                                                    bool read_only_after_start,
                                                    const client::WatchObserver& observer = {}) {
    const TempDir root;
    TinyModel({.n_layers = 24}).WriteHf(root / "good");
    WriteText(root / "text.txt", SomeText());
    testing::ServiceOptions options;
    options.model_roots = {root.path()};
    options.worker_data_dir = folder.path();
    ServiceFixture service(options);
    if (absl::Status status = service.Start(); !status.ok()) return status;
    if (read_only_after_start) folder.MakeReadOnly();
    v1::CreateQuantizationJobRequest request;
    v1::QuantizationJob& job = *request.mutable_quantization_job();
    job.set_source_model(root / "good");
    job.set_model_name("m");
    job.mutable_config()->mutable_calibration()->set_uri(root / "text.txt");
    job.mutable_config()->mutable_calibration()->set_num_samples(32);
    job.mutable_config()->mutable_calibration()->set_sequence_length(256);
    job.mutable_config()->mutable_evaluation()->set_disable(true);
    auto created = service.client().CreateJob(request);
    if (!created.ok()) return created;
    return service.client().WatchJob(created->name(), 0, observer);
  }

  // The error, whether the job was refused or failed.
  static absl::Status ErrorOf(const absl::StatusOr<v1::QuantizationJob>& job) {
    return job.ok() ? FromProtoStatus(job->error()) : job.status();
  }
};

TEST_F(FullDiskTest, AFolderThatFillsUpDuringTheJobDelaysIt) {
  SmallFileSystem folder("64m");
  if (!folder.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  std::string retried;
  client::WatchObserver observer;
  observer.on_event = [&](const v1::QuantizationJobEvent& event) {
    // Validation is over, nothing of the artifact is written yet.
    if (event.stage() == v1::QuantizationJob::LOADING && event.attempt() == 1) folder.Fill();
    if (event.state() != v1::QuantizationJob::QUEUED || event.attempt() == 0) return;
    // Heartbeats of the watch repeat the state without a message.
    if (!event.message().empty()) retried = event.message();
    folder.Free();
  };
  ASSERT_OK_AND_ASSIGN(const v1::QuantizationJob job, RunJob(folder, false, observer));
  EXPECT_THAT(retried, HasSubstr("after RESOURCE_EXHAUSTED: "));
  EXPECT_EQ(job.state(), v1::QuantizationJob::SUCCEEDED) << job.DebugString();
  EXPECT_EQ(job.attempt(), 2);
}

TEST_F(FullDiskTest, AFullDataFolderIsResourceExhausted) {
  SmallFileSystem folder("128k");
  if (!folder.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  // Where the folder lies is the operator's business: it is in the worker's log.
  EXPECT_THAT(ErrorOf(RunJob(folder, false)),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("bytes of disk"), HasSubstr("are free"),
                             Not(HasSubstr(folder.path())))));
}

TEST_F(FullDiskTest, AReadOnlyDataFolderIsPermissionDenied) {
  SmallFileSystem folder("64m");
  if (!folder.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  EXPECT_THAT(ErrorOf(RunJob(folder, true)),
              StatusIs(absl::StatusCode::kPermissionDenied,
                       AllOf(HasSubstr("creating the artifact's directory"),
                             Not(HasSubstr(folder.path())))));
}

}  // namespace
}  // namespace walsh
