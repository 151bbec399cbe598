#include "client/load_summary.h"

#include <algorithm>
#include <numeric>

namespace walsh::client {
namespace {

// Of sorted values, at least one.
double Percentile(const std::vector<double>& sorted, double share) {
  const double position = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

Distribution DistributionOf(std::vector<double> seconds) {
  if (seconds.empty()) return {};
  std::sort(seconds.begin(), seconds.end());
  const double sum = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  return {.mean = sum / static_cast<double>(seconds.size()),
          .p50 = Percentile(seconds, 0.5),
          .p90 = Percentile(seconds, 0.9),
          .p99 = Percentile(seconds, 0.99),
          .max = seconds.back()};
}

int64_t LoadSummary::n_failed() const {
  int64_t n = 0;
  for (const auto& [code, failed] : failures) n += failed.count;
  return n;
}

LoadSummary Summarize(const LoadResult& result) {
  LoadSummary summary{.seconds = absl::ToDoubleSeconds(result.elapsed),
                      .concurrency_peak = result.concurrency_peak,
                      .is_stopped = result.is_stopped};
  std::vector<double> first, gaps, per_token, whole;
  for (const RequestRecord& request : result.requests) {
    // What Ctrl-C ended says nothing of the service.
    if (result.is_stopped && absl::IsCancelled(request.status)) continue;
    if (!request.status.ok()) {
      LoadSummary::Failures& failures = summary.failures[request.status.code()];
      if (failures.count++ == 0) failures.example = std::string(request.status.message());
      continue;
    }
    ++summary.n_done;
    summary.n_prompt_tokens += request.n_prompt_tokens;
    summary.n_output_tokens += request.n_output_tokens;
    whole.push_back(absl::ToDoubleSeconds(request.end - request.due));
    if (request.n_output_tokens == 0) continue;
    first.push_back(absl::ToDoubleSeconds(request.first_token - request.due));
    for (const absl::Duration gap : request.token_gaps) gaps.push_back(absl::ToDoubleSeconds(gap));
    if (request.n_output_tokens < 2) continue;
    per_token.push_back(absl::ToDoubleSeconds(request.last_token - request.first_token) /
                        static_cast<double>(request.n_output_tokens - 1));
  }
  summary.time_to_first_token = DistributionOf(std::move(first));
  summary.inter_token_latency = DistributionOf(std::move(gaps));
  summary.time_per_output_token = DistributionOf(std::move(per_token));
  summary.request_latency = DistributionOf(std::move(whole));
  return summary;
}

}  // namespace walsh::client
