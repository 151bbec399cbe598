#include "client/commands/print_stream.h"

#include <unistd.h>

#include <cstdio>

#include "absl/strings/str_format.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/terminal.h"

namespace walsh::client {

std::string StatsText(const v1::Usage& usage, const v1::Timings& timings, v1::FinishReason reason) {
  return absl::StrFormat("%d tokens after %d of prompt, %s tokens/s, first token after %s, %s",
                         usage.completion_tokens(), usage.prompt_tokens(),
                         SignificantText(timings.tokens_per_second(), 3),
                         SecondsText(timings.time_to_first_token_seconds()),
                         v1::FinishReason_Name(reason));
}

StreamOutcome PrintStream(Interrupts& interrupts, bool stats, const StartStream& start) {
  const bool to_terminal = IsTerminal(STDOUT_FILENO);
  StreamOutcome outcome;
  std::string stats_line;
  Cancellation cancellation;
  const auto print = [&](const v1::GenerateStreamResponse& event) {
    if (event.has_delta() && !event.delta().text().empty()) {
      const std::string& text = event.delta().text();
      outcome.text += text;
      const std::string shown = to_terminal ? SafeText(text) : text;
      std::fwrite(shown.data(), 1, shown.size(), stdout);
      std::fflush(stdout);
    } else if (event.has_finished()) {
      const auto& finished = event.finished();
      stats_line = StatsText(finished.usage(), finished.timings(), finished.finish_reason());
    }
  };
  {
    const Interrupts::Cancels cancels(interrupts, cancellation);
    outcome.status = start(print, &cancellation);
  }
  outcome.cancelled = cancellation.cancelled() && !outcome.status.ok();
  if (!outcome.text.empty() && outcome.text.back() != '\n') std::fputc('\n', stdout);
  std::fflush(stdout);
  if (stats && !stats_line.empty()) std::fprintf(stderr, "[%s]\n", stats_line.c_str());
  return outcome;
}

}  // namespace walsh::client
