#include "worker/calibrate/token_windows.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "common/sha256.h"
#include "common/status_macros.h"

namespace walsh::calibrate {

absl::StatusOr<TokenStream> EncodeSamples(const SampleSet& set, const Tokenizer& tokenizer,
                                          int64_t vocab, int64_t window_length,
                                          int64_t tokens_wanted) {
  TokenStream stream;
  stream.dropped = set.dropped;
  for (const Sample& sample : set.samples) {
    if (static_cast<int64_t>(stream.ids.size()) >= tokens_wanted) {
      ++stream.left_over;
      continue;
    }
    Tokenizer::EncodeOptions options;
    options.add_special_tokens = !sample.is_chat;
    // A corpus must not be able to spell control tokens; a rendered template does just that.
    options.parse_special_tokens = sample.is_chat;
    WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer.Encode(sample.text, options));
    for (int32_t id : ids) {
      if (id < 0 || id >= vocab) {
        return absl::InvalidArgumentError(absl::StrCat(
            "the tokenizer gives id ", id, ", but the model has ", vocab, " embeddings"));
      }
    }
    if (ids.empty()) {
      ++stream.dropped;
      continue;
    }
    ++stream.kept;
    if (static_cast<int64_t>(ids.size()) < window_length) ++stream.n_short;
    stream.ids.insert(stream.ids.end(), ids.begin(), ids.end());
  }
  return stream;
}

TokenWindows CutWindows(std::span<const int32_t> ids, int64_t length, int64_t n_max) {
  TokenWindows windows;
  windows.length = length;
  const int64_t count = std::min(n_max, static_cast<int64_t>(ids.size()) / length);
  windows.ids.assign(ids.begin(), ids.begin() + count * length);
  return windows;
}

std::string Fingerprint(const TokenWindows& windows) {
  static_assert(std::endian::native == std::endian::little);
  Sha256 hash;
  hash.Update(&windows.length, sizeof(windows.length));
  hash.Update(windows.ids.data(), windows.ids.size() * sizeof(int32_t));
  return hash.HexDigest();
}

}  // namespace walsh::calibrate
