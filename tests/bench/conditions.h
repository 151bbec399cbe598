// Under what conditions a figure is measured: without them it is worth nothing.
//
// Threads: used by one.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/status_macros.h"

namespace walsh::bench {

// A line about the machine and the build.
std::string DescribeRun(int n_threads);

// CPU time of this process so far, all threads.
double OwnCpuSeconds();

// CPU time of a process that runs; 0 when there is none.
double CpuSecondsOf(pid_t pid);

// What processes other than this one and its children take of the machine.
class OtherLoad {
 public:
  OtherLoad() : start_(Now()) {}
  // Their share of all CPU time since the start, 0 to 1.
  double Share() const;

 private:
  struct Times {
    double total_seconds = 0;  // of all CPUs, idle or not
    double busy_seconds = 0;
    double own_seconds = 0;
  };
  static Times Now();

  const Times start_;
};

// More than this, and ratios say little: Linux prefers threads that often sleep, and how often they
// do is part of what is compared.
inline constexpr double kOthersMax = 0.05;

template <typename Round>
struct QuietRounds {
  std::vector<Round> rounds;
  int n_tried = 0;
  double others_max = 0;  // during those that are here

  std::string Describe() const;
};

// Rounds until `n_rounds` of them had the machine to themselves or `time_max` is over; then those
// `n_rounds` in which others took least. The choice does not look at what was measured.
// `measure` returns absl::StatusOr<Round>.
template <typename Round, typename Measure>
absl::StatusOr<QuietRounds<Round>> MeasureQuietly(int n_rounds, std::chrono::seconds time_max,
                                                  const Measure& measure) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + time_max;
  std::vector<std::pair<double, Round>> tried;
  int n_quiet = 0;
  while (static_cast<int>(tried.size()) < n_rounds || (n_quiet < n_rounds && Clock::now() < end)) {
    const OtherLoad others;
    WALSH_ASSIGN_OR_RETURN(Round round, measure());
    tried.emplace_back(others.Share(), std::move(round));
    if (tried.back().first <= kOthersMax) ++n_quiet;
  }
  std::stable_sort(tried.begin(), tried.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  QuietRounds<Round> quiet;
  quiet.n_tried = static_cast<int>(tried.size());
  for (int i = 0; i < n_rounds; ++i) {
    quiet.others_max = tried[i].first;
    quiet.rounds.push_back(std::move(tried[i].second));
  }
  return quiet;
}

std::string DescribeRounds(int n_kept, int n_tried, double others_max);

template <typename Round>
std::string QuietRounds<Round>::Describe() const {
  return DescribeRounds(static_cast<int>(rounds.size()), n_tried, others_max);
}

}  // namespace walsh::bench
