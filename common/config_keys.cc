#include "common/config_keys.h"

#include <algorithm>
#include <iterator>

namespace walsh {
namespace {

// Sorted. tests/integration/surface_test.cc compares it with the flags of the real binaries.
// clang-format off
constexpr std::string_view kConfigKeys[] = {
    "add-special-tokens", "advertise-host", "after-sequence", "bits", "calibration", "column-order",
    "coordinator", "damp", "data-dir", "describe", "detach", "device", "enable-reflection",
    "error-propagation", "eval-text", "eval-windows", "filter", "force", "group-size", "grpc-port", "heartbeat-seconds",
    "host", "http-port", "internal-port", "job-lease-seconds", "kv-cache-tokens", "limit", "load",
    "load-model", "log-format", "log-level", "log-to-stderr", "max-num-batched-tokens",
    "max-num-queued-reqs", "max-num-seqs", "max-queued-jobs", "max-tokens", "message", "method",
    "metrics-port", "min-p", "model-root", "name", "no-eval", "no-load", "no-mse-clip",
    "num-samples", "output", "port", "raw", "request-id", "rotation", "rotation-block",
    "rotation-signs", "seed", "seq-len", "server", "shutdown-timeout", "skip-special-tokens",
    "stats", "stop", "stream-interval-ms", "symmetric", "system", "temperature", "threads", "timeout", "top-k", "top-p",
    "validate-only",
};
// clang-format on

}  // namespace

std::span<const std::string_view> ConfigKeys() { return kConfigKeys; }

bool IsConfigKey(std::string_view key) {
  return std::binary_search(std::begin(kConfigKeys), std::end(kConfigKeys), key);
}

}  // namespace walsh
