#include "worker/engine/served_model.h"

namespace walsh::engine {

std::vector<int32_t> ServedModel::EndTokens() const {
  std::vector<int32_t> tokens = config().eos_tokens;
  if (tokenizer().eos() >= 0) tokens.push_back(tokenizer().eos());
  return tokens;
}

}  // namespace walsh::engine
