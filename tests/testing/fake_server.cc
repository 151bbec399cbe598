#include "tests/testing/fake_server.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/grpc_server.h"
#include "tests/testing/wait.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "walsh/v1/model.grpc.pb.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh::testing {
namespace {

constexpr absl::Duration kPollInterval = absl::Milliseconds(2);

bool IsTerminal(v1::QuantizationJob::State state) {
  return state == v1::QuantizationJob::SUCCEEDED || state == v1::QuantizationJob::FAILED ||
         state == v1::QuantizationJob::CANCELLED;
}

}  // namespace

struct FakeServer::State {
  struct Failure {
    int n_left = 0;
    grpc::Status status;
  };
  struct Job {
    v1::QuantizationJob job;
    std::vector<v1::QuantizationJobEvent> events;
  };

  mutable absl::Mutex mu;
  std::map<std::string, Failure> failures;
  std::map<std::string, int> calls;
  std::set<std::string> peers;
  bool stopping = false;

  std::map<std::string, Job> jobs;
  std::map<std::string, std::string> job_of_request;
  std::vector<v1::CreateQuantizationJobRequest> create_requests;
  std::vector<int64_t> watched_after;
  int cut_watch_after = -1;
  grpc::Status cut_watch_status;
  int64_t lost_event = -1;
  int n_silent_watches = 0;
  bool heartbeat_first = false;

  std::vector<v1::Model> models;
  std::vector<v1::Worker> workers;
  int page_size_max = 1000;
  bool hang_loads = false;

  std::vector<std::string> deltas = {"Hello", ", ", "world"};
  absl::Duration delta_pause;
  int cut_stream_after = -1;
  grpc::Status cut_stream_status;
  int n_streams = 0;
  int n_streams_max = 0;
  int n_streams_cancelled = 0;
  std::vector<v1::ChatRequest> chat_requests;
  std::vector<v1::GenerateRequest> generate_requests;

  // Counts the call and takes a planned failure.
  grpc::Status Enter(const std::string& method, grpc::ServerContext* context) {
    absl::MutexLock lock(&mu);
    ++calls[method];
    peers.insert(context->peer());
    Failure& failure = failures[method];
    if (failure.n_left == 0) return grpc::Status::OK;
    --failure.n_left;
    return failure.status;
  }

  Job* FindJob(const std::string& name) {
    const auto found = jobs.find(name);
    return found == jobs.end() ? nullptr : &found->second;
  }
};

#define FAKE_ENTER(method) \
  if (grpc::Status failure = state_->Enter(method, context); !failure.ok()) return failure

class FakeServer::Quantization : public v1::QuantizationService::Service {
 public:
  explicit Quantization(State* state) : state_(state) {}

  grpc::Status CreateQuantizationJob(grpc::ServerContext* context,
                                     const v1::CreateQuantizationJobRequest* request,
                                     v1::QuantizationJob* response) override {
    {
      absl::MutexLock lock(&state_->mu);
      state_->create_requests.push_back(*request);
    }
    FAKE_ENTER("CreateQuantizationJob");
    absl::MutexLock lock(&state_->mu);
    std::string& name = state_->job_of_request[request->request_id()];
    if (name.empty()) {
      name = absl::StrCat("quantizationJobs/job", state_->jobs.size() + 1);
      v1::QuantizationJob& job = state_->jobs[name].job;
      job = request->quantization_job();
      job.set_name(name);
      job.set_state(v1::QuantizationJob::QUEUED);
    }
    *response = state_->jobs[name].job;
    return grpc::Status::OK;
  }

  grpc::Status GetQuantizationJob(grpc::ServerContext* context,
                                  const v1::GetQuantizationJobRequest* request,
                                  v1::QuantizationJob* response) override {
    FAKE_ENTER("GetQuantizationJob");
    absl::MutexLock lock(&state_->mu);
    const auto* job = state_->FindJob(request->name());
    if (job == nullptr) return {grpc::StatusCode::NOT_FOUND, "no such job"};
    *response = job->job;
    return grpc::Status::OK;
  }

  grpc::Status ListQuantizationJobs(grpc::ServerContext* context,
                                    const v1::ListQuantizationJobsRequest* request,
                                    v1::ListQuantizationJobsResponse* response) override {
    FAKE_ENTER("ListQuantizationJobs");
    absl::MutexLock lock(&state_->mu);
    const int page_size = std::min(request->page_size(), state_->page_size_max);
    for (const auto& [name, job] : state_->jobs) {
      if (name <= request->page_token()) continue;
      if (!request->filter().empty() &&
          request->filter() != absl::StrCat("model_name=", job.job.model_name())) {
        continue;
      }
      if (response->quantization_jobs_size() == page_size) {
        response->set_next_page_token(
            response->quantization_jobs(response->quantization_jobs_size() - 1).name());
        break;
      }
      *response->add_quantization_jobs() = job.job;
    }
    return grpc::Status::OK;
  }

  grpc::Status ListQuantizationPresets(grpc::ServerContext* context,
                                       const v1::ListQuantizationPresetsRequest*,
                                       v1::ListQuantizationPresetsResponse* response) override {
    FAKE_ENTER("ListQuantizationPresets");
    v1::QuantizationPreset& preset = *response->add_presets();
    preset.set_name("fake-w2");
    preset.mutable_config()->set_bits(2);
    return grpc::Status::OK;
  }

  grpc::Status WatchQuantizationJob(grpc::ServerContext* context,
                                    const v1::WatchQuantizationJobRequest* request,
                                    grpc::ServerWriter<v1::QuantizationJobEvent>* writer) override {
    bool silent = false;
    {
      absl::MutexLock lock(&state_->mu);
      state_->watched_after.push_back(request->after_sequence());
      silent = state_->n_silent_watches > 0;
      if (silent) --state_->n_silent_watches;
    }
    FAKE_ENTER("WatchQuantizationJob");
    if (HeartbeatFirst()) {
      v1::QuantizationJobEvent heartbeat;
      heartbeat.set_heartbeat(true);
      if (!writer->Write(heartbeat)) return grpc::Status::CANCELLED;
    }
    int64_t sequence = request->after_sequence();
    for (int n_sent = 0;;) {
      v1::QuantizationJobEvent event;
      {
        absl::MutexLock lock(&state_->mu);
        const auto* job = state_->FindJob(request->name());
        if (job == nullptr) return {grpc::StatusCode::NOT_FOUND, "no such job"};
        if (state_->stopping) return {grpc::StatusCode::UNAVAILABLE, "stopping"};
        if (!silent && n_sent == state_->cut_watch_after) return state_->cut_watch_status;
        if (!silent && static_cast<size_t>(sequence) < job->events.size()) {
          event = job->events[static_cast<size_t>(sequence)];
        } else if (!silent && IsTerminal(job->job.state())) {
          return grpc::Status::OK;
        }
      }
      if (context->IsCancelled()) return grpc::Status::CANCELLED;
      if (event.sequence() == 0) {
        Pause(kPollInterval);
        continue;
      }
      ++sequence;
      ++n_sent;
      if (event.sequence() != LostEvent() && !writer->Write(event)) return grpc::Status::CANCELLED;
    }
  }

  grpc::Status CancelQuantizationJob(grpc::ServerContext* context,
                                     const v1::CancelQuantizationJobRequest* request,
                                     v1::QuantizationJob* response) override {
    FAKE_ENTER("CancelQuantizationJob");
    absl::MutexLock lock(&state_->mu);
    auto* job = state_->FindJob(request->name());
    if (job == nullptr) return {grpc::StatusCode::NOT_FOUND, "no such job"};
    job->job.set_state(v1::QuantizationJob::CANCELLING);
    *response = job->job;
    return grpc::Status::OK;
  }

  grpc::Status DeleteQuantizationJob(grpc::ServerContext* context,
                                     const v1::DeleteQuantizationJobRequest* request,
                                     google::protobuf::Empty* /*response*/) override {
    FAKE_ENTER("DeleteQuantizationJob");
    absl::MutexLock lock(&state_->mu);
    if (state_->jobs.erase(request->name()) == 0) {
      return {grpc::StatusCode::NOT_FOUND, "no such job"};
    }
    return grpc::Status::OK;
  }

 private:
  int64_t LostEvent() const {
    absl::MutexLock lock(&state_->mu);
    return state_->lost_event;
  }
  bool HeartbeatFirst() const {
    absl::MutexLock lock(&state_->mu);
    return state_->heartbeat_first;
  }

  State* const state_;
};

class FakeServer::Models : public v1::ModelService::Service {
 public:
  explicit Models(State* state) : state_(state) {}

  grpc::Status ListModels(grpc::ServerContext* context, const v1::ListModelsRequest* request,
                          v1::ListModelsResponse* response) override {
    FAKE_ENTER("ListModels");
    absl::MutexLock lock(&state_->mu);
    const size_t page_size =
        static_cast<size_t>(std::min(request->page_size(), state_->page_size_max));
    size_t begin = 0;
    for (; begin < state_->models.size() && !request->page_token().empty(); ++begin) {
      if (state_->models[begin].name() == request->page_token()) break;
    }
    const size_t end = std::min(begin + page_size, state_->models.size());
    for (size_t i = begin; i < end; ++i) *response->add_models() = state_->models[i];
    if (end < state_->models.size()) response->set_next_page_token(state_->models[end].name());
    return grpc::Status::OK;
  }

  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest* request,
                        v1::Model* response) override {
    FAKE_ENTER("GetModel");
    return Find(request->name(), v1::Model::STATE_UNSPECIFIED, response);
  }

  grpc::Status LoadModel(grpc::ServerContext* context, const v1::LoadModelRequest* request,
                         v1::Model* response) override {
    FAKE_ENTER("LoadModel");
    const auto hangs = [this] {
      absl::MutexLock lock(&state_->mu);
      return state_->hang_loads && !state_->stopping;
    };
    while (hangs() && !context->IsCancelled()) Pause(kPollInterval);
    return Find(request->name(), v1::Model::READY, response);
  }

  grpc::Status UnloadModel(grpc::ServerContext* context, const v1::UnloadModelRequest* request,
                           v1::Model* response) override {
    FAKE_ENTER("UnloadModel");
    return Find(request->name(), v1::Model::UNLOADED, response);
  }

  grpc::Status DeleteModel(grpc::ServerContext* context, const v1::DeleteModelRequest* request,
                           google::protobuf::Empty* /*response*/) override {
    FAKE_ENTER("DeleteModel");
    absl::MutexLock lock(&state_->mu);
    const auto is_named = [&](const v1::Model& model) { return model.name() == request->name(); };
    if (std::erase_if(state_->models, is_named) == 0) {
      return {grpc::StatusCode::NOT_FOUND, "no such model"};
    }
    return grpc::Status::OK;
  }

  grpc::Status ListWorkers(grpc::ServerContext* context, const v1::ListWorkersRequest* /*request*/,
                           v1::ListWorkersResponse* response) override {
    FAKE_ENTER("ListWorkers");
    absl::MutexLock lock(&state_->mu);
    for (const v1::Worker& worker : state_->workers) *response->add_workers() = worker;
    return grpc::Status::OK;
  }

 private:
  grpc::Status Find(const std::string& name, v1::Model::State new_state, v1::Model* response) {
    absl::MutexLock lock(&state_->mu);
    for (v1::Model& model : state_->models) {
      if (model.name() != name) continue;
      if (new_state != v1::Model::STATE_UNSPECIFIED) model.set_state(new_state);
      *response = model;
      return grpc::Status::OK;
    }
    return {grpc::StatusCode::NOT_FOUND, absl::StrCat("model '", name, "' does not exist")};
  }

  State* const state_;
};

class FakeServer::Generation : public v1::GenerationService::Service {
 public:
  explicit Generation(State* state) : state_(state) {}

  grpc::Status Generate(grpc::ServerContext* context, const v1::GenerateRequest* request,
                        v1::GenerateResponse* response) override {
    FAKE_ENTER("Generate");
    Record(state_->generate_requests, *request);
    return Whole(request->model(), response);
  }

  grpc::Status Chat(grpc::ServerContext* context, const v1::ChatRequest* request,
                    v1::GenerateResponse* response) override {
    FAKE_ENTER("Chat");
    Record(state_->chat_requests, *request);
    return Whole(request->model(), response);
  }

  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest* request,
                              grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    FAKE_ENTER("GenerateStream");
    Record(state_->generate_requests, *request);
    return Stream(context, request->model(), writer);
  }

  grpc::Status ChatStream(grpc::ServerContext* context, const v1::ChatRequest* request,
                          grpc::ServerWriter<v1::GenerateStreamResponse>* writer) override {
    FAKE_ENTER("ChatStream");
    Record(state_->chat_requests, *request);
    return Stream(context, request->model(), writer);
  }

  grpc::Status Tokenize(grpc::ServerContext* context, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    FAKE_ENTER("Tokenize");
    for (const char c : request->text()) response->add_token_ids(static_cast<unsigned char>(c));
    return grpc::Status::OK;
  }

  grpc::Status Detokenize(grpc::ServerContext* context, const v1::DetokenizeRequest* request,
                          v1::DetokenizeResponse* response) override {
    FAKE_ENTER("Detokenize");
    for (const int id : request->token_ids()) {
      response->mutable_text()->push_back(static_cast<char>(id));
    }
    return grpc::Status::OK;
  }

 private:
  template <typename Request>
  void Record(std::vector<Request>& requests, const Request& request) {
    absl::MutexLock lock(&state_->mu);
    requests.push_back(request);
  }

  grpc::Status Whole(const std::string& model, v1::GenerateResponse* response) {
    absl::MutexLock lock(&state_->mu);
    response->set_model(model);
    for (const std::string& delta : state_->deltas) response->mutable_text()->append(delta);
    response->set_finish_reason(v1::EOS);
    return grpc::Status::OK;
  }

  grpc::Status Stream(grpc::ServerContext* context, const std::string& model,
                      grpc::ServerWriter<v1::GenerateStreamResponse>* writer) {
    {
      absl::MutexLock lock(&state_->mu);
      state_->n_streams_max = std::max(state_->n_streams_max, ++state_->n_streams);
    }
    const grpc::Status status = StreamDeltas(context, model, writer);
    absl::MutexLock lock(&state_->mu);
    --state_->n_streams;
    if (context->IsCancelled()) ++state_->n_streams_cancelled;
    return status;
  }

  grpc::Status StreamDeltas(grpc::ServerContext* context, const std::string& model,
                            grpc::ServerWriter<v1::GenerateStreamResponse>* writer) {
    std::vector<std::string> deltas;
    absl::Duration pause;
    int cut_after = -1;
    grpc::Status cut_status;
    {
      absl::MutexLock lock(&state_->mu);
      deltas = state_->deltas;
      pause = state_->delta_pause;
      cut_after = state_->cut_stream_after;
      cut_status = state_->cut_stream_status;
    }
    v1::GenerateStreamResponse event;
    event.mutable_started()->set_model(model);
    event.mutable_started()->set_prompt_tokens(3);
    if (cut_after != 0) writer->Write(event);
    for (int i = 0; i < static_cast<int>(deltas.size()); ++i) {
      if (i == cut_after) return cut_status;
      for (absl::Duration waited; waited < pause; waited += kPollInterval) {
        if (context->IsCancelled()) return grpc::Status::CANCELLED;
        Pause(kPollInterval);
      }
      event.mutable_delta()->set_text(deltas[static_cast<size_t>(i)]);
      if (!writer->Write(event)) return grpc::Status::CANCELLED;
    }
    auto* finished = event.mutable_finished();
    finished->set_finish_reason(v1::EOS);
    finished->mutable_usage()->set_prompt_tokens(3);
    finished->mutable_usage()->set_completion_tokens(static_cast<int>(deltas.size()));
    finished->mutable_timings()->set_tokens_per_second(31.25);
    finished->mutable_timings()->set_time_to_first_token_seconds(0.35);
    writer->Write(event);
    return grpc::Status::OK;
  }

  State* const state_;
};

#undef FAKE_ENTER

FakeServer::FakeServer()
    : state_(std::make_unique<State>()),
      quantization_(std::make_unique<Quantization>(state_.get())),
      models_(std::make_unique<Models>(state_.get())),
      generation_(std::make_unique<Generation>(state_.get())) {
  Start();
}

FakeServer::~FakeServer() { Stop(); }

std::string FakeServer::address() const { return absl::StrCat("127.0.0.1:", port_); }

void FakeServer::Start() {
  {
    absl::MutexLock lock(&state_->mu);
    state_->stopping = false;
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  ApplyServerLimits(builder);
  int port = 0;
  builder.AddListeningPort(address(), grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(quantization_.get());
  builder.RegisterService(models_.get());
  builder.RegisterService(generation_.get());
  server_ = builder.BuildAndStart();
  WALSH_CHECK(server_ != nullptr);
  port_ = port;
}

void FakeServer::Stop() {
  if (server_ == nullptr) return;
  {
    absl::MutexLock lock(&state_->mu);
    state_->stopping = true;
  }
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

void FakeServer::FailNext(const std::string& method, int n, const grpc::Status& status) {
  absl::MutexLock lock(&state_->mu);
  state_->failures[method] = {n, status};
}

int FakeServer::Calls(const std::string& method) const {
  absl::MutexLock lock(&state_->mu);
  const auto found = state_->calls.find(method);
  return found == state_->calls.end() ? 0 : found->second;
}

int FakeServer::n_peers() const {
  absl::MutexLock lock(&state_->mu);
  return static_cast<int>(state_->peers.size());
}

void FakeServer::AddEvent(const std::string& job_name, v1::QuantizationJobEvent event) {
  absl::MutexLock lock(&state_->mu);
  State::Job& job = state_->jobs[job_name];
  job.job.set_name(job_name);
  job.job.set_state(event.state());
  event.set_sequence(static_cast<int64_t>(job.events.size()) + 1);
  job.events.push_back(std::move(event));
}

void FakeServer::CutWatchAfter(int n_events, const grpc::Status& status) {
  absl::MutexLock lock(&state_->mu);
  state_->cut_watch_after = n_events;
  state_->cut_watch_status = status;
}

void FakeServer::LoseEvent(int64_t sequence) {
  absl::MutexLock lock(&state_->mu);
  state_->lost_event = sequence;
}

void FakeServer::SilenceNextWatch(int n) {
  absl::MutexLock lock(&state_->mu);
  state_->n_silent_watches = n;
}

void FakeServer::BeginWatchesWithAHeartbeat() {
  absl::MutexLock lock(&state_->mu);
  state_->heartbeat_first = true;
}

v1::QuantizationJob* FakeServer::mutable_job(const std::string& name) {
  absl::MutexLock lock(&state_->mu);
  return &state_->jobs[name].job;
}

std::vector<v1::CreateQuantizationJobRequest> FakeServer::create_requests() const {
  absl::MutexLock lock(&state_->mu);
  return state_->create_requests;
}

std::vector<int64_t> FakeServer::watched_after() const {
  absl::MutexLock lock(&state_->mu);
  return state_->watched_after;
}

void FakeServer::AddModel(const v1::Model& model) {
  absl::MutexLock lock(&state_->mu);
  state_->models.push_back(model);
}

void FakeServer::AddWorker(const v1::Worker& worker) {
  absl::MutexLock lock(&state_->mu);
  state_->workers.push_back(worker);
}

void FakeServer::SetPageSizeMax(int n) {
  absl::MutexLock lock(&state_->mu);
  state_->page_size_max = n;
}

void FakeServer::HangLoads() {
  absl::MutexLock lock(&state_->mu);
  state_->hang_loads = true;
}

void FakeServer::SetStream(std::vector<std::string> deltas, absl::Duration pause) {
  absl::MutexLock lock(&state_->mu);
  state_->deltas = std::move(deltas);
  state_->delta_pause = pause;
}

void FakeServer::CutStreamAfter(int n_deltas, const grpc::Status& status) {
  absl::MutexLock lock(&state_->mu);
  state_->cut_stream_after = n_deltas;
  state_->cut_stream_status = status;
}

int FakeServer::n_streams() const {
  absl::MutexLock lock(&state_->mu);
  return state_->n_streams;
}

int FakeServer::n_streams_max() const {
  absl::MutexLock lock(&state_->mu);
  return state_->n_streams_max;
}

int FakeServer::n_streams_cancelled() const {
  absl::MutexLock lock(&state_->mu);
  return state_->n_streams_cancelled;
}

std::vector<v1::ChatRequest> FakeServer::chat_requests() const {
  absl::MutexLock lock(&state_->mu);
  return state_->chat_requests;
}

std::vector<v1::GenerateRequest> FakeServer::generate_requests() const {
  absl::MutexLock lock(&state_->mu);
  return state_->generate_requests;
}

}  // namespace walsh::testing
