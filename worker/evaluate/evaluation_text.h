// The text of a perplexity: how its file is read, and the windows that are cut from its tokens.
//
// Errors: those of worker/calibrate/samples.h
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/calibrate/samples.h"
#include "worker/calibrate/token_windows.h"
#include "worker/io/named_file.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::evaluate {

// Rows, one a line, as GPTQ and QuaRot evaluate WikiText-2: each keeps its "\n", those of white
// space alone become empty, and all are joined by "\n\n".
std::string JoinRows(std::string_view text);

// With `joins_rows` one sample, of the file's rows by JoinRows; else as calibration texts are read.
absl::StatusOr<calibrate::SampleSet> ReadEvaluationText(const NamedFile& file, bool joins_rows,
                                                        const Tokenizer& tokenizer,
                                                        std::string_view chat_template);

// Windows of `length` tokens that begin `stride` apart, at most `n_max`: all tokens of a long text
// but the last are in one. They are cut when they are needed, since those that overlap are many
// times the text.
class StridedWindows {
 public:
  StridedWindows() = default;
  StridedWindows(std::vector<int32_t> ids, int64_t length, int64_t stride, int64_t n_max);
  int64_t count() const { return count_; }
  int64_t length() const { return length_; }
  int64_t stride() const { return stride_; }
  int64_t n_ids() const { return static_cast<int64_t>(ids_.size()); }
  // Whether the text has another window, beyond `n_max`.
  bool has_more() const { return length_ + count_ * stride_ <= n_ids(); }
  calibrate::TokenWindows Cut(int64_t first, int64_t n) const;
  // Of the same windows, as ScoredFrom::positions.
  std::vector<int64_t> FirstScored(int64_t first, int64_t n) const;

 private:
  std::vector<int32_t> ids_;
  int64_t length_ = 0, stride_ = 0, count_ = 0;
};

}  // namespace walsh::evaluate
