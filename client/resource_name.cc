#include "client/resource_name.h"

namespace walsh::client {
namespace {

std::string WithPrefix(std::string_view prefix, std::string_view id) {
  if (id.substr(0, prefix.size()) == prefix) return std::string(id);
  return std::string(prefix) + std::string(id);
}

}  // namespace

std::string JobName(std::string_view id) { return WithPrefix("quantizationJobs/", id); }

std::string ModelName(std::string_view id) { return WithPrefix("models/", id); }

std::string ResourceId(std::string_view name) {
  const size_t slash = name.rfind('/');
  return std::string(slash == std::string_view::npos ? name : name.substr(slash + 1));
}

}  // namespace walsh::client
