// Goal:   objects and checkpoints in a real S3 server are what they are in a folder, and what boto3
//         reads.
// Method: the conformance tests of both, each beneath a prefix of its own, on moto's
//         server, which checks every signature with botocore.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/s3_server.h"
#include "tests/unit/worker/objects/object_store_conformance.h"
#include "tests/unit/worker/pipeline/object_checkpoints.h"
#include "worker/objects/s3_object_store.h"

namespace walsh::objects {
namespace {

using pipeline::CheckpointPlaceFactory;
using pipeline::CheckpointPlaceTest;
using ::walsh::testing::S3Server;

// moto's parts, as S3's, have at least this but for the last.
constexpr int64_t kPartBytesMin = 5 << 20;

// One for all tests of the process: it takes a second to start.
class MotoEnvironment final : public ::testing::Environment {
 public:
  void SetUp() override {
    if (!S3Server::IsThere()) return;
    absl::StatusOr<std::unique_ptr<S3Server>> server = S3Server::Start();
    ASSERT_OK(server);
    server_ = *std::move(server);
  }
  void TearDown() override { server_.reset(); }
  S3Server* server() const { return server_.get(); }

 private:
  std::unique_ptr<S3Server> server_;
};

auto* const moto =
    static_cast<MotoEnvironment*>(::testing::AddGlobalTestEnvironment(new MotoEnvironment));

S3Options OptionsOf(const S3Server& server, const std::string& prefix) {
  const std::map<std::string, std::string> environment = server.environment();
  return {.endpoint = environment.at("AWS_ENDPOINT_URL"),
          .region = environment.at("AWS_REGION"),
          .access_key_id = environment.at("AWS_ACCESS_KEY_ID"),
          .secret_access_key = environment.at("AWS_SECRET_ACCESS_KEY"),
          .session_token = environment.at("AWS_SESSION_TOKEN"),
          .bucket = S3Server::kBucket,
          .prefix = prefix,
          .part_bytes = kPartBytesMin,
          .deadline = absl::Seconds(20)};
}

std::unique_ptr<ObjectStore> OpenBeneathNewPrefix(const std::string&) {
  static std::atomic<int> n_prefixes = 0;
  return OpenS3Store(OptionsOf(*moto->server(), absl::StrCat("test/", n_prefixes.fetch_add(1))))
      .value();
}

class S3Test : public ::testing::Test {
 protected:
  void SetUp() override {
    WALSH_REQUIRE_S3();
    store_ = OpenS3Store(OptionsOf(*moto->server(), "")).value();
  }
  std::unique_ptr<ObjectStore> store_;
};

INSTANTIATE_TEST_SUITE_P(S3, ObjectStoreTest,
                         ::testing::Values(StoreFactory(OpenBeneathNewPrefix)));

INSTANTIATE_TEST_SUITE_P(S3, CheckpointPlaceTest,
                         ::testing::Values(CheckpointPlaceFactory([](const std::string& folder) {
                           return std::make_unique<pipeline::ObjectCheckpoints>(
                               OpenBeneathNewPrefix(folder));
                         })));

TEST_F(S3Test, Boto3ReadsWhatWasWrittenAndTheOtherWayRound) {
  ASSERT_OK(store_->Put("a/plain", "written by walsh"));
  EXPECT_EQ(moto->server()->ReadWithBoto3("a/plain").value_or(""), "written by walsh");
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Contents contents,
                       store_->Get(S3Server::kObjectOfBoto3, 100));
  EXPECT_EQ(contents.bytes, S3Server::kContentsOfBoto3);
}

TEST_F(S3Test, ALargeObjectGoesUpInParts) {
  std::string large;
  for (int i = 0; static_cast<int64_t>(large.size()) < 2 * kPartBytesMin + 12'345; ++i) {
    absl::StrAppend(&large, i, " ");
  }
  testing::TempDir files;
  ASSERT_OK(PublishFile(files / "file", large));
  ASSERT_OK(store_->PutFile("large", files / "file", Sha256Hex(large), {}));
  EXPECT_TRUE(moto->server()->ReadWithBoto3("large").value_or("") == large);
  std::string read(large.size(), ' ');
  EXPECT_OK(ReadVerified(
      *store_, "large", {static_cast<int64_t>(large.size()), Sha256Hex(large)},
      [&](int64_t offset, int64_t n) {
        return std::as_writable_bytes(std::span(read)).subspan(offset, n);
      },
      [](std::span<const std::byte>) { return absl::OkStatus(); }));
  EXPECT_TRUE(read == large);
  EXPECT_FALSE(store_->PutFile("never", files / "file", Sha256Hex("others"), {}).ok());
  EXPECT_EQ(moto->server()->n_open_uploads(), 0);
  EXPECT_THAT(store_->Get("never", 1), HasCode(absl::StatusCode::kNotFound));
}

TEST_F(S3Test, AWrongSecretIsRefused) {
  S3Options options = OptionsOf(*moto->server(), "");
  options.secret_access_key = "another";
  const std::unique_ptr<ObjectStore> store = OpenS3Store(options).value();
  EXPECT_THAT(store->Put("a", "x"),
              testing::StatusIs(absl::StatusCode::kPermissionDenied,
                                "the object store answered 403 (SignatureDoesNotMatch)"));
}

}  // namespace
}  // namespace walsh::objects
