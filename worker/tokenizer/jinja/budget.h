// What a rendering may still spend.
//
// Threads: one budget is used by one thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"

namespace walsh::jinja {

class Budget {
 public:
  absl::Status SpendSteps(int64_t n) {
    steps_ += n;
    if (steps_ <= limits::kTemplateStepsMax) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("chat template: more than ", limits::kTemplateStepsMax, " steps"));
  }
  // For an operation that reads or makes `n` bytes, or as many items.
  absl::Status SpendBytes(size_t n) { return SpendSteps(static_cast<int64_t>(n / 256)); }

  // For a text of `n` bytes that is about to be made.
  absl::Status AllowText(size_t n) {
    if (static_cast<int64_t>(n) > limits::kTemplateOutputBytesMax) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "chat template: a text of ", n, " bytes, at most ", limits::kTemplateOutputBytesMax));
    }
    return SpendBytes(n);
  }

 private:
  int64_t steps_ = 0;
};

}  // namespace walsh::jinja
