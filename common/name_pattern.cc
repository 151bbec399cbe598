#include "common/name_pattern.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

absl::Status Malformed(size_t position, std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat("character ", position + 1, ": ", std::string(what)));
}

bool IsNumber(std::string_view text) {
  if (text.empty() || text.size() > 9) return false;
  for (char c : text) {
    if (!absl::ascii_isdigit(static_cast<unsigned char>(c))) return false;
  }
  return true;
}

int64_t ToNumber(std::string_view text) {
  int64_t number = 0;
  for (char c : text) number = number * 10 + (c - '0');
  return number;
}

// Where the digits that start at `first` end.
size_t DigitsEnd(std::string_view name, size_t first) {
  while (first < name.size() && absl::ascii_isdigit(static_cast<unsigned char>(name[first]))) {
    ++first;
  }
  return first;
}

}  // namespace

absl::StatusOr<NamePattern::Choice> NamePattern::ParseChoice(std::string_view text,
                                                             size_t position) {
  if (text.empty()) return Malformed(position, "an alternative of '{' is empty");
  Choice choice;
  choice.text = std::string(text);
  const size_t dash = text.find('-');
  if (dash == std::string_view::npos) return choice;
  const std::string_view low = text.substr(0, dash), high = text.substr(dash + 1);
  if (!IsNumber(low) || !IsNumber(high)) return choice;
  choice.is_range = true;
  choice.low = ToNumber(low);
  choice.high = ToNumber(high);
  if (choice.low > choice.high) {
    return Malformed(position, absl::StrCat("the range ", choice.text, " has no number"));
  }
  return choice;
}

absl::StatusOr<NamePattern> NamePattern::Parse(std::string_view pattern) {
  if (pattern.empty()) return absl::InvalidArgumentError("is empty");
  NamePattern result;
  const auto add = [&](Kind kind) { result.parts_.push_back({kind, "", {}}); };
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (!absl::ascii_isgraph(static_cast<unsigned char>(c))) {
      return Malformed(i, "is no printable ASCII character");
    }
    if (c == '*') {
      add(Kind::kAnyText);
    } else if (c == '?') {
      add(Kind::kAnyCharacter);
    } else if (c == '}') {
      return Malformed(i, "'}' without '{'");
    } else if (c == '{') {
      const size_t end = pattern.find('}', i);
      if (end == std::string_view::npos) return Malformed(i, "'{' without '}'");
      add(Kind::kChoices);
      for (size_t first = i + 1; first <= end;) {
        const size_t last = std::min(pattern.find(',', first), end);
        const std::string_view text = pattern.substr(first, last - first);
        if (text.find_first_of("{*?") != std::string_view::npos) {
          return Malformed(first, "alternatives of '{' hold no '{', '*' or '?'");
        }
        WALSH_ASSIGN_OR_RETURN(Choice choice, ParseChoice(text, first));
        result.parts_.back().choices.push_back(std::move(choice));
        first = last + 1;
      }
      i = end;
    } else {
      if (result.parts_.empty() || result.parts_.back().kind != Kind::kText) add(Kind::kText);
      result.parts_.back().text += c;
    }
  }
  return result;
}

bool NamePattern::Matches(std::string_view name) const {
  // The places in the name up to which the parts so far can match.
  std::vector<bool> ends(name.size() + 1, false);
  ends[0] = true;
  for (const Part& part : parts_) {
    std::vector<bool> next(name.size() + 1, false);
    const auto add_text = [&](size_t first, const std::string& text) {
      if (name.substr(first, text.size()) == text) next[first + text.size()] = true;
    };
    for (size_t first = 0; first <= name.size(); ++first) {
      if (part.kind == Kind::kAnyText && first > 0 && next[first - 1]) next[first] = true;
      if (!ends[first]) continue;
      switch (part.kind) {
        case Kind::kText:
          add_text(first, part.text);
          break;
        case Kind::kAnyText:
          next[first] = true;
          break;
        case Kind::kAnyCharacter:
          if (first < name.size()) next[first + 1] = true;
          break;
        case Kind::kChoices:
          for (const Choice& choice : part.choices) {
            if (!choice.is_range) {
              add_text(first, choice.text);
              continue;
            }
            // The whole number that stands there, as names write it.
            const size_t end = DigitsEnd(name, first);
            const std::string_view digits = name.substr(first, end - first);
            if (!IsNumber(digits) || (digits.size() > 1 && digits.front() == '0')) continue;
            const int64_t number = ToNumber(digits);
            if (choice.low <= number && number <= choice.high) next[end] = true;
          }
          break;
      }
    }
    ends = std::move(next);
  }
  return ends[name.size()];
}

}  // namespace walsh
