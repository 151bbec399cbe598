// tokenizer.json: a tokenizer that encodes, or a refusal.

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/tokenizer_properties.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::MutateJsonInput(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  walsh::fuzz::CheckTokenizer(
      {.tokenizer_json = std::string(reinterpret_cast<const char*>(data), size)});
  return 0;
}
