#include "worker/tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "common/utf8.h"

namespace walsh {
namespace {

// Bounds how far a search looks ahead.
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
  for (auto byte = token.content.rbegin(); byte != token.content.rend(); ++byte) {
    const auto [edge, is_new] =
        edges_.emplace(Edge(node, *byte), static_cast<int32_t>(token_of_node_.size()));
    if (is_new) {
      token_of_node_.push_back(-1);
      parent_.push_back(node);
      byte_.push_back(*byte);
      depth_.push_back(static_cast<uint16_t>(depth_[node] + 1));
    }
    node = edge->second;
  }
  ends_token_[static_cast<uint8_t>(token.content.back())] = true;
  // Of two with one content the first counts.
  if (token_of_node_[node] < 0) {
    token_of_node_[node] = static_cast<int32_t>(tokens_.size());
    tokens_.push_back(token);
  }
  return absl::OkStatus();
}

void AddedTokens::Finish() {
  // Parents before children: failure links lead to shorter texts.
  std::vector<int32_t> nodes(depth_.size());
  std::iota(nodes.begin(), nodes.end(), 0);
  std::stable_sort(nodes.begin(), nodes.end(),
                   [this](int32_t a, int32_t b) { return depth_[a] < depth_[b]; });
  fallback_.assign(depth_.size(), 0);
  longest_of_node_ = token_of_node_;
  for (const int32_t node : nodes) {
    if (depth_[node] > 1) fallback_[node] = Next(fallback_[parent_[node]], byte_[node]);
    if (longest_of_node_[node] < 0) longest_of_node_[node] = longest_of_node_[fallback_[node]];
  }
}

int32_t AddedTokens::Next(int32_t node, char byte) const {
  while (true) {
    const auto edge = edges_.find(Edge(node, byte));
    if (edge != edges_.end()) return edge->second;
    if (node == 0) return 0;
    node = fallback_[node];
  }
}

void AddedTokens::FindMatches(std::string_view text, size_t begin, size_t end,
                              std::vector<Match>& matches) const {
  matches.clear();
  int32_t node = 0;
  // What begins before `end` may go on behind it.
  for (size_t at = std::min(text.size(), end + kContentBytesMax); at-- > begin;) {
    if (node == 0 && !ends_token_[static_cast<uint8_t>(text[at])]) continue;
    node = Next(node, text[at]);
    if (at < end && longest_of_node_[node] >= 0) {
      matches.push_back({.begin = at, .token = longest_of_node_[node]});
    }
  }
  std::reverse(matches.begin(), matches.end());
}

std::vector<AddedTokens::Segment> AddedTokens::Split(std::string_view text,
                                                     bool with_special) const {
  // Matches of so many bytes at a time: a text of half a gigabyte may have one at every byte.
  constexpr size_t kStretchBytes = 64 << 10;
  std::vector<Segment> segments;
  std::vector<Match> matches;
  size_t done = 0;
  size_t searched = 0;  // what begins before this has been looked at
  for (size_t begin = 0; begin < text.size() && !tokens_.empty(); begin += kStretchBytes) {
    FindMatches(text, begin, std::min(text.size(), begin + kStretchBytes), matches);
    for (const Match& match : matches) {
      if (match.begin < searched) continue;
      const AddedToken& token = tokens_[match.token];
      searched = match.begin + token.content.size();
      if (token.is_special && !with_special) continue;
      if (const std::optional<Segment> found = Cut(text, match.begin, token, done)) {
        const auto start = static_cast<size_t>(found->text.data() - text.data());
        if (start > done) segments.push_back({.id = -1, .text = text.substr(done, start - done)});
        segments.push_back(*found);
        done = start + found->text.size();
      }
    }
  }
  if (done < text.size()) segments.push_back({.id = -1, .text = text.substr(done)});
  return segments;
}

std::optional<AddedTokens::Segment> AddedTokens::Cut(std::string_view text, size_t begin,
                                                     const AddedToken& token, size_t done) {
  size_t end = begin + token.content.size();
  if (token.is_single_word && !IsSingleWord(text.substr(0, begin), text.substr(end))) {
    return std::nullopt;
  }
  // White space that the token before took is gone already.
  if (begin < done) return std::nullopt;
  if (token.strips_left) begin -= SpaceBytesAtEnd(text.substr(done, begin - done));
  if (token.strips_right) end += SpaceBytesAtStart(text.substr(end));
  return Segment{.id = token.id, .text = text.substr(begin, end - begin)};
}

}  // namespace walsh
