#include "worker/engine/sequence.h"

#include <algorithm>
#include <utility>

namespace walsh::engine {
namespace {

bool Contains(const std::vector<int32_t>& tokens, int32_t token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

}  // namespace

Sequence::Sequence(Request request, std::shared_ptr<Sink> sink, const ServedModel& model,
                   int64_t n_new_max, absl::Duration arrival)
    : request_(std::move(request)),
      sink_(std::move(sink)),
      n_new_max_(n_new_max),
      eos_(model.EndTokens()),
      sampler_(request_.sampling, request_.prompt, eos_),
      text_(&model.tokenizer(), {.skip_special_tokens = request_.sampling.skip_special_tokens,
                                 .stop = request_.sampling.stop,
                                 .include_stop = request_.sampling.include_stop}),
      arrival_(arrival) {}

int32_t Sequence::TokenAt(int64_t position) const {
  return position < n_prompt() ? request_.prompt[position] : output_[position - n_prompt()];
}

absl::StatusOr<Sequence::Emission> Sequence::Sample(ModelRunner& runner, size_t index) {
  absl::StatusOr<TokenLogprob> sampled = WantedOf(runner) == Wanted::kLogits
                                             ? sampler_.Sample(runner.logits(index))
                                             : sampler_.Take(runner.chosen(index));
  if (!sampled.ok()) return sampled.status();
  const int32_t token = sampled->token;
  output_.push_back(token);
  Emission emission;
  emission.delta.tokens.push_back(token);
  if (request_.sampling.logprobs) emission.delta.logprobs.push_back(*std::move(sampled));
  emission.finish = EndsWith(token);
  // A token that ends the output is counted, but its text is shown on request only.
  if (!emission.finish || request_.sampling.include_stop) {
    emission.delta.text = text_.Append(token);
    if (!text_.matched_stop().empty()) emission.finish = FinishReason::kStopString;
  }
  if (!emission.finish && n_generated() >= n_new_max_) emission.finish = FinishReason::kLength;
  if (emission.finish) emission.delta.text += FinishText();
  return emission;
}

std::optional<FinishReason> Sequence::EndsWith(int32_t token) const {
  if (!request_.sampling.ignore_eos && Contains(eos_, token)) return FinishReason::kEos;
  if (Contains(request_.sampling.stop_tokens, token)) return FinishReason::kStopToken;
  return std::nullopt;
}

void Sequence::MarkAdmitted(absl::Duration now, int64_t n_cached) {
  admitted_ = now;
  n_cached_ = n_cached;
}

std::optional<absl::Duration> Sequence::MarkToken(absl::Duration now) {
  std::optional<absl::Duration> interval;
  if (n_generated() <= 1) {
    first_token_ = now;
  } else {
    interval = now - last_token_;
  }
  last_token_ = now;
  return interval;
}

std::string Sequence::FinishText() { return text_.Finish(); }

Outcome Sequence::MakeOutcome(FinishReason reason, absl::Duration now) const {
  Outcome outcome;
  outcome.reason = reason;
  outcome.matched_stop = text_.matched_stop();
  outcome.prompt_tokens = static_cast<int>(n_prompt());
  outcome.completion_tokens = n_generated();
  outcome.cached_tokens = static_cast<int>(n_cached_);
  outcome.queue_seconds = absl::ToDoubleSeconds((is_admitted() ? admitted_ : now) - arrival_);
  if (n_generated() > 0) {
    outcome.ttft_seconds = absl::ToDoubleSeconds(first_token_ - arrival_);
    outcome.prefill_seconds = absl::ToDoubleSeconds(first_token_ - admitted_);
    outcome.decode_seconds = absl::ToDoubleSeconds(last_token_ - first_token_);
  }
  return outcome;
}

}  // namespace walsh::engine
