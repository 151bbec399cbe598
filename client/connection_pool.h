// Connections to one server, opened as streams need them.
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
#include <vector>

#include "absl/synchronization/mutex.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "walsh/v1/model.grpc.pb.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh::client {

// One connection and the stubs on it.
struct Connection {
  explicit Connection(std::shared_ptr<grpc::Channel> c);
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::QuantizationService::Stub> quantization;
  std::unique_ptr<v1::ModelService::Stub> models;
  std::unique_ptr<v1::GenerationService::Stub> generation;
  int n_calls = 0;  // guarded by the pool
};

class ConnectionPool {
 public:
  ConnectionPool(std::string address, int calls_per_connection_max);

  // Holds a place on a connection for one call.
  class Lease {
   public:
    Lease(ConnectionPool* pool, Connection* connection) : pool_(pool), connection_(connection) {}
    ~Lease();
    Lease(Lease&& other) noexcept;
    Lease& operator=(Lease&&) = delete;
    Connection* operator->() const { return connection_; }

   private:
    ConnectionPool* pool_;
    Connection* connection_;
  };
  Lease Acquire();

  int n_connections() const;
  const std::string& address() const { return address_; }

 private:
  const std::string address_;
  const int calls_per_connection_max_;
  mutable absl::Mutex mu_;
  std::vector<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mu_);
};

}  // namespace walsh::client
