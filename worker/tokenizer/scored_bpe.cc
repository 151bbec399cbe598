#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/utf8.h"
#include "worker/tokenizer/bpe_borders.h"
#include "worker/tokenizer/bpe_model.h"

namespace walsh {
namespace {

// Every joined pair looks its text up, so this bounds the cost of one step. SentencePiece's own
// default is 16 characters.
constexpr size_t kPieceBytesMax = 1024;

class ScoredBpe final : public BpeModel {
 public:
  ScoredBpe(const Vocabulary& vocabulary, const ScoredBpeOptions& options)
      : has_byte_fallback_(options.has_byte_fallback),
        unknown_(options.unknown),
        byte_tokens_(FindByteTokens(vocabulary)),
        ranks_(RanksOf(options.scores)) {
    for (int32_t id = 0; id < vocabulary.size(); ++id) {
      if (!options.is_mergeable[id]) continue;
      const std::string_view spelling = vocabulary.Spelling(id);
      pieces_.emplace(spelling, id);
      borders_.AddToken(spelling);
      piece_bytes_max_ = std::max(piece_bytes_max_, spelling.size());
    }
  }

  size_t piece_bytes_max() const { return piece_bytes_max_; }

  void Encode(std::string_view piece, BpeScratch& scratch,
              std::vector<int32_t>& ids) const override {
    WALSH_CHECK_LE(piece.size(), size_t{std::numeric_limits<int32_t>::max()});
    bool was_unknown = false;
    uint32_t previous = 0;
    scratch.symbols.clear();
    for (size_t end = 0; end < piece.size();) {
      const uint32_t begin = static_cast<uint32_t>(end);
      const uint32_t character = NextCodePoint(piece, &end);
      if (borders_.Separates(previous, character)) MergeWord(piece, scratch, was_unknown, ids);
      const uint32_t size = static_cast<uint32_t>(end) - begin;
      scratch.Add(Find(piece.substr(begin, size)), begin, size);
      previous = character;
    }
    MergeWord(piece, scratch, was_unknown, ids);
  }

 private:
  // Equal scores get equal ranks, so that the leftmost pair wins among them.
  static std::vector<uint32_t> RanksOf(const std::vector<float>& scores) {
    std::vector<float> sorted = scores;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    std::vector<uint32_t> ranks;
    ranks.reserve(scores.size());
    for (const float score : scores) {
      const auto at = std::lower_bound(sorted.begin(), sorted.end(), score, std::greater<>());
      ranks.push_back(static_cast<uint32_t>(at - sorted.begin()));
    }
    return ranks;
  }

  // Merges the symbols gathered so far and appends their ids.
  void MergeWord(std::string_view piece, BpeScratch& scratch, bool& was_unknown,
                 std::vector<int32_t>& ids) const {
    MergeSymbols(scratch, [&](const BpeSymbol& left, const BpeSymbol& right) {
      const int32_t id = Find(piece.substr(left.begin, left.size + right.size));
      return id < 0 ? std::nullopt : std::optional<BpeMerge>({.rank = ranks_[id], .id = id});
    });
    for (const BpeSymbol& symbol : scratch.symbols) {
      if (symbol.size == 0) continue;
      const bool is_unknown =
          symbol.id < 0 && !AddBytes(piece.substr(symbol.begin, symbol.size), ids);
      if (symbol.id >= 0) ids.push_back(symbol.id);
      if (is_unknown && !was_unknown && unknown_ >= 0) ids.push_back(unknown_);
      was_unknown = is_unknown;
    }
    scratch.symbols.clear();
  }

  int32_t Find(std::string_view text) const {
    if (text.size() > piece_bytes_max_) return -1;
    const auto found = pieces_.find(text);
    return found == pieces_.end() ? -1 : found->second;
  }

  bool AddBytes(std::string_view text, std::vector<int32_t>& ids) const {
    const auto token = [this](char c) { return byte_tokens_[static_cast<uint8_t>(c)]; };
    if (!has_byte_fallback_) return false;
    if (std::any_of(text.begin(), text.end(), [&](char c) { return token(c) < 0; })) return false;
    for (const char c : text) ids.push_back(token(c));
    return true;
  }

  const bool has_byte_fallback_;
  const int32_t unknown_;
  const std::array<int32_t, 256> byte_tokens_;
  const std::vector<uint32_t> ranks_;
  StringViewMap pieces_;  // keys live in the vocabulary
  BpeBorders borders_;
  size_t piece_bytes_max_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BpeModel>> MakeScoredBpe(const Vocabulary* vocabulary,
                                                        const ScoredBpeOptions& options) {
  const size_t n = static_cast<size_t>(vocabulary->size());
  if (options.scores.size() != n || options.is_mergeable.size() != n) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.scores.size(), " scores for ", n, " tokens"));
  }
  for (size_t id = 0; id < n; ++id) {
    if (!std::isfinite(options.scores[id])) {
      return absl::InvalidArgumentError(absl::StrCat("the score of token ", id, " is not finite"));
    }
  }
  auto model = std::make_unique<ScoredBpe>(*vocabulary, options);
  if (model->piece_bytes_max() > kPieceBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("a piece has ", model->piece_bytes_max(), " bytes, at most ", kPieceBytesMax));
  }
  return model;
}

}  // namespace walsh
