#include "tests/testing/tcp_proxy.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/check.h"

namespace walsh::testing {
namespace {

// How often the loop looks at what a test has changed.
constexpr int kPollMs = 2;
constexpr size_t kPieceBytes = 16 << 10;
// What waits in a direction; a source is not read meanwhile, as on a slow network.
constexpr size_t kWaitingBytesMax = 256 << 10;
constexpr std::array<TcpProxy::Direction, 2> kDirections = {TcpProxy::kRequests,
                                                            TcpProxy::kAnswers};

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

int PortOf(const std::string& endpoint) {
  int port = 0;
  WALSH_CHECK(absl::SimpleAtoi(endpoint.substr(endpoint.rfind(':') + 1), &port));
  return port;
}

// Closing it sends RST.
void SetNoLinger(int fd) {
  const linger none = {.l_onoff = 1, .l_linger = 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));
}

}  // namespace

struct TcpProxy::Connection {
  struct Piece {
    absl::Time due;
    std::string bytes;
  };
  struct Stream {
    int from = -1;
    int to = -1;
    std::deque<Piece> waiting;
    size_t n_waiting = 0;
    bool is_at_end = false;                       // nothing more comes
    bool is_closed = false;                       // and the other side knows
    absl::Time may_write = absl::InfinitePast();  // by the rate
    std::string tail;                             // of requests, to find what spans two pieces
  };

  ~Connection() {
    close(streams[kRequests].from);
    close(streams[kRequests].to);
  }

  Stream streams[2];
  bool swallows_answers = false;
};

TcpProxy::TcpProxy(const std::string& target) : target_port_(PortOf(target)) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  WALSH_CHECK(listener_ >= 0 && bind(listener_, any, size) == 0 && listen(listener_, 64) == 0 &&
              getsockname(listener_, any, &size) == 0);
  address_ = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  thread_ = std::thread([this] { Loop(); });
}

TcpProxy::~TcpProxy() {
  {
    const absl::MutexLock lock(&mu_);
    is_over_ = true;
  }
  thread_.join();
  close(listener_);
}

int TcpProxy::n_connections() const {
  const absl::MutexLock lock(&mu_);
  return static_cast<int>(connections_.size());
}
int TcpProxy::n_accepted() const {
  const absl::MutexLock lock(&mu_);
  return n_accepted_;
}
int64_t TcpProxy::n_bytes(Direction direction) const {
  const absl::MutexLock lock(&mu_);
  return n_bytes_[direction];
}
void TcpProxy::SetDelay(absl::Duration delay) {
  const absl::MutexLock lock(&mu_);
  delay_ = delay;
}
void TcpProxy::SetRate(double bytes_per_second) {
  const absl::MutexLock lock(&mu_);
  rate_ = bytes_per_second;
}
void TcpProxy::Swallow(Direction direction, bool is_on) {
  const absl::MutexLock lock(&mu_);
  swallows_[direction] = is_on;
}
void TcpProxy::SwallowAnswersTo(const std::string& request) {
  const absl::MutexLock lock(&mu_);
  swallowed_request_ = request;
}
bool TcpProxy::has_swallowed_answers() const {
  const absl::MutexLock lock(&mu_);
  return has_swallowed_answers_;
}

void TcpProxy::Reset() {
  const absl::MutexLock lock(&mu_);
  for (const auto& connection : connections_) {
    SetNoLinger(connection->streams[kRequests].from);
    SetNoLinger(connection->streams[kRequests].to);
  }
  connections_.clear();
}

void TcpProxy::HalfClose(Direction direction) {
  const absl::MutexLock lock(&mu_);
  for (const auto& connection : connections_) connection->streams[direction].is_at_end = true;
}

void TcpProxy::Inject(Direction direction, const std::string& bytes) {
  const absl::MutexLock lock(&mu_);
  for (const auto& connection : connections_) {
    Connection::Stream& stream = connection->streams[direction];
    stream.waiting.push_back({absl::Now(), bytes});
    stream.n_waiting += bytes.size();
  }
}

void TcpProxy::Loop() {
  while (true) {
    std::vector<pollfd> fds = {{listener_, POLLIN, 0}};
    {
      const absl::MutexLock lock(&mu_);
      if (is_over_) {
        connections_.clear();
        return;
      }
      for (const auto& connection : connections_) {
        for (const Direction direction : kDirections) {
          const Connection::Stream& stream = connection->streams[direction];
          const bool has_room = !stream.is_at_end && stream.n_waiting < kWaitingBytesMax;
          fds.push_back({stream.from, static_cast<int16_t>(has_room ? POLLIN : 0), 0});
        }
      }
    }
    // Not until something can be written: that is tried each time, since most of it waits for its
    // time. A descriptor that Reset() closes meanwhile is found out by reading.
    poll(fds.data(), fds.size(), kPollMs);
    const absl::MutexLock lock(&mu_);
    std::erase_if(connections_, [this](const auto& connection) ABSL_NO_THREAD_SAFETY_ANALYSIS {
      for (const Direction direction : kDirections) {
        if (!Read(connection.get(), direction) || !Write(connection.get(), direction)) return true;
      }
      return connection->streams[kRequests].is_closed && connection->streams[kAnswers].is_closed;
    });
    Accept();
  }
}

void TcpProxy::Accept() {
  const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (client < 0) return;
  const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_in target = Loopback(target_port_);
  WALSH_CHECK(server >= 0);
  if (connect(server, reinterpret_cast<const sockaddr*>(&target), sizeof(target)) != 0) {
    SetNoLinger(client);
    close(client);
    close(server);
    return;
  }
  fcntl(server, F_SETFL, O_NONBLOCK);
  auto connection = std::make_unique<Connection>();
  connection->streams[kRequests].from = connection->streams[kAnswers].to = client;
  connection->streams[kRequests].to = connection->streams[kAnswers].from = server;
  connections_.push_back(std::move(connection));
  ++n_accepted_;
}

bool TcpProxy::Read(Connection* connection, Direction direction) {
  Connection::Stream& stream = connection->streams[direction];
  if (stream.is_at_end || stream.n_waiting >= kWaitingBytesMax) return true;
  std::string bytes(kPieceBytes, '\0');
  const ssize_t n = read(stream.from, bytes.data(), bytes.size());
  if (n < 0) return errno == EAGAIN || errno == EINTR;
  stream.is_at_end = n == 0;
  bytes.resize(static_cast<size_t>(n));
  if (direction == kRequests && !swallowed_request_.empty()) {
    stream.tail += bytes;
    if (stream.tail.find(swallowed_request_) != std::string::npos) {
      connection->swallows_answers = has_swallowed_answers_ = true;
    }
    stream.tail.erase(
        0, stream.tail.size() - std::min(stream.tail.size(), swallowed_request_.size() - 1));
  }
  if (bytes.empty() || swallows_[direction] ||
      (direction == kAnswers && connection->swallows_answers)) {
    return true;
  }
  stream.n_waiting += bytes.size();
  stream.waiting.push_back({absl::Now() + delay_, std::move(bytes)});
  return true;
}

bool TcpProxy::Write(Connection* connection, Direction direction) {
  Connection::Stream& stream = connection->streams[direction];
  const absl::Time now = absl::Now();
  while (!stream.waiting.empty() && stream.waiting.front().due <= now && stream.may_write <= now) {
    std::string& bytes = stream.waiting.front().bytes;
    // What is late by the rate is sent a poll's worth at a time.
    const size_t n_max =
        rate_ == 0 ? bytes.size()
                   : std::min(bytes.size(), static_cast<size_t>(rate_ * kPollMs / 1000) + 1);
    const ssize_t n = send(stream.to, bytes.data(), n_max, MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (rate_ != 0) stream.may_write = now + absl::Seconds(static_cast<double>(n) / rate_);
    stream.n_waiting -= static_cast<size_t>(n);
    n_bytes_[direction] += n;
    bytes.erase(0, static_cast<size_t>(n));
    if (bytes.empty()) stream.waiting.pop_front();
  }
  if (stream.is_at_end && stream.waiting.empty() && !stream.is_closed) {
    shutdown(stream.to, SHUT_WR);
    stream.is_closed = true;
  }
  return true;
}

}  // namespace walsh::testing
