#include "server/api/generation_service.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "common/generation_limits.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/resource_name.h"
#include "common/status_macros.h"
#include "common/tenant_header.h"
#include "server/fleet/forwarding.h"
#include "server/fleet/placement.h"
#include "server/fleet/unary_proxy.h"

namespace walsh::api {
namespace {

using fleet::WorkerAddress;
using v1::GenerateStreamResponse;

// Where a request goes, and the model that it means there.
struct Destination {
  WorkerAddress worker;
  std::string model_id;
};

// The request counts as sent from now on, if this succeeds.
absl::StatusOr<Destination> Route(const Core& core, const std::string& model) {
  WALSH_ASSIGN_OR_RETURN(const std::string name, ParseModelName("model", model));
  if (core.is_stopping) return Stopping();
  Destination to;
  WALSH_RETURN_IF_ERROR(core.catalog->ForModel(name, [&](const std::string& id) -> absl::Status {
    WALSH_ASSIGN_OR_RETURN(to.worker, core.registry->BeginRequest(id));
    to.model_id = id;
    return absl::OkStatus();
  }));
  return to;
}

template <typename Messages>
int64_t TextBytes(const Messages& messages) {
  int64_t n_bytes = 0;
  for (const v1::ChatMessage& message : messages) {
    n_bytes += static_cast<int64_t>(message.role().size() + message.content().size());
  }
  return n_bytes;
}

template <typename Ids>
int64_t IdBytes(const Ids& ids) {
  return int64_t{ids.size()} * int64_t{sizeof(int32_t)};
}

int64_t NewTokens(const v1::SamplingParams& sampling) {
  return sampling.has_max_tokens() ? sampling.max_tokens() : limits::kNewTokensDefault;
}

access::RequestSize SizeOf(const v1::GenerateRequest& request) {
  return {.prompt_bytes = request.has_token_ids() ? IdBytes(request.token_ids().ids())
                                                  : static_cast<int64_t>(request.prompt().size()),
          .new_tokens = NewTokens(request.sampling())};
}
access::RequestSize SizeOf(const v1::ChatRequest& request) {
  return {.prompt_bytes = TextBytes(request.messages()),
          .new_tokens = NewTokens(request.sampling())};
}
access::RequestSize SizeOf(const v1::TokenizeRequest& request) {
  return {.prompt_bytes = request.has_messages() ? TextBytes(request.messages().messages())
                                                 : static_cast<int64_t>(request.text().size())};
}
access::RequestSize SizeOf(const v1::DetokenizeRequest& request) {
  return {.prompt_bytes = IdBytes(request.token_ids())};
}

// Those requests that carry an id for logs get the call's when they have none. The id that counts.
template <typename Request>
std::string SetRequestId(const std::string& id, Request* request) {
  if constexpr (requires { request->request_id(); }) {
    if (request->request_id().empty()) request->set_request_id(id);
    return request->request_id();
  }
  return id;
}

// A call on its way to a worker: counted there from now on, and alive until it ends.
template <typename Request>
class Forwarded {
 public:
  Forwarded(Core* core, Destination to, const access::Caller& caller, const Request& r)
      : request(r), core_(core), tenant_(caller.tenant), to_(std::move(to)) {
    Connect();
  }

  auto* async() const { return (*connection_)->generation->async(); }
  const Destination& to() const { return to_; }
  // Of each call that goes to a worker.
  void SetMetadata(grpc::ClientContext* context) const {
    if (tenant_.has_value()) context->AddMetadata(kTenantHeader, *tenant_);
  }
  void End() const { core_->registry->EndRequest(to_.worker.worker_id, to_.model_id); }

  // After a worker's call that failed: true when the next one goes to another worker. Once to each,
  // and only where the one before is leaving.
  bool GoElsewhere(const absl::Status& failure) {
    if (!fleet::IsLeaving(failure)) return false;
    refused_.insert(to_.worker.worker_id);
    absl::StatusOr<WorkerAddress> next = core_->registry->BeginRequest(to_.model_id, refused_);
    if (!next.ok()) return false;
    End();
    WALSH_LOG(Info, "a leaving worker's request goes to another",
              {"model", ModelName(to_.model_id)}, {"from", WorkerName(to_.worker.worker_id)},
              {"to", WorkerName(next->worker_id)});
    to_.worker = *std::move(next);
    Connect();
    return true;
  }

  Request request;

 private:
  void Connect() {
    connection_.reset();  // which its client must outlive
    client_ = core_->clients->Get(to_.worker);
    connection_.emplace(client_->AcquireGeneration());
  }

  Core* const core_;
  const std::optional<std::string> tenant_;
  Destination to_;
  std::set<std::string> refused_;  // ids of workers
  std::shared_ptr<fleet::WorkerClient> client_;
  std::optional<fleet::WorkerClient::GenerationPool::Lease> connection_;
};

// What ends a forwarded call: gets the status that the client gets.
using OnEnd = std::function<void(const absl::Status&)>;

// Checks, routes, counts; what the four kinds of calls have in common.
template <typename Request>
absl::StatusOr<std::shared_ptr<Forwarded<Request>>> Forward(
    Core* core, grpc::CallbackServerContext* context, const char* method, const Request& request,
    const std::string& request_id, OnEnd* done) {
  WALSH_RETURN_IF_ERROR(ValidateRequest(request));
  WALSH_ASSIGN_OR_RETURN(const access::Caller caller, core->access->CallerOf(*context));
  const access::RequestSize size = SizeOf(request);
  WALSH_RETURN_IF_ERROR(core->running_requests.Begin(caller, size));
  absl::StatusOr<Destination> destination = Route(*core, request.model());
  if (!destination.ok()) {
    core->running_requests.End(caller, size);
    return destination.status();
  }
  auto call = std::make_shared<Forwarded<Request>>(core, *std::move(destination), caller, request);
  const std::string log_id = SetRequestId(request_id, &call->request);
  call->request.set_model(call->to().model_id);
  *done = [=, asked = request.model(),
           start = core->clock->Monotonic()](const absl::Status& status) {
    core->running_requests.End(caller, size);
    call->End();
    const Destination& to = call->to();
    WALSH_LOG(Info, "call ended", {"method", method}, {"request_id", log_id}, {"model", asked},
              {"served_by", ModelName(to.model_id)}, {"worker", WorkerName(to.worker.worker_id)},
              {"status", status},
              {"seconds", absl::ToDoubleSeconds(core->clock->Monotonic() - start)});
  };
  return call;
}

// `method` is a unary method of the worker's stub.
template <typename Request, typename Response, typename Method>
grpc::ServerUnaryReactor* ForwardUnary(grpc::CallbackServerContext* context, Core* core,
                                       const char* name, absl::Duration timeout_default,
                                       const Request* request, Response* response, Method method) {
  std::string request_id = EchoRequestId(context);
  OnEnd done;
  auto forwarded = Forward(core, context, name, *request, request_id, &done);
  if (!forwarded.ok()) {
    LogEnd(name, request_id, forwarded.status());
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(forwarded.status()));
    return reactor;
  }
  const auto start = [call = *forwarded, response, method](
                         grpc::ClientContext* client_context,
                         std::function<void(grpc::Status)> finished) {
    call->SetMetadata(client_context);
    (call->async()->*method)(
        client_context, &call->request, response,
        [call, finished = std::move(finished)](const grpc::Status& status) { finished(status); });
  };
  return fleet::UnaryProxy::Run(
      &core->calls, fleet::WorkerTimeout(context->deadline(), timeout_default), start,
      [call = *forwarded](const absl::Status& failure) { return call->GoElsewhere(failure); },
      std::move(done));
}

template <typename Request, typename Method>
fleet::StreamReactor<GenerateStreamResponse>* ForwardStream(grpc::CallbackServerContext* context,
                                                            Core* core, const char* name,
                                                            const Request* request, Method method) {
  const std::string request_id = EchoRequestId(context);
  OnEnd done;
  auto forwarded = Forward(core, context, name, *request, request_id, &done);
  if (!forwarded.ok()) {
    LogEnd(name, request_id, forwarded.status());
    return new FailedStream<GenerateStreamResponse>(forwarded.status());
  }
  const auto start = [call = *forwarded, method](
                         grpc::ClientContext* client_context,
                         fleet::StreamReader<GenerateStreamResponse>* reader) {
    call->SetMetadata(client_context);
    (call->async()->*method)(client_context, &call->request, reader);
  };
  return fleet::ProxyStream<GenerateStreamResponse>(
      context, &core->calls,
      fleet::WorkerTimeout(context->deadline(), fleet::kGenerateTimeoutDefault),
      core->stream_limits, core->executor, start, std::move(done),
      [call = *forwarded](const absl::Status& failure) { return call->GoElsewhere(failure); });
}

// The class and the method of this name are told apart by the keyword.
using Async = class v1::GenerationService::Stub::async;
// The one of the stub's overloads that takes a callback.
template <typename Request, typename Response>
using UnaryMethod = void (Async::*)(grpc::ClientContext*, const Request*, Response*,
                                    std::function<void(grpc::Status)>);

}  // namespace

grpc::ServerUnaryReactor* GenerationServiceImpl::Generate(grpc::CallbackServerContext* context,
                                                          const v1::GenerateRequest* request,
                                                          v1::GenerateResponse* response) {
  constexpr UnaryMethod<v1::GenerateRequest, v1::GenerateResponse> kMethod = &Async::Generate;
  return ForwardUnary(context, core_, "Generate", fleet::kGenerateTimeoutDefault, request, response,
                      kMethod);
}

grpc::ServerWriteReactor<GenerateStreamResponse>* GenerationServiceImpl::GenerateStream(
    grpc::CallbackServerContext* context, const v1::GenerateRequest* request) {
  return ForwardStream(context, core_, "GenerateStream", request, &Async::GenerateStream);
}

grpc::ServerUnaryReactor* GenerationServiceImpl::Chat(grpc::CallbackServerContext* context,
                                                      const v1::ChatRequest* request,
                                                      v1::GenerateResponse* response) {
  constexpr UnaryMethod<v1::ChatRequest, v1::GenerateResponse> kMethod = &Async::Chat;
  return ForwardUnary(context, core_, "Chat", fleet::kGenerateTimeoutDefault, request, response,
                      kMethod);
}

grpc::ServerWriteReactor<GenerateStreamResponse>* GenerationServiceImpl::ChatStream(
    grpc::CallbackServerContext* context, const v1::ChatRequest* request) {
  return ForwardStream(context, core_, "ChatStream", request, &Async::ChatStream);
}

grpc::ServerUnaryReactor* GenerationServiceImpl::Tokenize(grpc::CallbackServerContext* context,
                                                          const v1::TokenizeRequest* request,
                                                          v1::TokenizeResponse* response) {
  constexpr UnaryMethod<v1::TokenizeRequest, v1::TokenizeResponse> kMethod = &Async::Tokenize;
  return ForwardUnary(context, core_, "Tokenize", fleet::kUnaryTimeoutDefault, request, response,
                      kMethod);
}

grpc::ServerUnaryReactor* GenerationServiceImpl::Detokenize(grpc::CallbackServerContext* context,
                                                            const v1::DetokenizeRequest* request,
                                                            v1::DetokenizeResponse* response) {
  constexpr UnaryMethod<v1::DetokenizeRequest, v1::DetokenizeResponse> kMethod = &Async::Detokenize;
  return ForwardUnary(context, core_, "Detokenize", fleet::kUnaryTimeoutDefault, request, response,
                      kMethod);
}

}  // namespace walsh::api
