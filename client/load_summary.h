// What a run of requests shows: rates, and how the times that people wait are distributed.
//
//   time to first token    from when a request was due to the first message with a token
//   inter-token latency    between two tokens; those that came in one message share its gap
//   time per output token  (last token − first token) / (tokens − 1), of requests of two or more
//   request latency        from when it was due to its end
//
// Only requests that ended well count; those that failed are counted by their code.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/load_generator.h"

namespace walsh::client {

// Seconds; all 0 when there is nothing.
struct Distribution {
  double mean = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;
};
// A value that stands for `count` equal ones.
struct Repeated {
  double seconds = 0;
  int64_t count = 1;
};
// Percentiles between two values are interpolated linearly.
Distribution DistributionOf(std::vector<Repeated> values);

struct LoadSummary {
  int64_t n_done = 0;
  struct Failures {
    int64_t count = 0;
    std::string example;  // the first message
  };
  std::map<absl::StatusCode, Failures> failures;
  double seconds = 0;
  int concurrency_peak = 0;
  int64_t n_unsent = 0;
  bool is_stopped = false;
  int64_t n_prompt_tokens = 0, n_output_tokens = 0;
  Distribution time_to_first_token, inter_token_latency, time_per_output_token, request_latency;

  int64_t n_failed() const;
  double PerSecond(int64_t n) const { return seconds > 0 ? static_cast<double>(n) / seconds : 0; }
};
LoadSummary Summarize(const LoadResult& result);

}  // namespace walsh::client
