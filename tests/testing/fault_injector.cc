#include "tests/testing/fault_injector.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "client/child_process.h"
#include "common/check.h"

namespace walsh::testing {

FaultInjector::FaultInjector(const std::string& path_prefix) {
  const int fd = open((dir_ / "plan").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  WALSH_CHECK(fd >= 0 && ftruncate(fd, sizeof(FaultPlan)) == 0);
  void* mapped = mmap(nullptr, sizeof(FaultPlan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  WALSH_CHECK(mapped != MAP_FAILED);
  close(fd);
  plan_ = static_cast<FaultPlan*>(mapped);  // zeros: counts nothing
  WALSH_CHECK(path_prefix.size() < plan_->path_prefix.size());
  std::copy(path_prefix.begin(), path_prefix.end(), plan_->path_prefix.begin());
}

FaultInjector::~FaultInjector() { munmap(plan_, sizeof(FaultPlan)); }

std::map<std::string, std::string> FaultInjector::environment() const {
  return {{"LD_PRELOAD", client::SiblingBinary("libpreloaded_faults.so")},
          {kFaultPlanVariable, dir_ / "plan"}};
}

void FaultInjector::Arm(const Fault& fault) {
  Disarm();
  plan_->calls = fault.calls;
  plan_->error = fault.error;
  plan_->delay_us = absl::ToInt64Microseconds(fault.delay);
  plan_->first = fault.first;
  plan_->last = std::max(fault.first, fault.last);
  plan_->n_calls = 0;
  plan_->n_faults = 0;
  plan_->action = fault.action;
}

void FaultInjector::Disarm() { plan_->action = FaultAction::kNone; }

int FaultStep(int sample) { return std::getenv("WALSH_EVERY_FAULT") != nullptr ? 1 : sample; }

}  // namespace walsh::testing
