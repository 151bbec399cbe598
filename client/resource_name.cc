#include "client/resource_name.h"

#include "common/resource_name.h"

namespace walsh::client {
namespace {

std::string WithCollection(std::string_view collection, std::string_view id) {
  if (id.substr(0, collection.size()) == collection) return std::string(id);
  return std::string(collection) + std::string(id);
}

}  // namespace

std::string FullJobName(std::string_view id) { return WithCollection(kJobCollection, id); }

std::string FullModelName(std::string_view id) { return WithCollection(kModelCollection, id); }

std::string FullAliasName(std::string_view id) { return WithCollection(kAliasCollection, id); }

std::string ResourceId(std::string_view name) {
  const size_t slash = name.rfind('/');
  return std::string(slash == std::string_view::npos ? name : name.substr(slash + 1));
}

}  // namespace walsh::client
