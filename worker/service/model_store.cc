#include "worker/service/model_store.h"

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/out_of_memory.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "worker/io/artifact.h"
#include "worker/io/model_config.h"
#include "worker/service/model_metrics.h"
#include "worker/service/proto_time.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using v1::Model;

constexpr std::string_view kBuildPrefix = ".tmp-";
constexpr std::string_view kDeletedPrefix = ".deleted-";
constexpr char kOrigins[] = "/.origins";
// An engine that neither turns, which it does when it is idle, too, nor goes on to another layer of
// its step for so long is taken for hung.
constexpr absl::Duration kHungAfter = absl::Seconds(60);
constexpr std::chrono::milliseconds kAskInterval{100};
// Of those that a message names, which has no place for all.
constexpr size_t kNamedModelsMax = 4;

absl::Status UnknownModel(const std::string& id) { return NotFound("model", ModelName(id)); }

// What glibc keeps of freed weights goes back to the system, so that unloading frees memory for
// others.
void ReturnFreedMemory() { malloc_trim(0); }

// UNAVAILABLE that passes by itself: another try finds another worker, or this one again.
absl::Status Away(std::string_view message, std::string_view reason) {
  absl::Status status = absl::UnavailableError(absl::string_view(message.data(), message.size()));
  SetErrorInfo(status, reason);
  SetRetryDelay(status, absl::Seconds(1));
  return status;
}

absl::Status Unloading(const std::string& id) {
  return Away(absl::StrCat(ModelName(id), " is being unloaded"), "MODEL_UNLOADING");
}

}  // namespace

class ModelStore::Move {
 public:
  Move(ModelStore* store, std::string id) : store_(*store), id_(std::move(id)) {}
  ~Move() {
    const std::lock_guard lock(store_.mu_);
    store_.moving_.erase(id_);
    store_.moved_.notify_all();
  }
  Move(const Move&) = delete;
  Move& operator=(const Move&) = delete;

 private:
  ModelStore& store_;
  const std::string id_;
};

ModelStore::ModelStore(Options options, Clock* clock)
    : options_(std::move(options)), clock_(clock) {}

absl::StatusOr<std::unique_ptr<ModelStore>> ModelStore::Open(Options options, Clock* clock) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(options.root + kOrigins));
  auto store = std::unique_ptr<ModelStore>(new ModelStore(std::move(options), clock));
  store->RemoveTemporaries();
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(store->options_.root, error)) {
    const std::string id = entry.path().filename().string();
    if (!entry.is_directory() || !IsModelId(id) || !fs::exists(entry.path() / "walsh.json")) {
      continue;
    }
    absl::StatusOr<Model> model = store->ReadArtifact(id, store->Directory(id));
    if (!model.ok()) {
      WALSH_LOG(Warning, "an artifact cannot be read and is left alone", {"model", id},
                {"error", model.status()});
      continue;
    }
    store->entries_[id].model = *std::move(model);
  }
  if (error) return ErrnoStatus(error.value(), "list the models");
  return store;
}

// Their jobs died with the process that ran them: a data folder belongs to one worker at a time.
void ModelStore::RemoveTemporaries() {
  const auto remove = [](const fs::path& path) {
    if (const absl::Status status = RemoveTree(path.string()); !status.ok()) {
      WALSH_LOG(Warning, "a temporary stays", {"name", path.filename().string()},
                {"error", status});
    }
  };
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(options_.root, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kBuildPrefix) || name.starts_with(kDeletedPrefix)) remove(entry.path());
  }
  // No model's name begins with a dot: what does was about to be published.
  for (const auto& entry : fs::directory_iterator(options_.root + kOrigins, error)) {
    if (entry.path().filename().string().starts_with('.')) remove(entry.path());
  }
}

std::string ModelStore::Directory(const std::string& id) const {
  return absl::StrCat(options_.root, "/", id);
}

std::string ModelStore::OriginPath(const std::string& id) const {
  return absl::StrCat(options_.root, kOrigins, "/", id);
}

absl::StatusOr<std::unique_ptr<ModelStore::Move>> ModelStore::BeginMove(
    const std::string& id, const KeepGoing& keep_going) {
  std::unique_lock lock(mu_);
  while (!moving_.insert(id).second) {
    moved_.wait_for(lock, kAskInterval);
    lock.unlock();
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    lock.lock();
  }
  return std::make_unique<Move>(this, id);
}

absl::StatusOr<Model> ModelStore::ReadArtifact(const std::string& id,
                                               const std::string& directory) const {
  WALSH_ASSIGN_OR_RETURN(const ArtifactInfo info, ArtifactReader::ReadInfo(directory));
  WALSH_ASSIGN_OR_RETURN(const std::string config_json,
                         ReadFile(directory + "/config.json", limits::kConfigFileBytesMax));
  WALSH_ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(config_json));
  Model model;
  model.set_name(ModelName(id));
  model.set_state(Model::UNLOADED);
  model.set_bits(info.bits);
  model.set_group_size(static_cast<int32_t>(info.group_size));
  model.set_bits_per_weight(info.bits_per_weight);
  for (const int bits : info.override_bits) model.add_override_bits(bits);
  model.set_grid(info.grid);
  model.set_activation_bits(info.activation_bits);
  model.set_kv_cache_bits(info.kv_cache_bits);
  model.set_rotation(info.rotation);
  model.set_method(info.method);
  model.set_architecture(config.architecture);
  model.set_size_bytes(info.size_bytes);
  model.set_max_model_len(static_cast<int32_t>(config.max_position));
  model.set_perplexity_before(info.perplexity_before);
  model.set_perplexity_after(info.perplexity_after);
  model.set_quantization_job(ReadFile(OriginPath(id), limits::kPathBytesMax).value_or(info.job));
  *model.mutable_create_time() = TimestampFromUnix(info.create_time_unix);
  model.set_sha256(info.sha256);
  return model;
}

ModelStore::Listing ModelStore::List() const {
  const std::lock_guard lock(mu_);
  Listing listing{.revision = revision_};
  for (const auto& [id, entry] : entries_) listing.models.push_back(entry.model);
  return listing;
}

absl::StatusOr<Model> ModelStore::Get(const std::string& id) const {
  const std::lock_guard lock(mu_);
  const auto it = entries_.find(id);
  if (it == entries_.end()) return UnknownModel(id);
  return it->second.model;
}

absl::StatusOr<std::string> ModelStore::ArtifactDirectory(const std::string& id) const {
  WALSH_RETURN_IF_ERROR(Get(id).status());
  return Directory(id);
}

Model ModelStore::Update(const std::string& id, const std::function<void(Entry&)>& change) {
  Model model;
  Listener listener;
  {
    const std::lock_guard lock(mu_);
    Entry& entry = entries_[id];
    change(entry);
    entry.model.set_revision(++revision_);
    model = entry.model;
    listener = listener_;
  }
  if (listener) listener(model);
  return model;
}

absl::StatusOr<Model> ModelStore::Load(const std::string& id) {
  if (!Get(id).ok()) WALSH_RETURN_IF_ERROR(Fetch(id).status());
  const std::lock_guard loading(load_mu_);
  WALSH_ASSIGN_OR_RETURN(const Model before, Get(id));
  if (before.state() == Model::READY) return before;
  if (options_.exclusive != nullptr) WALSH_RETURN_IF_ERROR(options_.exclusive->BeginModel());
  Update(id, [](Entry& entry) {
    entry.model.set_state(Model::LOADING);
    entry.model.clear_error();
  });
  const absl::Duration start = clock_->Monotonic();
  absl::StatusOr<Hosted> hosted = StartEngine(id);
  const absl::Duration elapsed = clock_->Monotonic() - start;
  if (IsOutOfMemory(hosted.status())) hosted = ExplainShortage(hosted.status());
  if (!hosted.ok()) {
    ReturnFreedMemory();
    CountModelLoadFailure(id, hosted.status().code());
    WALSH_LOG(Error, "a model cannot be loaded", {"model", id}, {"error", hosted.status()});
    EndModel();
    Update(id, [&](Entry& entry) {
      entry.model.set_state(Model::FAILED);
      *entry.model.mutable_error() = ToProtoStatus(hosted.status());
    });
    return hosted.status();
  }
  const int64_t memory_bytes = hosted->engine->model().memory_bytes();
  ObserveModelLoad(id, elapsed, memory_bytes);
  WALSH_LOG(Info, "model loaded", {"model", id}, {"seconds", absl::ToDoubleSeconds(elapsed)},
            {"memory_bytes", memory_bytes});
  return Update(id, [&](Entry& entry) {
    entry.model.set_state(Model::READY);
    entry.model.set_worker(WorkerName(options_.worker_id));
    entry.model.set_memory_bytes(memory_bytes);
    entry.model.set_max_model_len(static_cast<int32_t>(hosted->engine->context_tokens()));
    entry.hosted = *std::move(hosted);
  });
}

void ModelStore::EndModel() const {
  if (options_.exclusive != nullptr) options_.exclusive->EndModel();
}

absl::StatusOr<ModelStore::Hosted> ModelStore::StartEngine(const std::string& id) const {
  try {
    WALSH_ASSIGN_OR_RETURN(std::shared_ptr<engine::ServedModel> model,
                           options_.loader(Directory(id)));
    engine::Options options = options_.engine;
    options.model_name = id;
    options.free_bytes = UnpromisedBytes();
    options.requests = requests_;
    WALSH_ASSIGN_OR_RETURN(std::unique_ptr<engine::Engine> engine,
                           engine::Engine::Create(std::move(model), options, clock_));
    auto gone = std::make_shared<std::promise<void>>();
    std::shared_future<void> is_gone = gone->get_future().share();
    return Hosted{.engine = {engine.release(),
                             [gone = std::move(gone)](engine::Engine* last) {
                               delete last;
                               gone->set_value();
                             }},
                  .is_gone = std::move(is_gone)};
  } catch (const std::bad_alloc&) {
    return OutOfMemoryError(absl::StrCat("no memory to load ", ModelName(id)));
  }
}

absl::Status ModelStore::ExplainShortage(const absl::Status& shortage) const {
  std::string message(shortage.message());
  const auto engines = Engines();
  if (!engines.empty()) {
    message += "; loaded here are ";
    for (size_t i = 0; i < engines.size() && i < kNamedModelsMax; ++i) {
      const engine::Engine& engine = *engines[i].second;
      absl::StrAppend(&message, i == 0 ? "" : ", ", ModelName(engines[i].first), " (weights ",
                      engine.model().memory_bytes(), ", KV cache ", engine.kv_cache_bytes(),
                      " bytes)");
    }
    if (engines.size() > kNamedModelsMax) {
      absl::StrAppend(&message, " and ", engines.size() - kNamedModelsMax, " more");
    }
    message +=
        ": unload one, or start the worker with smaller KV caches (--kv-cache-memory-bytes, "
        "--kv-cache-free-memory-fraction)";
  }
  absl::Status status(shortage.code(), message);
  SetErrorInfo(status, "INSUFFICIENT_MEMORY");
  return status;
}

std::optional<int64_t> ModelStore::UnpromisedBytes() const {
  const int64_t free_bytes = options_.free_memory ? options_.free_memory() : 0;
  if (free_bytes <= 0) return std::nullopt;
  int64_t promised_bytes = 0;
  for (const auto& [id, engine] : Engines()) {
    if (engine->model().free_device_bytes().has_value()) continue;  // not of the host's memory
    // What its prefix cache holds is no longer free.
    const engine::Stats stats = engine->stats();
    const int64_t token_bytes = engine->kv_cache_bytes() / stats.kv_tokens_total;
    promised_bytes += engine->kv_cache_bytes() - stats.kv_tokens_cached * token_bytes;
  }
  return std::max<int64_t>(0, free_bytes - promised_bytes);
}

absl::StatusOr<Model> ModelStore::Unload(const std::string& id) {
  const std::lock_guard loading(load_mu_);
  WALSH_ASSIGN_OR_RETURN(const Model before, Get(id));
  if (before.state() != Model::READY) return before;
  Hosted hosted;
  Update(id, [&](Entry& entry) {
    entry.model.set_state(Model::DRAINING);
    hosted = entry.hosted;
  });
  hosted.engine->Drain(options_.drain_timeout, Unloading(id));
  Update(id, [](Entry& entry) {
    entry.model.set_state(Model::UNLOADING);
    entry.hosted = {};
  });
  hosted.engine.reset();
  // Calls that found the engine a moment ago hold it, and with it the weights, until they were
  // refused.
  hosted.is_gone.wait();
  ReturnFreedMemory();
  ForgetModelMemory(id);
  WALSH_LOG(Info, "model unloaded", {"model", id});
  EndModel();
  return Update(id, [](Entry& entry) {
    entry.model.set_state(Model::UNLOADED);
    entry.model.clear_worker();
    entry.model.clear_memory_bytes();
  });
}

absl::Status ModelStore::Delete(const std::string& id) {
  const std::lock_guard loading(load_mu_);
  // Before it is looked at: what is fetched appears at the end of its move.
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Move> move, BeginMove(id, [&] {
                           return Away(absl::StrCat(ModelName(id), " is being fetched"),
                                       "MODEL_LOADING");
                         }));
  const absl::StatusOr<Model> found = Get(id);
  if (found.ok() && found->state() == Model::READY) {
    absl::Status status =
        absl::FailedPreconditionError(absl::StrCat(ModelName(id), " is loaded; unload it first"));
    SetErrorInfo(status, "MODEL_LOADED");
    return status;
  }
  if (options_.artifacts != nullptr) {
    // First there: while that cannot be done, the model stays as it is.
    const absl::Status removed = options_.artifacts->Remove(id);
    if (!found.ok() || !absl::IsNotFound(removed)) WALSH_RETURN_IF_ERROR(removed);
  }
  if (!found.ok()) return options_.artifacts != nullptr ? absl::OkStatus() : found.status();
  const Model& model = *found;
  const std::string doomed = absl::StrCat(options_.root, "/", std::string(kDeletedPrefix), id, "-",
                                          absl::ToInt64Nanoseconds(clock_->Monotonic()));
  if (const absl::Status moved = MoveDirectory(Directory(id), doomed); !moved.ok()) {
    return absl::Status(moved.code(),
                        absl::StrCat("delete ", ModelName(id), ": ", moved.message()));
  }
  Listener listener;
  {
    const std::lock_guard lock(mu_);
    entries_.erase(id);
    ++revision_;
    listener = listener_;
  }
  WALSH_LOG(Info, "model deleted", {"model", id});
  if (listener) listener(model);
  RemoveTree(OriginPath(id)).IgnoreError();  // without its artifact it means nothing
  return RemoveTree(doomed);
}

void ModelStore::DrainAll(absl::Duration timeout) {
  is_draining_ = true;
  const absl::Duration deadline = clock_->Monotonic() + timeout;
  for (const auto& [id, engine] : Engines()) {
    Update(id, [](Entry& entry) { entry.model.set_state(Model::DRAINING); });
  }
  for (const auto& [id, engine] : Engines()) {
    engine->Drain(std::max(deadline - clock_->Monotonic(), absl::ZeroDuration()),
                  Away("the worker is stopping", "WORKER_STOPPING"));
  }
}

absl::StatusOr<std::shared_ptr<engine::Engine>> ModelStore::FindEngine(
    const std::string& id) const {
  const std::lock_guard lock(mu_);
  const auto it = entries_.find(id);
  if (it == entries_.end()) return UnknownModel(id);
  switch (it->second.model.state()) {
    case Model::READY:
      return it->second.hosted.engine;
    case Model::LOADING:
      return Away(absl::StrCat(ModelName(id), " is being loaded"), "MODEL_LOADING");
    case Model::DRAINING:
    case Model::UNLOADING:
      return Unloading(id);
    default: {
      absl::Status status =
          absl::FailedPreconditionError(absl::StrCat(ModelName(id), " is not loaded"));
      SetErrorInfo(status, "MODEL_NOT_LOADED");
      return status;
    }
  }
}

std::vector<std::pair<std::string, std::shared_ptr<engine::Engine>>> ModelStore::Engines() const {
  const std::lock_guard lock(mu_);
  std::vector<std::pair<std::string, std::shared_ptr<engine::Engine>>> engines;
  for (const auto& [id, entry] : entries_) {
    if (entry.hosted.engine != nullptr) engines.emplace_back(id, entry.hosted.engine);
  }
  return engines;
}

engine::Stats ModelStore::TotalStats() const {
  engine::Stats total;
  for (const auto& [id, engine] : Engines()) {
    const engine::Stats stats = engine->stats();
    total.running += stats.running;
    total.waiting += stats.waiting;
    total.kv_tokens_used += stats.kv_tokens_used;
    total.kv_tokens_total += stats.kv_tokens_total;
    total.steps += stats.steps;
    total.heartbeat_age_seconds =
        std::max(total.heartbeat_age_seconds, stats.heartbeat_age_seconds);
  }
  return total;
}

absl::Status ModelStore::CheckEngines() const {
  const double age = TotalStats().heartbeat_age_seconds;
  if (absl::Seconds(age) < kHungAfter) return absl::OkStatus();
  return absl::UnavailableError(absl::StrFormat("an engine has not turned for %.0f s", age));
}

std::string ModelStore::TemporaryDirectory(std::string_view job_id, int64_t fencing_token) const {
  return absl::StrCat(options_.root, "/", std::string(kBuildPrefix), std::string(job_id), "-",
                      fencing_token);
}

absl::Status ModelStore::CheckNameIsFree(const std::string& id) const {
  std::error_code error;
  if (!fs::exists(Directory(id), error) && !error) return absl::OkStatus();
  absl::Status status = absl::AlreadyExistsError(
      absl::StrCat(ModelName(id), " exists already",
                   Get(id).ok() ? "" : " and cannot be read; its folder must be moved away first"));
  SetErrorInfo(status, "MODEL_EXISTS");
  SetResourceInfo(status, "model", ModelName(id), "exists already");
  return status;
}

absl::StatusOr<Model> ModelStore::Publish(const std::string& from, const std::string& id,
                                          const std::string& job_name) {
  // Of a job and an import of one name the first has it: its origin, too.
  const std::lock_guard publishing(publish_mu_);
  WALSH_RETURN_IF_ERROR(CheckNameIsFree(id));
  WALSH_ASSIGN_OR_RETURN(Model model, ReadArtifact(id, from));
  model.set_quantization_job(job_name);
  WALSH_RETURN_IF_ERROR(PublishFile(OriginPath(id), job_name));
  WALSH_RETURN_IF_ERROR(PublishDirectory(from, Directory(id)));
  return Update(id, [&](Entry& entry) { entry.model = std::move(model); });
}

absl::Status ModelStore::Keep(const std::string& id, const ArtifactStore::Origin& origin,
                              const KeepGoing& keep_going) {
  if (options_.artifacts == nullptr) return absl::OkStatus();
  const absl::Duration start = clock_->Monotonic();
  WALSH_RETURN_IF_ERROR(options_.artifacts->Keep(id, Directory(id), origin, keep_going));
  WALSH_LOG(Info, "model is in the artifact store", {"model", id},
            {"seconds", absl::ToDoubleSeconds(clock_->Monotonic() - start)});
  return absl::OkStatus();
}

absl::StatusOr<Model> ModelStore::Fetch(
    const std::string& id, const std::function<bool(const ArtifactStore::Origin&)>& is_wanted,
    const KeepGoing& keep_going) {
  if (options_.artifacts == nullptr) return UnknownModel(id);
  const KeepGoing go_on = [&] {
    return is_draining_ ? Away("the worker is stopping", "WORKER_STOPPING") : Ask(keep_going);
  };
  WALSH_ASSIGN_OR_RETURN(const std::unique_ptr<Move> move, BeginMove(id, go_on));
  if (absl::StatusOr<Model> here = Get(id); here.ok()) return here;
  WALSH_ASSIGN_OR_RETURN(const ArtifactStore::Origin origin, options_.artifacts->Find(id, go_on));
  if (is_wanted && !is_wanted(origin)) return StoredAlready(id);
  const std::string directory = TemporaryDirectory(absl::StrCat("fetched-", id), 0);
  WALSH_RETURN_IF_ERROR(RemoveTree(directory));  // of a fetch that failed
  absl::StatusOr<Model> model = FetchInto(id, directory, go_on);
  if (!model.ok()) {
    RemoveTree(directory).IgnoreError();  // what stays is removed at the next start
    WALSH_LOG(Warning, "a model cannot be fetched", {"model", id}, {"error", model.status()});
  }
  return model;
}

absl::StatusOr<Model> ModelStore::FetchInto(const std::string& id, const std::string& directory,
                                            const KeepGoing& keep_going) {
  const absl::Duration start = clock_->Monotonic();
  WALSH_ASSIGN_OR_RETURN(const ArtifactStore::Origin origin,
                         options_.artifacts->Fetch(id, directory, keep_going));
  WALSH_ASSIGN_OR_RETURN(Model model, Publish(directory, id, origin.job_name));
  WALSH_LOG(Info, "model fetched from the artifact store", {"model", id},
            {"size_bytes", model.size_bytes()},
            {"seconds", absl::ToDoubleSeconds(clock_->Monotonic() - start)});
  return model;
}

void ModelStore::set_listener(Listener listener) {
  const std::lock_guard lock(mu_);
  listener_ = std::move(listener);
}

}  // namespace walsh::service
