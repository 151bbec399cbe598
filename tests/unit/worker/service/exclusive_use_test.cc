#include "worker/service/exclusive_use.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <thread>
#include <vector>

#include "common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace walsh::service {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

constexpr absl::Duration kSoon = absl::Milliseconds(1);
constexpr absl::Duration kLong = absl::Minutes(1);

TEST(ExclusiveUseTest, AModelKeepsJobsAway) {
  ExclusiveUse use;
  ASSERT_OK(use.BeginModel());
  ASSERT_OK(use.BeginModel());
  EXPECT_FALSE(use.BeginAsking(kSoon));
  use.EndModel();
  EXPECT_FALSE(use.BeginAsking(kSoon)) << "there is another one";
  use.EndModel();
  EXPECT_TRUE(use.BeginAsking(kSoon));
}

TEST(ExclusiveUseTest, AJobRefusesModelsByItsName) {
  ExclusiveUse use;
  ASSERT_TRUE(use.BeginAsking(kSoon));
  use.BeginJob("quantizationJobs/j");
  const absl::Status refused = use.BeginModel();
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("quantizationJobs/j")));
  EXPECT_EQ(ErrorReason(refused), "JOB_RUNNING");
  use.EndJob();
  use.EndJob();
  EXPECT_TRUE(use.BeginAsking(kSoon)) << "the refused one does not count";
  use.EndJob();
  EXPECT_OK(use.BeginModel());
}

// A lease may be on its way: only the answer tells who comes first.
TEST(ExclusiveUseTest, ALoadWaitsForTheAnswerAboutAJob) {
  for (const bool has_job : {false, true}) {
    ExclusiveUse use;
    ASSERT_TRUE(use.BeginAsking(kSoon));
    std::promise<absl::Status> loaded;
    std::thread load([&] { loaded.set_value(use.BeginModel()); });
    std::future<absl::Status> result = loaded.get_future();
    EXPECT_EQ(result.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
    if (has_job) {
      use.BeginJob("quantizationJobs/j");
    } else {
      use.EndJob();
    }
    EXPECT_EQ(result.get().ok(), !has_job);
    load.join();
  }
}

// As the agent does it: it asks again at once.
TEST(ExclusiveUseTest, AWaitingLoadComesBeforeTheNextQuestion) {
  ExclusiveUse use;
  std::atomic<bool> is_over = false;
  std::atomic<int> n_asked = 0;
  std::thread agent([&] {
    while (!is_over) {
      if (!use.BeginAsking(kSoon)) continue;
      ++n_asked;
      use.EndJob();
    }
  });
  while (n_asked == 0) std::this_thread::yield();
  for (int i = 0; i < 100; ++i) {
    EXPECT_OK(use.BeginModel());
    const int before = n_asked;
    EXPECT_FALSE(use.BeginAsking(kSoon));
    EXPECT_EQ(n_asked, before);
    use.EndModel();
  }
  is_over = true;
  agent.join();
}

TEST(ExclusiveUseTest, TheEndOfTheLastModelWakesTheAgent) {
  ExclusiveUse use;
  ASSERT_OK(use.BeginModel());
  std::thread unload([&] { use.EndModel(); });
  EXPECT_TRUE(use.BeginAsking(kLong));
  unload.join();
}

}  // namespace
}  // namespace walsh::service
