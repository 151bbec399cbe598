#include "worker/service/generation_service.h"

#include <algorithm>
#include <span>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/generation_limits.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/tenant_header.h"
#include "worker/engine/engine_metrics.h"
#include "worker/kernels/thread_pool.h"
#include "worker/service/generation_conversion.h"
#include "worker/service/request_id.h"

namespace walsh::service {
namespace {

// Of requests that wait to be tokenized, which is soon done.
constexpr absl::Duration kPreparingRetryDelay = absl::Seconds(1);

// gRPC aborts the process on metadata that is not printable ASCII.
void EchoRequestId(grpc::CallbackServerContext& context, const std::string& id) {
  const bool is_safe = std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 127; });
  if (is_safe && !id.empty()) context.AddInitialMetadata(kRequestIdHeader, id);
}

// The engine stops a little before the call's own deadline, so that what was generated until then
// still reaches the client, with finish reason DEADLINE.
absl::Time EngineDeadline(const grpc::CallbackServerContext& context, absl::Time now) {
  const bool has_deadline = context.deadline() != std::chrono::system_clock::time_point::max();
  const absl::Duration left = has_deadline ? std::min(absl::FromChrono(context.deadline()) - now,
                                                      absl::Seconds(limits::kGenerateSecondsMax))
                                           : absl::Seconds(limits::kGenerateSecondsDefault);
  return now + left - std::min(left / 50, absl::Milliseconds(100));
}

// Empty: nobody's, or that of a service without tenants.
std::string Tenant(const grpc::CallbackServerContext& context) {
  const auto header = context.client_metadata().find(kTenantHeader);
  if (header == context.client_metadata().end()) return "";
  return {header->second.data(), header->second.size()};
}

// Adds what a client can act on to the engine's refusal.
absl::Status Refuse(absl::Status status, int64_t n_prompt, const engine::Engine& engine) {
  if (absl::IsInvalidArgument(status) && n_prompt >= engine.context_tokens()) {
    SetErrorInfo(status, "CONTEXT_LENGTH_EXCEEDED",
                 {{"prompt_tokens", absl::StrCat(n_prompt)},
                  {"max_model_len", absl::StrCat(engine.context_tokens())}});
  }
  if (absl::IsResourceExhausted(status)) SetRetryDelay(status, engine.RetryDelay());
  return status;
}

absl::StatusOr<std::vector<int32_t>> InputTokens(const engine::ServedModel& model,
                                                 const v1::GenerateRequest& request) {
  return PromptTokens(model, request);
}
absl::StatusOr<std::vector<int32_t>> InputTokens(const engine::ServedModel& model,
                                                 const v1::ChatRequest& request) {
  return ChatTokens(model, request.messages());
}

// Preparing is short beside generating: a few threads, which leave the machine to the model.
int PreparingThreads() { return std::clamp(ThreadPool::HardwareThreads() / 2, 2, 8); }

}  // namespace

GenerationService::GenerationService(ModelStore* models, Clock* clock, const Options& options)
    : options_(options),
      models_(models),
      clock_(clock),
      stall_monitor_(options.stall_limit),
      preparing_({.n_threads = options.preparing_threads > 0 ? options.preparing_threads
                                                             : PreparingThreads(),
                  .tasks_max = options.preparing_max}) {}

absl::StatusOr<std::shared_ptr<engine::Engine>> GenerationService::EngineOf(
    const std::string& model) const {
  WALSH_ASSIGN_OR_RETURN(const std::string id, ParseModelName("model", model));
  return models_->FindEngine(id);
}

template <typename Request>
CallInfo GenerationService::Arrive(const grpc::CallbackServerContext& context,
                                   const Request& request) const {
  CallInfo info;
  info.request_id = RequestId(context, request.request_id());
  const absl::StatusOr<std::string> id = ParseModelName("model", request.model());
  info.model = id.ok() ? ModelName(*id) : "";
  info.clock = clock_;
  info.arrival = clock_->Monotonic();
  return info;
}

template <typename Request>
absl::StatusOr<GenerationService::Prepared> GenerationService::Prepare(
    grpc::CallbackServerContext* context, const Request& request, const CallInfo& info,
    const GenerationCall& call) {
  WALSH_RETURN_IF_ERROR(ValidateRequest(request));
  Prepared prepared;
  WALSH_ASSIGN_OR_RETURN(prepared.engine, EngineOf(request.model()));
  const std::string id = ParseModelName("model", request.model()).value();
  if (call.is_cancelled()) {
    engine::CountCancellation(id);
    return absl::CancelledError("the request was cancelled");
  }
  const engine::ServedModel& model = prepared.engine->model();

  engine::Request& out = prepared.request;
  absl::StatusOr<std::vector<int32_t>> tokens = InputTokens(model, request);
  if (!tokens.ok()) {
    engine::CountRejection(id, "invalid");
    return tokens.status();
  }
  out.prompt = *std::move(tokens);
  out.sampling = ToSamplingOptions(request.sampling());
  out.deadline = EngineDeadline(*context, clock_->Now());
  out.arrival = info.arrival;
  out.cache_salt = Tenant(*context);

  EchoRequestId(*context, info.request_id);
  out.id = absl::StrCat(info.request_id, "#", ++n_requests_);
  return prepared;
}

template <typename Call, typename Request>
void GenerationService::Run(grpc::CallbackServerContext* context, const Request& request,
                            const CallInfo& info, const std::shared_ptr<Call>& call) {
  absl::StatusOr<Prepared> prepared = Prepare(context, request, info, *call);
  if (!prepared.ok()) return call->Fail(prepared.status());
  const auto n_prompt = static_cast<int64_t>(prepared->request.prompt.size());
  if constexpr (std::is_same_v<Call, UnaryCall>) {
    const absl::Status fits =
        CheckAnswerFits(prepared->request.sampling, prepared->engine->context_tokens() - n_prompt);
    if (!fits.ok()) {
      engine::CountRejection(ParseModelName("model", request.model()).value(), "invalid");
      return call->Fail(fits);
    }
  } else {
    stall_monitor_.Watch(call);
  }
  const absl::Status status = call->Submit(prepared->engine, std::move(prepared->request));
  if (!status.ok()) call->Fail(Refuse(status, n_prompt, *prepared->engine));
}

template <typename Call, typename Request>
void GenerationService::RunSoon(grpc::CallbackServerContext* context, const Request& request,
                                const CallInfo& info, std::shared_ptr<Call> call) {
  // Context and request stay until the call has ended, which only Run brings about.
  const bool is_accepted =
      preparing_.Post([this, context, &request, info, call] { Run(context, request, info, call); });
  if (!is_accepted) call->Fail(TooManyPreparing(request.model()));
}

absl::Status GenerationService::TooManyPreparing(const std::string& model) const {
  // Only models that exist are labels.
  const absl::StatusOr<std::string> id = ParseModelName("model", model);
  if (id.ok() && models_->Get(*id).ok()) engine::CountRejection(*id, "queue_full");
  absl::Status status = absl::ResourceExhaustedError(
      absl::StrCat(options_.preparing_max, " requests wait to be tokenized already"));
  SetRetryDelay(status, kPreparingRetryDelay);
  return status;
}

template <typename Request>
grpc::ServerUnaryReactor* GenerationService::RunUnary(grpc::CallbackServerContext* context,
                                                      const Request& request,
                                                      v1::GenerateResponse* response) {
  const CallInfo info = Arrive(*context, request);
  const std::shared_ptr<UnaryCall> call = UnaryCall::Start(info, response);
  RunSoon(context, request, info, call);
  return call->reactor();
}

template <typename Request>
grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::RunStream(
    grpc::CallbackServerContext* context, const Request& request) {
  const CallInfo info = Arrive(*context, request);
  const std::shared_ptr<StreamCall> call =
      StreamCall::Start(info, context, options_.stream_interval);
  RunSoon(context, request, info, call);
  return call->reactor();
}

grpc::ServerUnaryReactor* GenerationService::AnswerSoon(grpc::CallbackServerContext* context,
                                                        const std::string& model,
                                                        std::function<absl::Status()> answer) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const bool is_accepted = preparing_.Post([context, reactor, answer = std::move(answer)] {
    const absl::Status status =
        context->IsCancelled() ? absl::CancelledError("the request was cancelled") : answer();
    reactor->Finish(ToGrpcStatus(status));
  });
  if (!is_accepted) reactor->Finish(ToGrpcStatus(TooManyPreparing(model)));
  return reactor;
}

grpc::ServerUnaryReactor* GenerationService::Generate(grpc::CallbackServerContext* context,
                                                      const v1::GenerateRequest* request,
                                                      v1::GenerateResponse* response) {
  return RunUnary(context, *request, response);
}

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::GenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  return RunStream(context, *request);
}

grpc::ServerUnaryReactor* GenerationService::Chat(grpc::CallbackServerContext* context,
                                                  const v1::ChatRequest* request,
                                                  v1::GenerateResponse* response) {
  return RunUnary(context, *request, response);
}

grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::ChatStream(
    grpc::CallbackServerContext* context, const v1::ChatRequest* request) {
  return RunStream(context, *request);
}

grpc::ServerUnaryReactor* GenerationService::Tokenize(grpc::CallbackServerContext* context,
                                                      const v1::TokenizeRequest* request,
                                                      v1::TokenizeResponse* response) {
  const auto tokenize = [this, request, response]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(ValidateRequest(*request));
    WALSH_ASSIGN_OR_RETURN(const std::shared_ptr<engine::Engine> engine,
                           EngineOf(request->model()));
    const engine::ServedModel& model = engine->model();
    absl::StatusOr<std::vector<int32_t>> ids =
        request->has_messages()
            ? ChatTokens(model, request->messages().messages())
            : model.tokenizer().Encode(request->text(),
                                       {.add_special_tokens = request->add_special_tokens(),
                                        .parse_special_tokens = true});
    if (!ids.ok()) return ids.status();
    response->mutable_token_ids()->Add(ids->begin(), ids->end());
    response->set_max_model_len(static_cast<int32_t>(engine->context_tokens()));
    return absl::OkStatus();
  };
  return AnswerSoon(context, request->model(), tokenize);
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  const auto detokenize = [this, request, response]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(ValidateRequest(*request));
    WALSH_ASSIGN_OR_RETURN(const std::shared_ptr<engine::Engine> engine,
                           EngineOf(request->model()));
    const Tokenizer& tokenizer = engine->model().tokenizer();
    for (const int32_t id : request->token_ids()) {
      if (id < 0 || id >= tokenizer.vocab_size()) {
        return InvalidField("token_ids", absl::StrCat("id ", id, " is outside the vocabulary of ",
                                                      tokenizer.vocab_size()));
      }
    }
    const std::span<const int32_t> ids(request->token_ids().data(),
                                       static_cast<size_t>(request->token_ids_size()));
    response->set_text(tokenizer.Decode(ids, request->skip_special_tokens()));
    return absl::OkStatus();
  };
  return AnswerSoon(context, request->model(), detokenize);
}

}  // namespace walsh::service
