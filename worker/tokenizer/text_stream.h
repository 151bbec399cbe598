// Tokens of a running generation to text that may be shown.
//
// Holds back bytes that could still become a code point and text that could still become a stop
// string; bytes that can never complete become U+FFFD at once, so that a stream cannot stall.
//
// Threads: one stream is used by one thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "worker/tokenizer/tokenizer.h"

namespace walsh {

class TextStream {
 public:
  struct Options {
    bool skip_special_tokens = true;
    std::vector<std::string> stop;
    bool include_stop = false;
    // The text continues a prompt, so a leading space is part of it.
    bool continues_text = true;
  };
  TextStream(const Tokenizer* tokenizer, Options options);

  // Text that became certain with this token; always whole code points. After a stop string
  // matched, further tokens give nothing.
  std::string Append(int32_t token);
  // What was held back, at the end of the generation.
  std::string Finish();
  // The stop string that matched, or empty.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  std::string Release(bool finished);

  const Tokenizer* tokenizer_;
  Options options_;
  std::string bytes_;  // decoded, incomplete code point at the end
  std::string text_;   // valid UTF-8, not yet released
  std::string matched_stop_;
  bool is_first_ = true;
};

}  // namespace walsh
