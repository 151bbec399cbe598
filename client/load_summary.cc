#include "client/load_summary.h"

#include <algorithm>

namespace walsh::client {
namespace {

// Of sorted values, `n` with their counts, at least one.
double Percentile(const std::vector<Repeated>& sorted, int64_t n, double share) {
  const double position = share * static_cast<double>(n - 1);
  const auto rank = static_cast<int64_t>(position);
  size_t i = 0;
  int64_t n_through = sorted[0].count;  // values up to the i-th
  while (rank >= n_through) n_through += sorted[++i].count;
  const bool is_last_of_equals = rank + 1 == n_through && i + 1 < sorted.size();
  const double above = sorted[is_last_of_equals ? i + 1 : i].seconds;
  return sorted[i].seconds + (position - static_cast<double>(rank)) * (above - sorted[i].seconds);
}

}  // namespace

Distribution DistributionOf(std::vector<Repeated> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end(),
            [](const Repeated& a, const Repeated& b) { return a.seconds < b.seconds; });
  int64_t n = 0;
  double sum = 0;
  for (const Repeated& value : values) {
    n += value.count;
    sum += value.seconds * static_cast<double>(value.count);
  }
  return {.mean = sum / static_cast<double>(n),
          .p50 = Percentile(values, n, 0.5),
          .p90 = Percentile(values, n, 0.9),
          .p99 = Percentile(values, n, 0.99),
          .max = values.back().seconds};
}

int64_t LoadSummary::n_failed() const {
  int64_t n = 0;
  for (const auto& [code, failed] : failures) n += failed.count;
  return n;
}

LoadSummary Summarize(const LoadResult& result) {
  LoadSummary summary{.seconds = absl::ToDoubleSeconds(result.elapsed),
                      .concurrency_peak = result.concurrency_peak,
                      .n_unsent = result.n_unsent,
                      .is_stopped = result.is_stopped};
  std::vector<Repeated> first, gaps, per_token, whole;
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
    whole.push_back({absl::ToDoubleSeconds(request.end - request.due)});
    if (request.n_output_tokens == 0) continue;
    first.push_back({absl::ToDoubleSeconds(request.first_token - request.due)});
    for (const auto& gap : request.token_gaps) gaps.push_back({gap.seconds, gap.n_tokens});
    if (request.n_output_tokens < 2) continue;
    per_token.push_back({absl::ToDoubleSeconds(request.last_token - request.first_token) /
                         static_cast<double>(request.n_output_tokens - 1)});
  }
  summary.time_to_first_token = DistributionOf(std::move(first));
  summary.inter_token_latency = DistributionOf(std::move(gaps));
  summary.time_per_output_token = DistributionOf(std::move(per_token));
  summary.request_latency = DistributionOf(std::move(whole));
  return summary;
}

}  // namespace walsh::client
