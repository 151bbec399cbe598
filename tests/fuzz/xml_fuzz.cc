// Answers of an object store: elements are parts of the answer, one after the other, and their text
// is no longer than they are; what is escaped is read again.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/objects/xml.h"

namespace walsh::fuzz {
namespace {

using objects::XmlElements;
using objects::XmlEscape;
using objects::XmlText;

// Those that are asked for.
constexpr std::string_view kNames[] = {"Contents",     "Key",         "Size",
                                       "LastModified", "IsTruncated", "NextContinuationToken",
                                       "Code",         "ETag",        "UploadId"};

void CheckElements(std::string_view xml, std::string_view name) {
  const std::vector<std::string_view> elements = XmlElements(xml, name);
  const std::optional<std::string> text = XmlText(xml, name);
  WALSH_CHECK_EQ(text.has_value(), !elements.empty());
  if (text.has_value()) WALSH_CHECK_LE(text->size(), elements.front().size());
  const char* end = xml.data();
  for (const std::string_view inside : elements) {
    WALSH_CHECK(end <= inside.data() && inside.data() <= xml.data() + xml.size());
    end = inside.data() + inside.size();
    WALSH_CHECK(end <= xml.data() + xml.size());
    WALSH_CHECK_EQ(inside.find(absl::StrCat("</", std::string(name), ">")), std::string_view::npos);
  }
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view xml(reinterpret_cast<const char*>(data), size);
  for (const std::string_view name : walsh::fuzz::kNames) walsh::fuzz::CheckElements(xml, name);
  for (const std::string_view entry : walsh::fuzz::XmlElements(xml, "Contents")) {
    for (const std::string_view name : walsh::fuzz::kNames) walsh::fuzz::CheckElements(entry, name);
  }
  const std::string escaped = absl::StrCat("<Key>", walsh::fuzz::XmlEscape(xml), "</Key>");
  WALSH_CHECK(walsh::fuzz::XmlText(escaped, "Key") == xml);
  return 0;
}
