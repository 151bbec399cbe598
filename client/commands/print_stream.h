// Prints a stream of generated text as it comes.
#pragma once

#include <functional>
#include <string>

#include "client/client.h"
#include "client/terminal/interrupts.h"

namespace walsh::client {

struct StreamOutcome {
  absl::Status status;
  std::string text;        // all that came
  bool cancelled = false;  // by Ctrl-C
};

// Runs `start` with a callback that writes to standard output (made harmless when that is a
// terminal); Ctrl-C cancels it. With `stats`, a line of counts and tokens per second goes to
// standard error.
using StartStream = std::function<absl::Status(const Client::OnStreamEvent&, Cancellation*)>;
StreamOutcome PrintStream(Interrupts& interrupts, bool stats, const StartStream& start);

// "128 tokens, 31.2 tokens/s, first token after 0.35 s, ended by EOS"
std::string StatsText(const v1::Usage& usage, const v1::Timings& timings, v1::FinishReason reason);

}  // namespace walsh::client
