#include "tests/testing/scripted_http_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace walsh::testing {
namespace {

// Of a request whose head is whole: how many bytes follow it.
size_t BodyBytes(const std::string& head) {
  const std::string lower = absl::AsciiStrToLower(head);
  const size_t at = lower.find("content-length:");
  size_t n_bytes = 0;
  if (at == std::string::npos) return 0;
  const size_t value = at + sizeof("content-length:") - 1;
  WALSH_CHECK(absl::SimpleAtoi(lower.substr(value, lower.find('\r', value) - value), &n_bytes));
  return n_bytes;
}

std::string ReadRequest(int connection) {
  std::string request;
  std::array<char, 65536> buffer;
  while (true) {
    const size_t head = request.find("\r\n\r\n");
    if (head != std::string::npos &&
        request.size() >= head + 4 + BodyBytes(request.substr(0, head + 2))) {
      return request;
    }
    const ssize_t n = read(connection, buffer.data(), buffer.size());
    if (n <= 0) return request;
    request.append(buffer.data(), static_cast<size_t>(n));
  }
}

}  // namespace

ScriptedHttpServer::ScriptedHttpServer(std::vector<std::string> answers)
    : answers_(std::move(answers)) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  WALSH_CHECK(bind(listener_, any, size) == 0 && listen(listener_, 16) == 0);
  WALSH_CHECK(getsockname(listener_, any, &size) == 0);
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { Serve(); });
}

ScriptedHttpServer::~ScriptedHttpServer() {
  shutdown(listener_, SHUT_RDWR);  // ends the thread's accept
  thread_.join();
  close(listener_);
  for (const int connection : hanging_) close(connection);
}

std::string ScriptedHttpServer::Answer(int status, const std::string& body,
                                       const std::string& headers) {
  return absl::StrCat("HTTP/1.1 ", status, " Scripted\r\nContent-Length: ", body.size(),
                      "\r\nConnection: close\r\n", headers, "\r\n", body);
}

std::string ScriptedHttpServer::url() const { return absl::StrCat("http://127.0.0.1:", port_); }

std::vector<std::string> ScriptedHttpServer::requests() const {
  const std::lock_guard lock(mu_);
  return requests_;
}

void ScriptedHttpServer::Serve() {
  while (true) {
    const int connection = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (connection < 0) return;
    Answer(connection);
  }
}

void ScriptedHttpServer::Answer(int connection) {
  std::string request = ReadRequest(connection);
  std::string answer;
  {
    const std::lock_guard lock(mu_);
    answer = answers_[std::min(requests_.size(), answers_.size() - 1)];
    requests_.push_back(std::move(request));
  }
  const bool hangs = answer.ends_with(kHang);
  if (hangs) answer.pop_back();
  // A client that has gone is none of the script's business.
  (void)!send(connection, answer.data(), answer.size(), MSG_NOSIGNAL);
  if (hangs) {
    hanging_.push_back(connection);
  } else {
    close(connection);
  }
}

}  // namespace walsh::testing
