#include "worker/tokenizer/pre_tokenizer.h"

#include <utility>

#include "common/status_macros.h"
#include "worker/tokenizer/normalizer.h"

namespace walsh {
namespace {

void SplitBeforeMetaspace(std::string_view text, std::vector<std::string_view>& pieces) {
  while (!text.empty()) {
    const size_t end = text.find(kMetaspace, 1);
    pieces.push_back(text.substr(0, end));
    text.remove_prefix(end == std::string_view::npos ? text.size() : end);
  }
}

}  // namespace

absl::Status PreTokenizer::Split(std::string_view text, bool is_first, std::string& buffer,
                                 std::vector<std::string_view>& pieces) const {
  pieces.clear();
  if (text.empty()) return absl::OkStatus();
  if (adds_prefix_space && !text.starts_with(' ')) {
    buffer.assign(1, ' ').append(text);
    text = buffer;
  }
  if (metaspace) {
    const bool prepends = metaspace->prepend == Metaspace::Prepend::kAlways ||
                          (metaspace->prepend == Metaspace::Prepend::kFirst && is_first);
    std::string replaced;
    if (prepends && !text.starts_with(' ') && !text.starts_with(kMetaspace)) replaced = kMetaspace;
    replaced += ReplaceAll(text, " ", kMetaspace);
    buffer = std::move(replaced);
    text = buffer;
  }
  if (metaspace && metaspace->splits) {
    SplitBeforeMetaspace(text, pieces);
  } else {
    pieces.push_back(text);
  }
  std::vector<std::string_view> finer;
  for (const RegexSplitter& splitter : splitters) {
    finer.clear();
    for (const std::string_view piece : pieces) {
      WALSH_RETURN_IF_ERROR(splitter.Split(piece, finer));
    }
    std::swap(pieces, finer);
  }
  return absl::OkStatus();
}

}  // namespace walsh
