#include "worker/tokenizer/vocabulary.h"

#include "absl/strings/str_cat.h"
#include "common/limits.h"

namespace walsh {

absl::Status Vocabulary::Add(std::string_view spelling, int64_t id) {
  if (id < 0 || id >= limits::kVocabMax) {
    return absl::InvalidArgumentError(absl::StrCat("token '", std::string(spelling), "' has id ",
                                                   id, ", allowed is 0 to ",
                                                   limits::kVocabMax - 1));
  }
  if (spelling.empty()) return absl::InvalidArgumentError(absl::StrCat("token ", id, " is empty"));
  if (id < size() && !spellings_[static_cast<size_t>(id)].empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens '", std::string(spellings_[static_cast<size_t>(id)]), "' and '",
                     std::string(spelling), "' have one id, ", id));
  }
  if (const int32_t other = Find(spelling); other >= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("token '", std::string(spelling), "' has two ids, ", other, " and ", id));
  }
  if (id >= size()) spellings_.resize(static_cast<size_t>(id) + 1);
  const std::string_view stored = storage_.emplace_back(spelling);
  spellings_[static_cast<size_t>(id)] = stored;
  ids_.emplace(stored, static_cast<int32_t>(id));
  return absl::OkStatus();
}

std::string_view Vocabulary::Spelling(int32_t id) const {
  return id < 0 || id >= size() ? std::string_view() : spellings_[static_cast<size_t>(id)];
}

int32_t Vocabulary::Find(std::string_view spelling) const {
  const auto found = ids_.find(spelling);
  return found == ids_.end() ? -1 : found->second;
}

}  // namespace walsh
