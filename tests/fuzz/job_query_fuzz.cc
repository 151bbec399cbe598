// ListQuantizationJobs' request: a query whose page tokens continue it, or a refusal with the
// field.

#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "common/limits.h"
#include "server/jobs/job_query.h"
#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/refusal.h"
#include "walsh/v1/quantization.pb.h"

using walsh::v1::ListQuantizationJobsRequest;

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  ListQuantizationJobsRequest request;
  return walsh::fuzz::MutateMessageInput(&request, data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ListQuantizationJobsRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  auto query = walsh::jobs::ParseQuery(request, "tenant");
  if (!query.ok()) {
    walsh::fuzz::CheckRefusal(query.status(), {absl::StatusCode::kInvalidArgument});
    // With the token that belongs to it, the rest is read.
    request.clear_page_token();
    query = walsh::jobs::ParseQuery(request, "tenant");
    if (!query.ok()) return 0;
  }
  WALSH_CHECK_GE(query->page_size, 1);
  WALSH_CHECK_LE(query->page_size, walsh::limits::kPageSizeMax);
  const int64_t ordinal = static_cast<int64_t>(size) + 1;
  request.set_page_token(walsh::jobs::PageToken(*query, ordinal));
  const auto next = walsh::jobs::ParseQuery(request, "tenant");
  WALSH_CHECK_EQ(next.status(), absl::OkStatus());
  WALSH_CHECK_EQ(next->after.value_or(0), ordinal);
  return 0;
}
