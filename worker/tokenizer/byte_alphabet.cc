#include "worker/tokenizer/byte_alphabet.h"

#include <array>

#include "common/utf8.h"

namespace walsh {
namespace {

// The largest character is U+0143: 256 + 68 bytes that are not printable, less one.
constexpr uint32_t kCharactersMax = 0x144;

struct Alphabet {
  std::array<std::string, 256> characters;
  std::array<int16_t, kCharactersMax> bytes;

  Alphabet() {
    bytes.fill(-1);
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                             (byte >= 0xAE && byte <= 0xFF);
      const uint32_t character = printable ? byte : next++;
      AppendUtf8(character, characters[byte]);
      bytes[character] = static_cast<int16_t>(byte);
    }
  }
};

const Alphabet& GetAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

std::string_view ByteCharacter(uint8_t byte) { return GetAlphabet().characters[byte]; }

std::optional<std::string> BytesOfSpelling(std::string_view spelling) {
  const Alphabet& alphabet = GetAlphabet();
  std::string out;
  out.reserve(spelling.size());
  for (size_t pos = 0; pos < spelling.size();) {
    const uint32_t character = NextCodePoint(spelling, &pos);
    if (character >= kCharactersMax || alphabet.bytes[character] < 0) return std::nullopt;
    out.push_back(static_cast<char>(alphabet.bytes[character]));
  }
  return out;
}

}  // namespace walsh
