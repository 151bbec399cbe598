// What every verb of `walsh` shares: the global flags, the client made from them, errors, paths.
//
// A verb is a function Add…Command that declares its flags on the app and stores in `chosen` what
// to run when the command line names it; main() runs it after parsing.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/security.h"

namespace walsh::client {

struct GlobalFlags {
  std::string server;    // empty: found as client/address.h says
  std::string data_dir;  // of the service on this machine
  std::string output = "text";
  double timeout_seconds = 60;
  SecurityFlags security_flags;
  ChannelSecurity security;  // that ReadSecurity makes of them

  bool json() const { return output == "json"; }
};

using Chosen = std::function<int()>;

ClientOptions MakeClientOptions(const GlobalFlags& flags);
// "walsh" with what a person must add to reach the same service, for hints: --server or --data-dir
// where they are not the defaults, and the flags of client/security.h that were given.
std::string WalshCommand(const GlobalFlags& flags);
// Prints the error to standard error and returns kExitFailed.
int Fail(const absl::Status& status);
// Relative paths are the caller's, who may stand elsewhere than the service.
std::string AbsolutePath(const std::string& path);
// The same for models and texts that a worker reads; s3:// URLs stay as they are.
std::string SourceReference(const std::string& path_or_url);
// The text itself, or all of standard input when it is "-". INVALID_ARGUMENT when it is not UTF-8;
// `what` names it.
absl::StatusOr<std::string> TextOrStdin(const std::string& text, const std::string& what);
absl::Status CheckUtf8(const std::string& text, const std::string& what);
void PrintOut(const std::string& text);

}  // namespace walsh::client
