#include "worker/service/exclusive_use.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"

namespace walsh::service {
namespace {

constexpr absl::Duration kRetryDelay = absl::Seconds(5);

}  // namespace

bool ExclusiveUse::BeginAsking(absl::Duration at_most) {
  std::unique_lock lock(mu_);
  is_asking_ = changed_.wait_for(lock, absl::ToChronoMicroseconds(at_most),
                                 [this] { return n_models_ == 0; });
  return is_asking_;
}

void ExclusiveUse::BeginJob(std::string job_name) {
  const std::lock_guard lock(mu_);
  is_asking_ = false;
  job_name_ = std::move(job_name);
  changed_.notify_all();
}

void ExclusiveUse::EndJob() {
  const std::lock_guard lock(mu_);
  is_asking_ = false;
  job_name_.clear();
  changed_.notify_all();
}

absl::Status ExclusiveUse::BeginModel() {
  std::unique_lock lock(mu_);
  ++n_models_;
  changed_.wait(lock, [this] { return !is_asking_; });
  if (job_name_.empty()) return absl::OkStatus();
  --n_models_;
  changed_.notify_all();
  absl::Status status =
      absl::UnavailableError(absl::StrCat(job_name_,
                                          " runs on this worker, which loads no model meanwhile "
                                          "(--serve-while-quantizing exclusive)"));
  SetErrorInfo(status, "JOB_RUNNING", {{"job", job_name_}});
  SetRetryDelay(status, kRetryDelay);
  return status;
}

void ExclusiveUse::EndModel() {
  const std::lock_guard lock(mu_);
  --n_models_;
  changed_.notify_all();
}

}  // namespace walsh::service
