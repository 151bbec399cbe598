// Under what conditions a figure was measured: without them it is worth nothing.
//
// Threads: used by one.
#pragma once

#include <string>

namespace walsh::bench {

// CPU time of this process so far, all threads.
double OwnCpuSeconds();

// What other processes take of the machine while this object lives.
class OtherLoad {
 public:
  OtherLoad() : start_(Now()) {}
  // Their share of all CPU time since the start, 0 to 1. Children count as this process once they
  // were waited for, so ask then.
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

// A line about the machine and the build.
std::string DescribeRun(int n_threads);

}  // namespace walsh::bench
