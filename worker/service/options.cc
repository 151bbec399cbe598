#include "worker/service/options.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "common/device_choice.h"
#include "common/endpoints.h"
#include "common/grpc_security_flags.h"
#include "common/kv_cache_dtype.h"
#include "common/limits.h"
#include "common/resource_name.h"
#include "common/serve_while_quantizing.h"
#include "common/status_macros.h"

namespace walsh::service {
namespace {

constexpr int kPortMax = 65535;
constexpr int kThreadsMax = 1024;
constexpr int kSequencesMax = 1024;
constexpr int kBatchTokensMax = 65536;
constexpr int kQueueMax = 100'000;
constexpr uint64_t kKvBytesMax = uint64_t{1} << 50;
constexpr uint64_t kSourceBytesMax = uint64_t{1} << 50;
constexpr double kKvFractionMin = 0.01;
// The rest is for CUDA graphs and what else is not counted.
constexpr double kKvFractionMax = 0.95;
// A device's steps cost their weights' bytes whether few sequences share them or many, and a
// prompt's chunk pays for dequantizing them.
constexpr StepLimits kCpuLimits = {.max_sequences = 16, .max_batch_tokens = 512};
constexpr StepLimits kCudaLimits = {.max_sequences = 64, .max_batch_tokens = 2048};

}  // namespace

void AddWorkerFlags(CLI::App& app, WorkerOptions& options) {
  options.data_dir = DefaultDataDir();
  app.add_option("--coordinator", options.coordinator,
                 "HOST:PORT of the coordinator's workers port")
      ->capture_default_str();
  app.add_option("--host", options.host, "Address to listen on")->capture_default_str();
  app.add_option(
      "--advertise-host", options.advertise_host,
      "Address where the coordinator reaches this worker; --host by default, and needed when "
      "that is 0.0.0.0 or :: and the coordinator runs on another machine");
  app.add_option("--grpc-port", options.grpc_port, "0 takes a free one")
      ->capture_default_str()
      ->check(CLI::Range(0, kPortMax));
  app.add_option("--metrics-port", options.metrics_port, "0 takes a free one")
      ->capture_default_str()
      ->check(CLI::Range(0, kPortMax));
  AddDaemonSecurityFlags(app, options.security);
  app.add_option("--data-dir", options.data_dir, "Folder of the models")->capture_default_str();
  app.add_option("--model-root", options.model_roots,
                 "Folder that source models and texts may be read from; repeatable");
  app.add_option("--model-url-prefix", options.model_url_prefixes,
                 "s3://BUCKET[/KEY] beneath which source models and texts may be read, from the "
                 "endpoint and with the credentials of --artifact-store; repeatable");
  app.add_option("--source-cache-bytes", options.source_cache_bytes,
                 "Copies of such sources in --data-dir at most, such as 500GB; those that were not "
                 "used for longest go first")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->check(CLI::Range(uint64_t{0}, kSourceBytesMax));
  app.add_option(
      "--export-root", options.export_root,
      "Folder that exported models are written beneath; exports in --data-dir by default");
  app.add_option("--checkpoint-dir", options.checkpoint_dir,
                 "Folder where jobs keep their finished layers until they have ended, so that one "
                 "whose worker stops or dies goes on there: on any worker of the same kind that "
                 "shares the folder, which may be s3://BUCKET/PREFIX as in --artifact-store; "
                 "checkpoints in --data-dir by default");
  app.add_flag("--no-checkpoints", options.no_checkpoints,
               "Keep no layers: a job whose worker stops or dies starts over");
  app.add_option(
      "--artifact-store", options.artifact_store,
      "Where published models are kept besides --data-dir, for other workers and for "
      "the time after this one: file:DIR, or s3://BUCKET/PREFIX of the endpoint and with "
      "the credentials of AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, "
      "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN");
  app.add_option("--device", options.device,
                 "Where jobs run and models are served: auto (CUDA device 0, or the CPU where "
                 "there is none), cpu, cuda "
                 "or cuda:N")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "CPU threads of jobs and of each engine; 0: all")
      ->capture_default_str()
      ->check(CLI::Range(0, kThreadsMax));
  app.add_option("--max-num-seqs", options.max_num_seqs,
                 "Sequences of a model that run at once; 0: 16 on the CPU, 64 on a CUDA device")
      ->capture_default_str()
      ->check(CLI::Range(0, kSequencesMax));
  app.add_option(
         "--max-num-batched-tokens", options.max_num_batched_tokens,
         "Tokens of one step, at least --max-num-seqs; 0: 512 on the CPU, 2048 on a CUDA device")
      ->capture_default_str()
      ->check(CLI::Range(0, kBatchTokensMax));
  app.add_option("--max-num-queued-reqs", options.max_num_queued_reqs,
                 "Requests of a model that wait; more are refused")
      ->capture_default_str()
      ->check(CLI::Range(0, kQueueMax));
  app.add_option("--max-num-queued-tokens", options.max_num_queued_tokens,
                 "Tokens of the prompts that wait for a model whose sequences are all taken; a "
                 "request beyond them is refused unless none waits")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{limits::kContextMax} * kQueueMax));
  app.add_option(
         "--kv-cache-tokens", options.kv_cache_tokens,
         "Tokens of a model's KV cache; 0: 2048 for each sequence. Fewer where memory is short")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{0}, int64_t{limits::kContextMax} * kSequencesMax));
  app.add_option("--kv-cache-memory-bytes", options.kv_cache_memory_bytes,
                 "Memory of a model's KV cache at most, such as 4GiB or 500MB, so that other "
                 "models find theirs; 0: as --kv-cache-tokens says")
      ->capture_default_str()
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->check(CLI::Range(uint64_t{0}, kKvBytesMax));
  app.add_option("--kv-cache-free-memory-fraction", options.kv_cache_free_memory_fraction,
                 "Part of the memory that is free when a model is loaded, of the device or of the "
                 "host where it is served, and that its steps do not need, that its KV cache may "
                 "take at most; less leaves more to the models that are loaded after it")
      ->capture_default_str()
      ->check(CLI::Range(kKvFractionMin, kKvFractionMax));
  app.add_option("--kv-cache-dtype", options.kv_cache_dtype,
                 "How keys and values are stored on a CUDA device: auto (as the model's job said, "
                 "else bf16), bf16, int8 or int4. The CPU keeps floats, rounded to the same grid")
      ->capture_default_str();
  app.add_flag("--no-prefix-cache", options.no_prefix_cache,
               "Compute every prompt from its beginning, and keep nothing of those that ended");
  app.add_flag(
      "--batch-invariant", options.batch_invariant,
      "On a CUDA device, too, tokens do not depend on what runs beside their request: prompts, and "
      "steps of more than 16 sequences, take up to several times as long. The CPU always does so");
  app.add_option("--stream-interval-ms", options.stream_interval_ms,
                 "Tokens of one stream that come faster than this share a message; 0: each has its "
                 "own")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1000.0));
  app.add_option("--load-model", options.load_models, "Model to load at start; repeatable");
  app.add_option("--serve-while-quantizing", options.serve_while_quantizing,
                 "Requests of models while a job runs: share (the job leaves them most of the "
                 "time), preempt (it stands still while there are some) or exclusive (no job "
                 "while a model is loaded, and no model is loaded while a job runs)")
      ->capture_default_str();
  app.add_option("--shutdown-timeout", options.shutdown_timeout_seconds,
                 "Seconds that running requests have after SIGTERM")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 86400.0));
  app.add_flag(
      "--vllm-metrics-compat", options.vllm_metrics_compat,
      "Serve the metrics under vLLM's names, too, for dashboards and autoscalers that were "
      "made for it");
  app.add_option("--log-format", options.log_format, "text or json")->capture_default_str();
  app.add_option("--log-level", options.log_level, "debug, info, warning or error")
      ->capture_default_str();
  app.add_flag("--describe", options.describe,
               "Print what this machine can run, as JSON, and exit");
}

absl::Status CheckWorkerOptions(const WorkerOptions& options) {
  log::Format format = log::Format::kText;
  log::Level level = log::Level::kInfo;
  WALSH_RETURN_IF_ERROR(log::ParseFormat(options.log_format, &format));
  WALSH_RETURN_IF_ERROR(log::ParseLevel(options.log_level, &level));
  log::Configure("worker", format, level);
  WALSH_RETURN_IF_ERROR(ParseDeviceChoice(options.device).status());
  WALSH_RETURN_IF_ERROR(ParseServeWhileQuantizing(options.serve_while_quantizing).status());
  // The parser's range takes NaN.
  if (std::isnan(options.kv_cache_free_memory_fraction)) {
    return absl::InvalidArgumentError(absl::StrCat("--kv-cache-free-memory-fraction must be from ",
                                                   kKvFractionMin, " to ", kKvFractionMax,
                                                   ", is no number"));
  }
  WALSH_RETURN_IF_ERROR(ParseKvCacheDtype(options.kv_cache_dtype).status());
  if (options.max_num_batched_tokens > 0 && options.max_num_batched_tokens < options.max_num_seqs) {
    return absl::InvalidArgumentError(
        absl::StrCat("--max-num-batched-tokens ", options.max_num_batched_tokens,
                     " is below --max-num-seqs ", options.max_num_seqs));
  }
  WALSH_RETURN_IF_ERROR(AdvertisedHost(options).status());
  for (const std::string& model : options.load_models) {
    WALSH_RETURN_IF_ERROR(ParseModelName("--load-model", model).status());
  }
  return absl::OkStatus();
}

StepLimits StepLimitsOf(const WorkerOptions& options, bool on_cuda) {
  StepLimits limits = on_cuda ? kCudaLimits : kCpuLimits;
  const int n_tokens = options.max_num_batched_tokens;
  if (n_tokens > 0) limits = {std::min(limits.max_sequences, n_tokens), n_tokens};
  if (options.max_num_seqs > 0) limits.max_sequences = options.max_num_seqs;
  limits.max_batch_tokens = std::max(limits.max_batch_tokens, limits.max_sequences);
  return limits;
}

bool IsOpenToTheNetwork(const WorkerOptions& options) {
  return !IsLoopbackHost(options.host) && options.security.worker_token_file.empty() &&
         options.security.tls.ca.empty();
}

absl::StatusOr<std::string> AdvertisedHost(const WorkerOptions& options) {
  if (!options.advertise_host.empty()) return options.advertise_host;
  if (!IsWildcardHost(options.host)) return options.host;
  const std::string coordinator = options.coordinator.substr(0, options.coordinator.rfind(':'));
  if (IsLoopbackHost(coordinator)) return "127.0.0.1";
  return absl::InvalidArgumentError(
      absl::StrCat("--host ", options.host, " is no address that the coordinator at ",
                   options.coordinator, " could call: give --advertise-host"));
}

}  // namespace walsh::service
