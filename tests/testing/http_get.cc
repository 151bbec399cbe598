#include "tests/testing/http_get.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace walsh::testing {

absl::StatusOr<std::string> HttpGet(const std::string& endpoint, const std::string& path) {
  int port = 0;
  if (!absl::SimpleAtoi(endpoint.substr(endpoint.rfind(':') + 1), &port)) {
    return absl::InvalidArgumentError(absl::StrCat("no port in '", endpoint, "'"));
  }
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  const std::string host = endpoint.substr(0, endpoint.rfind(':'));
  if (inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("no IPv4 address in '", endpoint, "'"));
  }
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    close(fd);
    return absl::UnavailableError(absl::StrCat("nobody listens at ", endpoint));
  }
  const std::string request =
      absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: ", endpoint, "\r\n\r\n");
  std::string answer;
  if (write(fd, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
    std::array<char, 65536> buffer;
    for (ssize_t n; (n = read(fd, buffer.data(), buffer.size())) > 0;) {
      answer.append(buffer.data(), static_cast<size_t>(n));
    }
  }
  close(fd);
  const size_t body = answer.find("\r\n\r\n");
  if (answer.substr(0, answer.find('\r')).find(" 200") == std::string::npos ||
      body == std::string::npos) {
    return absl::UnavailableError(absl::StrCat(path, ": ", answer.substr(0, 200)));
  }
  return answer.substr(body + 4);
}

}  // namespace walsh::testing
