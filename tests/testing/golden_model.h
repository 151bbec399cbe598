// The tiny models of tests/golden/models and the logits that transformers gives for them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/tensor/matrix.h"

namespace walsh::testing {

// The folders there: one of each family and what of it needs its own.
const std::vector<std::string>& GoldenFamilies();

struct GoldenModel {
  std::vector<int32_t> tokens;  // longer than every sliding window
  Matrix logits;                // [tokens, vocab] of the next tokens, in float32
};
GoldenModel ReadGoldenModel(const std::string& family);

// The checkpoint into `directory`, with the byte-level tokenizer of tiny_model.h beside it.
void WriteGoldenModel(const std::string& family, const std::string& directory);

}  // namespace walsh::testing
