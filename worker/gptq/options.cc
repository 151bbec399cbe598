#include "worker/gptq/options.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace walsh::gptq {

absl::Status ValidateOptions(const Options& options, int64_t in) {
  const int bits = options.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat("bits ", bits, ": must be 2, 3, 4 or 8"));
  }
  if (options.group_size <= 0 || in % options.group_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("group size ", options.group_size, " does not divide the input width ", in));
  }
  if (!std::isfinite(options.damp) || options.damp < 0 || options.damp > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("damping ", options.damp, ": must be from 0 to 1"));
  }
  if (!std::isfinite(options.error_propagation) || options.error_propagation < 0 ||
      options.error_propagation > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("error propagation ", options.error_propagation, ": must be from 0 to 1"));
  }
  return absl::OkStatus();
}

}  // namespace walsh::gptq
