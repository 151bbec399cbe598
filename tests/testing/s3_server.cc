#include "tests/testing/s3_server.h"

#include <cstdlib>
#include <filesystem>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "tests/testing/http_get.h"
#include "tests/testing/wait.h"

namespace walsh::testing {
namespace {

std::string PythonPath() { return CacheDir() + "/venv/bin/python"; }
std::string PackagesPath() { return CacheDir() + "/moto"; }

}  // namespace

bool S3Server::IsThere() {
  return std::filesystem::exists(PythonPath()) && std::filesystem::exists(PackagesPath());
}

absl::StatusOr<std::unique_ptr<S3Server>> S3Server::Start() {
  const char* source = std::getenv("WALSH_SOURCE_DIR");
  if (source == nullptr) return absl::FailedPreconditionError("no WALSH_SOURCE_DIR: use ctest");
  std::unique_ptr<S3Server> server(new S3Server);
  const std::string printed = server->directory_ / "printed";
  WALSH_ASSIGN_OR_RETURN(
      server->process_,
      client::ChildProcess::Spawn(
          {.argv = {PythonPath(), absl::StrCat(source, "/tests/testing/s3_server.py"), kBucket},
           .environment = {{"PYTHONPATH", PackagesPath()}, {"PYTHONDONTWRITEBYTECODE", "1"}},
           .stdout_path = printed,
           .stderr_path = server->directory_ / "log"}));
  const std::string before = "endpoint http://";
  std::string line;
  const bool is_up = WaitUntil([&] {
    line = ReadFile(printed, 4096).value_or("");
    return line.ends_with('\n') || server->process_->Poll().has_value();
  });
  if (!is_up || !line.starts_with(before)) {
    return absl::UnavailableError(absl::StrCat(
        "moto does not start: ", ReadFile(server->directory_ / "log", 1 << 20).value_or("")));
  }
  server->endpoint_ = line.substr(before.size(), line.size() - before.size() - 1);
  return server;
}

std::map<std::string, std::string> S3Server::environment() const {
  return {{"AWS_ENDPOINT_URL", "http://" + endpoint_},
          {"AWS_ACCESS_KEY_ID", "test-key"},
          {"AWS_SECRET_ACCESS_KEY", "test/secret+key"},
          {"AWS_SESSION_TOKEN", "test-token"},
          {"AWS_REGION", "eu-test-1"}};
}

absl::StatusOr<std::string> S3Server::ReadWithBoto3(const std::string& key) const {
  return HttpGet(endpoint_, "/_boto3/" + key);
}

int S3Server::n_open_uploads() const {
  int n_uploads = -1;
  (void)absl::SimpleAtoi(HttpGet(endpoint_, "/_uploads").value_or(""), &n_uploads);
  return n_uploads;
}

}  // namespace walsh::testing
