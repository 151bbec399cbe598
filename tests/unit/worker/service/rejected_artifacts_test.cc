#include "worker/service/rejected_artifacts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "common/limits.h"
#include "common/publish.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;

class RejectedArtifactsTest : public ::testing::Test {
 protected:
  // A finished artifact of one file.
  std::string Artifact(const std::string& contents) {
    const std::string path = dir_ / "finished";
    fs::create_directories(path);
    EXPECT_OK(PublishFile(path + "/walsh.json", contents));
    return path;
  }
  std::string Contents(const std::string& id) const {
    return ReadFile(rejected_.Directory(id) + "/walsh.json", 100).value_or("none");
  }

  testing::TempDir dir_;
  RejectedArtifacts rejected_{dir_ / "rejected"};
};

TEST_F(RejectedArtifactsTest, MovesTheArtifact) {
  const std::string path = Artifact("a");
  ASSERT_OK(rejected_.Keep(path, "j"));
  EXPECT_EQ(Contents("j"), "a");
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(RejectedArtifactsTest, ASecondRunOfAJobReplacesTheFirst) {
  ASSERT_OK(rejected_.Keep(Artifact("a"), "j"));
  ASSERT_OK(rejected_.Keep(Artifact("b"), "j"));
  EXPECT_EQ(Contents("j"), "b");
}

TEST_F(RejectedArtifactsTest, TheOldestGoes) {
  const int n = limits::kRejectedArtifactsMax;
  for (int i = 0; i <= n; ++i) {
    // Ids against the order of time: that of the names does not count.
    const std::string id = "j" + std::to_string(n - i);
    ASSERT_OK(rejected_.Keep(Artifact(id), id));
  }
  EXPECT_EQ(Contents("j" + std::to_string(n)), "none");
  for (int i = 0; i < n; ++i) EXPECT_NE(Contents("j" + std::to_string(i)), "none") << i;
}

}  // namespace
}  // namespace walsh::service
