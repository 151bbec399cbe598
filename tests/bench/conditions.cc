#include "tests/bench/conditions.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
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

// Of children that were waited for, and of those that run.
double ChildrenCpuSeconds() {
  double seconds = CpuSeconds(RUSAGE_CHILDREN);
  const std::string self = absl::StrCat(getpid());
  std::ifstream children("/proc/self/task/" + self + "/children");
  for (pid_t pid = 0; children >> pid;) seconds += CpuSecondsOf(pid);
  return seconds;
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

double CpuSecondsOf(pid_t pid) {
  // proc(5): utime and stime are the fields 14 and 15, and the second one, in parentheses, may hold
  // anything.
  std::ifstream stat(absl::StrCat("/proc/", pid, "/stat"));
  const std::string text(std::istreambuf_iterator<char>(stat), {});
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream fields(text.substr(name_end + 1));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  double user_ticks = 0;
  double system_ticks = 0;
  fields >> user_ticks >> system_ticks;
  return (user_ticks + system_ticks) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

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
  times.own_seconds = OwnCpuSeconds() + ChildrenCpuSeconds();
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

std::string DescribeRounds(int n_kept, int n_tried, double others_max) {
  return absl::StrFormat("%d rounds of %d; other processes took at most %.0f %% of the CPUs%s",
                         n_kept, n_tried, 100 * others_max,
                         others_max > kOthersMax ? ": THE MACHINE WAS BUSY" : "");
}

}  // namespace walsh::bench
