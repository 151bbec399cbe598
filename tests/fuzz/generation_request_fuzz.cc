// Requests for generation, as gRPC hands them to a handler: valid within every limit, or refused
// with the field.
//
// The same bytes are read as each kind of request; their messages have fields in common.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "common/generation_limits.h"
#include "common/limits.h"
#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/refusal.h"
#include "walsh/v1/generation.pb.h"

namespace walsh::fuzz {
namespace {

// What the engine relies on without looking again.
void CheckAccepted(const v1::SamplingParams& sampling) {
  if (sampling.has_max_tokens()) {
    WALSH_CHECK_GE(sampling.max_tokens(), 1);
    WALSH_CHECK_LE(sampling.max_tokens(), limits::kNewTokensMax);
  }
  for (const double value :
       {sampling.temperature(), sampling.top_p(), sampling.min_p(), sampling.repetition_penalty(),
        sampling.presence_penalty(), sampling.frequency_penalty()}) {
    WALSH_CHECK(std::isfinite(value));
  }
  WALSH_CHECK(sampling.temperature() >= 0);
  WALSH_CHECK(!sampling.has_top_p() || (sampling.top_p() > 0 && sampling.top_p() <= 1));
  WALSH_CHECK(sampling.min_p() >= 0 && sampling.min_p() < 1);
  WALSH_CHECK(!sampling.has_repetition_penalty() || sampling.repetition_penalty() > 0);
  WALSH_CHECK_GE(sampling.top_k(), 0);
  WALSH_CHECK(sampling.top_logprobs() >= 0 && sampling.top_logprobs() <= limits::kTopLogprobsMax);
  WALSH_CHECK_GE(sampling.min_tokens(), 0);
  if (sampling.has_max_tokens()) WALSH_CHECK_LE(sampling.min_tokens(), sampling.max_tokens());
  WALSH_CHECK_LE(sampling.stop_size(), limits::kStopStringsMax);
  for (const std::string& stop : sampling.stop()) WALSH_CHECK(!stop.empty());
}
void CheckAccepted(const v1::GenerateRequest& request) { CheckAccepted(request.sampling()); }
void CheckAccepted(const v1::ChatRequest& request) {
  WALSH_CHECK(!request.messages().empty());
  CheckAccepted(request.sampling());
}
void CheckAccepted(const v1::TokenizeRequest& request) {
  WALSH_CHECK(request.has_text() || request.has_messages());
}
void CheckAccepted(const v1::DetokenizeRequest& request) {
  for (const int32_t id : request.token_ids()) WALSH_CHECK(id >= 0 && id < limits::kVocabMax);
}

template <typename Request>
void Check(const uint8_t* data, size_t size) {
  Request request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return;
  const absl::Status status = ValidateRequest(request);
  if (status.ok()) {
    CheckAccepted(request);
  } else {
    CheckRefusal(status, {absl::StatusCode::kInvalidArgument});
  }
}

template <typename Request>
size_t Mutate(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  Request request;
  return MutateMessageInput(&request, data, size, size_max, seed);
}

size_t MutateAsOneKind(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  constexpr decltype(&Mutate<v1::GenerateRequest>) kMutators[] = {
      Mutate<v1::GenerateRequest>, Mutate<v1::ChatRequest>, Mutate<v1::TokenizeRequest>,
      Mutate<v1::DetokenizeRequest>};
  return kMutators[seed % 4](data, size, size_max, seed / 4);
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::MutateAsOneKind(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walsh::fuzz::Check<walsh::v1::GenerateRequest>(data, size);
  walsh::fuzz::Check<walsh::v1::ChatRequest>(data, size);
  walsh::fuzz::Check<walsh::v1::TokenizeRequest>(data, size);
  walsh::fuzz::Check<walsh::v1::DetokenizeRequest>(data, size);
  return 0;
}
