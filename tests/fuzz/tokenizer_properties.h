// What holds of every tokenizer, whatever source it was made from.
#pragma once

#include "worker/io/checkpoint.h"

namespace walsh::fuzz {

// Makes the tokenizer and lets it encode and decode a few texts: ids are of the vocabulary, text is
// UTF-8, and every failure has a documented code.
void CheckTokenizer(const TokenizerSource& source);

}  // namespace walsh::fuzz
