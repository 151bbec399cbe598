// How a worker stores the keys and values of what it serves, as --kv-cache-dtype of walsh-worker
// and of `walsh up` says it.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

enum class KvCacheDtype {
  kAuto,  // as the model's quantization says, or bf16
  kBf16,
  kInt8,
  kInt4,
};

// "auto", "bf16", "int8" or "int4". INVALID_ARGUMENT names the text and these.
absl::StatusOr<KvCacheDtype> ParseKvCacheDtype(std::string_view text);

}  // namespace walsh
