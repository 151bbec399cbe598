#include "worker/tokenizer/text_stream.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "common/utf8.h"

namespace walsh {

TextStream::TextStream(const Tokenizer* tokenizer, Options options)
    : tokenizer_(tokenizer),
      options_(std::move(options)),
      drops_space_(!options_.continues_text && tokenizer->strips_leading_space()) {
  std::erase(options_.stop, "");
}

std::string TextStream::Append(int32_t token) {
  if (!matched_stop_.empty()) return "";
  std::string bytes = tokenizer_->TokenBytes(token, options_.skip_special_tokens);
  if (bytes.empty()) return "";
  if (std::exchange(drops_space_, false) && bytes.front() == ' ') bytes.erase(0, 1);
  bytes_ += bytes;
  const size_t n_complete = bytes_.size() - IncompleteUtf8Suffix(bytes_);
  text_ += ReplaceInvalidUtf8(std::string_view(bytes_).substr(0, n_complete));
  bytes_.erase(0, n_complete);
  return Release(/*is_end=*/false);
}

std::string TextStream::Finish() {
  if (!matched_stop_.empty()) return "";
  text_ += ReplaceInvalidUtf8(bytes_);
  bytes_.clear();
  return Release(/*is_end=*/true);
}

std::string TextStream::Release(bool is_end) {
  if (CutAtStop()) {
    bytes_.clear();
    return std::exchange(text_, "");
  }
  const size_t n_certain = text_.size() - (is_end ? 0 : HeldBytes());
  std::string certain = text_.substr(0, n_certain);
  text_.erase(0, n_certain);
  return certain;
}

bool TextStream::CutAtStop() {
  size_t first_end = std::string::npos;
  for (const std::string& stop : options_.stop) {
    const size_t begin = text_.find(stop);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stop.size();
    if (end < first_end || (end == first_end && stop.size() > matched_stop_.size())) {
      first_end = end;
      matched_stop_ = stop;
    }
  }
  if (first_end == std::string::npos) return false;
  text_.resize(first_end - (options_.include_stop ? 0 : matched_stop_.size()));
  return true;
}

// The longest end of the text that begins a stop string.
size_t TextStream::HeldBytes() const {
  size_t held = 0;
  for (const std::string& stop : options_.stop) {
    for (size_t n = std::min(stop.size() - 1, text_.size()); n > held; --n) {
      if (text_.compare(text_.size() - n, n, stop, 0, n) == 0) {
        held = n;
        break;
      }
    }
  }
  return held;
}

}  // namespace walsh
