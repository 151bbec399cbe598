#include "common/grpc_server.h"

#include <grpc/impl/codegen/grpc_types.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/support/server_interceptor.h>
#include <sys/resource.h>

#include <atomic>
#include <cerrno>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/limits.h"
#include "common/log.h"
#include "common/metrics.h"

namespace walsh {
namespace {

using grpc::experimental::InterceptionHookPoints;

constexpr std::string_view kReflectionMethod =
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";

struct Families {
  prometheus::Family<prometheus::Counter>& started =
      metrics::Counter("grpc_server_started_total", "RPCs that began.");
  prometheus::Family<prometheus::Counter>& handled =
      metrics::Counter("grpc_server_handled_total", "RPCs that ended, by status code.");
  prometheus::Family<prometheus::Counter>& received =
      metrics::Counter("grpc_server_msg_received_total", "Messages received from clients.");
  prometheus::Family<prometheus::Counter>& sent =
      metrics::Counter("grpc_server_msg_sent_total", "Messages sent to clients.");
  prometheus::Family<prometheus::Histogram>& seconds =
      metrics::Histogram("grpc_server_handling_seconds", "Time from an RPC's start to its status.");
};

Families& GetFamilies() {
  static auto* const families = new Families;
  return *families;
}

const metrics::Buckets& HandlingBuckets() {
  // Prometheus's defaults, then what a generation or a watch takes.
  static const auto* const buckets =
      new metrics::Buckets{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300};
  return *buckets;
}

std::string TypeName(grpc::experimental::ServerRpcInfo::Type type) {
  using Type = grpc::experimental::ServerRpcInfo::Type;
  switch (type) {
    case Type::UNARY:
      return "unary";
    case Type::CLIENT_STREAMING:
      return "client_stream";
    case Type::SERVER_STREAMING:
      return "server_stream";
    case Type::BIDI_STREAMING:
      return "bidi_stream";
  }
  return "unknown";
}

std::string CodeName(grpc::StatusCode code) {
  // The spelling of go-grpc-prometheus, which dashboards and alerts expect.
  static constexpr const char* kNames[] = {
      "OK",       "Canceled",       "Unknown",          "InvalidArgument",   "DeadlineExceeded",
      "NotFound", "AlreadyExists",  "PermissionDenied", "ResourceExhausted", "FailedPrecondition",
      "Aborted",  "OutOfRange",     "Unimplemented",    "Internal",          "Unavailable",
      "DataLoss", "Unauthenticated"};
  const int index = static_cast<int>(code);
  return index >= 0 && index < static_cast<int>(std::size(kNames)) ? kNames[index] : "Unknown";
}

// gRPC's callback API gives a call of a method that nobody registered to a handler of last resort,
// which is a bidirectional stream under the caller's name. walsh's services have no such streams.
bool MayBeUnregistered(const grpc::experimental::ServerRpcInfo& info) {
  return info.type() == grpc::experimental::ServerRpcInfo::Type::BIDI_STREAMING;
}

// "/walsh.v1.ModelService/ListModels" -> service, method. Names that a caller made up would be
// labels without bound; the one known stream is reflection's.
prometheus::Labels RpcLabels(const grpc::experimental::ServerRpcInfo& info) {
  std::string_view path = info.method();
  if (MayBeUnregistered(info) && path != kReflectionMethod) path = "unknown/unknown";
  if (!path.empty() && path.front() == '/') path.remove_prefix(1);
  const size_t slash = path.find('/');
  const std::string service(path.substr(0, slash));
  const std::string method(slash == std::string_view::npos ? "" : path.substr(slash + 1));
  return {{"grpc_type", TypeName(info.type())}, {"grpc_service", service}, {"grpc_method", method}};
}

// One per RPC. Reads and writes of a stream are intercepted on different threads.
class MetricsInterceptor : public grpc::experimental::Interceptor {
 public:
  explicit MetricsInterceptor(const grpc::experimental::ServerRpcInfo& info)
      : labels_(RpcLabels(info)),
        received_(GetFamilies().received.Add(labels_)),
        sent_(GetFamilies().sent.Add(labels_)),
        start_(Clock::Real()->Monotonic()) {
    GetFamilies().started.Add(labels_).Increment();
  }

  // A call whose handler never sent a status was cancelled under it.
  ~MetricsInterceptor() override { Finish(grpc::StatusCode::CANCELLED); }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_MESSAGE) &&
        methods->GetRecvMessage() != nullptr) {
      received_.Increment();
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_MESSAGE)) {
      sent_.Increment();
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      Finish(methods->GetSendStatus().error_code());
    }
    methods->Proceed();
  }

 private:
  void Finish(grpc::StatusCode code) {
    if (finished_.exchange(true)) return;
    prometheus::Labels labels = labels_;
    labels["grpc_code"] = CodeName(code);
    GetFamilies().handled.Add(labels).Increment();
    GetFamilies()
        .seconds.Add(labels_, HandlingBuckets())
        .Observe(absl::ToDoubleSeconds(Clock::Real()->Monotonic() - start_));
  }

  const prometheus::Labels labels_;
  prometheus::Counter& received_;
  prometheus::Counter& sent_;
  const absl::Duration start_;
  std::atomic<bool> finished_{false};
};

class MetricsInterceptorFactory : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    return new MetricsInterceptor(*info);
  }
};

// gRPC 1.51 stops accepting for good once descriptors have run out, so the process takes all that
// it may have. A failure leaves things as they are.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
    WALSH_LOG(Warning, "the limit of open files cannot be raised", {"errno", errno});
  }
}

// gRPC's callback API answers a message that does not parse, half a character in a string for one,
// as if the method did not exist: UNIMPLEMENTED without a word. It is the request that is wrong.
class MalformedRequestInterceptor : public grpc::experimental::Interceptor {
 public:
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      const grpc::Status status = methods->GetSendStatus();
      if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED &&
          status.error_message().empty()) {
        methods->ModifySendStatus({grpc::StatusCode::INVALID_ARGUMENT,
                                   "the request is not a message of its type; strings must be "
                                   "valid UTF-8"});
      }
    }
    methods->Proceed();
  }
};

class MalformedRequestInterceptorFactory
    : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    // That a method does not exist is the truth there.
    return MayBeUnregistered(*info) ? nullptr : new MalformedRequestInterceptor;
  }
};

class NoReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins,
                  [](const auto& plugin) { return plugin->name() == "proto_server_reflection"; });
  }
};

}  // namespace

void ApplyServerLimits(grpc::ServerBuilder& builder, const Keepalive& keepalive) {
  RaiseDescriptorLimit();
  builder.SetMaxReceiveMessageSize(limits::kMessageBytesMax);
  builder.SetMaxSendMessageSize(limits::kMessageBytesMax);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, limits::kMetadataBytesMax);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, limits::kConcurrentStreamsMax);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two daemons on one port: an error
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, limits::kHandshakeMsMax);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, limits::kConnectionIdleMsMax);
  // Without a grace, which would cut long calls: each has a limit of its own.
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, limits::kConnectionAgeMsMax);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive.server_interval_ms);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive.timeout_ms);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             keepalive.server_min_ping_interval_ms);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, keepalive.server_ping_strikes_max);
  // Without this a ping on a connection without calls counts as a strike for two hours.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.SetResourceQuota(
      grpc::ResourceQuota("walsh").Resize(static_cast<size_t>(limits::kGrpcBuffersBytesMax)));
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, int connection,
                                           const ChannelSecurity& security,
                                           const Keepalive& keepalive) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(limits::kMessageBytesMax);
  arguments.SetMaxSendMessageSize(limits::kMessageBytesMax);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive.client_interval_ms);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive.timeout_ms);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  // A quiet stream (Watch) is pinged for as long as it lives; the default stops after two.
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5000);
  // An argument that gRPC does not know still tells connections apart in its pool.
  arguments.SetInt("walsh.connection", connection);
  // No proxy from the environment between coordinator and worker.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return MakeSecuredChannel(address, security, std::move(arguments));
}

void DisableReflection(grpc::ServerBuilder& builder) {
  builder.SetOption(std::make_unique<NoReflection>());
}

void AddServerInterceptors(grpc::ServerBuilder& builder) {
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> creators;
  // What is sent passes them in this order: the metrics see the status that leaves.
  creators.push_back(std::make_unique<MalformedRequestInterceptorFactory>());
  creators.push_back(std::make_unique<MetricsInterceptorFactory>());
  builder.experimental().SetInterceptorCreators(std::move(creators));
}

}  // namespace walsh
