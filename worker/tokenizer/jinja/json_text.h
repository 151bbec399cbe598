// A value as JSON, as Hugging Face's tojson writes it: json.dumps with ensure_ascii=False.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "worker/tokenizer/jinja/value.h"

namespace walsh::jinja {

// `indent`: spaces for each level, one item a line; without it everything is on one line.
// INVALID_ARGUMENT for a value that JSON cannot hold.
absl::StatusOr<std::string> ToJson(const Value& value, std::optional<int64_t> indent);

}  // namespace walsh::jinja
