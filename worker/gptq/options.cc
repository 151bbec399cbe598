#include "worker/gptq/options.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace walsh::gptq {

absl::Status ValidateOptions(const Options& options, int64_t in) {
  const int bits = options.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat("bits ", bits, ": must be 2, 3, 4 or 8"));
  }
  if (options.grid == Grid::kCodebook && (bits != 2 || options.symmetric)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a codebook is of 2 bits and not symmetric, asked for are ", bits, " bits",
                     options.symmetric ? ", symmetric" : ""));
  }
  if (options.zero_point == ZeroPoint::kFloat &&
      (options.symmetric || options.grid == Grid::kCodebook)) {
    return absl::InvalidArgumentError(
        absl::StrCat("a float zero point with a ",
                     options.symmetric ? "symmetric grid" : "codebook", ", which has none"));
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
  if (!std::isfinite(options.gptaq_alpha) || options.gptaq_alpha < 0 || options.gptaq_alpha > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("GPTAQ's alpha ", options.gptaq_alpha, ": must be from 0 to 1"));
  }
  return absl::OkStatus();
}

int64_t StoredBits(const Options& options, int64_t in, int64_t out) {
  constexpr int64_t kHalf = 16;
  int64_t grid = kHalf + options.bits;
  if (options.zero_point == ZeroPoint::kFloat) grid = 2 * kHalf;
  if (options.grid == Grid::kCodebook) grid = kHalf << options.bits;
  return in * out * options.bits + in / options.group_size * out * grid;
}

}  // namespace walsh::gptq
