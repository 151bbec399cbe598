// The few elements that S3's answers are read for.
//
// No parser of XML: an element is found by its tag, which must have no attributes, and its text
// ends with the closing tag. The five named entities and character numbers are resolved, and no
// other: what an answer defines is never looked at, so nothing in it can grow.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace walsh::objects {

// The text of the first element of this name; nothing where there is none.
std::optional<std::string> XmlText(std::string_view xml, std::string_view name);
// The insides of all elements of this name, one after the other; none is inside another.
std::vector<std::string_view> XmlElements(std::string_view xml, std::string_view name);
// For text in a request.
std::string XmlEscape(std::string_view text);

}  // namespace walsh::objects
