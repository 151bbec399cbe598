// tokenizer.model: a tokenizer that encodes, or a refusal.

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fuzz/tokenizer_properties.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walsh::fuzz::CheckTokenizer(
      {.sentencepiece_model = std::string(reinterpret_cast<const char*>(data), size)});
  return 0;
}
