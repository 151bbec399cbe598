#include "tests/bench/generation.h"

#include <chrono>
#include <future>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh::bench {
namespace {

constexpr char kText[] =
    "The lighthouse keeper wrote down the weather every evening. He noted the wind, the height of "
    "the waves and the ships that passed, and on most days there was little else to say. When the "
    "fog came in from the north he lit the lamp early and sat by the window until morning. ";

class TimingSink final : public engine::Sink {
 public:
  void OnStarted(double) override {}
  void OnDelta(engine::Delta delta) override {
    const double now =
        std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    for (const int32_t token : delta.tokens) {
      generation_.tokens.push_back(token);
      generation_.token_seconds.push_back(now);
    }
  }
  void OnFinished(const engine::Outcome& outcome) override {
    generation_.outcome = outcome;
    end_.set_value(absl::OkStatus());
  }
  void OnFailed(const absl::Status& status) override { end_.set_value(status); }

  // Once, by the thread that submitted.
  absl::StatusOr<Generation> Wait() {
    WALSH_RETURN_IF_ERROR(end_.get_future().get());
    return std::move(generation_);
  }

 private:
  Generation generation_;  // the engine's until the end
  std::promise<absl::Status> end_;
};

}  // namespace

absl::StatusOr<std::vector<int32_t>> MakePrompt(const engine::ServedModel& model, int64_t n_tokens,
                                                int index) {
  WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> text,
                         model.tokenizer().Encode(
                             kText, {.add_special_tokens = false, .parse_special_tokens = false}));
  if (text.empty()) return absl::InternalError("the tokenizer gave no ids for the prompt's text");
  std::vector<int32_t> prompt(static_cast<size_t>(n_tokens));
  for (size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = text[(i + static_cast<size_t>(index) * 7) % text.size()];
  }
  return prompt;
}

engine::SamplingOptions FixedLength(int max_tokens) {
  return {.max_tokens = max_tokens, .temperature = 0, .ignore_eos = true};
}

absl::StatusOr<std::vector<Generation>> GenerateAll(
    engine::Engine& engine, const std::vector<std::vector<int32_t>>& prompts, int max_tokens) {
  std::vector<std::shared_ptr<TimingSink>> sinks;
  for (const std::vector<int32_t>& prompt : prompts) {
    sinks.push_back(std::make_shared<TimingSink>());
    WALSH_RETURN_IF_ERROR(engine.Submit({.id = absl::StrCat("bench-", sinks.size()),
                                         .prompt = prompt,
                                         .sampling = FixedLength(max_tokens)},
                                        sinks.back()));
  }
  std::vector<Generation> generations;
  for (const auto& sink : sinks) {
    WALSH_ASSIGN_OR_RETURN(Generation generation, sink->Wait());
    generations.push_back(std::move(generation));
  }
  return generations;
}

}  // namespace walsh::bench
