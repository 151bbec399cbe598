// JSON from strangers: bounded in bytes, depth and values, valid UTF-8, no key twice in one object.
//
// All of that is checked while the document is built, in one pass: a tokenizer has megabytes.
//
// Errors:  INVALID_ARGUMENT, with the name that the caller gives, the limit and the value;
//          RESOURCE_EXHAUSTED when memory runs out
// Threads: safe.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

// Scalars, objects and arrays of one document. A value takes 2 bytes in a file and 16 or more in
// memory; the tokenizer of Llama 3 has under a million.
inline constexpr int64_t kJsonValuesMax = 4 << 20;

struct JsonBounds {
  int64_t bytes_max = 0;
  int depth_max = 0;
};

// `name` is the file's, for messages. The top level must be an object.
absl::StatusOr<nlohmann::json> ParseBoundedJson(const std::string& name, std::string_view text,
                                                const JsonBounds& bounds);

// Nothing where `value` is no integer, or one that 64 bits with a sign do not hold, which get<>()
// would wrap.
std::optional<int64_t> Int64Of(const nlohmann::json& value);

}  // namespace walsh
