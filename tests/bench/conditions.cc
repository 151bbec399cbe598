#include "tests/bench/conditions.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "common/version.h"
#include "worker/kernels/kernels.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::bench {
namespace {

double CpuSeconds(int who) {
  rusage usage{};
  getrusage(who, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::string CpuName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown CPU";
}

}  // namespace

double OwnCpuSeconds() { return CpuSeconds(RUSAGE_SELF); }

OtherLoad::Times OtherLoad::Now() {
  // proc(5): user nice system idle iowait irq softirq steal, in ticks.
  constexpr int kFields = 8;
  constexpr int kIdle = 3;
  constexpr int kIoWait = 4;
  std::ifstream stat("/proc/stat");
  std::string name;
  stat >> name;
  const auto ticks_per_second = static_cast<double>(sysconf(_SC_CLK_TCK));
  Times times;
  double ticks = 0;
  for (int i = 0; i < kFields && stat >> ticks; ++i) {
    times.total_seconds += ticks / ticks_per_second;
    if (i != kIdle && i != kIoWait) times.busy_seconds += ticks / ticks_per_second;
  }
  times.own_seconds = OwnCpuSeconds() + CpuSeconds(RUSAGE_CHILDREN);
  return times;
}

double OtherLoad::Share() const {
  const Times now = Now();
  const double total = now.total_seconds - start_.total_seconds;
  const double others =
      (now.busy_seconds - start_.busy_seconds) - (now.own_seconds - start_.own_seconds);
  // Ticks are coarse: next to nothing may come out below nothing.
  return total > 0 ? std::clamp(others / total, 0.0, 1.0) : 0;
}

std::string DescribeRun(int n_threads) {
  return absl::StrCat(CpuName(), ", ", ThreadPool::HardwareThreads(), " CPUs; ", n_threads,
                      " threads, ", kernels::DescribeCpuBackend(), "; revision ",
                      std::string(Revision()));
}

}  // namespace walsh::bench
