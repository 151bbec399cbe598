#include "client/commands/doctor.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/child_process.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "common/command_line.h"
#include "common/publish.h"

namespace walsh::client {
namespace {

using nlohmann::json;

constexpr absl::Duration kDescribeTimeout = absl::Seconds(60);

struct UsualPort {
  int port;
  const char* use;
};
constexpr std::array<UsualPort, 6> kUsualPorts = {{{50051, "gRPC"},
                                                   {50052, "gRPC of the workers' protocol"},
                                                   {8000, "HTTP"},
                                                   {8002, "metrics of the coordinator"},
                                                   {50053, "gRPC of the worker"},
                                                   {8003, "metrics of the worker"}}};

// True when a daemon could listen on 127.0.0.1:`port` now.
bool IsPortFree(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const int on = 1;
  // As servers do: a port in TIME_WAIT is free.
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const bool is_free =
      bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 && listen(fd, 1) == 0;
  close(fd);
  return is_free;
}

json DescribeWorker() {
  SpawnOptions spawn;
  spawn.argv = {SiblingBinary("walsh-worker"), "--describe"};
  const auto output = RunCommand(spawn, "", kDescribeTimeout);
  if (!output.ok()) return {{"error", std::string(output.status().message())}};
  json described = json::parse(output->out, nullptr, false);
  if (output->exit_code != 0 || !described.is_object()) {
    return {{"error", absl::StrCat("walsh-worker --describe ended with exit code ",
                                   output->exit_code, ": ", output->err)}};
  }
  return described;
}

// The folder itself, or where it would be made.
std::filesystem::path NearestExisting(std::filesystem::path path) {
  std::error_code error;
  while (!std::filesystem::exists(path, error) && path.has_relative_path()) {
    path = path.parent_path();
  }
  return path;
}

json DescribeDataDir(const std::string& data_dir) {
  const std::filesystem::path existing = NearestExisting(data_dir);
  // What a published file needs, fsync and rename included, is tried rather than guessed.
  const std::string probe = (existing / ".walsh-doctor").string();
  const absl::Status status = PublishFile(probe, "ok");
  unlink(probe.c_str());
  json described = {
      {"path", data_dir}, {"exists", existing == data_dir}, {"writable", status.ok()}};
  if (!status.ok()) described["error"] = std::string(status.message());
  if (const auto free = FreeBytes(existing.string()); free.ok()) described["free_bytes"] = *free;
  return described;
}

json DescribePorts() {
  json ports = json::array();
  for (const UsualPort& usual : kUsualPorts) {
    ports.push_back({{"port", usual.port}, {"use", usual.use}, {"free", IsPortFree(usual.port)}});
  }
  return ports;
}

json DescribeService(const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const absl::Status status = client.CheckHealth("", absl::Seconds(3));
  json described = {{"address", client.address()}, {"running", status.ok()}};
  if (!status.ok()) described["error"] = std::string(status.message());
  return described;
}

// "openblas_core" -> "openblas core"
std::string Label(std::string key) {
  for (char& c : key) c = c == '_' ? ' ' : c;
  return key;
}

std::string ValueText(const std::string& key, const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_integer() && key.size() > 6 && key.find("bytes") != std::string::npos) {
    return BytesText(value.get<int64_t>());
  }
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_array()) {
    std::vector<std::string> items;
    for (const json& item : value) items.push_back(ValueText(key, item));
    return absl::StrJoin(items, "; ");
  }
  return value.dump();
}

// An object as lines; an object inside as its own indented block.
void AppendObject(const json& object, int indent, std::string& text) {
  for (const auto& [key, value] : object.items()) {
    const std::string margin(static_cast<size_t>(indent), ' ');
    if (value.is_object()) {
      absl::StrAppend(&text, margin, Label(key), "\n");
      AppendObject(value, indent + 2, text);
    } else {
      absl::StrAppendFormat(&text, "%s%-24s %s\n", margin, Label(key), ValueText(key, value));
    }
  }
}

int RunDoctor(const GlobalFlags& global) {
  const std::string data_dir = AbsolutePath(global.data_dir);
  const json findings = {{"worker", DescribeWorker()},
                         {"data_dir", DescribeDataDir(data_dir)},
                         {"ports", DescribePorts()},
                         {"service", DescribeService(global)}};
  PrintOut(global.json() ? findings.dump(2, ' ', false, json::error_handler_t::replace) + "\n"
                         : DoctorText(findings));
  const bool can_run =
      !findings["worker"].contains("error") && findings["data_dir"]["writable"].get<bool>();
  return can_run ? kExitOk : kExitFailed;
}

}  // namespace

std::string DoctorText(const json& findings) {
  std::string text = "this machine, as a worker sees it\n";
  AppendObject(findings["worker"], 2, text);
  text += "data folder\n";
  AppendObject(findings["data_dir"], 2, text);
  text += "service\n";
  AppendObject(findings["service"], 2, text);
  const bool running = findings["service"]["running"].get<bool>();
  text += "usual ports\n";
  for (const json& port : findings["ports"]) {
    const char* state = port["free"].get<bool>() ? "free"
                        : running                ? "in use"
                                                 : "in use by something else (walsh up --port 0)";
    absl::StrAppendFormat(
        &text, "  %-36s %s\n",
        absl::StrCat(port["port"].get<int>(), " ", port["use"].get<std::string>()), state);
  }
  return SafeText(text);
}

void AddDoctorCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  app.add_subcommand("doctor", "Show what this machine can run, and why not")
      ->callback([&global, &chosen] { chosen = [&global] { return RunDoctor(global); }; });
}

}  // namespace walsh::client
