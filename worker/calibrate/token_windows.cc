#include "worker/calibrate/token_windows.h"

#include <algorithm>
#include <bit>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/utf8.h"

namespace walsh::calibrate {

namespace {

constexpr std::string_view kWhiteSpace = " \t\r\n\v\f";

bool IsWhiteSpace(char c) { return kWhiteSpace.find(c) != std::string_view::npos; }

// Where the first slice of `text` ends, at least `slice_bytes` from its start: before a single
// space between two words, or if there is none within as many bytes again, before the first
// character of a line, or if there is none within twice as many again, between any two characters.
size_t SliceEnd(std::string_view text, int64_t slice_bytes) {
  const auto begin = static_cast<size_t>(slice_bytes);
  const size_t last = text.empty() ? 0 : text.size() - 1;
  for (size_t at = begin; at < std::min(last, 2 * begin); ++at) {
    if (text[at] == ' ' && !IsWhiteSpace(text[at - 1]) && !IsWhiteSpace(text[at + 1])) return at;
  }
  for (size_t at = begin; at < std::min(last, 4 * begin); ++at) {
    if (text[at - 1] == '\n' && !IsWhiteSpace(text[at])) return at;
  }
  return text.size() <= 4 * begin ? text.size() : Utf8Prefix(text, 4 * begin).size();
}

// What the tokenizer puts around every text.
struct Surroundings {
  std::vector<int32_t> before, after;
};

absl::StatusOr<Surroundings> FindSurroundings(const Tokenizer& tokenizer,
                                              Tokenizer::EncodeOptions options) {
  constexpr std::string_view kProbe = "a";
  WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> with, tokenizer.Encode(kProbe, options));
  options.add_special_tokens = false;
  WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> bare, tokenizer.Encode(kProbe, options));
  const auto text = std::search(with.begin(), with.end(), bare.begin(), bare.end());
  if (text == with.end()) return Surroundings();
  return Surroundings{{with.begin(), text},
                      {text + static_cast<std::ptrdiff_t>(bare.size()), with.end()}};
}

class SampleEncoder {
 public:
  SampleEncoder(const Tokenizer& tokenizer, const EncodeSettings& settings,
                const KeepGoing& keep_going)
      : tokenizer_(tokenizer), settings_(settings), keep_going_(keep_going) {}

  // Appends the ids of `sample`, at least `n_wanted` of them where it has so many.
  absl::Status Append(const Sample& sample, int64_t n_wanted, std::vector<int32_t>& ids) const {
    Tokenizer::EncodeOptions options;
    options.add_special_tokens = !sample.is_chat;
    // A corpus must not be able to spell control tokens; a rendered template does just that, and
    // has them where a slice might end.
    options.parse_special_tokens = sample.is_chat;
    const size_t begin = ids.size();
    if (sample.is_chat || static_cast<int64_t>(sample.text.size()) <= settings_.slice_bytes) {
      WALSH_RETURN_IF_ERROR(AppendSlice(sample.text, options, ids));
      if (!sample.is_chat) DropBosAt(begin, ids);
      return absl::OkStatus();
    }
    WALSH_ASSIGN_OR_RETURN(const Surroundings surroundings, FindSurroundings(tokenizer_, options));
    options.add_special_tokens = false;
    const size_t n_wanted_in_all = ids.size() + static_cast<size_t>(n_wanted);
    ids.insert(ids.end(), surroundings.before.begin(), surroundings.before.end());
    DropBosAt(begin, ids);
    std::string_view rest = sample.text;
    while (!rest.empty() && ids.size() < n_wanted_in_all) {
      const std::string_view slice = rest.substr(0, SliceEnd(rest, settings_.slice_bytes));
      WALSH_RETURN_IF_ERROR(AppendSlice(slice, options, ids));
      rest.remove_prefix(slice.size());
      // Such a tokenizer puts a space before every text, which here is there already.
      if (rest.starts_with(' ') && tokenizer_.strips_leading_space()) rest.remove_prefix(1);
    }
    if (rest.empty()) {
      ids.insert(ids.end(), surroundings.after.begin(), surroundings.after.end());
    }
    return absl::OkStatus();
  }

 private:
  absl::Status AppendSlice(std::string_view text, const Tokenizer::EncodeOptions& options,
                           std::vector<int32_t>& ids) const {
    WALSH_RETURN_IF_ERROR(Ask(keep_going_));
    WALSH_ASSIGN_OR_RETURN(const std::vector<int32_t> encoded, tokenizer_.Encode(text, options));
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    return absl::OkStatus();
  }

  // Where a sample begins. Its own text cannot spell the token.
  void DropBosAt(size_t begin, std::vector<int32_t>& ids) const {
    if (!settings_.skip_bos || begin == ids.size() || tokenizer_.bos() < 0) return;
    if (ids[begin] == tokenizer_.bos()) ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(begin));
  }

  const Tokenizer& tokenizer_;
  const EncodeSettings& settings_;
  const KeepGoing& keep_going_;
};

}  // namespace

absl::StatusOr<TokenStream> EncodeSamples(const SampleSet& set, const Tokenizer& tokenizer,
                                          int64_t vocab, int64_t window_length,
                                          int64_t tokens_wanted, const KeepGoing& keep_going,
                                          const EncodeSettings& settings) {
  const SampleEncoder encoder(tokenizer, settings, keep_going);
  TokenStream stream;
  stream.dropped = set.dropped;
  for (const Sample& sample : set.samples) {
    const auto n_before = static_cast<int64_t>(stream.ids.size());
    if (n_before >= tokens_wanted) {
      ++stream.left_over;
      continue;
    }
    WALSH_RETURN_IF_ERROR(encoder.Append(sample, tokens_wanted - n_before, stream.ids));
    for (int32_t id : std::span(stream.ids).subspan(static_cast<size_t>(n_before))) {
      if (id < 0 || id >= vocab) {
        return absl::InvalidArgumentError(absl::StrCat(
            "the tokenizer gives id ", id, ", but the model has ", vocab, " embeddings"));
      }
    }
    const int64_t n_added = static_cast<int64_t>(stream.ids.size()) - n_before;
    if (n_added == 0) {
      ++stream.dropped;
      continue;
    }
    ++stream.kept;
    if (n_added < window_length) ++stream.n_short;
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
  WindowHash hash(windows.length);
  hash.Add(windows.ids);
  return hash.HexDigest();
}

WindowHash::WindowHash(int64_t length) { hash_.Update(&length, sizeof(length)); }

void WindowHash::Add(std::span<const int32_t> ids) {
  static_assert(std::endian::native == std::endian::little);
  hash_.Update(ids.data(), ids.size_bytes());
}

}  // namespace walsh::calibrate
