// Generation between the wire and the engine.
//
// Requests were validated before (common/generation_limits.h); what only the model can judge, its
// vocabulary, context and chat template, is judged here and in Engine::Submit.
//
// Errors: INVALID_ARGUMENT; UNIMPLEMENTED for a model without a chat template
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "walsh/v1/generation.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/served_model.h"

namespace walsh::service {

// Defaults filled in; a seed is drawn when the request has none.
engine::SamplingOptions ToSamplingOptions(const v1::SamplingParams& params);

// INVALID_ARGUMENT when an answer in one message would outgrow it: max_tokens, or the
// `n_tokens_left` of the context if they are fewer, with their log-probabilities.
absl::Status CheckAnswerFits(const engine::SamplingOptions& sampling, int64_t n_tokens_left);

absl::StatusOr<std::vector<int32_t>> PromptTokens(const engine::ServedModel& model,
                                                  const v1::GenerateRequest& request);
// The messages rendered by the model's own chat template.
absl::StatusOr<std::vector<int32_t>> ChatTokens(
    const engine::ServedModel& model,
    const google::protobuf::RepeatedPtrField<v1::ChatMessage>& messages);

v1::FinishReason ToProto(engine::FinishReason reason);
v1::TokenLogprob ToProto(const engine::TokenLogprob& logprob, const Tokenizer& tokenizer);
v1::Usage ToUsage(const engine::Outcome& outcome);
v1::Timings ToTimings(const engine::Outcome& outcome);
v1::GenerateStreamResponse::Delta ToProto(engine::Delta delta, const Tokenizer& tokenizer);

}  // namespace walsh::service
