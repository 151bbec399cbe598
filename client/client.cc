#include "client/client.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/resource_name.h"
#include "client/stream_watchdog.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "google/rpc/error_details.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace walsh::client {
namespace {

uint64_t RandomSeed() { return std::random_device{}(); }

bool Pause(Cancellation* cancellation, absl::Duration duration) {
  if (cancellation != nullptr) return cancellation->Sleep(duration);
  absl::SleepFor(duration);
  return true;
}

// What the service asks for, or zero.
absl::Duration RetryDelay(const absl::Status& status) {
  const google::rpc::Status proto = ToProtoStatus(status);
  for (const auto& detail : proto.details()) {
    google::rpc::RetryInfo retry;
    if (detail.UnpackTo(&retry)) {
      return absl::Seconds(retry.retry_delay().seconds()) +
             absl::Nanoseconds(retry.retry_delay().nanos());
    }
  }
  return absl::ZeroDuration();
}

void SetDeadline(grpc::ClientContext& context, absl::Time deadline) {
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
}

}  // namespace

bool IsTerminal(v1::QuantizationJob::State state) {
  return state == v1::QuantizationJob::SUCCEEDED || state == v1::QuantizationJob::FAILED ||
         state == v1::QuantizationJob::CANCELLED;
}

std::string NewRequestId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 4; ++i) {
    std::array<char, 9> digits;
    std::snprintf(digits.data(), digits.size(), "%08x", random());
    id += digits.data();
  }
  return id;
}

Client::Client(ClientOptions options)
    : options_(std::move(options)),
      pool_(options_.address, options_.streams_per_connection, options_.security) {}

absl::Status Client::ToStatus(const grpc::Status& status) const {
  absl::Status converted = FromGrpcStatus(status);
  // gRPC's own words for this name resolvers and subchannels; a service's UNAVAILABLE has details.
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE && status.error_details().empty() &&
      status.error_message().rfind("failed to connect", 0) == 0) {
    if (!absl::StrContains(status.error_message(), "remote host")) {
      return absl::UnavailableError(
          absl::StrCat("something answers at ", address(),
                       ", but no connection came about: it may want TLS or none, a certificate "
                       "(--tls-cert), or have one that --tls-ca does not vouch for; gRPC says: ",
                       status.error_message()));
    }
    return absl::UnavailableError(
        absl::StrCat("no walsh service answers at ", address(),
                     " (start one with `walsh up`, or name another with --server)"));
  }
  return converted;
}

absl::Status Client::Retry(const Attempt& attempt, absl::Duration timeout,
                           Cancellation* cancellation, const std::function<bool()>& may_retry) {
  const absl::Time deadline =
      timeout == absl::InfiniteDuration() ? absl::InfiniteFuture() : absl::Now() + timeout;
  Backoff backoff(options_.backoff, RandomSeed());
  for (int n_attempts = 1;; ++n_attempts) {
    grpc::ClientContext context;
    SetDeadline(context, deadline);
    grpc::Status result;
    {
      const auto connection = pool_.Acquire();
      Cancellation::Call call(cancellation, &context);
      result = attempt(*connection, &context);
    }
    absl::Status status = ToStatus(result);
    if (status.ok() || status.code() != absl::StatusCode::kUnavailable) return status;
    if (n_attempts >= options_.attempts_max || (may_retry && !may_retry())) return status;
    const absl::Duration pause = std::max(backoff.Next(), RetryDelay(status));
    if (absl::Now() + pause >= deadline) return status;
    if (!Pause(cancellation, pause))
      return absl::CancelledError("cancelled while waiting to retry");
  }
}

absl::Status Client::RetryDelete(const Attempt& attempt, absl::Duration timeout,
                                 Cancellation* cancellation) {
  int n_attempts = 0;
  const absl::Status status = Retry(
      [&](Connection& connection, grpc::ClientContext* context) {
        ++n_attempts;
        return attempt(connection, context);
      },
      timeout, cancellation);
  // An attempt whose answer was lost may have deleted it.
  return n_attempts > 1 && absl::IsNotFound(status) ? absl::OkStatus() : status;
}

template <typename Response, typename Service, typename Request>
absl::StatusOr<Response> Client::Unary(std::unique_ptr<Service> Connection::*stub,
                                       grpc::Status (Service::*method)(grpc::ClientContext*,
                                                                       const Request&, Response*),
                                       const Request& request, absl::Duration timeout,
                                       Cancellation* cancellation) {
  Response response;
  WALSH_RETURN_IF_ERROR(Retry(
      [&](Connection& connection, grpc::ClientContext* context) {
        response.Clear();
        return ((*(connection.*stub)).*method)(context, request, &response);
      },
      timeout, cancellation));
  return response;
}

// -- Jobs

using JobStub = v1::QuantizationService::Stub;

absl::StatusOr<v1::QuantizationJob> Client::CreateJob(v1::CreateQuantizationJobRequest request,
                                                      Cancellation* cancellation) {
  if (request.request_id().empty()) request.set_request_id(NewRequestId());
  return Unary(&Connection::quantization, &JobStub::CreateQuantizationJob, request,
               options_.timeout, cancellation);
}

absl::StatusOr<v1::QuantizationJob> Client::GetJob(const std::string& name,
                                                   Cancellation* cancellation) {
  v1::GetQuantizationJobRequest request;
  request.set_name(FullJobName(name));
  return Unary(&Connection::quantization, &JobStub::GetQuantizationJob, request, options_.timeout,
               cancellation);
}

absl::StatusOr<v1::ListQuantizationJobsResponse> Client::ListJobs(const std::string& filter,
                                                                  const std::string& order_by,
                                                                  int n_jobs_max) {
  v1::ListQuantizationJobsResponse all;
  v1::ListQuantizationJobsRequest request;
  request.set_filter(filter);
  request.set_order_by(order_by);
  do {
    request.set_page_size(
        std::min(limits::kPageSizeMax, n_jobs_max - all.quantization_jobs_size()));
    WALSH_ASSIGN_OR_RETURN(v1::ListQuantizationJobsResponse page,
                           Unary(&Connection::quantization, &JobStub::ListQuantizationJobs, request,
                                 options_.timeout));
    request.set_page_token(page.next_page_token());
    all.MergeFrom(page);
  } while (!request.page_token().empty() && all.quantization_jobs_size() < n_jobs_max);
  all.set_next_page_token(request.page_token());
  return all;
}

absl::StatusOr<v1::QuantizationJob> Client::CancelJob(const std::string& name) {
  v1::CancelQuantizationJobRequest request;
  request.set_name(FullJobName(name));
  return Unary(&Connection::quantization, &JobStub::CancelQuantizationJob, request,
               options_.timeout);
}

absl::Status Client::DeleteJob(const std::string& name) {
  v1::DeleteQuantizationJobRequest request;
  request.set_name(FullJobName(name));
  return RetryDelete(
      [&](Connection& connection, grpc::ClientContext* context) {
        google::protobuf::Empty response;
        return connection.quantization->DeleteQuantizationJob(context, request, &response);
      },
      options_.timeout);
}

absl::StatusOr<v1::ListSupportedArchitecturesResponse> Client::ListSupportedArchitectures() {
  return Unary(&Connection::quantization, &JobStub::ListSupportedArchitectures,
               v1::ListSupportedArchitecturesRequest(), options_.timeout);
}

absl::StatusOr<v1::ListQuantizationPresetsResponse> Client::ListQuantizationPresets() {
  return Unary(&Connection::quantization, &JobStub::ListQuantizationPresets,
               v1::ListQuantizationPresetsRequest(), options_.timeout);
}

Client::WatchResult Client::WatchOnce(const std::string& name, const WatchObserver& observer,
                                      Cancellation* cancellation, int64_t* last_sequence) {
  v1::WatchQuantizationJobRequest request;
  request.set_name(FullJobName(name));
  request.set_after_sequence(*last_sequence);
  grpc::ClientContext context;
  const auto connection = pool_.Acquire();
  Cancellation::Call call(cancellation, &context);
  StreamWatchdog watchdog(&context, options_.watch_silence_max);
  const auto reader = connection->quantization->WatchQuantizationJob(&context, request);
  WatchResult result;
  absl::Status gap;
  v1::QuantizationJobEvent event;
  while (reader->Read(&event)) {
    watchdog.Feed();
    result.delivered = true;
    if (!event.heartbeat()) {
      if (event.sequence() <= *last_sequence) continue;
      if (event.sequence() != *last_sequence + 1) {
        gap = absl::DataLossError(absl::StrCat("the events of job '", ResourceId(name),
                                               "' have a gap: ", event.sequence(), " came after ",
                                               *last_sequence));
        context.TryCancel();
        break;
      }
      *last_sequence = event.sequence();
      result.finished = IsTerminal(event.state());
    }
    if (observer.on_event) observer.on_event(event);
  }
  result.status = ToStatus(reader->Finish());
  if (!gap.ok()) {
    result.status = gap;
  } else if (watchdog.barked()) {
    result.status = absl::UnavailableError(
        absl::StrCat("nothing arrived for ", absl::FormatDuration(options_.watch_silence_max)));
  } else if (absl::IsCancelled(result.status) &&
             (cancellation == nullptr || !cancellation->cancelled())) {
    // A server that shuts down cancels its streams: for the watcher that is a lost connection.
    result.status = absl::UnavailableError("the service ended the stream");
  }
  return result;
}

absl::StatusOr<v1::QuantizationJob> Client::WatchJob(const std::string& name,
                                                     int64_t after_sequence,
                                                     const WatchObserver& observer,
                                                     Cancellation* cancellation) {
  Backoff backoff(options_.backoff, RandomSeed());
  int64_t last_sequence = after_sequence;
  absl::Time give_up = absl::Now() + options_.watch_patience;
  while (true) {
    const WatchResult watched = WatchOnce(name, observer, cancellation, &last_sequence);
    absl::Status status = watched.status;
    if (watched.delivered) {
      backoff.Reset();
      give_up = absl::Now() + options_.watch_patience;
    }
    if (watched.finished || status.ok()) {
      // Without a last event the end was before `after_sequence`, or the stream ended early. A
      // service that goes away before it tells is waited for like one that goes away earlier.
      const auto job = GetJob(name, cancellation);
      if (job.ok() && IsTerminal(job->state())) return job;
      status =
          job.ok() ? absl::UnavailableError("the stream ended before the job did") : job.status();
    }
    if (status.code() != absl::StatusCode::kUnavailable) return status;
    const absl::Duration pause = std::max(backoff.Next(), RetryDelay(status));
    if (absl::Now() + pause > give_up) return status;
    if (observer.on_disconnect) observer.on_disconnect(status, pause);
    if (!Pause(cancellation, pause)) return absl::CancelledError("cancelled while reconnecting");
  }
}

// -- Models and workers

using ModelStub = v1::ModelService::Stub;

absl::StatusOr<v1::ListModelsResponse> Client::ListModels() {
  v1::ListModelsResponse all;
  v1::ListModelsRequest request;
  request.set_page_size(limits::kPageSizeMax);
  do {
    WALSH_ASSIGN_OR_RETURN(
        v1::ListModelsResponse page,
        Unary(&Connection::models, &ModelStub::ListModels, request, options_.timeout));
    request.set_page_token(page.next_page_token());
    all.MergeFrom(page);
  } while (!request.page_token().empty());
  all.clear_next_page_token();
  return all;
}

absl::StatusOr<v1::Model> Client::GetModel(const std::string& name) {
  v1::GetModelRequest request;
  request.set_name(FullModelName(name));
  return Unary(&Connection::models, &ModelStub::GetModel, request, options_.timeout);
}

absl::StatusOr<v1::Model> Client::LoadModel(const std::string& name, Cancellation* cancellation) {
  v1::LoadModelRequest request;
  request.set_name(FullModelName(name));
  return Unary(&Connection::models, &ModelStub::LoadModel, request, options_.load_timeout,
               cancellation);
}

absl::StatusOr<v1::Model> Client::UnloadModel(const std::string& name, Cancellation* cancellation) {
  v1::UnloadModelRequest request;
  request.set_name(FullModelName(name));
  return Unary(&Connection::models, &ModelStub::UnloadModel, request, options_.load_timeout,
               cancellation);
}

absl::Status Client::DeleteModel(const std::string& name, bool force, Cancellation* cancellation) {
  v1::DeleteModelRequest request;
  request.set_name(FullModelName(name));
  request.set_force(force);
  return RetryDelete(
      [&](Connection& connection, grpc::ClientContext* context) {
        google::protobuf::Empty response;
        return connection.models->DeleteModel(context, request, &response);
      },
      options_.load_timeout, cancellation);
}

absl::StatusOr<v1::ModelAlias> Client::SetModelAlias(const std::string& alias,
                                                     const std::string& model, bool force) {
  v1::SetModelAliasRequest request;
  request.set_alias(FullAliasName(alias));
  request.set_model(FullModelName(model));
  request.set_force(force);
  return Unary(&Connection::models, &ModelStub::SetModelAlias, request, options_.timeout);
}

absl::Status Client::DeleteModelAlias(const std::string& alias) {
  v1::DeleteModelAliasRequest request;
  request.set_alias(FullAliasName(alias));
  return RetryDelete(
      [&](Connection& connection, grpc::ClientContext* context) {
        google::protobuf::Empty response;
        return connection.models->DeleteModelAlias(context, request, &response);
      },
      options_.timeout);
}

template <typename Response, typename Request>
absl::StatusOr<Response> Client::Convert(
    std::unique_ptr<grpc::ClientReader<Response>> (ModelStub::*method)(grpc::ClientContext*,
                                                                       const Request&),
    const Request& request, const OnProgress& on_progress, Cancellation* cancellation) {
  bool started = false;
  Response last;
  WALSH_RETURN_IF_ERROR(Retry(
      [&](Connection& connection, grpc::ClientContext* context) {
        const auto reader = ((*connection.models).*method)(context, request);
        Response message;
        while (reader->Read(&message)) {
          started = true;
          if (message.has_progress() && on_progress) on_progress(message.progress());
          last = message;
        }
        return reader->Finish();
      },
      absl::InfiniteDuration(), cancellation, [&] { return !started; }));
  if (!started || last.has_progress()) {
    return absl::DataLossError("the stream ended without its last message");
  }
  return last;
}

absl::StatusOr<v1::ModelExport> Client::ExportModel(v1::ExportModelRequest request,
                                                    const OnProgress& on_progress,
                                                    Cancellation* cancellation) {
  request.set_name(FullModelName(request.name()));
  WALSH_ASSIGN_OR_RETURN(v1::ExportModelResponse last,
                         Convert<v1::ExportModelResponse>(&ModelStub::ExportModel, request,
                                                          on_progress, cancellation));
  return std::move(*last.mutable_model_export());
}

absl::StatusOr<v1::Model> Client::ImportModel(const v1::ImportModelRequest& request,
                                              const OnProgress& on_progress,
                                              Cancellation* cancellation) {
  WALSH_ASSIGN_OR_RETURN(v1::ImportModelResponse last,
                         Convert<v1::ImportModelResponse>(&ModelStub::ImportModel, request,
                                                          on_progress, cancellation));
  return std::move(*last.mutable_model());
}

absl::StatusOr<v1::ListWorkersResponse> Client::ListWorkers() {
  return Unary(&Connection::models, &ModelStub::ListWorkers, v1::ListWorkersRequest(),
               options_.timeout);
}

// -- Generation

using GenerationStub = v1::GenerationService::Stub;

absl::StatusOr<v1::GenerateResponse> Client::Generate(const v1::GenerateRequest& request,
                                                      Cancellation* cancellation,
                                                      absl::Duration timeout) {
  return Unary(&Connection::generation, &GenerationStub::Generate, request, timeout, cancellation);
}

absl::StatusOr<v1::GenerateResponse> Client::Chat(const v1::ChatRequest& request,
                                                  Cancellation* cancellation,
                                                  absl::Duration timeout) {
  return Unary(&Connection::generation, &GenerationStub::Chat, request, timeout, cancellation);
}

template <typename Request>
absl::Status Client::Stream(std::unique_ptr<grpc::ClientReader<v1::GenerateStreamResponse>> (
                                GenerationStub::*method)(grpc::ClientContext*, const Request&),
                            const Request& request, const OnStreamEvent& on_event,
                            Cancellation* cancellation, absl::Duration timeout) {
  bool started = false;
  bool finished = false;
  WALSH_RETURN_IF_ERROR(Retry(
      [&](Connection& connection, grpc::ClientContext* context) {
        const auto reader = ((*connection.generation).*method)(context, request);
        v1::GenerateStreamResponse event;
        while (reader->Read(&event)) {
          started = true;
          finished = event.has_finished();
          on_event(event);
        }
        return reader->Finish();
      },
      timeout, cancellation, [&] { return !started; }));
  if (!finished) return absl::DataLossError("the stream ended without its last message");
  return absl::OkStatus();
}

absl::Status Client::GenerateStream(const v1::GenerateRequest& request,
                                    const OnStreamEvent& on_event, Cancellation* cancellation,
                                    absl::Duration timeout) {
  return Stream(&GenerationStub::GenerateStream, request, on_event, cancellation, timeout);
}

absl::Status Client::ChatStream(const v1::ChatRequest& request, const OnStreamEvent& on_event,
                                Cancellation* cancellation, absl::Duration timeout) {
  return Stream(&GenerationStub::ChatStream, request, on_event, cancellation, timeout);
}

absl::StatusOr<v1::TokenizeResponse> Client::Tokenize(const v1::TokenizeRequest& request) {
  return Unary(&Connection::generation, &GenerationStub::Tokenize, request, options_.timeout);
}

absl::StatusOr<v1::DetokenizeResponse> Client::Detokenize(const v1::DetokenizeRequest& request) {
  return Unary(&Connection::generation, &GenerationStub::Detokenize, request, options_.timeout);
}

absl::StatusOr<v1::EvaluateModelResponse::Result> Client::EvaluateModel(
    const v1::EvaluateModelRequest& request, const OnEvaluationProgress& on_progress,
    Cancellation* cancellation, absl::Duration timeout) {
  bool started = false;
  std::optional<v1::EvaluateModelResponse::Result> result;
  WALSH_RETURN_IF_ERROR(Retry(
      [&](Connection& connection, grpc::ClientContext* context) {
        const auto reader = connection.evaluation->EvaluateModel(context, request);
        v1::EvaluateModelResponse event;
        while (reader->Read(&event)) {
          started = true;
          if (event.has_result()) result = event.result();
          if (event.has_progress() && on_progress) on_progress(event.progress());
        }
        return reader->Finish();
      },
      timeout, cancellation, [&] { return !started; }));
  if (!result.has_value()) return absl::DataLossError("the stream ended without a result");
  return *std::move(result);
}

absl::Status Client::CheckHealth(const std::string& service, absl::Duration timeout) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  grpc::ClientContext context;
  SetDeadline(context, absl::Now() + timeout);
  const auto connection = pool_.Acquire();
  const auto stub = grpc::health::v1::Health::NewStub(connection->channel);
  WALSH_RETURN_IF_ERROR(ToStatus(stub->Check(&context, request, &response)));
  if (response.status() != grpc::health::v1::HealthCheckResponse::SERVING) {
    return absl::UnavailableError(
        absl::StrCat("'", service, "' is ",
                     grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status())));
  }
  return absl::OkStatus();
}

}  // namespace walsh::client
