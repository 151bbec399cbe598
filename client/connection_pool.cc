#include "client/connection_pool.h"

#include <utility>

#include "common/grpc_server.h"

namespace walsh::client {

Connection::Connection(std::shared_ptr<grpc::Channel> c)
    : channel(std::move(c)),
      quantization(v1::QuantizationService::NewStub(channel)),
      models(v1::ModelService::NewStub(channel)),
      generation(v1::GenerationService::NewStub(channel)) {}

ConnectionPool::ConnectionPool(std::string address, int calls_per_connection_max)
    : address_(std::move(address)), calls_per_connection_max_(calls_per_connection_max) {}

ConnectionPool::Lease ConnectionPool::Acquire() {
  absl::MutexLock lock(&mu_);
  Connection* least_busy = nullptr;
  for (const auto& connection : connections_) {
    if (least_busy == nullptr || connection->n_calls < least_busy->n_calls) {
      least_busy = connection.get();
    }
  }
  if (least_busy == nullptr || least_busy->n_calls >= calls_per_connection_max_) {
    const int index = static_cast<int>(connections_.size());
    connections_.push_back(std::make_unique<Connection>(MakeChannel(address_, index)));
    least_busy = connections_.back().get();
  }
  ++least_busy->n_calls;
  return Lease(this, least_busy);
}

int ConnectionPool::n_connections() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(connections_.size());
}

ConnectionPool::Lease::Lease(Lease&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), connection_(other.connection_) {}

ConnectionPool::Lease::~Lease() {
  if (pool_ == nullptr) return;
  absl::MutexLock lock(&pool_->mu_);
  --connection_->n_calls;
}

}  // namespace walsh::client
