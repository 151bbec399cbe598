#include "common/http_server.h"

#include <civetweb.h>

#include <atomic>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string_view>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/endpoints.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/version.h"

namespace walsh {
namespace {

constexpr const char* kTextType = "text/plain; charset=utf-8";
constexpr const char* kPrometheusType = "text/plain; version=0.0.4; charset=utf-8";

struct Response {
  int code = 200;
  const char* type = kTextType;
  std::string body;
};

const char* ReasonPhrase(int code) {
  switch (code) {
    case 200:
      return "OK";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    default:
      return "Service Unavailable";
  }
}

Response FromProbe(const std::function<absl::Status()>& probe) {
  const absl::Status status = probe ? probe() : absl::OkStatus();
  if (status.ok()) return {.body = "ok\n"};
  return {.code = 503, .body = absl::StrCat(log::Escape(std::string(status.message())), "\n")};
}

std::string VersionJson() {
  const nlohmann::json json = {{"version", std::string(Version())},
                               {"revision", std::string(Revision())},
                               {"cuda", HasCuda()}};
  return json.dump() + "\n";
}

Response Answer(const HttpServer::Options& options, std::string_view method,
                std::string_view path) {
  if (method != "GET" && method != "HEAD") return {.code = 405, .body = "only GET and HEAD\n"};
  if (path == "/livez") return FromProbe(options.live);
  if (path == "/readyz" || path == "/health") return FromProbe(options.ready);
  if (path == "/version") return {.type = "application/json", .body = VersionJson()};
  if (path == "/metrics") {
    return {.type = kPrometheusType, .body = metrics::Render({.vllm_names = options.vllm_metrics})};
  }
  return {.code = 404, .body = "no such page\n"};
}

int Handle(mg_connection* connection, void* options) {
  const mg_request_info* request = mg_get_request_info(connection);
  const std::string_view method = request->request_method;
  const char* path = request->local_uri;
  const Response response = Answer(*static_cast<const HttpServer::Options*>(options), method,
                                   path == nullptr ? "" : path);
  mg_printf(connection,
            "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n%s\r\n",
            response.code, ReasonPhrase(response.code), response.type, response.body.size(),
            response.code == 405 ? "Allow: GET, HEAD\r\n" : "");
  if (method != "HEAD") mg_write(connection, response.body.data(), response.body.size());
  return response.code;
}

int LogMessage(const mg_connection*, const char* message) {
  WALSH_LOG(Warning, "http server", {"detail", message});
  return 1;  // handled: civetweb writes no log of its own
}

}  // namespace

struct HttpServer::Impl {
  Options options;
  mg_context* context = nullptr;
  int port = 0;
};

HttpServer::HttpServer() : impl_(std::make_unique<Impl>()) {}

HttpServer::~HttpServer() {
  if (impl_->context == nullptr) return;
  // civetweb notices a stop when its two-second poll for connections ends, so a connection ends it.
  std::atomic<bool> is_stopped{false};
  std::thread stopper([&] {
    mg_stop(impl_->context);
    is_stopped = true;
  });
  char error[64];
  while (!is_stopped) {
    mg_connection* wake = mg_connect_client(std::string(BareHost(impl_->options.host)).c_str(),
                                            impl_->port, 0, error, sizeof error);
    if (wake == nullptr) break;
    mg_close_connection(wake);
  }
  stopper.join();
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const Options& options) {
  static std::once_flag once;
  std::call_once(once, [] { mg_init_library(MG_FEATURES_DEFAULT); });
  std::unique_ptr<HttpServer> server(new HttpServer);
  server->impl_->options = options;
  const std::string address = HostPort(options.host, options.port);
  if (address.starts_with('[') && mg_check_feature(MG_FEATURES_IPV6) == 0) {
    return absl::UnimplementedError(
        absl::StrCat("HTTP cannot listen on ", address,
                     ": the civetweb of this machine has no IPv6; use an IPv4 --host"));
  }
  // No document root: nothing of the file system is served. Scrapers and probes are few, so a
  // handful of threads is enough, and a slow peer holds one of them for 5 s at most.
  const char* settings[] = {"listening_ports",
                            address.c_str(),
                            "num_threads",
                            "4",
                            "request_timeout_ms",
                            "5000",
                            "enable_keep_alive",
                            "no",
                            nullptr};
  mg_callbacks callbacks{};
  callbacks.log_message = LogMessage;
  server->impl_->context = mg_start(&callbacks, nullptr, settings);
  if (server->impl_->context == nullptr) {
    return absl::UnavailableError(absl::StrCat("HTTP cannot listen on ", address));
  }
  mg_server_port bound{};
  if (mg_get_server_ports(server->impl_->context, 1, &bound) < 1) {
    return absl::InternalError("the HTTP server has no port");
  }
  server->impl_->port = bound.port;
  mg_set_request_handler(server->impl_->context, "/", Handle, &server->impl_->options);
  return server;
}

int HttpServer::port() const { return impl_->port; }

}  // namespace walsh
