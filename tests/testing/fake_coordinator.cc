#include "tests/testing/fake_coordinator.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/check.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"

namespace walsh::testing {
namespace {

google::protobuf::Duration ToProto(absl::Duration d) {
  google::protobuf::Duration proto;
  proto.set_seconds(absl::IDivDuration(d, absl::Seconds(1), &d));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(d)));
  return proto;
}

grpc::Status UnknownWorker() { return ToGrpcStatus(NotFound("worker", "w")); }

}  // namespace

FakeCoordinator::FakeCoordinator(const Options& options) : options_(options) { Listen(0); }

FakeCoordinator::~FakeCoordinator() { Stop(); }

void FakeCoordinator::Listen(int port) {
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  builder.AddListeningPort(absl::StrCat("127.0.0.1:", port), grpc::InsecureServerCredentials(),
                           &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  WALSH_CHECK(server_ != nullptr);
  address_ = absl::StrCat("127.0.0.1:", port_);
}

void FakeCoordinator::Stop() {
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = true;
    is_registered_ = false;
    changed_.notify_all();
  }
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
}

void FakeCoordinator::Restart() {
  {
    const std::lock_guard lock(mu_);
    is_stopping_ = false;
  }
  Listen(port_);
}

int64_t FakeCoordinator::Offer(const v1::QuantizationJob& job) {
  const std::lock_guard lock(mu_);
  internal::v1::Lease lease;
  lease.set_job_name(job.name());
  lease.set_fencing_token(next_token_++);
  *lease.mutable_duration() = ToProto(options_.lease_duration);
  *lease.mutable_job() = job;
  offers_.push_back(lease);
  is_cancelling_ = is_lost_ = false;
  changed_.notify_all();
  return lease.fencing_token();
}

void FakeCoordinator::CancelJob() {
  const std::lock_guard lock(mu_);
  is_cancelling_ = true;
}

void FakeCoordinator::LoseLease() {
  const std::lock_guard lock(mu_);
  is_lost_ = true;
}

void FakeCoordinator::ForgetWorkers() {
  const std::lock_guard lock(mu_);
  is_registered_ = false;
  changed_.notify_all();
}

void FakeCoordinator::set_on_report(ReportHook hook) {
  const std::lock_guard lock(mu_);
  on_report_ = std::move(hook);
}

void FakeCoordinator::set_on_complete(CompleteHook hook) {
  const std::lock_guard lock(mu_);
  on_complete_ = std::move(hook);
}

void FakeCoordinator::set_on_drain(std::function<void()> hook) {
  const std::lock_guard lock(mu_);
  on_drain_ = std::move(hook);
}

FakeCoordinator::Record FakeCoordinator::record() const {
  const std::lock_guard lock(mu_);
  return record_;
}

bool FakeCoordinator::WaitFor(const std::function<bool(const Record&)>& predicate,
                              absl::Duration timeout) const {
  std::unique_lock lock(mu_);
  return changed_.wait_for(lock, absl::ToChronoMicroseconds(timeout),
                           [&] { return predicate(record_); });
}

grpc::Status FakeCoordinator::Register(grpc::ServerContext*,
                                       const internal::v1::RegisterRequest* request,
                                       internal::v1::RegisterResponse* response) {
  const std::lock_guard lock(mu_);
  record_.registrations.push_back(*request);
  is_registered_ = true;
  *response->mutable_heartbeat_interval() = ToProto(options_.heartbeat_interval);
  *response->mutable_lease_duration() = ToProto(options_.lease_duration);
  changed_.notify_all();
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::AcquireLease(grpc::ServerContext* context,
                                           const internal::v1::AcquireLeaseRequest* request,
                                           internal::v1::AcquireLeaseResponse* response) {
  std::unique_lock lock(mu_);
  const absl::Time end = absl::Now() + absl::Seconds(request->wait().seconds()) +
                         absl::Nanoseconds(request->wait().nanos());
  while (!is_stopping_ && !context->IsCancelled() && absl::Now() < end) {
    if (!is_registered_) return UnknownWorker();
    if (!offers_.empty()) {
      *response->mutable_lease() = offers_.front();
      offers_.erase(offers_.begin());
      break;
    }
    changed_.wait_for(lock, std::chrono::milliseconds(10));
  }
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::Heartbeat(grpc::ServerContext*,
                                        const internal::v1::HeartbeatRequest* request,
                                        internal::v1::HeartbeatResponse* response) {
  const std::lock_guard lock(mu_);
  record_.heartbeats.push_back(*request);
  changed_.notify_all();
  if (!is_registered_) return UnknownWorker();
  response->set_lease_valid(!request->job_name().empty() && !is_lost_);
  response->set_cancel_job(is_cancelling_);
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::ReportProgress(grpc::ServerContext*,
                                             const internal::v1::ReportProgressRequest* request,
                                             google::protobuf::Empty*) {
  ReportHook hook;
  {
    const std::lock_guard lock(mu_);
    record_.reports.push_back(*request);
    changed_.notify_all();
    hook = on_report_;
  }
  return ToGrpcStatus(hook ? hook(*request) : absl::OkStatus());
}

grpc::Status FakeCoordinator::CompleteJob(grpc::ServerContext*,
                                          const internal::v1::CompleteJobRequest* request,
                                          google::protobuf::Empty*) {
  CompleteHook hook;
  {
    const std::lock_guard lock(mu_);
    record_.completions.push_back(*request);
    changed_.notify_all();
    hook = on_complete_;
  }
  return ToGrpcStatus(hook ? hook(*request) : absl::OkStatus());
}

grpc::Status FakeCoordinator::Drain(grpc::ServerContext*, const internal::v1::DrainRequest* request,
                                    google::protobuf::Empty*) {
  std::function<void()> hook;
  {
    const std::lock_guard lock(mu_);
    record_.drains.push_back(*request);
    changed_.notify_all();
    hook = on_drain_;
  }
  if (hook) hook();
  return grpc::Status::OK;
}

grpc::Status FakeCoordinator::Deregister(grpc::ServerContext*,
                                         const internal::v1::DeregisterRequest* request,
                                         google::protobuf::Empty*) {
  const std::lock_guard lock(mu_);
  record_.goodbyes.push_back(*request);
  changed_.notify_all();
  return grpc::Status::OK;
}

}  // namespace walsh::testing
