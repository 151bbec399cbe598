// The flags of walsh-worker.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/grpc_security.h"
#include "common/limits.h"
#include "common/log.h"

namespace walsh::service {

struct WorkerOptions {
  std::string coordinator = "127.0.0.1:50052";  // its internal port
  std::string host = "127.0.0.1";
  std::string advertise_host;  // empty: as AdvertisedHost says
  DaemonSecurity::Options security;
  int grpc_port = 50053;
  int metrics_port = 8003;
  std::string data_dir;
  std::vector<std::string> model_roots;
  std::vector<std::string> model_url_prefixes;  // s3://BUCKET[/KEY]
  uint64_t source_cache_bytes = uint64_t{256} << 30;
  std::string export_root;     // empty: exports beneath data_dir
  std::string checkpoint_dir;  // or s3://BUCKET/PREFIX; empty: checkpoints beneath data_dir
  std::string artifact_store;  // file:DIR or s3://BUCKET/PREFIX; empty: none
  bool no_checkpoints = false;
  std::string device = "auto";  // as ParseDeviceChoice takes it
  int threads = 0;
  int max_num_seqs = 0;            // 0: as many as suit the device
  int max_num_batched_tokens = 0;  // likewise
  int max_num_queued_reqs = 64;
  int64_t max_num_queued_tokens = 65536;
  int64_t kv_cache_tokens = 0;
  uint64_t kv_cache_memory_bytes = 0;  // 0: no limit but that of tokens and of free memory
  double kv_cache_free_memory_fraction = 0.9;
  bool no_prefix_cache = false;
  bool batch_invariant = false;
  std::string kv_cache_dtype = "auto";  // as ParseKvCacheDtype takes it
  double stream_interval_ms = limits::kStreamIntervalMsDefault;
  std::vector<std::string> load_models;
  double shutdown_timeout_seconds = 30;
  std::string serve_while_quantizing = "share";  // as ParseServeWhileQuantizing takes it
  bool vllm_metrics_compat = false;
  std::string log_format = "text";
  std::string log_level = "info";
  bool describe = false;
};

void AddWorkerFlags(CLI::App& app, WorkerOptions& options);
// What the parser cannot judge; also configures the log.
absl::Status CheckWorkerOptions(const WorkerOptions& options);

// What a step of an engine may hold: what the flags say, or what suits the device. A sequence has a
// token of every step at least, so that fewer tokens than a device's usual sequences mean fewer
// sequences.
struct StepLimits {
  int max_sequences = 0;
  int max_batch_tokens = 0;
};
StepLimits StepLimitsOf(const WorkerOptions& options, bool on_cuda);

// Whether other machines may call the worker without any proof of who they are.
bool IsOpenToTheNetwork(const WorkerOptions& options);

// The host that the coordinator is told: --advertise-host, else --host. A --host that stands for
// every address of the machine is no place to call: beside the coordinator it is the loopback,
// elsewhere INVALID_ARGUMENT, since all such workers would have one and the same address.
absl::StatusOr<std::string> AdvertisedHost(const WorkerOptions& options);

}  // namespace walsh::service
