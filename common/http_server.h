// A small HTTP server for health and metrics, on civetweb.
//
//   /livez /readyz /health (= readyz) /version /metrics
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace walsh {

class HttpServer {
 public:
  struct Options {
    std::string host = "127.0.0.1";  // an IPv6 address with or without brackets
    int port = 0;                    // 0 takes a free one
    // OK answers 200; anything else 503 with the message. Must not block.
    std::function<absl::Status()> live;
    std::function<absl::Status()> ready;
    bool vllm_metrics = false;  // /metrics has vLLM's names, too
  };
  // UNAVAILABLE when the port is taken; UNIMPLEMENTED for an IPv6 host where civetweb was built
  // without (Debian's is).
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const Options& options);
  ~HttpServer();
  int port() const;

 private:
  HttpServer();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace walsh
