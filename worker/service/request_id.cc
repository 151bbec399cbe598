#include "worker/service/request_id.h"

#include <algorithm>
#include <cstddef>
#include <random>

#include "absl/strings/str_format.h"
#include "common/limits.h"

namespace walsh::service {

std::string RequestId(const grpc::ServerContextBase& context, const std::string& field) {
  if (!field.empty()) return field;
  const auto& metadata = context.client_metadata();
  if (const auto it = metadata.find(kRequestIdHeader); it != metadata.end()) {
    return std::string(it->second.data(),
                       std::min<size_t>(it->second.size(), limits::kRequestIdBytesMax));
  }
  std::random_device device;
  return absl::StrFormat("req-%08x%08x", device(), device());
}

}  // namespace walsh::service
