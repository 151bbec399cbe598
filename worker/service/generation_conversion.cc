#include "worker/service/generation_conversion.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/status_macros.h"

namespace walsh::service {
namespace {

uint64_t DrawSeed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

// Of a token in a message: tags, lengths, an id and a probability, and a text of 16 bytes, which
// hardly any token exceeds. An answer of tokens that do ends when it outgrows the message.
constexpr int64_t kTokenBytes = 32;

std::string TokenText(const Tokenizer& tokenizer, int32_t id) {
  return id < 0 ? "" : tokenizer.TokenBytes(id, /*skip_special=*/false);
}

}  // namespace

engine::SamplingOptions ToSamplingOptions(const v1::SamplingParams& params) {
  engine::SamplingOptions options;
  options.max_tokens = params.has_max_tokens() ? params.max_tokens() : limits::kNewTokensDefault;
  options.min_tokens = params.min_tokens();
  if (params.has_temperature()) options.temperature = params.temperature();
  if (params.has_top_p()) options.top_p = params.top_p();
  options.top_k = params.top_k();
  options.min_p = params.min_p();
  if (params.has_repetition_penalty()) options.repetition_penalty = params.repetition_penalty();
  options.presence_penalty = params.presence_penalty();
  options.frequency_penalty = params.frequency_penalty();
  options.seed = params.has_seed() ? params.seed() : DrawSeed();
  options.stop.assign(params.stop().begin(), params.stop().end());
  options.stop_tokens.assign(params.stop_token_ids().begin(), params.stop_token_ids().end());
  options.ignore_eos = params.ignore_eos();
  options.logprobs = params.logprobs();
  options.top_logprobs = params.top_logprobs();
  options.include_stop = params.include_stop_str_in_output();
  options.skip_special_tokens = !params.has_skip_special_tokens() || params.skip_special_tokens();
  return options;
}

absl::Status CheckAnswerFits(const engine::SamplingOptions& sampling, int64_t n_tokens_left) {
  const int64_t n_tokens = std::min<int64_t>(sampling.max_tokens, n_tokens_left);
  const int64_t n_logprobs = sampling.logprobs ? 1 + sampling.top_logprobs : 0;
  const int64_t n_bytes = n_tokens * (1 + n_logprobs) * kTokenBytes;
  if (n_bytes <= limits::kMessageBytesMax) return absl::OkStatus();
  return InvalidField(
      "sampling.max_tokens",
      absl::StrCat(n_tokens, " tokens with ", sampling.top_logprobs,
                   " top_logprobs make an answer of about ", n_bytes, " bytes, more than the ",
                   limits::kMessageBytesMax, " of a message; ask for fewer than ",
                   limits::kMessageBytesMax / ((1 + n_logprobs) * kTokenBytes),
                   " or use the streaming call"));
}

absl::StatusOr<std::vector<int32_t>> PromptTokens(const engine::ServedModel& model,
                                                  const v1::GenerateRequest& request) {
  if (request.has_token_ids()) {
    return std::vector<int32_t>(request.token_ids().ids().begin(), request.token_ids().ids().end());
  }
  // A raw prompt may spell special tokens: who calls Generate writes the model's own markup.
  return model.tokenizer().Encode(
      request.prompt(), {.add_special_tokens = !request.skip_bos(), .parse_special_tokens = true});
}

absl::StatusOr<std::vector<int32_t>> ChatTokens(
    const engine::ServedModel& model,
    const google::protobuf::RepeatedPtrField<v1::ChatMessage>& messages) {
  if (model.chat_template() == nullptr) {
    return absl::UnimplementedError("the model has no chat template; use Generate");
  }
  const Tokenizer& tokenizer = model.tokenizer();
  ChatTemplate::Variables variables;
  for (const v1::ChatMessage& message : messages) {
    variables.messages.push_back({message.role(), message.content()});
  }
  variables.bos_token = TokenText(tokenizer, tokenizer.bos());
  variables.eos_token = TokenText(tokenizer, tokenizer.eos());
  WALSH_ASSIGN_OR_RETURN(const std::string text, model.chat_template()->Render(variables));
  // The template writes BOS itself where the model wants it.
  return tokenizer.Encode(text, {.add_special_tokens = false, .parse_special_tokens = true});
}

v1::FinishReason ToProto(engine::FinishReason reason) {
  switch (reason) {
    case engine::FinishReason::kStopToken:
      return v1::STOP;
    case engine::FinishReason::kLength:
      return v1::LENGTH;
    case engine::FinishReason::kEos:
      return v1::EOS;
    case engine::FinishReason::kStopString:
      return v1::STOP_SEQUENCE;
    case engine::FinishReason::kCancelled:
      return v1::CANCELLED;
    case engine::FinishReason::kDeadline:
      return v1::DEADLINE;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

v1::TokenLogprob ToProto(const engine::TokenLogprob& logprob, const Tokenizer& tokenizer) {
  v1::TokenLogprob proto;
  proto.set_token_id(logprob.token);
  proto.set_token(TokenText(tokenizer, logprob.token));
  proto.set_logprob(logprob.logprob);
  for (const auto& [id, value] : logprob.top) {
    v1::TokenLogprob::Top& top = *proto.add_top();
    top.set_token_id(id);
    top.set_token(TokenText(tokenizer, id));
    top.set_logprob(value);
  }
  return proto;
}

v1::Usage ToUsage(const engine::Outcome& outcome) {
  v1::Usage usage;
  usage.set_prompt_tokens(outcome.prompt_tokens);
  usage.set_completion_tokens(outcome.completion_tokens);
  usage.set_total_tokens(outcome.prompt_tokens + outcome.completion_tokens);
  usage.set_cached_tokens(outcome.cached_tokens);
  return usage;
}

v1::Timings ToTimings(const engine::Outcome& outcome) {
  v1::Timings timings;
  timings.set_queue_seconds(outcome.queue_seconds);
  timings.set_time_to_first_token_seconds(outcome.ttft_seconds);
  timings.set_prefill_seconds(outcome.prefill_seconds);
  timings.set_decode_seconds(outcome.decode_seconds);
  if (outcome.decode_seconds > 0) {
    timings.set_tokens_per_second((outcome.completion_tokens - 1) / outcome.decode_seconds);
  }
  return timings;
}

v1::GenerateStreamResponse::Delta ToProto(engine::Delta delta, const Tokenizer& tokenizer) {
  v1::GenerateStreamResponse::Delta proto;
  proto.set_text(std::move(delta.text));
  proto.mutable_token_ids()->Add(delta.tokens.begin(), delta.tokens.end());
  for (const engine::TokenLogprob& logprob : delta.logprobs) {
    *proto.add_logprobs() = ToProto(logprob, tokenizer);
  }
  return proto;
}

}  // namespace walsh::service
