// Text from the service or a model, made harmless for a terminal.
//
// A model can be made to write escape sequences, which move the cursor, set the title or answer
// back; names and messages travel from other people. Control characters and bidirectional marks
// become U+FFFD; newlines and tabs stay.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace walsh::client {

std::string SafeText(std::string_view text);
// Columns that `text` takes, one per code point; wide and combining characters are not told apart.
size_t DisplayWidth(std::string_view text);

}  // namespace walsh::client
