// Spellings and ids of a vocabulary, both ways.
//
// Ids may have holes (HF files with added tokens beyond the model's do), never two spellings.
//
// Errors:  INVALID_ARGUMENT  empty or repeated spelling, repeated id, id at or above
// limits::kVocabMax Threads: const methods are safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace walsh {

// absl::Hash does not take std::string_view in this build.
struct StringViewHash {
  size_t operator()(std::string_view text) const {
    return absl::Hash<absl::string_view>{}(absl::string_view(text.data(), text.size()));
  }
};
using StringViewMap = absl::flat_hash_map<std::string_view, int32_t, StringViewHash>;

class Vocabulary {
 public:
  Vocabulary() = default;
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;

  absl::Status Add(std::string_view spelling, int64_t id);

  // Empty for an id without a token.
  std::string_view Spelling(int32_t id) const;
  // −1 when there is none.
  int32_t Find(std::string_view spelling) const;
  // One past the largest id.
  int32_t size() const { return static_cast<int32_t>(spellings_.size()); }

 private:
  std::deque<std::string> storage_;  // stable addresses
  std::vector<std::string_view> spellings_;
  StringViewMap ids_;
};

}  // namespace walsh
