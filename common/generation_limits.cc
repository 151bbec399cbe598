#include "common/generation_limits.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh {
namespace {

absl::Status CheckInt(std::string_view field, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("must be from ", min, " to ", max, ", is ", value));
}

struct Range {
  double min;
  double max;
  bool min_excluded = false;
  bool max_excluded = false;
};

absl::Status CheckReal(std::string_view field, double value, const Range& range) {
  const bool inside = std::isfinite(value) && value >= range.min && value <= range.max &&
                      !(range.min_excluded && value == range.min) &&
                      !(range.max_excluded && value == range.max);
  if (inside) return absl::OkStatus();
  return InvalidField(
      field, absl::StrCat("must be in ", range.min_excluded ? "(" : "[", range.min, ", ", range.max,
                          range.max_excluded ? ")" : "]", ", is ", value));
}

absl::Status CheckText(std::string_view field, std::string_view text, int64_t bytes_max) {
  if (static_cast<int64_t>(text.size()) > bytes_max) {
    return InvalidField(
        field, absl::StrCat("has ", text.size(), " bytes, at most ", bytes_max, " are taken"));
  }
  if (!IsValidUtf8(text)) return InvalidField(field, "is not valid UTF-8");
  return absl::OkStatus();
}

absl::Status CheckRequestId(std::string_view id) {
  WALSH_RETURN_IF_ERROR(CheckText("request_id", id, limits::kRequestIdBytesMax));
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) {
    return static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
  });
  return printable ? absl::OkStatus() : InvalidField("request_id", "has a control character");
}

template <typename Ids>
absl::Status CheckTokenIds(std::string_view field, const Ids& ids, int64_t n_max) {
  if (ids.size() > n_max) {
    return InvalidField(
        field, absl::StrCat("has ", ids.size(), " entries, at most ", n_max, " are taken"));
  }
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= limits::kVocabMax) {
      return CheckInt(absl::StrCat(std::string(field), "[", i, "]"), ids[i], 0,
                      limits::kVocabMax - 1);
    }
  }
  return absl::OkStatus();
}

template <typename Messages>
absl::Status CheckMessages(std::string_view field, const Messages& messages) {
  const std::string name(field);
  if (messages.empty()) return InvalidField(field, "needs at least one message");
  if (messages.size() > limits::kChatMessagesMax) {
    return InvalidField(field, absl::StrCat("has ", messages.size(), " messages, at most ",
                                            limits::kChatMessagesMax, " are taken"));
  }
  int64_t n_bytes = 0;
  for (int i = 0; i < messages.size(); ++i) {
    const v1::ChatMessage& message = messages[i];
    const std::string item = absl::StrCat(name, "[", i, "]");
    if (message.role().empty()) return InvalidField(item + ".role", "is empty");
    WALSH_RETURN_IF_ERROR(CheckText(item + ".role", message.role(), limits::kChatRoleBytesMax));
    WALSH_RETURN_IF_ERROR(CheckText(item + ".content", message.content(), limits::kPromptBytesMax));
    n_bytes += static_cast<int64_t>(message.content().size());
  }
  if (n_bytes > limits::kPromptBytesMax) {
    return InvalidField(field, absl::StrCat("has ", n_bytes, " bytes of content, at most ",
                                            limits::kPromptBytesMax, " are taken"));
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const v1::SamplingParams& sampling) {
  if (sampling.stop_size() > limits::kStopStringsMax) {
    return InvalidField("sampling.stop",
                        absl::StrCat("has ", sampling.stop_size(), " strings, at most ",
                                     limits::kStopStringsMax, " are taken"));
  }
  for (int i = 0; i < sampling.stop_size(); ++i) {
    const std::string item = absl::StrCat("sampling.stop[", i, "]");
    if (sampling.stop(i).empty()) return InvalidField(item, "is empty");
    WALSH_RETURN_IF_ERROR(CheckText(item, sampling.stop(i), limits::kStopStringBytesMax));
  }
  return CheckTokenIds("sampling.stop_token_ids", sampling.stop_token_ids(),
                       limits::kStopTokensMax);
}

absl::Status CheckModel(const std::string& model) {
  return ParseModelName("model", model).status();
}

}  // namespace

absl::Status ValidateSampling(const v1::SamplingParams& s) {
  const int max_tokens = s.has_max_tokens() ? s.max_tokens() : limits::kNewTokensDefault;
  WALSH_RETURN_IF_ERROR(CheckInt("sampling.max_tokens", max_tokens, 1, limits::kNewTokensMax));
  WALSH_RETURN_IF_ERROR(CheckInt("sampling.min_tokens", s.min_tokens(), 0, max_tokens));
  WALSH_RETURN_IF_ERROR(CheckReal("sampling.temperature", s.temperature(),
                                  {.min = 0, .max = limits::kTemperatureMax}));
  if (s.has_top_p()) {
    WALSH_RETURN_IF_ERROR(
        CheckReal("sampling.top_p", s.top_p(), {.min = 0, .max = 1, .min_excluded = true}));
  }
  WALSH_RETURN_IF_ERROR(
      CheckInt("sampling.top_k", s.top_k(), 0, std::numeric_limits<int32_t>::max()));
  WALSH_RETURN_IF_ERROR(
      CheckReal("sampling.min_p", s.min_p(), {.min = 0, .max = 1, .max_excluded = true}));
  if (s.has_repetition_penalty()) {
    WALSH_RETURN_IF_ERROR(
        CheckReal("sampling.repetition_penalty", s.repetition_penalty(),
                  {.min = 0, .max = limits::kRepetitionPenaltyMax, .min_excluded = true}));
  }
  const Range penalty = {.min = -limits::kPenaltyAbsMax, .max = limits::kPenaltyAbsMax};
  WALSH_RETURN_IF_ERROR(CheckReal("sampling.presence_penalty", s.presence_penalty(), penalty));
  WALSH_RETURN_IF_ERROR(CheckReal("sampling.frequency_penalty", s.frequency_penalty(), penalty));
  WALSH_RETURN_IF_ERROR(CheckStops(s));
  WALSH_RETURN_IF_ERROR(
      CheckInt("sampling.top_logprobs", s.top_logprobs(), 0, limits::kTopLogprobsMax));
  if (s.top_logprobs() > 0 && !s.logprobs()) {
    return InvalidField("sampling.top_logprobs", "needs sampling.logprobs");
  }
  return absl::OkStatus();
}

absl::Status ValidateRequest(const v1::GenerateRequest& request) {
  WALSH_RETURN_IF_ERROR(CheckModel(request.model()));
  WALSH_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  switch (request.input_case()) {
    case v1::GenerateRequest::kPrompt:
      // Empty is BOS alone; whether the model has one is the worker's to know.
      WALSH_RETURN_IF_ERROR(CheckText("prompt", request.prompt(), limits::kPromptBytesMax));
      break;
    case v1::GenerateRequest::kTokenIds:
      if (request.token_ids().ids().empty()) return InvalidField("token_ids", "is empty");
      // A token stands for at least one byte of a prompt.
      WALSH_RETURN_IF_ERROR(
          CheckTokenIds("token_ids", request.token_ids().ids(), limits::kPromptBytesMax));
      break;
    case v1::GenerateRequest::INPUT_NOT_SET:
      return InvalidField("input", "needs prompt or token_ids");
  }
  return ValidateSampling(request.sampling());
}

absl::Status ValidateRequest(const v1::ChatRequest& request) {
  WALSH_RETURN_IF_ERROR(CheckModel(request.model()));
  WALSH_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  WALSH_RETURN_IF_ERROR(CheckMessages("messages", request.messages()));
  return ValidateSampling(request.sampling());
}

absl::Status ValidateRequest(const v1::TokenizeRequest& request) {
  WALSH_RETURN_IF_ERROR(CheckModel(request.model()));
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText:
      return CheckText("text", request.text(), limits::kPromptBytesMax);
    case v1::TokenizeRequest::kMessages:
      return CheckMessages("messages", request.messages().messages());
    case v1::TokenizeRequest::INPUT_NOT_SET:
      break;
  }
  return InvalidField("input", "needs text or messages");
}

absl::Status ValidateRequest(const v1::DetokenizeRequest& request) {
  WALSH_RETURN_IF_ERROR(CheckModel(request.model()));
  return CheckTokenIds("token_ids", request.token_ids(), limits::kPromptBytesMax);
}

}  // namespace walsh
