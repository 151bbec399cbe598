#include "common/http_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "common/metrics.h"
#include "common/version.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using ::walsh::testing::StatusIs;

// Sends raw bytes and returns all that comes back.
template <typename Address>
std::string ExchangeWith(const Address& address, int family, const std::string& request) {
  const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 &&
      send(fd, request.data(), request.size(), MSG_NOSIGNAL) >= 0) {
    char buffer[4096];
    for (ssize_t n; (n = recv(fd, buffer, sizeof buffer, 0)) > 0;) {
      answer.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return answer;
}

std::string Exchange(int port, const std::string& request) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return ExchangeWith(address, AF_INET, request);
}

std::string ExchangeIpv6(int port, const std::string& request) {
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(static_cast<uint16_t>(port));
  address.sin6_addr = in6addr_loopback;
  return ExchangeWith(address, AF_INET6, request);
}

// Whether this machine has an IPv6 loopback.
bool HasIpv6() {
  const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const bool is_there = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
  close(fd);
  return is_there;
}

std::string Get(int port, const std::string& path, const std::string& method = "GET") {
  return Exchange(port, method + " " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
}

TEST(HttpServerTest, ProbesFollowTheCallbacks) {
  std::atomic<bool> is_ready{false};
  ASSERT_OK_AND_ASSIGN(const auto server,
                       HttpServer::Start({.live = [] { return absl::OkStatus(); },
                                          .ready = [&]() -> absl::Status {
                                            if (is_ready) return absl::OkStatus();
                                            return absl::UnavailableError("no worker\nyet");
                                          }}));
  EXPECT_THAT(Get(server->port(), "/livez"), StartsWith("HTTP/1.1 200 OK\r\n"));
  for (const char* path : {"/readyz", "/health"}) {
    const std::string answer = Get(server->port(), path);
    EXPECT_THAT(answer, StartsWith("HTTP/1.1 503 Service Unavailable\r\n"));
    EXPECT_THAT(answer, EndsWith("\r\n\r\nno worker\\u000ayet\n"));
  }
  is_ready = true;
  EXPECT_THAT(Get(server->port(), "/readyz"), EndsWith("\r\n\r\nok\n"));
}

TEST(HttpServerTest, MetricsHaveVllmsNamesWhereTheyAreAskedFor) {
  metrics::Gauge("walsh_num_requests_running", "Running.").Add({{"model_name", "m"}}).Set(2);
  constexpr char kSeries[] = "\nvllm:num_requests_running{model_name=\"m\",engine=\"0\"} 2\n";
  ASSERT_OK_AND_ASSIGN(const auto plain, HttpServer::Start({}));
  EXPECT_THAT(Get(plain->port(), "/metrics"), Not(HasSubstr("vllm:")));
  ASSERT_OK_AND_ASSIGN(const auto compatible, HttpServer::Start({.vllm_metrics = true}));
  EXPECT_THAT(Get(compatible->port(), "/metrics"), HasSubstr(kSeries));
}

TEST(HttpServerTest, ListensOnIpv6WithAndWithoutBrackets) {
  if (!HasIpv6()) GTEST_SKIP() << "no IPv6 loopback here";
  for (const char* host : {"::1", "[::1]"}) {
    const auto server = HttpServer::Start({.host = host});
    if (absl::IsUnimplemented(server.status())) {
      EXPECT_THAT(server.status(),
                  StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("[::1]:0: the civetweb")));
      continue;
    }
    ASSERT_OK(server);
    EXPECT_THAT(ExchangeIpv6((*server)->port(), "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                StartsWith("HTTP/1.1 200"))
        << host;
  }
}

TEST(HttpServerTest, ShowsMetricsAndVersion) {
  metrics::Counter("walsh_http_test_total", "Test.").Add({}).Increment();
  ASSERT_OK_AND_ASSIGN(const auto server, HttpServer::Start({}));
  const std::string answer = Get(server->port(), "/metrics");
  EXPECT_THAT(answer, HasSubstr("Content-Type: text/plain; version=0.0.4"));
  EXPECT_THAT(answer, HasSubstr("\nwalsh_http_test_total 1\n"));
  EXPECT_THAT(Get(server->port(), "/version"),
              HasSubstr("\"version\":\"" + std::string(Version()) + "\""));
}

TEST(HttpServerTest, ServesNothingElse) {
  ASSERT_OK_AND_ASSIGN(const auto server, HttpServer::Start({}));
  for (const char* path :
       {"/", "/livez/x", "/metricsx", "/etc/passwd", "/../etc/passwd", "/%2e%2e/etc/passwd"}) {
    EXPECT_THAT(Get(server->port(), path), Not(StartsWith("HTTP/1.1 200"))) << path;
  }
  const std::string post = Get(server->port(), "/livez", "POST");
  EXPECT_THAT(post, StartsWith("HTTP/1.1 405"));
  EXPECT_THAT(post, HasSubstr("Allow: GET, HEAD\r\n"));
  EXPECT_THAT(Get(server->port(), "/livez", "HEAD"), EndsWith("\r\n\r\n"));
}

TEST(HttpServerTest, SurvivesBadRequests) {
  ASSERT_OK_AND_ASSIGN(const auto server, HttpServer::Start({}));
  for (const std::string& request :
       {std::string("\r\n\r\n"), std::string("GET\r\n\r\n"), std::string(100'000, 'x') + "\r\n\r\n",
        std::string("GET /livez HTTP/9.9\r\n\r\n")}) {
    EXPECT_THAT(Exchange(server->port(), request), Not(StartsWith("HTTP/1.1 200")));
  }
  EXPECT_THAT(Get(server->port(), "/livez"), StartsWith("HTTP/1.1 200"));
}

TEST(HttpServerTest, ATakenPortIsAnError) {
  ASSERT_OK_AND_ASSIGN(const auto server, HttpServer::Start({}));
  EXPECT_GT(server->port(), 0);
  EXPECT_THAT(HttpServer::Start({.port = server->port()}),
              StatusIs(absl::StatusCode::kUnavailable,
                       HasSubstr("cannot listen on 127.0.0.1:" + std::to_string(server->port()))));
  EXPECT_THAT(HttpServer::Start({.host = "no such host"}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no such host")));
}

TEST(HttpServerTest, AnswersInParallel) {
  ASSERT_OK_AND_ASSIGN(const auto server, HttpServer::Start({}));
  std::vector<std::thread> threads;
  std::atomic<int> n_good{0};
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 20; ++k) {
        if (Get(server->port(), "/livez").starts_with("HTTP/1.1 200")) ++n_good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(n_good, 160);
}

}  // namespace
}  // namespace walsh
