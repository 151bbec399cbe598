// What a rendering may still spend.
//
// Work is counted in steps of about a hundred nanoseconds; 256 bytes that are read or made are one.
// What is allocated is spent first, so a rendering allocates at most 256 bytes a step.
//
// Threads: one budget is used by one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"

namespace walsh::jinja {

class Budget {
 public:
  absl::Status SpendSteps(int64_t n) {
    return SpendBytes(static_cast<size_t>(std::min(n, limits::kTemplateStepsMax + 1)) * kStepBytes);
  }
  // For an operation that copies, compares or makes `n` bytes. Fractions of a step add up.
  absl::Status SpendBytes(size_t n) {
    constexpr int64_t kBytesMax = limits::kTemplateStepsMax * int64_t{kStepBytes};
    bytes_ += static_cast<int64_t>(std::min(n, size_t{kBytesMax} + 1));
    if (bytes_ <= kBytesMax) return absl::OkStatus();
    bytes_ = kBytesMax + 1;
    return absl::ResourceExhaustedError(
        absl::StrCat("chat template: more than ", limits::kTemplateStepsMax, " steps"));
  }
  // For an operation that looks at `n` bytes or characters one by one: searches, changes of case.
  absl::Status SpendCharacters(size_t n) { return SpendBytes(4 * n); }

  // For a text of `n` bytes that is about to be made.
  absl::Status AllowText(size_t n) {
    if (static_cast<int64_t>(n) > limits::kTemplateOutputBytesMax) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "chat template: a text of ", n, " bytes, at most ", limits::kTemplateOutputBytesMax));
    }
    return SpendBytes(n);
  }

 private:
  static constexpr size_t kStepBytes = 256;

  int64_t bytes_ = 0;
};

}  // namespace walsh::jinja
