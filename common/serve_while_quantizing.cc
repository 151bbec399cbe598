#include "common/serve_while_quantizing.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace walsh {

absl::StatusOr<ServeWhileQuantizing> ParseServeWhileQuantizing(std::string_view text) {
  if (text == "exclusive") return ServeWhileQuantizing::kExclusive;
  if (text == "share") return ServeWhileQuantizing::kShare;
  if (text == "preempt") return ServeWhileQuantizing::kPreempt;
  return absl::InvalidArgumentError(absl::StrCat("--serve-while-quantizing '", std::string(text),
                                                 "' is not exclusive, share or preempt"));
}

}  // namespace walsh
