// A real S3 server for tests: moto's (tests/testing/s3_server.py), which `./run test` fetches, on a
// free port of the loopback. It refuses requests that are not signed as botocore signs them.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "client/child_process.h"
#include "tests/testing/test_data.h"

namespace walsh::testing {

class S3Server {
 public:
  // Whether moto is there.
  static bool IsThere();
  static absl::StatusOr<std::unique_ptr<S3Server>> Start();

  // AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID …
  std::map<std::string, std::string> environment() const;
  static constexpr char kBucket[] = "walsh-test";
  // There from the start, with these contents.
  static constexpr char kObjectOfBoto3[] = "by/boto3";
  static constexpr char kContentsOfBoto3[] = "written by boto3";

  // An object as boto3 reads it.
  absl::StatusOr<std::string> ReadWithBoto3(const std::string& key) const;
  // Uploads in parts that have neither ended nor been given up.
  int n_open_uploads() const;

 private:
  S3Server() = default;
  TempDir directory_;
  std::string endpoint_;  // HOST:PORT
  std::optional<client::ChildProcess> process_;
};

}  // namespace walsh::testing

#define WALSH_REQUIRE_S3() \
  WALSH_SKIP_OR_FAIL(!::walsh::testing::S3Server::IsThere(), "no moto (./run test fetches it)")
