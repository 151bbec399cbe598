// What happens to text before it is cut: HF's normalizers NFC, Prepend and Replace, in sequence.
//
// NFC comes from utf8proc's tables. Runs of combining marks are put in order here, by a stable
// sort: utf8proc's own loop takes time quadratic in such a run, and a prompt may be nothing else.
//
// Errors:  RESOURCE_EXHAUSTED  the text grows beyond what any known tokenizer needs
// Threads: safe.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace walsh {

struct NormalizerStep {
  enum class Kind { kNfc, kPrepend, kReplace };
  Kind kind = Kind::kNfc;
  std::string pattern = {};  // kReplace: literal, not empty
  std::string content = {};  // kPrepend, kReplace
};

struct Normalizer {
  std::vector<NormalizerStep> steps;

  // An empty text stays empty. `text` must be valid UTF-8.
  absl::StatusOr<std::string> Apply(std::string_view text) const;
};

std::string ReplaceAll(std::string_view text, std::string_view pattern, std::string_view content);
// Unicode normalization form C. `text` must be valid UTF-8.
std::string ToNfc(std::string_view text);

}  // namespace walsh
