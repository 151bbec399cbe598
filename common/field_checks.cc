#include "common/field_checks.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/utf8.h"

namespace walsh {

absl::Status CheckLine(std::string_view field, std::string_view text, int64_t bytes_max) {
  if (static_cast<int64_t>(text.size()) > bytes_max) {
    return InvalidField(
        field, absl::StrCat("has ", text.size(), " bytes, at most ", bytes_max, " are taken"));
  }
  if (!IsValidUtf8(text)) return InvalidField(field, "is not valid UTF-8");
  const bool has_control = std::any_of(text.begin(), text.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
  return has_control ? InvalidField(field, "has a control character") : absl::OkStatus();
}

absl::Status CheckOneOf(std::string_view field, int value, std::initializer_list<int> allowed,
                        std::string_view rule) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("must be ", std::string(rule), ", is ", value));
}

}  // namespace walsh
