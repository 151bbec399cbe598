// Connections to one server, opened as calls need them.
//
// HTTP/2 servers cap the streams of one connection (ours: limits::kConcurrentStreamsMax); a client
// that puts more on one connection waits silently. Each call takes the least busy connection, and
// when all are full another one is opened.
//
// Threads: safe.
#pragma once

#include <grpcpp/channel.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "common/grpc_server.h"

namespace walsh {

// `Stubs` is made from a std::shared_ptr<grpc::Channel>, once for each connection.
template <typename Stubs>
class ConnectionPool {
 public:
  // Connections get the numbers from `first_connection` on (MakeChannel), so that pools to one
  // address can stay apart.
  ConnectionPool(std::string address, int calls_per_connection_max, ChannelSecurity security = {},
                 int first_connection = 0)
      : address_(std::move(address)),
        calls_per_connection_max_(calls_per_connection_max),
        security_(std::move(security)),
        first_connection_(first_connection) {}

 private:
  struct Connection {
    explicit Connection(const std::shared_ptr<grpc::Channel>& channel) : stubs(channel) {}
    Stubs stubs;
    int n_calls = 0;
  };

 public:
  // Holds a place on a connection for one call. The pool must outlive it.
  class Lease {
   public:
    Lease(ConnectionPool* pool, Connection* connection) : pool_(pool), connection_(connection) {}
    ~Lease() {
      if (pool_ == nullptr) return;
      const absl::MutexLock lock(&pool_->mu_);
      --connection_->n_calls;
    }
    Lease(Lease&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)), connection_(other.connection_) {}
    Lease& operator=(Lease&&) = delete;
    Stubs& operator*() const { return connection_->stubs; }
    Stubs* operator->() const { return &connection_->stubs; }

   private:
    ConnectionPool* pool_;
    Connection* connection_;
  };

  Lease Acquire() {
    const absl::MutexLock lock(&mu_);
    Connection* least_busy = nullptr;
    for (const auto& connection : connections_) {
      if (least_busy == nullptr || connection->n_calls < least_busy->n_calls) {
        least_busy = connection.get();
      }
    }
    if (least_busy == nullptr || least_busy->n_calls >= calls_per_connection_max_) {
      const int number = first_connection_ + static_cast<int>(connections_.size());
      connections_.push_back(
          std::make_unique<Connection>(MakeChannel(address_, number, security_)));
      least_busy = connections_.back().get();
    }
    ++least_busy->n_calls;
    return Lease(this, least_busy);
  }

  int n_connections() const {
    const absl::MutexLock lock(&mu_);
    return static_cast<int>(connections_.size());
  }
  const std::string& address() const { return address_; }

 private:
  const std::string address_;
  const int calls_per_connection_max_;
  const ChannelSecurity security_;
  const int first_connection_;
  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh
