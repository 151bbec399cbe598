// Samples to token ids, and ids to windows of equal length.
//
// Samples are encoded one by one by the tokenizer's own rule (a BOS at the start of each where the
// model wants one; rendered chats bring their own), follow one another without anything in between,
// and are cut into windows without overlap. A long sample is encoded in slices, and only as far as
// it is needed. Slices begin with a single space between two words, where the pre-tokenizers of
// byte-level BPE begin a new piece and no piece of a SentencePiece vocabulary goes on, so that they
// give the ids of the whole; tests compare them for every tokenizer at hand. Text without such
// spaces (Chinese, Japanese) is cut at the start of a line, and in the end between any two
// characters, every few megabytes: there a token may be in two
// parts, and a SentencePiece tokenizer puts a space before the slice. A window that starts
// inside a sample gets no BOS of its own: that is the GPTQ and WikiText convention, where one long
// text has one BOS at its start.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "common/sha256.h"
#include "worker/calibrate/samples.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::calibrate {

struct TokenWindows {
  int64_t length = 0;
  std::vector<int32_t> ids;  // [count · length]

  int64_t count() const { return length == 0 ? 0 : static_cast<int64_t>(ids.size()) / length; }
  std::span<const int32_t> window(int64_t i) const {
    return std::span(ids).subspan(static_cast<size_t>(i * length), static_cast<size_t>(length));
  }
};

struct TokenStream {
  std::vector<int32_t> ids;
  int64_t kept = 0;       // samples in `ids`
  int64_t n_short = 0;    // of these, shorter than a window: they share one with others
  int64_t dropped = 0;    // blank
  int64_t left_over = 0;  // not needed
};

struct EncodeSettings {
  // Leaves out the BOS that the tokenizer puts before a sample, and none that a rendered chat
  // spells: there it may be the mark of every turn.
  bool skip_bos = false;
  int64_t slice_bytes = 1 << 20;  // longer samples are encoded in slices of about as many
};

// Encodes samples in their order until `tokens_wanted` ids are there. INVALID_ARGUMENT for an id
// that is outside `vocab`. Asks `keep_going` before each sample and slice.
absl::StatusOr<TokenStream> EncodeSamples(const SampleSet& set, const Tokenizer& tokenizer,
                                          int64_t vocab, int64_t window_length,
                                          int64_t tokens_wanted, const KeepGoing& keep_going = {},
                                          const EncodeSettings& settings = {});

// At most `n_max` windows from the start of `ids`.
TokenWindows CutWindows(std::span<const int32_t> ids, int64_t length, int64_t n_max);

// SHA-256 of the window length and the ids (little-endian 32-bit): what a job was calibrated with.
std::string Fingerprint(const TokenWindows& windows);
// The same of windows that come one after another.
class WindowHash {
 public:
  explicit WindowHash(int64_t length);
  void Add(std::span<const int32_t> ids);
  std::string HexDigest() { return hash_.HexDigest(); }

 private:
  Sha256 hash_;
};

}  // namespace walsh::calibrate
