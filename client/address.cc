#include "client/address.h"

#include <string_view>

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
  const std::string_view text = address;
  return text.substr(0, 10) == "localhost:" || text == "localhost" || text.substr(0, 4) == "127." ||
         text.substr(0, 5) == "[::1]" || text == "::1" || text.substr(0, 5) == "unix:";
}

}  // namespace walsh::client
