// Python's operations on str, over UTF-8: lengths and positions count code points, white space is
// Unicode's as str.isspace() has it.
//
// Upper and lower case are Unicode's simple mappings, one character for one: where Python's full
// mapping gives several ("ß" to "SS") the character stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace walsh::jinja {

// str.strip and its halves. `characters`: a set to strip instead of white space.
enum class Side { kLeft, kRight, kBoth };
std::string_view Strip(std::string_view text, std::optional<std::string_view> characters,
                       Side side);

// Where `part` begins first, and last, in `text`; npos if nowhere. Linear in both.
size_t FindText(std::string_view text, std::string_view part);
size_t FindLastText(std::string_view text, std::string_view part);

// str.split: at white space, or at a separator that is not empty; at most `splits_max` times, if
// that is not negative.
std::vector<std::string_view> SplitAtSpace(std::string_view text, int64_t splits_max);
std::vector<std::string_view> SplitAt(std::string_view text, std::string_view separator,
                                      int64_t splits_max);
// str.rsplit with a separator.
std::vector<std::string_view> SplitAtFromRight(std::string_view text, std::string_view separator,
                                               int64_t splits_max);
std::vector<std::string_view> SplitLines(std::string_view text);
// str.replace; all of them, if `count_max` is negative.
std::string Replace(std::string_view text, std::string_view from, std::string_view to,
                    int64_t count_max);

std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
std::string Title(std::string_view text);

bool HasDigitBeyondAscii(std::string_view text);
size_t CountCodePoints(std::string_view text);
// One string for each code point.
std::vector<std::string_view> CodePoints(std::string_view text);

std::string ReprOfString(std::string_view text);
std::string ReprOfReal(double value);
// json.dumps(text, ensure_ascii=False).
std::string JsonOfString(std::string_view text);
// What ensure_ascii=True makes of JSON that was written without it.
std::string EscapeNonAscii(std::string_view json);

}  // namespace walsh::jinja
