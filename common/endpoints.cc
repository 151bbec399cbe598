#include "common/endpoints.h"

#include <arpa/inet.h>
#include <unistd.h>

#include <cstdlib>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

constexpr int64_t kEndpointsBytesMax = 64 << 10;

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

std::string EndpointsPath(const std::string& data_dir, const std::string& daemon) {
  return absl::StrCat(data_dir, "/run/", daemon, ".json");
}

absl::Status WriteEndpoints(const std::string& data_dir, const std::string& daemon,
                            const Endpoints& endpoints) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(data_dir + "/run"));
  nlohmann::json json = endpoints;
  json["pid"] = getpid();
  return PublishFile(EndpointsPath(data_dir, daemon), json.dump(2) + "\n");
}

absl::StatusOr<Endpoints> ReadEndpoints(const std::string& data_dir, const std::string& daemon) {
  auto contents = ReadFile(EndpointsPath(data_dir, daemon), kEndpointsBytesMax);
  if (absl::IsNotFound(contents.status())) {
    return absl::NotFoundError(absl::StrCat("no ", daemon, " runs on this data folder"));
  }
  WALSH_RETURN_IF_ERROR(contents.status());
  const nlohmann::json json = nlohmann::json::parse(*contents, nullptr, false);
  if (!json.is_object()) {
    return absl::DataLossError(
        absl::StrCat("the endpoints file of ", daemon, " is no JSON object"));
  }
  Endpoints endpoints;
  for (const auto& [key, value] : json.items()) {
    endpoints[key] = value.is_string() ? value.get<std::string>() : value.dump();
  }
  return endpoints;
}

void RemoveEndpoints(const std::string& data_dir, const std::string& daemon) {
  unlink(EndpointsPath(data_dir, daemon).c_str());
}

std::string DefaultDataDir() {
  if (std::string dir = Environment("WALSH_DATA_DIR"); !dir.empty()) return dir;
  if (const std::string xdg = Environment("XDG_DATA_HOME"); !xdg.empty()) return xdg + "/walsh";
  return Environment("HOME") + "/.local/share/walsh";
}

std::string_view BareHost(std::string_view host) {
  const bool has_brackets = host.starts_with('[') && host.ends_with(']');
  return has_brackets ? host.substr(1, host.size() - 2) : host;
}

std::string HostPort(std::string_view host, int port) {
  const std::string bare(BareHost(host));
  const bool is_ipv6 = bare.find(':') != std::string::npos;
  return is_ipv6 ? absl::StrCat("[", bare, "]:", port) : absl::StrCat(bare, ":", port);
}

std::string_view HostOf(std::string_view address) {
  if (address.starts_with('[')) return BareHost(address.substr(0, address.find(']') + 1));
  const size_t colon = address.find(':');
  // More than one: an IPv6 address without a port.
  return address.find(':', colon + 1) == std::string_view::npos ? address.substr(0, colon)
                                                                : address;
}

bool IsLoopbackHost(std::string_view host) {
  const std::string_view bare = BareHost(host);
  in_addr ipv4{};  // a name may begin with 127., too
  return bare == "localhost" || bare == "::1" ||
         (bare.starts_with("127.") && inet_pton(AF_INET, std::string(bare).c_str(), &ipv4) == 1);
}

bool IsWildcardHost(std::string_view host) {
  const std::string_view bare = BareHost(host);
  return bare == "0.0.0.0" || bare == "::";
}

}  // namespace walsh
