#include "worker/service/daemon.h"

#include <fcntl.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <iostream>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "common/command_line.h"
#include "common/device_choice.h"
#include "common/endpoints.h"
#include "common/grpc_server.h"
#include "common/http_server.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/serve_while_quantizing.h"
#include "common/status_macros.h"
#include "worker/io/model_root.h"
#include "worker/kernels/kernels.h"
#include "worker/objects/object_store.h"
#include "worker/objects/s3_options.h"
#include "worker/pipeline/checkpoint_store.h"
#include "worker/pipeline/object_checkpoint_store.h"
#include "worker/pipeline/quantize_job.h"
#include "worker/service/agent.h"
#include "worker/service/artifact_store.h"
#include "worker/service/coordinator_link.h"
#include "worker/service/describe.h"
#include "worker/service/device_metrics.h"
#include "worker/service/evaluation_service.h"
#include "worker/service/exclusive_use.h"
#include "worker/service/generation_service.h"
#include "worker/service/host_memory.h"
#include "worker/service/job_metrics.h"
#include "worker/service/job_runner.h"
#include "worker/service/memory_check.h"
#include "worker/service/model_conversions.h"
#include "worker/service/model_host_service.h"
#include "worker/service/model_loader.h"
#include "worker/service/model_sources.h"
#include "worker/service/model_store.h"
#include "worker/service/rejected_artifacts.h"
#include "worker/service/traffic_gate.h"

namespace walsh::service {
namespace {

constexpr char kDaemonName[] = "worker";
// A checkpoint that no worker has touched for so long is of a job that ended while none had it, and
// so is a result that was not told.
constexpr absl::Duration kCheckpointsKept = absl::Hours(7 * 24);
constexpr absl::Duration kResultsKept = kCheckpointsKept;
// After the requests' time: for calls to send their last words.
constexpr absl::Duration kServerGrace = absl::Seconds(2);

// One worker per data folder, for as long as this object lives; the system releases the lock of a
// process that dies.
class DataFolderLock {
 public:
  static absl::StatusOr<DataFolderLock> Take(const std::string& data_dir) {
    WALSH_RETURN_IF_ERROR(MakeDirectories(data_dir + "/run"));
    const int fd =
        open((data_dir + "/run/worker.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return ErrnoStatus(errno, "open the data folder's lock");
    DataFolderLock lock(fd);
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError(
          "another worker uses this data folder (run/worker.lock)");
    }
    return lock;
  }
  DataFolderLock(DataFolderLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  DataFolderLock& operator=(DataFolderLock&&) = delete;
  ~DataFolderLock() {
    if (fd_ >= 0) close(fd_);
  }

 private:
  explicit DataFolderLock(int fd) : fd_(fd) {}
  int fd_;
};

std::string NewWorkerId() {
  std::random_device device;
  return absl::StrFormat("w-%08x", device());
}

std::string RejectedDirectory(const WorkerOptions& options) {
  return options.data_dir + "/rejected";
}

std::string SourcesDirectory(const WorkerOptions& options) { return options.data_dir + "/sources"; }

class WorkerDaemon final : public Daemon {
 public:
  WorkerDaemon(const WorkerOptions& options, const Surroundings& surroundings,
               ServeWhileQuantizing policy, DataFolderLock lock, ModelRoots roots)
      : options_(options),
        policy_(policy),
        surroundings_(surroundings),
        worker_id_(NewWorkerId()),
        lock_(std::move(lock)),
        roots_(std::move(roots)),
        resolve_([this](std::string_view path) { return roots_.Resolve(path); }),
        rejected_(RejectedDirectory(options)) {}

  ~WorkerDaemon() override { Stop(); }

  absl::Status Start();
  void Stop() override;

 private:
  absl::Status OpenDevice();
  absl::Status OpenSources();
  absl::Status OpenStore();
  absl::Status StartServer();
  absl::Status StartHttp();
  absl::Status Announce();
  void MakeAgent();
  void LoadModels();
  void OnModelChanged(const v1::Model& model);
  // From a job, from the check of one or from an engine. No more leases are taken when it returns.
  void OnDeviceBroken(const absl::Status& cause);
  void RefuseWork();
  void StopStores();
  // Waits for its job, which may wait for an endpoint until then at most (monotonic).
  void StopAgentBy(absl::Duration deadline);
  absl::StatusOr<pipeline::JobPlan> PlanJob(const pipeline::JobSpec& spec) const;
  absl::StatusOr<WorkerMemory> ReadMemory() const;
  absl::Status CheckLive() const;
  absl::Status CheckReady() const;
  Agent::Load MakeLoad() const;
  std::string AdvertisedAddress() const;
  absl::Status OpenCheckpoints();
  // Empty where no checkpoints are kept, or in a bucket.
  std::string CheckpointsDirectory() const;

  // Null unless jobs and models take turns.
  ExclusiveUse* exclusive() {
    return policy_ == ServeWhileQuantizing::kExclusive ? &exclusive_use_ : nullptr;
  }

  const WorkerOptions options_;
  const ServeWhileQuantizing policy_;
  const Surroundings surroundings_;
  const std::string worker_id_;
  const DataFolderLock lock_;
  const ModelRoots roots_;
  const PathResolver resolve_;
  RejectedArtifacts rejected_;
  Clock* const clock_ = Clock::Real();

  JobDevice device_;
  ExclusiveUse exclusive_use_;
  std::unique_ptr<ModelSources> sources_;                     // null without --model-url-prefix
  std::unique_ptr<ArtifactStore> artifacts_;                  // null without --artifact-store
  std::unique_ptr<objects::ObjectStore> checkpoint_objects_;  // null unless a bucket has them
  std::unique_ptr<ModelStore> models_;
  std::unique_ptr<DaemonSecurity> security_;  // outlives the server
  std::unique_ptr<GenerationService> generation_;
  std::unique_ptr<ModelConversions> conversions_;
  std::unique_ptr<ModelHostService> model_host_;
  std::unique_ptr<EvaluationService> evaluation_;
  std::unique_ptr<grpc::Server> server_;
  int grpc_port_ = 0;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<CoordinatorLink> coordinator_;
  std::unique_ptr<JobRunner> runner_;
  std::unique_ptr<Agent> agent_;
  std::thread loader_;
  std::thread sweeper_;
  std::atomic<bool> is_stopping_ = false;
  std::atomic<bool> is_device_broken_ = false;
  // A coordinator may have a job checked here, and find a broken device, while this worker starts.
  std::mutex mu_;
  bool is_complete_ = false;  // guarded by mu_; server_ and agent_ are there
};

absl::Status WorkerDaemon::Start() {
  metrics::RegisterBuildInfo();
  RegisterJobMetrics();
  WALSH_RETURN_IF_ERROR(OpenDevice());
  WALSH_RETURN_IF_ERROR(OpenSources());
  WALSH_RETURN_IF_ERROR(OpenStore());
  WALSH_RETURN_IF_ERROR(OpenCheckpoints());
  WALSH_RETURN_IF_ERROR(StartServer());
  MakeAgent();
  models_->set_listener([this](const v1::Model& model) { OnModelChanged(model); });
  WALSH_RETURN_IF_ERROR(StartHttp());
  WALSH_RETURN_IF_ERROR(Announce());
  {
    const std::lock_guard lock(mu_);
    is_complete_ = true;
  }
  if (is_device_broken_) RefuseWork();
  // Before the first job is asked for, which these models do not stand behind.
  if (exclusive() != nullptr) WALSH_RETURN_IF_ERROR(exclusive_use_.BeginModel());
  agent_->Start();
  loader_ = std::thread([this] {
    LoadModels();
    if (exclusive() != nullptr) exclusive_use_.EndModel();
  });
  return absl::OkStatus();
}

absl::Status WorkerDaemon::OpenDevice() {
  WALSH_ASSIGN_OR_RETURN(const DeviceChoice choice, ParseDeviceChoice(options_.device));
  WALSH_ASSIGN_OR_RETURN(device_, OpenJobDevice(choice, surroundings_.cuda));
  if (device_.no_cuda.ok()) {
    WALSH_LOG(Info, "jobs run and models are served here", {"device", device_.name});
  } else {
    WALSH_LOG(Info, "jobs run and models are served here", {"device", device_.name},
              {"no_cuda", device_.no_cuda});
  }
  return absl::OkStatus();
}

absl::Status WorkerDaemon::OpenCheckpoints() {
  if (!options_.no_checkpoints && objects::IsS3Location(options_.checkpoint_dir)) {
    WALSH_ASSIGN_OR_RETURN(checkpoint_objects_,
                           objects::OpenObjectStore("--checkpoint-dir", options_.checkpoint_dir));
    // An endpoint that is away for minutes keeps no worker from starting or from stopping.
    sweeper_ = std::thread([this] {
      const absl::Status removed =
          pipeline::RemoveStaleObjectCheckpoints(*checkpoint_objects_, kCheckpointsKept);
      if (!removed.ok()) WALSH_LOG(Warning, "old checkpoints stay", {"error", removed});
    });
    return absl::OkStatus();
  }
  const std::string directory = CheckpointsDirectory();
  if (directory.empty()) return absl::OkStatus();
  if (const absl::Status made = MakeDirectories(directory); !made.ok()) {
    return absl::Status(made.code(), absl::StrCat("--checkpoint-dir: ", made.message()));
  }
  const absl::Status removed = pipeline::RemoveStaleCheckpoints(directory, kCheckpointsKept);
  if (!removed.ok()) WALSH_LOG(Warning, "old checkpoints stay", {"error", removed});
  return absl::OkStatus();
}

absl::Status WorkerDaemon::OpenSources() {
  if (options_.model_url_prefixes.empty()) return absl::OkStatus();
  WALSH_ASSIGN_OR_RETURN(
      sources_,
      ModelSources::Open({.prefixes = options_.model_url_prefixes,
                          .cache_directory = SourcesDirectory(options_),
                          .cache_bytes_max = static_cast<int64_t>(options_.source_cache_bytes),
                          .open_bucket = {}}));
  return absl::OkStatus();
}

absl::Status WorkerDaemon::OpenStore() {
  if (!options_.artifact_store.empty()) {
    WALSH_ASSIGN_OR_RETURN(std::unique_ptr<objects::ObjectStore> objects,
                           objects::OpenObjectStore("--artifact-store", options_.artifact_store));
    artifacts_ = std::make_unique<ArtifactStore>(std::move(objects));
  }
  ModelStore::Options options;
  options.root = options_.data_dir + "/models";
  options.worker_id = worker_id_;
  const StepLimits limits = StepLimitsOf(options_, device_.cuda_device.has_value());
  options.engine.max_sequences = limits.max_sequences;
  options.engine.max_batch_tokens = limits.max_batch_tokens;
  options.engine.max_waiting = options_.max_num_queued_reqs;
  options.engine.max_waiting_tokens = options_.max_num_queued_tokens;
  options.engine.kv_cache_tokens = options_.kv_cache_tokens;
  options.engine.kv_cache_bytes = static_cast<int64_t>(options_.kv_cache_memory_bytes);
  options.engine.kv_memory_fraction = options_.kv_cache_free_memory_fraction;
  options.engine.prefix_cache = !options_.no_prefix_cache;
  options.engine.n_threads = options_.threads;
  options.drain_timeout = absl::Seconds(options_.shutdown_timeout_seconds);
  const int n_threads = options_.threads > 0 ? options_.threads : ThreadPool::HardwareThreads();
  options.engine.on_device_broken = [this](const absl::Status& cause) {
    OnDeviceBroken(cause);
    return DeviceBrokenError(device_.name, cause);
  };
  WALSH_ASSIGN_OR_RETURN(const KvCacheDtype kv_cache_dtype,
                         ParseKvCacheDtype(options_.kv_cache_dtype));
  options.loader = MakeModelLoader(device_, surroundings_.cuda,
                                   {.n_threads = n_threads,
                                    .batch_invariant = options_.batch_invariant,
                                    .kv_cache_dtype = kv_cache_dtype},
                                   [this](const absl::Status& cause) { OnDeviceBroken(cause); });
  options.free_memory = [] { return ReadHostMemory().free_bytes; };
  options.exclusive = exclusive();
  options.artifacts = artifacts_.get();
  WALSH_ASSIGN_OR_RETURN(models_, ModelStore::Open(std::move(options), clock_));
  WALSH_ASSIGN_OR_RETURN(conversions_,
                         ModelConversions::Open({.export_root = options_.export_root.empty()
                                                                    ? options_.data_dir + "/exports"
                                                                    : options_.export_root,
                                                 .worker_id = worker_id_,
                                                 .resolve = resolve_,
                                                 .sources = sources_.get(),
                                                 .n_threads = n_threads},
                                                models_.get()));
  return absl::OkStatus();
}

absl::Status WorkerDaemon::StartServer() {
  WALSH_ASSIGN_OR_RETURN(security_, DaemonSecurity::Open(options_.security));
  if (IsOpenToTheNetwork(options_)) {
    WALSH_LOG(Warning, "whoever reaches the port may use it: no --worker-token-file",
              {"host", options_.host});
  }
  generation_ = std::make_unique<GenerationService>(
      models_.get(), clock_,
      GenerationService::Options{.stream_interval =
                                     absl::Milliseconds(options_.stream_interval_ms)});
  model_host_ = std::make_unique<ModelHostService>(
      ModelHostService::Options{
          .data_dir = options_.data_dir,
          .device = device_.name,
          .resolve = resolve_,
          .sources = sources_.get(),
          .plan = [this](const pipeline::JobSpec& spec) { return PlanJob(spec); },
          .memory = [this] { return ReadMemory(); },
          .on_device_broken = [this](const absl::Status& cause) { OnDeviceBroken(cause); }},
      models_.get(), conversions_.get());
  evaluation_ = std::make_unique<EvaluationService>(
      EvaluationService::Options{
          .resolve = resolve_, .sources = sources_.get(), .n_threads = options_.threads},
      models_.get(), clock_);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  AddServerInterceptors(builder);
  builder.AddListeningPort(HostPort(options_.host, options_.grpc_port),
                           MakeServerCredentials(security_->internal_port()), &grpc_port_);
  builder.RegisterService(generation_.get());
  builder.RegisterService(model_host_.get());
  builder.RegisterService(evaluation_.get());
  server_ = builder.BuildAndStart();
  if (server_ == nullptr || grpc_port_ == 0) {
    return absl::UnavailableError(absl::StrCat(
        "cannot listen on ", HostPort(options_.host, options_.grpc_port), " for gRPC"));
  }
  grpc::HealthCheckServiceInterface& health = *server_->GetHealthCheckService();
  health.SetServingStatus(v1::GenerationService::service_full_name(), true);
  health.SetServingStatus(v1::EvaluationService::service_full_name(), true);
  health.SetServingStatus(internal::v1::ModelHostService::service_full_name(), true);
  return absl::OkStatus();
}

absl::Status WorkerDaemon::StartHttp() {
  WALSH_ASSIGN_OR_RETURN(http_, HttpServer::Start({.host = options_.host,
                                                   .port = options_.metrics_port,
                                                   .live = [this] { return CheckLive(); },
                                                   .ready = [this] { return CheckReady(); },
                                                   .vllm_metrics = options_.vllm_metrics_compat}));
  return absl::OkStatus();
}

absl::Status WorkerDaemon::Announce() {
  const Endpoints endpoints = {{"grpc", HostPort(options_.host, grpc_port_)},
                               {"metrics", HostPort(options_.host, http_->port())}};
  for (const auto& [name, address] : endpoints) {
    std::cout << name << " " << address << "\n";
  }
  std::cout.flush();
  return WriteEndpoints(options_.data_dir, kDaemonName, endpoints);
}

void WorkerDaemon::MakeAgent() {
  coordinator_ = std::make_unique<CoordinatorLink>(options_.coordinator,
                                                   [this] { return security_->to_coordinator(); });
  const std::string results = options_.data_dir + "/results";
  if (const absl::Status removed = RemoveStaleResults(results, kResultsKept); !removed.ok()) {
    WALSH_LOG(Warning, "old results stay", {"error", removed});
  }
  runner_ = std::make_unique<JobRunner>(
      JobRunner::Options{
          .worker_id = worker_id_,
          .results_directory = results,
          .rejected = &rejected_,
          .n_threads = options_.threads,
          .resolve = resolve_,
          .sources = sources_.get(),
          .device = device_.name,
          .checkpoints_directory = CheckpointsDirectory(),
          .checkpoint_objects = checkpoint_objects_.get(),
          .kernel_family = device_.backend->kernel_family(),
          .plan = [this](const pipeline::JobSpec& spec) { return PlanJob(spec); },
          .memory = [this] { return ReadMemory(); },
          .quantize =
              [this](const pipeline::JobSpec& spec, ThreadPool& pool,
                     const pipeline::Observer& observer) {
                TrafficGate gate(policy_, TrafficGate::TrafficOf(models_->requests()), clock_);
                return pipeline::RunJob(spec, *device_.backend, pool, observer, &gate);
              },
          .on_device_broken = [this](const absl::Status& cause) { OnDeviceBroken(cause); },
          .exclusive = exclusive()},
      coordinator_.get(), models_.get(), clock_);
  const int n_threads = options_.threads > 0 ? options_.threads : ThreadPool::HardwareThreads();
  agent_ = std::make_unique<Agent>(
      Agent::Identity{.worker_id = worker_id_,
                      .address = AdvertisedAddress(),
                      .device = DescribeDevice(device_, n_threads),
                      .has_artifact_store = artifacts_ != nullptr},
      coordinator_.get(),
      Agent::Hooks{.load = [this] { return MakeLoad(); },
                   .run_job = [this](const internal::v1::Lease& lease,
                                     HeldLease& held) { runner_->Run(lease, held); },
                   .exclusive = exclusive()},
      clock_);
}

void WorkerDaemon::LoadModels() {
  for (const std::string& name : options_.load_models) {
    if (is_stopping_) return;
    // A model that cannot be loaded is reported in its state, and the worker goes on.
    if (const auto id = ParseModelName("--load-model", name); id.ok()) {
      const auto model = models_->Load(*id);
      if (absl::IsNotFound(model.status())) {
        WALSH_LOG(Error, "no such model to load at start", {"model", name});
      }
    }
  }
}

void WorkerDaemon::OnModelChanged(const v1::Model& model) {
  const std::string id = model.name().substr(kModelCollection.size());
  server_->GetHealthCheckService()->SetServingStatus(
      "model/" + id, model.state() == v1::Model::READY && !is_stopping_);
  agent_->Poke();
}

void WorkerDaemon::OnDeviceBroken(const absl::Status& cause) {
  const bool was_known = is_device_broken_.exchange(true);
  RefuseWork();  // in any case before the agent asks for the next lease
  if (was_known) return;
  WALSH_LOG(Error, "the device is broken; this worker stops", {"device", device_.name},
            {"error", cause});
  surroundings_.on_device_broken();
}

absl::StatusOr<pipeline::JobPlan> WorkerDaemon::PlanJob(const pipeline::JobSpec& spec) const {
  return pipeline::PlanJob(spec, *device_.backend);
}

absl::StatusOr<WorkerMemory> WorkerDaemon::ReadMemory() const {
  WALSH_ASSIGN_OR_RETURN(const pipeline::DeviceMemory device, device_.backend->memory());
  return WorkerMemory{.host = ReadHostMemory(), .device = device, .device_name = device_.name};
}

absl::Status WorkerDaemon::CheckLive() const {
  if (is_device_broken_) return absl::UnavailableError(device_.name + " is broken");
  return models_->CheckEngines();
}

absl::Status WorkerDaemon::CheckReady() const {
  WALSH_RETURN_IF_ERROR(CheckLive());
  if (is_stopping_) return absl::UnavailableError("the worker is stopping");
  if (!agent_->is_registered()) return absl::UnavailableError("not registered with a coordinator");
  return absl::OkStatus();
}

Agent::Load WorkerDaemon::MakeLoad() const {
  const engine::Stats stats = models_->TotalStats();
  // A device that cannot tell is found out by the next job or step.
  if (const auto memory = device_.backend->memory(); memory.ok()) {
    ObserveDeviceMemory(device_.name, *memory);
  }
  ModelStore::Listing listing = models_->List();
  return {.models = std::move(listing.models),
          .models_revision = listing.revision,
          .requests_running = stats.running,
          .requests_waiting = stats.waiting};
}

std::string WorkerDaemon::AdvertisedAddress() const {
  // The options were checked; whoever starts a daemon without gets the host as it is.
  return HostPort(AdvertisedHost(options_).value_or(options_.host), grpc_port_);
}

std::string WorkerDaemon::CheckpointsDirectory() const {
  if (options_.no_checkpoints || checkpoint_objects_ != nullptr) return "";
  return options_.checkpoint_dir.empty() ? options_.data_dir + "/checkpoints"
                                         : options_.checkpoint_dir;
}

void WorkerDaemon::RefuseWork() {
  const std::lock_guard lock(mu_);
  if (!is_complete_) return;
  server_->GetHealthCheckService()->SetServingStatus(false);
  agent_->Drain();
}

void WorkerDaemon::StopStores() {
  if (sources_ != nullptr) sources_->Stop();
  if (artifacts_ != nullptr) artifacts_->Stop();
  if (checkpoint_objects_ != nullptr) checkpoint_objects_->Stop();
}

void WorkerDaemon::StopAgentBy(absl::Duration deadline) {
  if (agent_ == nullptr) return;
  absl::Notification is_stopped;
  std::thread watching([&] {
    if (!is_stopped.WaitForNotificationWithTimeout(deadline - clock_->Monotonic())) StopStores();
  });
  agent_->Stop();
  is_stopped.Notify();
  watching.join();
}

void WorkerDaemon::Stop() {
  if (is_stopping_.exchange(true)) return;
  WALSH_LOG(Info, "stopping");
  const absl::Duration timeout = absl::Seconds(options_.shutdown_timeout_seconds);
  const absl::Duration deadline = clock_->Monotonic() + timeout;
  RefuseWork();
  if (evaluation_ != nullptr) evaluation_->Stop();
  if (agent_ != nullptr) {
    agent_->HandBack(timeout);
    // Whoever refuses before the coordinator knows refuses what it has just sent.
    agent_->AwaitArrivals();
  }
  if (models_ != nullptr) {
    models_->DrainAll(std::max(deadline - clock_->Monotonic(), absl::ZeroDuration()));
  }
  StopAgentBy(deadline);
  StopStores();  // a fetch ends
  if (loader_.joinable()) loader_.join();
  if (sweeper_.joinable()) sweeper_.join();
  if (server_ != nullptr) server_->Shutdown(absl::ToChronoTime(absl::Now() + kServerGrace));
  http_.reset();  // its probes look at all of the above
  RemoveEndpoints(options_.data_dir, kDaemonName);
  WALSH_LOG(Info, "stopped");
}

// What the process waits for: the exit code of the first reason to end.
class End {
 public:
  void Tell(int exit_code) {
    const std::lock_guard lock(mu_);
    if (!exit_code_.has_value()) exit_code_ = exit_code;
    told_.notify_all();
  }
  int Wait() {
    std::unique_lock lock(mu_);
    told_.wait(lock, [this] { return exit_code_.has_value(); });
    return *exit_code_;
  }

 private:
  std::mutex mu_;
  std::condition_variable told_;
  std::optional<int> exit_code_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const WorkerOptions& options,
                                                      const Surroundings& surroundings) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(options.data_dir));
  WALSH_ASSIGN_OR_RETURN(const ServeWhileQuantizing policy,
                         ParseServeWhileQuantizing(options.serve_while_quantizing));
  WALSH_ASSIGN_OR_RETURN(DataFolderLock lock, DataFolderLock::Take(options.data_dir));
  const std::vector<std::string> roots = options.model_roots.empty()
                                             ? std::vector<std::string>{options.data_dir}
                                             : options.model_roots;
  // What a quality gate kept from being published is not evaluated, exported or quantized again by
  // its path, and copies of sources are known by their URLs only.
  WALSH_ASSIGN_OR_RETURN(
      ModelRoots model_roots,
      ModelRoots::Create(roots, {RejectedDirectory(options), SourcesDirectory(options)}));
  auto daemon = std::make_unique<WorkerDaemon>(options, surroundings, policy, std::move(lock),
                                               std::move(model_roots));
  WALSH_RETURN_IF_ERROR(daemon->Start());
  return daemon;
}

int RunUntilSignal(const WorkerOptions& options, const CudaDevices& cuda) {
  // Blocked before any thread starts, so that only the one below takes them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  // Loads OpenBLAS, which is configured through the environment: setenv is safe only while no other
  // thread can read it.
  (void)kernels::DescribeCpuBackend();

  // The thread below has a share of it, since it outlives this function.
  const auto end = std::make_shared<End>();
  absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Start(
      options, {.cuda = cuda, .on_device_broken = [end] { end->Tell(kExitDeviceBroken); }});
  if (!daemon.ok()) {
    WALSH_LOG(Error, "the worker cannot start", {"error", daemon.status()});
    return kExitFailed;
  }
  std::thread([end, signals] {
    int received = 0;
    sigwait(&signals, &received);
    end->Tell(kExitOk);
    sigwait(&signals, &received);
    WALSH_LOG(Warning, "second signal: leaving at once");
    _exit(kExitFailed);
  }).detach();
  const int exit_code = end->Wait();
  (*daemon)->Stop();
  daemon->reset();
  return exit_code;
}

}  // namespace walsh::service
