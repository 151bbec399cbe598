#include "common/resource_name.h"

#include <algorithm>

#include "common/grpc_status.h"
#include "common/limits.h"

namespace walsh {
namespace {

bool IsLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsLowerOrDigit(char c) { return IsLower(c) || (c >= '0' && c <= '9'); }

std::string Join(std::string_view collection, std::string_view id) {
  return std::string(collection).append(id);
}

absl::StatusOr<std::string> Parse(std::string_view field, std::string_view name,
                                  std::string_view collection, bool (*is_id)(std::string_view),
                                  std::string_view rule) {
  const std::string_view id = name.starts_with(collection) ? name.substr(collection.size()) : name;
  if (is_id(id)) return std::string(id);
  const std::string shown(name.substr(0, 128));
  return InvalidField(field, "'" + shown + "' is not of the form " + std::string(rule));
}

}  // namespace

bool IsModelId(std::string_view id) {
  return !id.empty() && id.size() <= limits::kModelNameBytesMax && IsLowerOrDigit(id[0]) &&
         id.find("..") == std::string_view::npos && std::all_of(id.begin(), id.end(), [](char c) {
           return IsLowerOrDigit(c) || c == '.' || c == '_' || c == '-';
         });
}

bool IsJobId(std::string_view id) {
  return !id.empty() && id.size() <= limits::kJobIdBytesMax && IsLower(id[0]) &&
         std::all_of(id.begin(), id.end(), [](char c) { return IsLowerOrDigit(c) || c == '-'; });
}

std::string ModelName(std::string_view id) { return Join(kModelCollection, id); }
std::string AliasName(std::string_view id) { return Join(kAliasCollection, id); }
std::string JobName(std::string_view id) { return Join(kJobCollection, id); }
std::string WorkerName(std::string_view id) { return Join(kWorkerCollection, id); }

absl::StatusOr<std::string> ParseModelName(std::string_view field, std::string_view name) {
  return Parse(field, name, kModelCollection, IsModelId, "models/[a-z0-9][a-z0-9._-]{0,63}");
}

absl::StatusOr<std::string> ParseAliasName(std::string_view field, std::string_view name) {
  return Parse(field, name, kAliasCollection, IsModelId, "aliases/[a-z0-9][a-z0-9._-]{0,63}");
}

absl::StatusOr<std::string> ParseJobName(std::string_view field, std::string_view name) {
  return Parse(field, name, kJobCollection, IsJobId, "quantizationJobs/[a-z][a-z0-9-]{0,62}");
}

}  // namespace walsh
