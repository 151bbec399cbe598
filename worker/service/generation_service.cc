#include "worker/service/generation_service.h"

#include <algorithm>
#include <random>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/generation_limits.h"
#include "common/grpc_status.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "worker/engine/engine_metrics.h"
#include "worker/service/generation_conversion.h"

namespace walsh::service {
namespace {

constexpr char kRequestIdHeader[] = "x-request-id";
constexpr absl::Duration kQueueRetryDelay = absl::Seconds(1);

// The client's id from the field, else from the header, else a random one.
std::string RequestId(const grpc::CallbackServerContext& context, const std::string& field) {
  if (!field.empty()) return field;
  const auto& metadata = context.client_metadata();
  if (const auto it = metadata.find(kRequestIdHeader); it != metadata.end()) {
    return std::string(it->second.data(),
                       std::min<size_t>(it->second.size(), limits::kRequestIdBytesMax));
  }
  std::random_device device;
  return absl::StrFormat("req-%08x%08x", device(), device());
}

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

// Adds what a client can act on to the engine's refusal.
absl::Status Refuse(absl::Status status, int64_t n_prompt, const engine::Engine& engine) {
  if (absl::IsInvalidArgument(status) && n_prompt >= engine.context_tokens()) {
    SetErrorInfo(status, "CONTEXT_LENGTH_EXCEEDED",
                 {{"prompt_tokens", absl::StrCat(n_prompt)},
                  {"max_model_len", absl::StrCat(engine.context_tokens())}});
  }
  if (absl::IsResourceExhausted(status)) SetRetryDelay(status, kQueueRetryDelay);
  return status;
}

absl::StatusOr<std::vector<int32_t>> InputTokens(const engine::LoadedModel& model,
                                                 const v1::GenerateRequest& request) {
  return PromptTokens(model, request);
}
absl::StatusOr<std::vector<int32_t>> InputTokens(const engine::LoadedModel& model,
                                                 const v1::ChatRequest& request) {
  return ChatTokens(model, request.messages());
}

// A call that answers at once.
grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

GenerationService::GenerationService(ModelStore* models, Clock* clock, absl::Duration stall_limit)
    : models_(models), clock_(clock), stall_monitor_(stall_limit) {}

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
    grpc::CallbackServerContext* context, const Request& request, CallInfo info) {
  WALSH_RETURN_IF_ERROR(ValidateRequest(request));
  Prepared prepared;
  WALSH_ASSIGN_OR_RETURN(prepared.engine, EngineOf(request.model()));
  const engine::LoadedModel& model = prepared.engine->model();

  engine::Request& out = prepared.request;
  absl::StatusOr<std::vector<int32_t>> tokens = InputTokens(model, request);
  if (!tokens.ok()) {
    engine::CountRejection(ParseModelName("model", request.model()).value(), "invalid");
    return tokens.status();
  }
  out.prompt = *std::move(tokens);
  out.sampling = ToSamplingOptions(request.sampling());
  out.deadline = EngineDeadline(*context, clock_->Now());
  out.arrival = info.arrival;

  EchoRequestId(*context, info.request_id);
  out.id = info.engine_id = absl::StrCat(info.request_id, "#", ++n_requests_);
  info.seed = out.sampling.seed;
  info.prompt_tokens = static_cast<int>(out.prompt.size());
  info.engine = prepared.engine;
  info.tokenizer = &model.tokenizer();
  prepared.info = std::move(info);
  return prepared;
}

template <typename Request>
grpc::ServerUnaryReactor* GenerationService::RunUnary(grpc::CallbackServerContext* context,
                                                      const Request& request,
                                                      v1::GenerateResponse* response) {
  const CallInfo info = Arrive(*context, request);
  absl::StatusOr<Prepared> prepared = Prepare(context, request, info);
  if (!prepared.ok()) {
    LogFailed(info, prepared.status());
    return Answer(context, prepared.status());
  }
  const std::shared_ptr<UnaryCall> call = UnaryCall::Start(prepared->info, response);
  const absl::Status status = prepared->engine->Submit(std::move(prepared->request), call);
  if (!status.ok()) call->Fail(Refuse(status, prepared->info.prompt_tokens, *prepared->engine));
  return call->reactor();
}

template <typename Request>
grpc::ServerWriteReactor<v1::GenerateStreamResponse>* GenerationService::RunStream(
    grpc::CallbackServerContext* context, const Request& request) {
  const CallInfo info = Arrive(*context, request);
  absl::StatusOr<Prepared> prepared = Prepare(context, request, info);
  const std::shared_ptr<StreamCall> call =
      StreamCall::Start(prepared.ok() ? prepared->info : info, context);
  if (!prepared.ok()) {
    call->Fail(prepared.status());
    return call->reactor();
  }
  stall_monitor_.Watch(call);
  const absl::Status status = prepared->engine->Submit(std::move(prepared->request), call);
  if (!status.ok()) call->Fail(Refuse(status, prepared->info.prompt_tokens, *prepared->engine));
  return call->reactor();
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
  const auto tokenize = [&]() -> absl::Status {
    WALSH_RETURN_IF_ERROR(ValidateRequest(*request));
    WALSH_ASSIGN_OR_RETURN(const std::shared_ptr<engine::Engine> engine,
                           EngineOf(request->model()));
    const engine::LoadedModel& model = engine->model();
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
  return Answer(context, tokenize());
}

grpc::ServerUnaryReactor* GenerationService::Detokenize(grpc::CallbackServerContext* context,
                                                        const v1::DetokenizeRequest* request,
                                                        v1::DetokenizeResponse* response) {
  const auto detokenize = [&]() -> absl::Status {
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
  return Answer(context, detokenize());
}

}  // namespace walsh::service
