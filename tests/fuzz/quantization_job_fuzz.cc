// CreateQuantizationJob's request: a job with every default filled in, which sent again is the same
// job, or a refusal with the field.

#include <google/protobuf/util/message_differencer.h>

#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "server/jobs/job_validation.h"
#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/refusal.h"
#include "walsh/v1/quantization.pb.h"

using google::protobuf::util::MessageDifferencer;
using walsh::v1::CreateQuantizationJobRequest;
using walsh::v1::QuantizationJob;

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  CreateQuantizationJobRequest request;
  return walsh::fuzz::MutateMessageInput(&request, data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  CreateQuantizationJobRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  const absl::StatusOr<QuantizationJob> job = walsh::jobs::ValidateNewJob(request);
  if (!job.ok()) {
    walsh::fuzz::CheckRefusal(job.status(), {absl::StatusCode::kInvalidArgument});
    return 0;
  }
  CreateQuantizationJobRequest again;
  *again.mutable_quantization_job() = *job;
  const absl::StatusOr<QuantizationJob> same = walsh::jobs::ValidateNewJob(again);
  // Compared, so that they are printed.
  WALSH_CHECK_EQ(same.status(), absl::OkStatus());
  if (!MessageDifferencer::Equals(*job, *same)) {
    WALSH_CHECK_EQ(job->ShortDebugString(), same->ShortDebugString());
  }
  return 0;
}
