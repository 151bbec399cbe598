#include "common/config_keys.h"

#include <algorithm>
#include <iterator>

namespace walsh {
namespace {

// Sorted. tests/integration/surface_test.cc compares it with the flags of the real binaries.
// clang-format off
constexpr std::string_view kConfigKeys[] = {
    "act-asymmetric", "act-bits", "act-clip", "act-group-size", "act-order", "add-special-tokens",
    "advertise-host", "after-sequence", "api-key-file", "api-keys-file",
    "artifact-store", "asymmetric", "batch-invariant", "bits", "calibration", "checkpoint-dir",
    "column-order", "concurrency", "coordinator", "damp", "data-dir", "deadline", "describe", "detach", "device", "dtype",
    "duration", "enable-reflection", "error-propagation", "eval-limit", "eval-no-bos",
    "eval-stride", "eval-tasks", "eval-text", "eval-text-format", "eval-window", "eval-windows",
    "export-root", "file", "filter", "force", "format", "gptaq-alpha", "grid", "group-size",
    "grpc-port", "head-rotation", "heartbeat-seconds", "host", "http-port", "internal-port",
    "job-lease-seconds", "job-store", "kv-bits", "kv-cache-dtype", "kv-cache-free-memory-fraction",
    "kv-cache-memory-bytes", "kv-cache-tokens", "kv-clip", "kv-group-size", "limit", "list-presets",
    "load", "load-model", "log-format", "log-level", "log-to-stderr", "max-kl",
    "max-num-batched-tokens", "max-num-queued-reqs", "max-num-queued-tokens", "max-num-seqs",
    "max-perplexity-ratio", "max-queued-jobs", "max-tokens", "message", "method", "metrics-port",
    "min-p", "model-root", "model-url-prefix", "mse-clip", "name", "no-bos", "no-checkpoints", "no-eval", "no-load",
    "no-mse-clip", "no-prefix-cache", "num-samples", "online-rotation", "online-rotation-block",
    "output", "output-dir", "output-tokens", "override", "port", "preset", "prompt-tokens",
    "qk-rotation", "rate", "raw", "reference", "request-id", "requests", "rotation",
    "rotation-block", "rotation-signs", "seed", "seq-len", "serve-while-quantizing", "server",
    "shared-prefix", "shutdown-timeout", "skip-special-tokens", "source-cache-bytes", "stats", "stop", "stop-at-eos",
    "stream-interval-ms", "stride", "symmetric", "system", "tasks", "temperature", "text",
    "text-format", "threads", "timeout", "tls-ca", "tls-cert", "tls-client-ca", "tls-key",
    "tls-worker-name", "top-k", "top-p", "validate-only", "vllm-metrics-compat", "warmup", "window",
    "windows", "worker-token-file", "zero-point",
};
// clang-format on

}  // namespace

std::span<const std::string_view> ConfigKeys() { return kConfigKeys; }

bool IsConfigKey(std::string_view key) {
  return std::binary_search(std::begin(kConfigKeys), std::end(kConfigKeys), key);
}

}  // namespace walsh
