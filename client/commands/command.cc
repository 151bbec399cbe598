#include "client/commands/command.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "client/address.h"
#include "client/terminal/error_text.h"
#include "common/command_line.h"
#include "common/endpoints.h"
#include "common/utf8.h"

namespace walsh::client {
namespace {

// As it is typed in a shell: quoted where it has to be.
std::string ShellWord(const std::string& text) {
  const bool is_plain = std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("%+,-./:=@_", c);
  });
  if (is_plain && !text.empty()) return text;
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

}  // namespace

ClientOptions MakeClientOptions(const GlobalFlags& flags) {
  ClientOptions options;
  options.address = ResolveAddress(flags.server, flags.data_dir);
  options.timeout = absl::Seconds(flags.timeout_seconds);
  options.security = flags.security;
  return options;
}

std::string WalshCommand(const GlobalFlags& flags) {
  std::string command = "walsh";
  const auto add = [&command](const char* flag, const std::string& value) {
    if (!value.empty()) absl::StrAppend(&command, " ", flag, " ", ShellWord(value));
  };
  add("--server", flags.server);
  if (flags.server.empty() && flags.data_dir != DefaultDataDir()) {
    add("--data-dir", flags.data_dir);
  }
  add("--tls-ca", flags.security_flags.tls.ca);
  add("--tls-cert", flags.security_flags.tls.certificate);
  add("--tls-key", flags.security_flags.tls.private_key);
  add("--api-key-file", flags.security_flags.api_key_file);
  return command;
}

int Fail(const absl::Status& status) {
  std::fflush(stdout);
  std::fputs(ErrorText(status).c_str(), stderr);
  return kExitFailed;
}

std::string AbsolutePath(const std::string& path) {
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal().string();
}

std::string SourceReference(const std::string& path_or_url) {
  return path_or_url.starts_with("s3://") ? path_or_url : AbsolutePath(path_or_url);
}

absl::Status CheckUtf8(const std::string& text, const std::string& what) {
  if (IsValidUtf8(text)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the ", what, " is not UTF-8"));
}

absl::StatusOr<std::string> TextOrStdin(const std::string& text, const std::string& what) {
  std::string result = text;
  if (text == "-") {
    result.clear();
    std::array<char, 65536> buffer;
    for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), stdin)) > 0;) {
      result.append(buffer.data(), n);
    }
  }
  if (absl::Status status = CheckUtf8(result, what); !status.ok()) return status;
  return result;
}

void PrintOut(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

}  // namespace walsh::client
