#include "server/server.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/grpc_server.h"
#include "common/grpc_status.h"
#include "common/http_server.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "server/access/access_control.h"
#include "server/api/call.h"
#include "server/api/core.h"
#include "server/api/evaluation_service.h"
#include "server/api/external_scaler_service.h"
#include "server/api/generation_service.h"
#include "server/api/model_service.h"
#include "server/api/quantization_service.h"
#include "server/api/worker_service.h"
#include "server/fleet/fleet_metrics.h"
#include "server/jobs/leadership.h"
#include "server/jobs/sql_job_store.h"

namespace walsh {
namespace {

constexpr absl::Duration kTickInterval = absl::Milliseconds(250);
// After the calls' time: for those that it has ended to say why.
constexpr absl::Duration kLastWords = absl::Seconds(2);
// A leader whose database does not answer goes on serving models for so long. It is longer than
// databases take to restart or to fail over, and bounds how long one that only it cannot reach is
// served by two.
constexpr absl::Duration kUnconfirmedMax = absl::Seconds(60);

// Held while the process lives; the system gives it back however the process ends.
class FileLock {
 public:
  ~FileLock() {
    if (fd_ >= 0) close(fd_);
  }
  // `what` it is the lock of, for the error.
  absl::Status Take(const std::string& path, const std::string& what) {
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd_ < 0) return ErrnoStatus(errno, "opening the lock of the " + what);
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError(
          "another coordinator uses this data folder or job store");
    }
    return absl::OkStatus();
  }

 private:
  int fd_ = -1;
};

// For people who read logs.
std::string ProcessName() {
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat(host, ":", getpid());
}

prometheus::Gauge& LeadsGauge() {
  static auto& family =
      metrics::Gauge("walsh_coordinator_leads", "Whether it leads and answers every port.");
  return family.Add({});
}

}  // namespace

struct Server::Impl {
  explicit Impl(const ServerOptions& server_options)
      : options(server_options),
        executor(Executor::Options()),
        registry(Clock::Real(), {.offline_after = options.lease_duration}) {}

  absl::Status Open();
  // What Lead does where it has to wait for its turn.
  absl::Status LeadInTurn();
  absl::Status Serve();
  absl::Status OpenStore();
  absl::Status WaitToLead();
  void KeepLeading();
  void LoseLeadership(const absl::Status& why);
  void Resign();
  absl::Status Listen();
  absl::Status ListenHttp();
  absl::StatusOr<std::unique_ptr<grpc::Server>> StartGrpc(
      const std::string& name, int port, const std::vector<grpc::Service*>& services,
      bool is_public);
  void WarnIfOpen() const;
  void SetServing(bool is_serving);
  void Tick();
  void UpdateModelHealth();
  void Stop(absl::Duration timeout);

  const ServerOptions options;
  Endpoints endpoints;
  FileLock lock;
  FileLock store_lock;  // of a file elsewhere
  Executor executor;
  // With PostgreSQL only; of LeadInTurn's thread, then of `keeper`, then of Stop.
  std::unique_ptr<jobs::Leadership> leadership;
  int64_t epoch = 0;  // 0: has never led
  std::thread keeper;
  std::atomic<bool> is_leadership_lost{false};
  std::unique_ptr<jobs::SqlJobStore> store;
  jobs::JobMetrics job_metrics;
  std::unique_ptr<jobs::JobQueue> queue;
  fleet::WorkerRegistry registry;
  std::unique_ptr<fleet::ModelCatalog> catalog;
  std::unique_ptr<DaemonSecurity> security;
  std::unique_ptr<access::AccessControl> access;
  fleet::WorkerClients clients{[this] { return security->to_worker(); }};
  std::unique_ptr<api::Core> core;
  std::unique_ptr<api::QuantizationServiceImpl> quantization;
  std::unique_ptr<api::ModelServiceImpl> models;
  std::unique_ptr<api::GenerationServiceImpl> generation;
  std::unique_ptr<api::EvaluationServiceImpl> evaluation;
  std::unique_ptr<api::WorkerServiceImpl> workers;
  std::unique_ptr<api::ExternalScalerServiceImpl> scaler;
  std::unique_ptr<grpc::Server> public_server;
  std::unique_ptr<grpc::Server> internal_server;
  std::atomic<bool> takes_calls{false};
  absl::Notification stopping;
  absl::Mutex lead_mu;               // held by LeadInTurn, for which Stop waits
  std::unique_ptr<HttpServer> http;  // its probes look at all of the above
  std::unique_ptr<HttpServer> metrics_http;
  std::set<std::string> ready_models;  // touched by Tick only
};

void Server::Impl::WarnIfOpen() const {
  if (IsLoopbackHost(options.host)) return;
  if (!access->has_keys() && options.security.tls.client_ca.empty()) {
    WALSH_LOG(Warning, "whoever reaches the public port may use it: no --api-keys-file",
              {"host", options.host});
  }
  if (options.security.worker_token_file.empty() && options.security.tls.ca.empty()) {
    WALSH_LOG(Warning, "whoever reaches the internal port may be a worker: no --worker-token-file",
              {"host", options.host});
  }
}

absl::Status Server::Impl::Open() {
  WALSH_ASSIGN_OR_RETURN(security, DaemonSecurity::Open(options.security));
  WALSH_ASSIGN_OR_RETURN(access, access::AccessControl::Open(options.api_keys_file));
  WarnIfOpen();
  WALSH_RETURN_IF_ERROR(MakeDirectories(options.data_dir));
  WALSH_RETURN_IF_ERROR(lock.Take(options.data_dir + "/coordinator.lock", "data folder"));
  LeadsGauge().Set(0);
  if (!options.postgres_uri.empty()) {
    WALSH_ASSIGN_OR_RETURN(
        leadership, jobs::Leadership::Open(options.postgres_uri, ProcessName(), Clock::Real()));
  }
  return ListenHttp();
}

absl::Status Server::Impl::LeadInTurn() {
  const absl::MutexLock turn(&lead_mu);
  WALSH_RETURN_IF_ERROR(WaitToLead());
  return Serve();
}

absl::Status Server::Impl::WaitToLead() {
  std::string leader;
  absl::Status failure;
  while (!stopping.HasBeenNotified()) {
    const absl::StatusOr<bool> leads = leadership->TryToLead();
    if (leads.ok() && *leads) {
      epoch = leadership->epoch();
      WALSH_LOG(Info, "leads", {"epoch", epoch});
      // From now on, as what follows may take its time.
      keeper = std::thread([this] { KeepLeading(); });
      return absl::OkStatus();
    }
    if (leads.ok() && std::exchange(leader, leadership->leader()) != leadership->leader()) {
      WALSH_LOG(Info, "stands by", {"leader", leader});
    }
    if (std::exchange(failure, leads.status()) != failure && !failure.ok()) {
      WALSH_LOG(Warning, "cannot see who leads", {"status", failure});
    }
    stopping.WaitForNotificationWithTimeout(jobs::Leadership::kLookInterval);
  }
  return absl::CancelledError("stopped before its turn to lead");
}

void Server::Impl::KeepLeading() {
  const Clock* clock = Clock::Real();
  absl::Duration confirmed = clock->Monotonic();
  while (!stopping.WaitForNotificationWithTimeout(jobs::Leadership::kRenewInterval)) {
    const absl::Duration start = clock->Monotonic();
    const absl::Status renewed = leadership->Renew();
    if (renewed.ok()) {
      confirmed = start;
    } else if (ErrorReason(renewed) == "NOT_LEADER" ||
               clock->Monotonic() - confirmed > kUnconfirmedMax) {
      return LoseLeadership(renewed);
    }
  }
}

void Server::Impl::LoseLeadership(const absl::Status& why) {
  // One that stops has given it up itself.
  if (stopping.HasBeenNotified() || is_leadership_lost.exchange(true)) return;
  takes_calls = false;
  LeadsGauge().Set(0);
  WALSH_LOG(Error, "no longer leads", {"epoch", epoch}, {"status", why});
  if (options.on_leadership_lost) options.on_leadership_lost(why);
}

// The next leader need not wait for the calls that still run here. Workers are sent to it at once:
// nothing that they report could be stored.
void Server::Impl::Resign() {
  if (keeper.joinable()) keeper.join();
  if (epoch == 0) return;
  LeadsGauge().Set(0);
  if (const absl::Status resigned = leadership->Resign(); !resigned.ok()) {
    WALSH_LOG(Warning, "the next leader has to wait", {"status", resigned});
  }
  if (internal_server != nullptr) internal_server->Shutdown(absl::ToChronoTime(absl::Now()));
}

absl::Status Server::Impl::OpenStore() {
  if (leadership == nullptr) {
    std::string path = options.data_dir + "/coordinator.db";
    if (!options.sqlite_path.empty()) {
      path = options.sqlite_path;
      WALSH_RETURN_IF_ERROR(store_lock.Take(path + ".lock", "job store"));
    }
    WALSH_ASSIGN_OR_RETURN(store, jobs::SqlJobStore::OpenSqlite(path, Clock::Real()));
    return absl::OkStatus();
  }
  const jobs::WriteFence fence = {
      .epoch = epoch, .on_lost = [this](const absl::Status& why) { LoseLeadership(why); }};
  WALSH_ASSIGN_OR_RETURN(
      store, jobs::SqlJobStore::OpenPostgres(options.postgres_uri, fence, Clock::Real()));
  return absl::OkStatus();
}

absl::Status Server::Impl::Serve() {
  WALSH_RETURN_IF_ERROR(OpenStore());
  WALSH_ASSIGN_OR_RETURN(queue, jobs::JobQueue::Open(store.get(), Clock::Real(),
                                                     {.lease_duration = options.lease_duration,
                                                      .queued_jobs_max = options.queued_jobs_max},
                                                     &job_metrics));
  WALSH_ASSIGN_OR_RETURN(catalog, fleet::ModelCatalog::Open(store.get(), &registry, Clock::Real()));
  core = std::make_unique<api::Core>();
  core->executor = &executor;
  core->clock = Clock::Real();
  core->access = access.get();
  core->queue = queue.get();
  core->registry = &registry;
  core->catalog = catalog.get();
  core->clients = &clients;
  core->lease_duration = options.lease_duration;
  core->heartbeat_interval = options.heartbeat_interval;
  core->watch_heartbeat = options.watch_heartbeat;
  core->validation_max = options.validation_max;
  core->call_timeout = options.call_timeout;
  core->stream_limits.stall_max = options.stream_stall_max;
  return Listen();
}

absl::StatusOr<std::unique_ptr<grpc::Server>> Server::Impl::StartGrpc(
    const std::string& name, int port, const std::vector<grpc::Service*>& services,
    bool is_public) {
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  AddServerInterceptors(builder);
  const bool has_reflection = is_public && options.enable_reflection;
  if (!has_reflection) DisableReflection(builder);
  int bound_port = 0;
  builder.AddListeningPort(
      HostPort(options.host, port),
      MakeServerCredentials(
          is_public ? security->public_port(access->check())
                    // KEDA has no secret to show.
                    : security->internal_port(externalscaler::ExternalScaler::service_full_name())),
      &bound_port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || bound_port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", HostPort(options.host, port), " (", name, " gRPC port)"));
  }
  endpoints[name] = HostPort(options.host, bound_port);
  WALSH_LOG(Info, "listening", {"port", name}, {"address", endpoints[name]},
            {"reflection", has_reflection});
  return server;
}

absl::Status Server::Impl::Listen() {
  grpc::EnableDefaultHealthCheckService(true);
  quantization = std::make_unique<api::QuantizationServiceImpl>(core.get());
  models = std::make_unique<api::ModelServiceImpl>(core.get());
  generation = std::make_unique<api::GenerationServiceImpl>(core.get());
  evaluation = std::make_unique<api::EvaluationServiceImpl>(core.get());
  workers = std::make_unique<api::WorkerServiceImpl>(core.get());
  scaler = std::make_unique<api::ExternalScalerServiceImpl>(core.get());
  // Called for the linker, which may leave out a library that nothing calls.
  if (options.enable_reflection) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  // Workers first: a client that finds the public port finds them, too.
  WALSH_ASSIGN_OR_RETURN(internal_server,
                         StartGrpc("internal", options.internal_port, {workers.get(), scaler.get()},
                                   /*is_public=*/false));
  WALSH_ASSIGN_OR_RETURN(public_server, StartGrpc("grpc", options.grpc_port,
                                                  {quantization.get(), models.get(),
                                                   generation.get(), evaluation.get()},
                                                  /*is_public=*/true));
  SetServing(true);
  Tick();
  LeadsGauge().Set(1);
  takes_calls = !is_leadership_lost;
  return absl::OkStatus();
}

absl::Status Server::Impl::ListenHttp() {
  const auto live = [] { return absl::OkStatus(); };
  const auto ready = [this] {
    if (stopping.HasBeenNotified()) return absl::UnavailableError("stopping");
    return takes_calls ? absl::OkStatus() : absl::UnavailableError("standby: it does not lead");
  };
  HttpServer::Options http_options = {
      .host = options.host, .port = options.http_port, .live = live, .ready = ready};
  WALSH_ASSIGN_OR_RETURN(http, HttpServer::Start(http_options));
  http_options.port = options.metrics_port;
  WALSH_ASSIGN_OR_RETURN(metrics_http, HttpServer::Start(http_options));
  endpoints["http"] = HostPort(options.host, http->port());
  endpoints["metrics"] = HostPort(options.host, metrics_http->port());
  return absl::OkStatus();
}

void Server::Impl::SetServing(bool is_serving) {
  for (grpc::Server* server : {public_server.get(), internal_server.get()}) {
    if (server != nullptr) server->GetHealthCheckService()->SetServingStatus(is_serving);
  }
  if (!is_serving) return;
  for (const char* service :
       {v1::QuantizationService::service_full_name(), v1::ModelService::service_full_name(),
        v1::GenerationService::service_full_name(), v1::EvaluationService::service_full_name()}) {
    public_server->GetHealthCheckService()->SetServingStatus(service, true);
  }
}

void Server::Impl::Tick() {
  if (core->is_stopping) return;
  if (absl::Status ticked = queue->Tick(); !ticked.ok()) {
    WALSH_LOG(Error, "job store failed", {"status", ticked});
  }
  registry.Tick();
  clients.KeepOnly(registry.Connected());
  // A worker that registers between these two calls does not count: it finds a job failed that it
  // might have run, as it would a moment later.
  if (const auto taking_jobs = registry.TakingJobs(); taking_jobs.has_value()) {
    if (absl::Status failed = queue->FailRefusedByAll(*taking_jobs); !failed.ok()) {
      WALSH_LOG(Error, "job store failed", {"status", failed});
    }
  }
  UpdateModelHealth();
  executor.PostAfter(kTickInterval, [this] { Tick(); });
}

void Server::Impl::UpdateModelHealth() {
  const std::map<std::string, v1::Model::State> states = catalog->States();
  fleet::SetFleetMetrics(registry.List(), states);
  std::set<std::string> ready;
  for (const auto& [id, state] : states) {
    if (state == v1::Model::READY) ready.insert(id);
  }
  for (const auto& [alias, id] : catalog->Aliases()) {
    const auto state = states.find(id);
    const bool is_ready = state != states.end() && state->second == v1::Model::READY;
    // Its name means this model, whatever else has it.
    ready.erase(alias);
    if (is_ready) ready.insert(alias);
  }
  grpc::HealthCheckServiceInterface* health = public_server->GetHealthCheckService();
  for (const std::string& id : ready) {
    if (!ready_models.contains(id)) health->SetServingStatus("model/" + id, true);
  }
  for (const std::string& id : ready_models) {
    if (!ready.contains(id)) health->SetServingStatus("model/" + id, false);
  }
  ready_models = std::move(ready);
}

void Server::Impl::Stop(absl::Duration timeout) {
  if (stopping.HasBeenNotified()) return;
  stopping.Notify();
  const absl::MutexLock turn(&lead_mu);
  if (core != nullptr) core->is_stopping = true;
  SetServing(false);
  const auto deadline = absl::ToChronoTime(absl::Now() + timeout + kLastWords);
  if (queue != nullptr) {
    // Watchers and waiting workers look at is_stopping now.
    queue->event_subscriptions().NotifyAll();
    queue->work_subscriptions().NotifyAll();
  }
  if (core != nullptr) {
    executor.PostAfter(timeout, [this] { core->calls.EndAll(api::Stopping()); });
  }
  // A database that does not answer takes its time, and nobody's above.
  if (leadership != nullptr) Resign();
  if (public_server != nullptr) public_server->Shutdown(deadline);
  // Last, so that workers can end what they have begun.
  if (internal_server != nullptr) internal_server->Shutdown(deadline);
  if (core != nullptr) core->calls.WaitForNone();
  // Tasks of ended calls; none of them touches gRPC any more.
  executor.Stop();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options) {
  std::unique_ptr<Server> server(new Server);
  server->impl_ = std::make_unique<Impl>(options);
  WALSH_RETURN_IF_ERROR(server->impl_->Open());
  if (server->impl_->leadership == nullptr) WALSH_RETURN_IF_ERROR(server->impl_->Serve());
  return server;
}

absl::Status Server::Lead() {
  return impl_->leadership == nullptr ? absl::OkStatus() : impl_->LeadInTurn();
}

Server::Server() = default;

Server::~Server() {
  if (impl_ != nullptr) impl_->Stop(absl::ZeroDuration());
}

const Endpoints& Server::endpoints() const { return impl_->endpoints; }

void Server::Stop(absl::Duration timeout) { impl_->Stop(timeout); }

}  // namespace walsh
