// Which bucket a store is, and how its endpoint is talked to.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace walsh::objects {

struct S3Options {
  std::string endpoint;  // http://HOST[:PORT] or https://…
  std::string region;
  std::string access_key_id, secret_access_key;
  std::string session_token;  // empty: none
  std::string bucket;
  std::string prefix;  // of all keys; may be empty

  // Larger objects go up in parts of this, and more where they would be over 10,000. An endpoint
  // may refuse parts below 5 MiB.
  int64_t part_bytes = int64_t{32} << 20;
  absl::Duration connect_timeout = absl::Seconds(5);
  // A transfer that is slower than 1 KiB/s for so long has stalled.
  absl::Duration stall_timeout = absl::Seconds(30);
  // Of a request with all its tries.
  absl::Duration deadline = absl::Minutes(5);
  absl::Duration retry_first = absl::Milliseconds(200);
};

// Where s3://BUCKET[/KEY] leads, unchecked.
struct S3Location {
  std::string bucket;
  std::string key;  // without slashes at its end; may be empty
};
bool IsS3Location(std::string_view location);
S3Location SplitS3Location(std::string_view location);

// Endpoint, region and credentials: AWS_ENDPOINT_URL (AWS's own of the region where unset),
// AWS_REGION (us-east-1), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN.
// FAILED_PRECONDITION names a variable that is missing, INVALID_ARGUMENT one that cannot be used,
// neither with its value.
absl::StatusOr<S3Options> S3OptionsFromEnvironment();
// INVALID_ARGUMENT for what could not be a bucket, a prefix or an endpoint.
absl::Status CheckS3Options(const S3Options& options);

}  // namespace walsh::objects
