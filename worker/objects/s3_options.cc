#include "worker/objects/s3_options.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/objects/object_store.h"

namespace walsh::objects {
namespace {

constexpr std::string_view kS3Scheme = "s3://";
constexpr char kRegionDefault[] = "us-east-1";
constexpr size_t kBucketBytesMin = 3;
constexpr size_t kBucketBytesMax = 63;

// What may stand in a header.
bool IsPrintable(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > ' ' && c < 0x7f; });
}

absl::StatusOr<std::string> Variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return "";
  if (!IsPrintable(value)) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has characters that it cannot have"));
  }
  return value;
}

absl::StatusOr<std::string> Needed(const char* name) {
  WALSH_ASSIGN_OR_RETURN(std::string value, Variable(name));
  if (!value.empty()) return value;
  return absl::FailedPreconditionError(absl::StrCat("an s3:// store needs ", name));
}

bool IsBucket(const std::string& bucket) {
  return bucket.size() >= kBucketBytesMin && bucket.size() <= kBucketBytesMax &&
         std::isalnum(static_cast<unsigned char>(bucket.front())) != 0 &&
         std::all_of(bucket.begin(), bucket.end(), [](unsigned char c) {
           return std::islower(c) != 0 || std::isdigit(c) != 0 || c == '-' || c == '.';
         });
}

}  // namespace

bool IsS3Location(std::string_view location) { return location.starts_with(kS3Scheme); }

S3Location SplitS3Location(std::string_view location) {
  while (location.ends_with('/')) location.remove_suffix(1);
  const std::string_view rest = location.substr(std::min(kS3Scheme.size(), location.size()));
  const size_t slash = std::min(rest.find('/'), rest.size());
  return {.bucket = std::string(rest.substr(0, slash)),
          .key = std::string(rest.substr(std::min(slash + 1, rest.size())))};
}

absl::StatusOr<S3Options> S3OptionsFromEnvironment() {
  S3Options options;
  WALSH_ASSIGN_OR_RETURN(options.access_key_id, Needed("AWS_ACCESS_KEY_ID"));
  WALSH_ASSIGN_OR_RETURN(options.secret_access_key, Needed("AWS_SECRET_ACCESS_KEY"));
  WALSH_ASSIGN_OR_RETURN(options.session_token, Variable("AWS_SESSION_TOKEN"));
  WALSH_ASSIGN_OR_RETURN(options.region, Variable("AWS_REGION"));
  WALSH_ASSIGN_OR_RETURN(options.endpoint, Variable("AWS_ENDPOINT_URL"));
  if (options.region.empty()) options.region = kRegionDefault;
  if (options.endpoint.empty()) {
    options.endpoint = absl::StrCat("https://s3.", options.region, ".amazonaws.com");
  }
  while (options.endpoint.ends_with('/')) options.endpoint.pop_back();
  return options;
}

absl::Status CheckS3Options(const S3Options& options) {
  if (!options.endpoint.starts_with("http://") && !options.endpoint.starts_with("https://")) {
    return absl::InvalidArgumentError("AWS_ENDPOINT_URL must begin with http:// or https://");
  }
  if (options.endpoint.find_first_of("?#@") != std::string::npos) {
    return absl::InvalidArgumentError("AWS_ENDPOINT_URL must be a scheme, a host and a port only");
  }
  if (!IsBucket(options.bucket)) {
    return absl::InvalidArgumentError(absl::StrCat("the bucket of an s3:// store must be ",
                                                   kBucketBytesMin, " to ", kBucketBytesMax,
                                                   " small letters, digits, '-' or '.'"));
  }
  if (!options.prefix.empty() && !CheckKey(options.prefix).ok()) {
    return absl::InvalidArgumentError(
        "the prefix of an s3:// store must be parts of letters, digits, '-', '_' and '.'");
  }
  return absl::OkStatus();
}

}  // namespace walsh::objects
