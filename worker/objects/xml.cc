#include "worker/objects/xml.h"

#include <array>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace walsh::objects {
namespace {

constexpr std::array<std::pair<std::string_view, char>, 5> kEntities = {
    {{"amp", '&'}, {"lt", '<'}, {"gt", '>'}, {"quot", '"'}, {"apos", '\''}}};
constexpr size_t kEntityBytesMax = 8;

// The inside of the first element from `from` on, and where the search for the next one begins.
struct Element {
  std::string_view inside;
  size_t end;
};
std::optional<Element> Find(std::string_view xml, std::string_view name, size_t from) {
  const std::string opening = absl::StrCat("<", std::string(name), ">");
  const std::string closing = absl::StrCat("</", std::string(name), ">");
  const size_t begin = xml.find(opening, from);
  if (begin == std::string_view::npos) return std::nullopt;
  const size_t inside = begin + opening.size();
  const size_t end = xml.find(closing, inside);
  if (end == std::string_view::npos) return std::nullopt;
  return Element{xml.substr(inside, end - inside), end + closing.size()};
}

// What stands between & and ;. Numbers beyond ASCII are no part of what is read here.
std::optional<char> Entity(std::string_view name) {
  for (const auto& [known, character] : kEntities) {
    if (name == known) return character;
  }
  if (!name.starts_with('#')) return std::nullopt;
  const bool is_hex = name.starts_with("#x");
  const std::string digits(name.substr(is_hex ? 2 : 1));
  uint32_t code = 0;
  const bool is_number =
      is_hex ? absl::SimpleHexAtoi(digits, &code) : absl::SimpleAtoi(digits, &code);
  if (!is_number || code == 0 || code > 0x7f) return std::nullopt;
  return static_cast<char>(code);
}

std::string Unescape(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    if (text.front() == '&') {
      const size_t end = text.substr(0, kEntityBytesMax).find(';');
      const std::optional<char> character =
          end == std::string_view::npos ? std::nullopt : Entity(text.substr(1, end - 1));
      if (character.has_value()) {
        out += *character;
        text.remove_prefix(end + 1);
        continue;
      }
    }
    out += text.front();
    text.remove_prefix(1);
  }
  return out;
}

}  // namespace

std::optional<std::string> XmlText(std::string_view xml, std::string_view name) {
  const std::optional<Element> element = Find(xml, name, 0);
  if (!element.has_value()) return std::nullopt;
  return Unescape(element->inside);
}

std::vector<std::string_view> XmlElements(std::string_view xml, std::string_view name) {
  std::vector<std::string_view> elements;
  for (size_t from = 0;;) {
    const std::optional<Element> element = Find(xml, name, from);
    if (!element.has_value()) return elements;
    elements.push_back(element->inside);
    from = element->end;
  }
}

std::string XmlEscape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    bool is_escaped = false;
    for (const auto& [name, character] : kEntities) {
      if (c != character) continue;
      absl::StrAppend(&out, "&", std::string(name), ";");
      is_escaped = true;
    }
    if (!is_escaped) out += c;
  }
  return out;
}

}  // namespace walsh::objects
