#include "worker/service/artifact_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::walsh::testing::HasCode;

class ArtifactStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Write("weights", "many bytes");
    Write("walsh.json", "{}");
    Write("copy", "{}");
  }
  void Write(const std::string& name, const std::string& contents) {
    ASSERT_OK(MakeDirectories(artifact_));
    ASSERT_OK(PublishFile(artifact_ + "/" + name, contents));
  }
  absl::Status Keep(const std::string& id, int64_t token = 7) {
    return store_.Keep(id, artifact_, {.job_name = "jobs/a", .fencing_token = token}, {});
  }
  std::string Fetched(const std::string& name) {
    return ReadFile(dir_ / "fetched/" + name, 100).value_or("");
  }
  // Paths in the store's folder.
  std::vector<std::string> Stored() {
    std::vector<std::string> paths;
    for (const auto& entry : fs::recursive_directory_iterator(dir_ / "store")) {
      if (entry.is_regular_file()) {
        paths.push_back(entry.path().lexically_relative(dir_ / "store").string());
      }
    }
    std::erase(paths, ".lock");
    std::sort(paths.begin(), paths.end());
    return paths;
  }
  std::string EntryPath() { return dir_ / "store/models/m/model.json"; }

  testing::TempDir dir_;
  const std::string artifact_ = dir_ / "artifact";
  ArtifactStore store_{objects::OpenDirectoryStore(dir_ / "store").value()};
};

TEST_F(ArtifactStoreTest, GivesBackWhatItKept) {
  EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kNotFound));
  ASSERT_OK(Keep("m"));
  ASSERT_OK_AND_ASSIGN(const ArtifactStore::Origin origin, store_.Fetch("m", dir_ / "fetched", {}));
  EXPECT_EQ(origin.job_name, "jobs/a");
  EXPECT_EQ(origin.fencing_token, 7);
  EXPECT_EQ(Fetched("weights"), "many bytes");
  EXPECT_EQ(Fetched("walsh.json"), "{}");
  EXPECT_EQ(Fetched("copy"), "{}");
  EXPECT_THAT(Stored(), SizeIs(3)) << "the same contents are there once";
}

TEST_F(ArtifactStoreTest, TheFirstOfTwoWritersHasMadeIt) {
  ASSERT_OK(Keep("m", 7));
  ASSERT_OK(Keep("m", 6)) << "the same artifact";
  EXPECT_EQ(store_.Find("m")->fencing_token, 7);
  Write("weights", "others");
  EXPECT_THAT(Keep("m", 8), HasCode(absl::StatusCode::kAlreadyExists));
  ASSERT_OK(store_.Fetch("m", dir_ / "fetched", {}));
  EXPECT_EQ(Fetched("weights"), "many bytes");
}

TEST_F(ArtifactStoreTest, AModelIsThereWithAllItsFilesOrNotAtAll) {
  int n_asked = 0;
  const auto stops = [&] {
    return ++n_asked < 5 ? absl::OkStatus() : absl::AbortedError("the lease is lost");
  };
  EXPECT_THAT(store_.Keep("m", artifact_, {}, stops), HasCode(absl::StatusCode::kAborted));
  EXPECT_THAT(Stored(), SizeIs(1));
  EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kNotFound));
  // The next one goes on, and removes what it has no use for.
  Write("walsh.json", "{1}");
  Write("copy", "{1}");
  Write("weights", "other bytes");
  ASSERT_OK(Keep("m"));
  EXPECT_THAT(Stored(), SizeIs(3));
}

TEST_F(ArtifactStoreTest, RemovesAModelAndNoOther) {
  ASSERT_OK(Keep("m"));
  ASSERT_OK(Keep("m2"));
  ASSERT_OK(store_.Remove("m"));
  EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_THAT(store_.Remove("m"), HasCode(absl::StatusCode::kNotFound));
  EXPECT_OK(store_.Fetch("m2", dir_ / "fetched", {}));
  ASSERT_OK(store_.Remove("m2"));
  EXPECT_THAT(Stored(), IsEmpty());
}

TEST_F(ArtifactStoreTest, SeesDamage) {
  ASSERT_OK(Keep("m"));
  const std::string object = dir_ / "store/models/m/objects/" + Sha256Hex("many bytes");
  ASSERT_OK(PublishFile(object, "MANY bytes"));
  EXPECT_THAT(store_.Fetch("m", dir_ / "1", {}), HasCode(absl::StatusCode::kDataLoss));
  ASSERT_OK(PublishFile(object, "many"));
  EXPECT_THAT(store_.Fetch("m", dir_ / "2", {}), HasCode(absl::StatusCode::kDataLoss));
  fs::remove(object);
  EXPECT_THAT(store_.Fetch("m", dir_ / "3", {}), HasCode(absl::StatusCode::kDataLoss));
}

TEST_F(ArtifactStoreTest, RefusesNumbersThatDoNotFit) {
  ASSERT_OK(Keep("m"));
  const auto entry = [](const std::string& fencing_token, const std::string& size_bytes) {
    return absl::StrCat(R"({"format_version": 1, "job": "", "fencing_token": )", fencing_token,
                        R"(, "files": {"weights": {"size_bytes": )", size_bytes, R"(, "sha256": ")",
                        Sha256Hex("many bytes"), R"("}}})");
  };
  ASSERT_OK(PublishFile(EntryPath(), entry("9223372036854775807", "10")));
  EXPECT_OK(store_.Find("m"));
  for (const char* number : {"18446744073709551615", "1e300", "1.5", "null"}) {
    for (const std::string& text : {entry(number, "10"), entry("7", number)}) {
      ASSERT_OK(PublishFile(EntryPath(), text));
      EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kDataLoss)) << text;
    }
  }
}

// The list of files comes from outside and becomes paths.
TEST_F(ArtifactStoreTest, RefusesAListThatItDidNotWrite) {
  ASSERT_OK(Keep("m"));
  const std::string digest = Sha256Hex("many bytes");
  const auto list = [&](const std::string& name, const std::string& sha256) {
    return R"({"format_version": 1, "job": "", "fencing_token": 0, "files": {")" + name +
           R"(": {"size_bytes": 10, "sha256": ")" + sha256 + R"("}}})";
  };
  ASSERT_OK(PublishFile(EntryPath(), list("weights", digest)));
  EXPECT_OK(store_.Find("m"));
  for (const std::string& text :
       {list("../weights", digest), list("a/b", digest), list(".hidden", digest), list("", digest),
        list("weights", "../walsh.json"), list("weights", ""), std::string("{}"), std::string("["),
        std::string(R"({"format_version": 1, "job": 3})")}) {
    ASSERT_OK(PublishFile(EntryPath(), text));
    EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kDataLoss)) << text;
  }
  for (const char* version : {"2", "4294967297", "1e300"}) {
    ASSERT_OK(PublishFile(EntryPath(), absl::StrCat(R"({"format_version": )", version, "}")));
    EXPECT_THAT(store_.Find("m"), HasCode(absl::StatusCode::kUnimplemented)) << version;
  }
}

}  // namespace
}  // namespace walsh::service
