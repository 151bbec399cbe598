#include "worker/tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/utf8.h"

namespace walsh {
namespace {

// A search step takes at most this many bytes, so that time stays linear in the text.
constexpr size_t kContentBytesMax = 1024;
constexpr size_t kAddedBytesMax = 8 << 20;

uint64_t Edge(int32_t node, char byte) {
  return uint64_t{static_cast<uint32_t>(node)} << 8 | static_cast<uint8_t>(byte);
}

// Unicode's White_Space.
bool IsSpace(uint32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

// Letters, marks, decimal digits, connectors: Unicode's \w, but for a few symbols that it counts as
// letters.
bool IsWord(uint32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return c == 0x200C || c == 0x200D;  // joiners
  }
}

size_t StartOfLastCodePoint(std::string_view text) {
  size_t pos = text.size() - 1;
  while (pos > 0 && (text[pos] & 0xC0) == 0x80) --pos;
  return pos;
}

uint32_t LastCodePoint(std::string_view text) {
  size_t pos = StartOfLastCodePoint(text);
  return NextCodePoint(text, &pos);
}

uint32_t FirstCodePoint(std::string_view text) {
  size_t pos = 0;
  return NextCodePoint(text, &pos);
}

bool IsSingleWord(std::string_view before, std::string_view after) {
  return (before.empty() || !IsWord(LastCodePoint(before))) &&
         (after.empty() || !IsWord(FirstCodePoint(after)));
}

size_t SpaceBytesAtEnd(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0 && IsSpace(LastCodePoint(text.substr(0, begin)))) {
    begin = StartOfLastCodePoint(text.substr(0, begin));
  }
  return text.size() - begin;
}

size_t SpaceBytesAtStart(std::string_view text) {
  size_t end = 0;
  for (size_t pos = 0; pos < text.size(); end = pos) {
    if (!IsSpace(NextCodePoint(text, &pos))) break;
  }
  return end;
}

}  // namespace

absl::Status AddedTokens::Add(const AddedToken& token) {
  if (token.content.empty() || token.content.size() > kContentBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("added token ", token.id, " has ",
                                                   token.content.size(),
                                                   " bytes, allowed are 1 to ", kContentBytesMax));
  }
  bytes_ += token.content.size();
  if (bytes_ > kAddedBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("added tokens have more than ", kAddedBytesMax, " bytes in all"));
  }
  int32_t node = 0;
  for (const char byte : token.content) {
    const auto [edge, is_new] =
        edges_.emplace(Edge(node, byte), static_cast<int32_t>(token_of_node_.size()));
    if (is_new) token_of_node_.push_back(-1);
    node = edge->second;
  }
  begins_token_[static_cast<uint8_t>(token.content[0])] = true;
  // Of two with one content the first counts.
  if (token_of_node_[node] < 0) {
    token_of_node_[node] = static_cast<int32_t>(tokens_.size());
    tokens_.push_back(token);
  }
  return absl::OkStatus();
}

AddedTokens::Match AddedTokens::LongestAt(std::string_view text) const {
  Match longest;
  int32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto edge = edges_.find(Edge(node, text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (token_of_node_[node] >= 0) longest = {.token = token_of_node_[node], .size = i + 1};
  }
  return longest;
}

std::vector<AddedTokens::Segment> AddedTokens::Split(std::string_view text,
                                                     bool with_special) const {
  std::vector<Segment> segments;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    Match match;
    if (begins_token_[static_cast<uint8_t>(text[at])]) match = LongestAt(text.substr(at));
    if (match.token < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[match.token];
    size_t begin = at;
    size_t end = at + match.size;
    at = end;
    if (token.is_special && !with_special) continue;
    if (token.is_single_word && !IsSingleWord(text.substr(0, begin), text.substr(end))) continue;
    // White space that the token before took is gone already.
    if (begin < done) continue;
    if (token.strips_left) begin -= SpaceBytesAtEnd(text.substr(done, begin - done));
    if (token.strips_right) end += SpaceBytesAtStart(text.substr(end));
    if (begin > done) segments.push_back({.id = -1, .text = text.substr(done, begin - done)});
    segments.push_back({.id = token.id, .text = text.substr(begin, end - begin)});
    done = end;
  }
  if (done < text.size()) segments.push_back({.id = -1, .text = text.substr(done)});
  return segments;
}

}  // namespace walsh
