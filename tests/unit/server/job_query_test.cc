#include "server/jobs/job_query.h"

#include <string>

#include "common/limits.h"
#include "server/jobs/page_token.h"
#include "tests/testing/status_matchers.h"

namespace walsh::jobs {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;

absl::StatusOr<JobQuery> Parse(const std::string& filter, const std::string& order_by = "",
                               int page_size = 0, const std::string& page_token = "") {
  v1::ListQuantizationJobsRequest request;
  request.set_filter(filter);
  request.set_order_by(order_by);
  request.set_page_size(page_size);
  request.set_page_token(page_token);
  return ParseQuery(request);
}

TEST(JobQueryTest, Filters) {
  ASSERT_OK_AND_ASSIGN(JobQuery query, Parse(" state = RUNNING AND model_name=\"a.b\" "));
  EXPECT_EQ(query.state, QuantizationJob::RUNNING);
  EXPECT_EQ(query.model_name, "a.b");
  ASSERT_OK_AND_ASSIGN(query, Parse("  "));
  EXPECT_FALSE(query.state.has_value());
  EXPECT_TRUE(query.newest_first);
  EXPECT_EQ(query.page_size, limits::kPageSizeDefault);
}

TEST(JobQueryTest, BadFiltersNameTheField) {
  for (const char* filter :
       {"state=Running", "state=", "state", "=RUNNING", "AND", "state=RUNNING AND",
        "state=RUNNING OR model_name=a", "state=RUNNING AND state=QUEUED", "worker=x",
        "model_name=A", "model_name='a'; DROP TABLE jobs", "\xff",
        "state=RUNNING and model_name=a"}) {
    EXPECT_THAT(Parse(filter), StatusIs(kInvalid, HasSubstr("filter"))) << filter;
  }
  EXPECT_THAT(Parse(std::string(5000, 'x')), StatusIs(kInvalid, HasSubstr("filter")));
}

TEST(JobQueryTest, Order) {
  EXPECT_FALSE(Parse("", "create_time")->newest_first);
  EXPECT_TRUE(Parse("", "create_time desc")->newest_first);
  EXPECT_THAT(Parse("", "name"), StatusIs(kInvalid, HasSubstr("order_by")));
}

TEST(JobQueryTest, PageSizes) {
  EXPECT_EQ(Parse("", "", 1)->page_size, 1);
  EXPECT_EQ(Parse("", "", 1000)->page_size, 1000);
  EXPECT_EQ(Parse("", "", 2147483647)->page_size, 1000);
  EXPECT_THAT(Parse("", "", -1), StatusIs(kInvalid, HasSubstr("page_size")));
}

TEST(JobQueryTest, TokensBelongToTheirQuery) {
  ASSERT_OK_AND_ASSIGN(JobQuery query, Parse("state=QUEUED"));
  const std::string token = PageToken(query, 42);
  ASSERT_OK_AND_ASSIGN(query, Parse("state=QUEUED", "", 7, token));
  EXPECT_EQ(query.after, 42);
  EXPECT_THAT(Parse("state=RUNNING", "", 0, token), StatusIs(kInvalid, HasSubstr("page_token")));
  EXPECT_THAT(Parse("state=QUEUED", "create_time", 0, token),
              StatusIs(kInvalid, HasSubstr("page_token")));
  for (const std::string& damaged :
       {token.substr(1), token.substr(0, 3), std::string("!!"), std::string("\xff\xff"),
        MakePageToken("desc|1|", "x"), MakePageToken("desc|1|", "99999999999999999999")}) {
    EXPECT_THAT(Parse("state=QUEUED", "", 0, damaged), StatusIs(kInvalid, HasSubstr("page_token")))
        << damaged;
  }
}

}  // namespace
}  // namespace walsh::jobs
