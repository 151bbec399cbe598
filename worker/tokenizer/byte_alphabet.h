// GPT-2's byte alphabet: every byte as one printable character, so that vocabularies are text.
//
// Printable Latin-1 bytes stand for themselves; the others get U+0100 onwards, in order.
//
// Source:  Radford et al. 2019, bytes_to_unicode() of the released encoder.
// Threads: safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace walsh {

// The character for `byte`, as UTF-8.
std::string_view ByteCharacter(uint8_t byte);
// The bytes that a token stands for; none when a character is outside the alphabet.
std::optional<std::string> BytesOfSpelling(std::string_view spelling);

}  // namespace walsh
