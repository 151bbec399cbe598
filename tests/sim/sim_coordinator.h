// A coordinator that is killed and comes back: the real JobQueue, LeaseTable and WorkerRegistry
// behind handlers that do what those of server/api do, without gRPC.
//
// A handler that writes holds the queue until its write is over. While the disk is slow others wait
// for it, but for heartbeats, which never touch the disk.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "google/protobuf/empty.pb.h"
#include "server/fleet/worker_registry.h"
#include "server/jobs/job_queue.h"
#include "tests/sim/faulty_job_store.h"
#include "tests/sim/world.h"
#include "walsh/internal/v1/worker.pb.h"

namespace walsh::sim {

namespace internal_v1 = walsh::internal::v1;
using google::protobuf::Empty;

inline constexpr char kCoordinator[] = "coordinator";
inline constexpr absl::Duration kHeartbeatInterval = absl::Seconds(10);
inline constexpr absl::Duration kLeaseDuration = absl::Seconds(30);

class SimCoordinator {
 public:
  struct Options {
    History::Limits limits;
    // The disk as a new process finds it; outlives that process.
    std::function<jobs::JobStore*()> open_disk;
    bool has_ticks = true;  // false: a bug, that leases are not watched
  };
  SimCoordinator(World* world, Options options) : world_(*world), options_(std::move(options)) {}

  void Start();
  // It comes back by itself.
  void Kill();
  bool is_up() const { return queue_ != nullptr && !process_->store.is_dead(); }

  // -- For workers.
  void Register(const internal_v1::RegisterRequest& request,
                const Reply<internal_v1::RegisterResponse>& reply);
  void AcquireLease(int64_t call, const internal_v1::AcquireLeaseRequest& request,
                    const Reply<internal_v1::AcquireLeaseResponse>& reply);
  // The caller of this call has gone.
  void CancelAcquire(int64_t call);
  void Heartbeat(const internal_v1::HeartbeatRequest& request,
                 const Reply<internal_v1::HeartbeatResponse>& reply);
  void ReportProgress(const internal_v1::ReportProgressRequest& request, const Reply<Empty>& reply);
  void CompleteJob(const internal_v1::CompleteJobRequest& request, const Reply<Empty>& reply);
  void Deregister(const internal_v1::DeregisterRequest& request, const Reply<Empty>& reply);

  // -- For clients. `id` is the job's, should it be new.
  void Submit(const v1::QuantizationJob& job, const std::string& id, const jobs::RequestKey& key,
              const std::string& tenant, const Reply<v1::QuantizationJob>& reply);
  void Cancel(const std::string& id, const Reply<v1::QuantizationJob>& reply);
  void Delete(const std::string& id, const Reply<Empty>& reply);

 private:
  // A worker's call for a job that is not answered yet.
  struct Waiter {
    int64_t call = 0;
    std::string worker_id;
    Reply<internal_v1::AcquireLeaseResponse> reply;
    bool is_over = false;
  };
  // What dies with the process.
  struct Process {
    FaultyJobStore store;
    fleet::WorkerRegistry registry;
  };

  // Runs `handler` when nobody else writes; not at all in a process that dies before.
  void Serve(std::function<void()> handler);
  void ServeBacklog();
  void Die();
  void ComeBackLater();
  // Runs the handler, and answers unless the process died of it.
  template <typename Response>
  void Answer(const Reply<Response>& reply, std::function<absl::StatusOr<Response>()> handler);
  void Tick(int64_t life);
  void TryWaiters();
  void TryWaiter(int64_t number);
  absl::Status Complete(const internal_v1::CompleteJobRequest& request);

  World& world_;
  const Options options_;
  std::unique_ptr<Process> process_;
  std::unique_ptr<jobs::JobQueue> queue_;
  int64_t life_ = 0;
  bool is_busy_ = false;
  std::deque<std::function<void()>> backlog_;
  std::map<int64_t, Waiter> waiters_;
  int64_t n_waiters_ = 0;
  bool has_work_ = false;
};

}  // namespace walsh::sim
