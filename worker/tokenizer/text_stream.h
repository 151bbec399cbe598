// Tokens of a running generation to text that may be shown.
//
// Holds back bytes that could still become a code point (at most 3) and text that could still
// become a stop string; bytes that can never complete become U+FFFD at once, so that a stream
// cannot stall. What comes out does not depend on how the text fell into tokens: of several stop
// strings the one that is complete first counts, the longest where two end together.
//
// Threads: one stream is used by one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "worker/tokenizer/tokenizer.h"

namespace walsh {

class TextStream {
 public:
  struct Options {
    bool skip_special_tokens = true;
    // Valid UTF-8; empty ones are ignored.
    std::vector<std::string> stop = {};
    // The text ends with the stop string instead of before it.
    bool include_stop = false;
    // The text continues a prompt, so a leading space is part of it.
    bool continues_text = true;
  };
  // `tokenizer` must outlive the stream.
  TextStream(const Tokenizer* tokenizer, Options options);

  // Text that became certain with this token; always whole code points. After a stop string
  // matched, further tokens give nothing.
  std::string Append(int32_t token);
  // What was held back, at the end of the generation.
  std::string Finish();
  // The stop string that matched, or empty.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  // Moves what is certain out of `text_`.
  std::string Release(bool is_end);
  bool CutAtStop();
  size_t HeldBytes() const;

  const Tokenizer* tokenizer_;
  Options options_;
  std::string bytes_;  // the beginning of a code point
  std::string text_;   // valid UTF-8, not yet released
  std::string matched_stop_;
  bool drops_space_;  // the first text may begin with a space that is not part of it
};

}  // namespace walsh
