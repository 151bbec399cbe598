#include "worker/evaluate/evaluation_text.h"

#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh::evaluate {

std::string JoinRows(std::string_view text) {
  std::string joined;
  bool is_first = true;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view row = text.substr(0, std::min(end + 1, text.size()));
    text.remove_prefix(row.size());
    if (!is_first) joined += "\n\n";
    is_first = false;
    if (row.find_first_not_of(" \t\r\n\v\f") != std::string_view::npos) joined += row;
  }
  return joined;
}

absl::StatusOr<calibrate::SampleSet> ReadEvaluationText(const NamedFile& file, bool joins_rows,
                                                        const Tokenizer& tokenizer,
                                                        std::string_view chat_template) {
  if (!joins_rows) return calibrate::ReadSamples(file, tokenizer, chat_template);
  WALSH_ASSIGN_OR_RETURN(const std::string rows,
                         ReadFile(file.path, limits::kCalibrationFileBytesMax));
  calibrate::SampleSet samples;
  samples.samples.push_back({.text = JoinRows(rows), .is_chat = false});
  return samples;
}

StridedWindows::StridedWindows(std::vector<int32_t> ids, int64_t length, int64_t stride,
                               int64_t n_max)
    : ids_(std::move(ids)), length_(length), stride_(stride) {
  if (n_ids() >= length_) count_ = std::min(n_max, (n_ids() - length_) / stride_ + 1);
}

calibrate::TokenWindows StridedWindows::Cut(int64_t first, int64_t n) const {
  calibrate::TokenWindows windows;
  windows.length = length_;
  windows.ids.reserve(static_cast<size_t>(n * length_));
  for (int64_t i = first; i < first + n; ++i) {
    const auto begin = ids_.begin() + i * stride_;
    windows.ids.insert(windows.ids.end(), begin, begin + length_);
  }
  return windows;
}

std::vector<int64_t> StridedWindows::FirstScored(int64_t first, int64_t n) const {
  // The last `stride` tokens were in no window before; the first token of all is never predicted.
  std::vector<int64_t> positions(static_cast<size_t>(n), std::max<int64_t>(1, length_ - stride_));
  if (first == 0 && n > 0) positions[0] = 1;
  return positions;
}

}  // namespace walsh::evaluate
