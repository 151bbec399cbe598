#include "client/address.h"

#include "common/endpoints.h"

namespace walsh::client {

std::string ResolveAddress(const std::string& server, const std::string& data_dir) {
  if (!server.empty()) return server;
  const auto endpoints = ReadEndpoints(data_dir, "coordinator");
  // A missing or unreadable file only means that no coordinator runs on this data folder.
  if (endpoints.ok()) {
    const auto grpc = endpoints->find("grpc");
    if (grpc != endpoints->end() && !grpc->second.empty()) return grpc->second;
  }
  return kDefaultAddress;
}

bool IsLoopback(const std::string& address) {
  return address.starts_with("unix:") || IsLoopbackHost(HostOf(address));
}

}  // namespace walsh::client
