// UTF-8: validity and boundaries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace walsh {

bool IsValidUtf8(std::string_view text);
// Replaces every maximal invalid part by U+FFFD, as the Unicode standard recommends.
std::string ReplaceInvalidUtf8(std::string_view text);
// Longest prefix of at most `bytes_max` bytes that ends at a code point.
std::string_view Utf8Prefix(std::string_view text, size_t bytes_max);
void AppendUtf8(uint32_t code_point, std::string& out);
// Bytes at the end of `text` that begin a code point which more bytes could still complete: 0 to 3.
size_t IncompleteUtf8Suffix(std::string_view text);
// Decodes the code point at text[*pos] and advances; invalid bytes give U+FFFD one at a time.
uint32_t NextCodePoint(std::string_view text, size_t* pos);

}  // namespace walsh
