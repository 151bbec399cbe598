// Calibration and evaluation texts on disk.
//
//   .jsonl   one object a line: {"text": "…"} or {"messages": [{"role": "…", "content": "…"}, …]},
//            the latter rendered by the model's own chat template
//   .json    an array of strings or of such objects
//   other    plain text, one sample, byte for byte
//
// The ending is that of the name that the file was asked for by, not of what a link leads to.
//
// Files are hostile: size and depth are bounded, text must be UTF-8.
//
// Errors:  NOT_FOUND         no such file
//          INVALID_ARGUMENT  too large, not UTF-8 (byte offset), malformed (line or element), or no
//                            sample with any text
//          UNIMPLEMENTED     messages for a model without a chat template
//          and those of worker/tokenizer/chat_template.h
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/named_file.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::calibrate {

struct Sample {
  std::string text;
  // Rendered by a chat template: special tokens are spelled out in the text, BOS included.
  bool is_chat = false;
};

struct SampleSet {
  std::vector<Sample> samples;
  int64_t dropped = 0;  // without any text but white space
};

// `chat_template` is the model's own, in Jinja; parsed only where a sample needs it. May be empty.
absl::StatusOr<SampleSet> ReadSamples(const NamedFile& file, const Tokenizer& tokenizer,
                                      std::string_view chat_template);

}  // namespace walsh::calibrate
