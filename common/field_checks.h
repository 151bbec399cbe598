// Checks of single fields of a request, for those who check whole ones.
//
// Errors: INVALID_ARGUMENT with BadRequest.field_violations; the message names the field, the limit
//         and the value.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "absl/status/status.h"

namespace walsh {

// One line of UTF-8 without control characters.
absl::Status CheckLine(std::string_view field, std::string_view text, int64_t bytes_max);

// `rule` names the values that are allowed.
absl::Status CheckOneOf(std::string_view field, int value, std::initializer_list<int> allowed,
                        std::string_view rule);

}  // namespace walsh
