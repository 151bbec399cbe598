// A tokenizer of bytes with optional BOS and EOS, for tests of what happens around tokenizers.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "worker/tokenizer/tokenizer.h"

namespace walsh::testing {

class ByteTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kBos = 256;
  // `eos` ends every text; −1: none.
  explicit ByteTokenizer(bool has_bos, int32_t eos = -1) : has_bos_(has_bos), eos_(eos) {}

  // "<s>" is BOS where special tokens are parsed.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    if (options.add_special_tokens && has_bos_) ids.push_back(kBos);
    while (!text.empty()) {
      if (options.parse_special_tokens && text.substr(0, 3) == "<s>") {
        ids.push_back(kBos);
        text.remove_prefix(3);
        continue;
      }
      ids.push_back(static_cast<unsigned char>(text.front()));
      text.remove_prefix(1);
    }
    if (options.add_special_tokens && eos_ >= 0) ids.push_back(eos_);
    return ids;
  }
  std::string TokenBytes(int32_t id, bool skip_special) const override {
    if (id == kBos) return skip_special ? "" : "<s>";
    return std::string(1, static_cast<char>(id));
  }
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const override {
    std::string text;
    for (int32_t id : ids) text += TokenBytes(id, skip_special);
    return text;
  }
  bool strips_leading_space() const override { return false; }
  int32_t vocab_size() const override { return 257; }
  int32_t bos() const override { return has_bos_ ? kBos : -1; }
  int32_t eos() const override { return eos_; }
  bool IsSpecial(int32_t id) const override { return id == kBos; }
  int32_t TokenId(std::string_view token) const override { return token == "<s>" ? kBos : -1; }

 private:
  bool has_bos_;
  int32_t eos_;
};

}  // namespace walsh::testing
