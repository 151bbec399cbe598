// One request inside the engine: what it asked for, what it has so far, and when what happened.
//
// Threads: one at a time once the scheduler admitted it: the engine's, or for Sample and MarkToken
//          one of its pool while the engine's waits for it.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "absl/time/time.h"
#include "worker/engine/engine.h"
#include "worker/engine/sampler.h"
#include "worker/engine/served_model.h"
#include "worker/tokenizer/text_stream.h"

namespace walsh::engine {

class Sequence {
 public:
  // `n_new_max` is max_tokens cut to what the context leaves.
  Sequence(Request request, std::shared_ptr<Sink> sink, const ServedModel& model, int64_t n_new_max,
           absl::Duration arrival);

  const Request& request() const { return request_; }
  Sink& sink() { return *sink_; }
  int64_t n_prompt() const { return static_cast<int64_t>(request_.prompt.size()); }
  int64_t n_new_max() const { return n_new_max_; }
  int n_generated() const { return sampler_.n_generated(); }
  // The token at a position of prompt and output.
  int32_t TokenAt(int64_t position) const;

  // What one sampled token means. `finish` is set when it is the last.
  struct Emission {
    Delta delta;
    std::optional<FinishReason> finish;
  };
  // What a step of this runner must make of this sequence for the token that is `n_ahead` behind
  // the next.
  Wanted WantedOf(const ModelRunner& runner, uint64_t n_ahead = 0) const {
    if (!sampler_.needs_logits(n_ahead)) return Wanted::kBest;
    return runner.can_choose(ChoiceOf(n_ahead)) ? Wanted::kChosen : Wanted::kLogits;
  }
  // How that token is chosen. Valid until the next Sample.
  Choice ChoiceOf(uint64_t n_ahead) const { return sampler_.ChoiceOf(n_ahead); }
  // Samples from what the runner's last step made of it, as WantedOf said. An error concerns this
  // sequence alone.
  absl::StatusOr<Emission> Sample(ModelRunner& runner, size_t index);

  // Intervals: queue from arrival to admission, prefill from admission to the first token, decode
  // from the first to the last token; time to first token counts from arrival.
  // `n_cached`: tokens of the prompt that are not computed again.
  void MarkAdmitted(absl::Duration now, int64_t n_cached);
  // Returns the time since the previous token, or nothing for the first.
  std::optional<absl::Duration> MarkToken(absl::Duration now);
  bool is_admitted() const { return admitted_ >= absl::ZeroDuration(); }
  absl::Duration arrival() const { return arrival_; }
  // Text still held back at the end; then the figures.
  std::string FinishText();
  Outcome MakeOutcome(FinishReason reason, absl::Duration now) const;

 private:
  std::optional<FinishReason> EndsWith(int32_t token) const;

  Request request_;
  std::shared_ptr<Sink> sink_;
  int64_t n_new_max_;
  std::vector<int32_t> eos_;
  Sampler sampler_;
  TextStream text_;
  std::vector<int32_t> output_;
  absl::Duration arrival_;
  int64_t n_cached_ = 0;
  absl::Duration admitted_ = -absl::InfiniteDuration();
  absl::Duration first_token_ = absl::InfiniteDuration();
  absl::Duration last_token_ = absl::InfiniteDuration();
};

}  // namespace walsh::engine
