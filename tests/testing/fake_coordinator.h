// A coordinator for tests of workers: walsh.internal.v1.WorkerService on loopback, with every
// answer in the test's hands and everything that a worker said on record.
//
// Threads: safe.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "walsh/internal/v1/worker.grpc.pb.h"

namespace grpc {
class Server;
}

namespace walsh::testing {

class FakeCoordinator final : public internal::v1::WorkerService::Service {
 public:
  struct Options {
    absl::Duration heartbeat_interval = absl::Milliseconds(50);
    absl::Duration lease_duration = absl::Seconds(30);
  };
  FakeCoordinator() : FakeCoordinator(Options{}) {}
  explicit FakeCoordinator(const Options& options);
  ~FakeCoordinator() override;

  const std::string& address() const { return address_; }
  // Takes the port away and gives it back: what workers see of a restart. Registrations are
  // forgotten.
  void Stop();
  void Restart();

  // Queues a job; the next call to AcquireLease gets it. The fencing token.
  int64_t Offer(const v1::QuantizationJob& job);
  // The heartbeat's answers for the job that is leased.
  void CancelJob();
  void LoseLease();
  // The worker is unknown until it registers again.
  void ForgetWorkers();
  // What ReportProgress and CompleteJob answer from now on; OK by default.
  using ReportHook = std::function<absl::Status(const internal::v1::ReportProgressRequest&)>;
  using CompleteHook = std::function<absl::Status(const internal::v1::CompleteJobRequest&)>;
  void set_on_report(ReportHook hook);
  void set_on_complete(CompleteHook hook);
  // Runs before Drain is answered.
  void set_on_drain(std::function<void()> hook);

  // Everything that was received, OK or not.
  struct Record {
    std::vector<internal::v1::RegisterRequest> registrations;
    std::vector<internal::v1::HeartbeatRequest> heartbeats;
    std::vector<internal::v1::ReportProgressRequest> reports;
    std::vector<internal::v1::CompleteJobRequest> completions;
    std::vector<internal::v1::DrainRequest> drains;
    std::vector<internal::v1::DeregisterRequest> goodbyes;
  };
  Record record() const;
  // False when the record does not come to satisfy the predicate within the time.
  bool WaitFor(const std::function<bool(const Record&)>& predicate,
               absl::Duration timeout = absl::Seconds(60)) const;

  grpc::Status Register(grpc::ServerContext* context, const internal::v1::RegisterRequest* request,
                        internal::v1::RegisterResponse* response) override;
  grpc::Status AcquireLease(grpc::ServerContext* context,
                            const internal::v1::AcquireLeaseRequest* request,
                            internal::v1::AcquireLeaseResponse* response) override;
  grpc::Status Heartbeat(grpc::ServerContext* context,
                         const internal::v1::HeartbeatRequest* request,
                         internal::v1::HeartbeatResponse* response) override;
  grpc::Status ReportProgress(grpc::ServerContext* context,
                              const internal::v1::ReportProgressRequest* request,
                              google::protobuf::Empty* response) override;
  grpc::Status CompleteJob(grpc::ServerContext* context,
                           const internal::v1::CompleteJobRequest* request,
                           google::protobuf::Empty* response) override;
  grpc::Status Drain(grpc::ServerContext* context, const internal::v1::DrainRequest* request,
                     google::protobuf::Empty* response) override;
  grpc::Status Deregister(grpc::ServerContext* context,
                          const internal::v1::DeregisterRequest* request,
                          google::protobuf::Empty* response) override;

 private:
  void Listen(int port);

  const Options options_;
  std::string address_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;

  mutable std::mutex mu_;
  mutable std::condition_variable changed_;
  Record record_;
  bool is_stopping_ = false;
  bool is_registered_ = false;
  int64_t next_token_ = 1;
  std::vector<internal::v1::Lease> offers_;
  bool is_cancelling_ = false;
  bool is_lost_ = false;
  ReportHook on_report_;
  CompleteHook on_complete_;
  std::function<void()> on_drain_;
};

}  // namespace walsh::testing
