// safetensors_verdicts: files on standard input, each after its length in eight bytes; for each a
// line with "accepted" or why ParseSafetensors refuses it.

#include <cstdint>
#include <iostream>
#include <span>
#include <string>

#include "worker/io/safetensors.h"

int main() {
  uint64_t length = 0;
  while (std::cin.read(reinterpret_cast<char*>(&length), sizeof(length))) {
    std::string bytes(length, '\0');
    if (!std::cin.read(bytes.data(), static_cast<std::streamsize>(length))) return 1;
    const auto file = walsh::MemoryFile("file", std::as_bytes(std::span(bytes)));
    const auto entries = walsh::ParseSafetensors(*file);
    std::cout << (entries.ok() ? "accepted" : entries.status().message()) << "\n";
  }
  return 0;
}
