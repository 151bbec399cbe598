#include "client/commands/up.h"

#include <cstdio>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/address.h"
#include "client/supervisor.h"
#include "common/command_line.h"
#include "common/device_choice.h"
#include "common/kv_cache_dtype.h"
#include "common/serve_while_quantizing.h"

namespace walsh::client {
namespace {

struct UpFlags {
  std::string device = "auto";
  std::string serve_while_quantizing = "share";
  std::string kv_cache_dtype = "auto";
  std::vector<std::string> model_roots;
  int port = 50051;
  int n_threads = 0;
  bool log_to_stderr = false;
  double shutdown_seconds = 30;
};

std::string EndpointOr(const Endpoints& endpoints, const std::string& key) {
  const auto found = endpoints.find(key);
  return found == endpoints.end() ? "-" : found->second;
}

// Where everything is and what to type next.
std::string Banner(const Supervisor& supervisor, const SupervisorOptions& options) {
  const std::string address = EndpointOr(supervisor.coordinator(), "grpc");
  // Commands find a service on the default data folder or port by themselves.
  std::string walsh = "walsh";
  if (options.data_dir != DefaultDataDir() && address != kDefaultAddress) {
    absl::StrAppend(&walsh, " --server ", address);
  }
  const std::string logs = options.log_to_stderr ? "standard error"
                                                 : absl::StrCat(supervisor.LogPath("coordinator"),
                                                                ", ", supervisor.LogPath("worker"));
  return absl::StrCat(
      "walsh is up\n", "  gRPC     ", address, "\n", "  health   http://",
      EndpointOr(supervisor.coordinator(), "http"), "/readyz\n", "  metrics  http://",
      EndpointOr(supervisor.coordinator(), "metrics"), "/metrics, http://",
      EndpointOr(supervisor.worker(), "metrics"), "/metrics\n", "  data     ", options.data_dir,
      "\n", "  models   are read from ", absl::StrJoin(options.model_roots, ", "), "\n",
      "  logs     ", logs, "\n\n", "In another terminal:\n", "  ", walsh,
      " quantize MODEL --name NAME    MODEL is a folder with safetensors or a .gguf file\n", "  ",
      walsh, " chat NAME\n", "Ctrl-C stops the service; jobs go on when it is started again.\n");
}

int RunUp(const UpFlags& flags, const GlobalFlags& global, const std::string& config_path) {
  SupervisorOptions options;
  options.coordinator_binary = SiblingBinary("walsh-coordinator");
  options.worker_binary = SiblingBinary("walsh-worker");
  options.data_dir = AbsolutePath(global.data_dir);
  options.device = flags.device;
  options.serve_while_quantizing = flags.serve_while_quantizing;
  options.kv_cache_dtype = flags.kv_cache_dtype;
  for (const std::string& root : flags.model_roots) {
    options.model_roots.push_back(AbsolutePath(root));
  }
  if (options.model_roots.empty()) options.model_roots = {AbsolutePath("."), options.data_dir};
  if (!config_path.empty()) options.config_path = AbsolutePath(config_path);
  options.port = flags.port;
  options.n_threads = flags.n_threads;
  options.log_to_stderr = flags.log_to_stderr;
  options.security = global.security;
  options.shutdown_timeout = absl::Seconds(flags.shutdown_seconds);
  Supervisor supervisor(options);
  if (absl::Status status = supervisor.Start(); !status.ok()) return Fail(status);
  PrintOut(Banner(supervisor, options));
  std::fflush(stdout);
  const absl::Status status = supervisor.Run();
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddUpCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<UpFlags>();
  CLI::App& command = *app.add_subcommand("up", "Run a coordinator and a worker on this machine");
  command
      .add_option("--device", flags->device,
                  "Where the worker's jobs run: auto (CUDA device 0, or the CPU where there is "
                  "none), cpu, cuda or cuda:N")
      ->check([](const std::string& text) {
        return std::string(ParseDeviceChoice(text).status().message());
      })
      ->capture_default_str();
  command
      .add_option("--serve-while-quantizing", flags->serve_while_quantizing,
                  "Requests of models while a job runs: share (the job leaves them most of the "
                  "time), preempt (it stands still while there are some) or exclusive (no job "
                  "while a model is loaded, and no model is loaded while a job runs)")
      ->check([](const std::string& text) {
        return std::string(ParseServeWhileQuantizing(text).status().message());
      })
      ->capture_default_str();
  command
      .add_option("--kv-cache-dtype", flags->kv_cache_dtype,
                  "How keys and values are stored on a CUDA device: auto (as the model's job said, "
                  "else bf16), bf16, int8 or int4. The CPU keeps floats, rounded to the same grid")
      ->check([](const std::string& text) {
        return std::string(ParseKvCacheDtype(text).status().message());
      })
      ->capture_default_str();
  command.add_option("--model-root", flags->model_roots,
                     "Folder that models and texts may be read from; may be repeated, on the "
                     "command line and in a config file (WALSH_MODEL_ROOT is one folder); default: "
                     "the current folder and the data folder");
  command
      .add_option("--port", flags->port,
                  "Public gRPC port; any other than 50051 takes free ports for the rest, 0 for "
                  "all")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  command.add_option("--threads", flags->n_threads, "Threads of the worker; default: all cores")
      ->check(CLI::PositiveNumber);
  command.add_flag("--log-to-stderr", flags->log_to_stderr,
                   "The daemons' logs on standard error instead of in the data folder");
  command
      .add_option("--shutdown-timeout", flags->shutdown_seconds,
                  "Seconds that running calls have when the service is asked to stop")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command.footer(
      "Both daemons listen on 127.0.0.1. --host, --grpc-port, --internal-port, --http-port and "
      "--metrics-port,\nas environment variables or in a config file, are for daemons that are "
      "started by themselves; --port rules here.\nOther settings of the daemons are taken from the "
      "environment and the config file.");
  command.callback([flags, &app, &global, &chosen] {
    const CLI::Option* config = app.get_config_ptr();
    const std::string config_path = config == nullptr ? "" : config->as<std::string>();
    chosen = [flags, &global, config_path] { return RunUp(*flags, global, config_path); };
  });
}

}  // namespace walsh::client
