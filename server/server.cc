#include "server/server.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/file.h>
#include <unistd.h>

#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/clock.h"
#include "common/executor.h"
#include "common/grpc_server.h"
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
#include "server/jobs/sql_job_store.h"

namespace walsh {
namespace {

constexpr absl::Duration kTickInterval = absl::Milliseconds(250);
// After the calls' time: for those that it has ended to say why.
constexpr absl::Duration kLastWords = absl::Seconds(2);

// Held while the process lives; the system gives it back however the process ends.
class FolderLock {
 public:
  ~FolderLock() {
    if (fd_ >= 0) close(fd_);
  }
  absl::Status Take(const std::string& path) {
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd_ < 0) return ErrnoStatus(errno, "opening the lock of the data folder");
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError("another coordinator uses this data folder");
    }
    return absl::OkStatus();
  }

 private:
  int fd_ = -1;
};

}  // namespace

struct Server::Impl {
  explicit Impl(const ServerOptions& server_options)
      : options(server_options),
        executor(Executor::Options()),
        registry(Clock::Real(), {.offline_after = options.lease_duration}) {}

  absl::Status Open();
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
  FolderLock lock;
  Executor executor;
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
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<HttpServer> metrics_http;
  std::set<std::string> ready_models;  // touched by Tick only
  bool is_stopped = false;
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
  WALSH_RETURN_IF_ERROR(lock.Take(options.data_dir + "/coordinator.lock"));
  WALSH_ASSIGN_OR_RETURN(
      store, jobs::SqlJobStore::OpenSqlite(options.data_dir + "/coordinator.db", Clock::Real()));
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
  core->stream_limits.stall_max = options.stream_stall_max;
  return absl::OkStatus();
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
  WALSH_RETURN_IF_ERROR(ListenHttp());
  SetServing(true);
  Tick();
  return absl::OkStatus();
}

absl::Status Server::Impl::ListenHttp() {
  const auto live = [] { return absl::OkStatus(); };
  const auto ready = [this] {
    return core->is_stopping ? absl::UnavailableError("stopping") : absl::OkStatus();
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
  if (std::exchange(is_stopped, true)) return;
  if (core != nullptr) core->is_stopping = true;
  SetServing(false);
  if (queue != nullptr) {
    // Watchers and waiting workers look at is_stopping now.
    queue->event_subscriptions().NotifyAll();
    queue->work_subscriptions().NotifyAll();
  }
  const auto deadline = absl::ToChronoTime(absl::Now() + timeout + kLastWords);
  if (core != nullptr) {
    executor.PostAfter(timeout, [this] { core->calls.EndAll(api::Stopping()); });
  }
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
  WALSH_RETURN_IF_ERROR(server->impl_->Listen());
  return server;
}

Server::Server() = default;

Server::~Server() {
  if (impl_ != nullptr) impl_->Stop(absl::ZeroDuration());
}

const Endpoints& Server::endpoints() const { return impl_->endpoints; }

void Server::Stop(absl::Duration timeout) { impl_->Stop(timeout); }

}  // namespace walsh
