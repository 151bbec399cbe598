#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/container/flat_hash_map.h"
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
        is_unused_(options.is_unused),
        has_unused_(std::find(is_unused_.begin(), is_unused_.end(), true) != is_unused_.end()),
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
    Word word;
    uint32_t previous = 0;
    scratch.symbols.clear();
    for (size_t end = 0; end < piece.size();) {
      const uint32_t begin = static_cast<uint32_t>(end);
      const uint32_t character = NextCodePoint(piece, &end);
      // How an unused token was put together may differ from word to word; the last one counts for
      // all of them, so they are not merged apart from each other.
      if (!has_unused_ && borders_.Separates(previous, character)) {
        MergeWord(piece, scratch, word, ids);
      }
      const uint32_t size = static_cast<uint32_t>(end) - begin;
      scratch.Add(Find(piece.substr(begin, size)), begin, size);
      previous = character;
    }
    MergeWord(piece, scratch, word, ids);
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

  struct Word {
    bool was_unknown = false;
    // The bytes of the left part of unused tokens, by their text.
    absl::flat_hash_map<std::string_view, size_t> parts_of_unused = {};
  };

  // Merges the symbols gathered so far and appends their ids.
  void MergeWord(std::string_view piece, BpeScratch& scratch, Word& word,
                 std::vector<int32_t>& ids) const {
    MergeSymbols(scratch, [&](const BpeSymbol& left, const BpeSymbol& right) {
      const std::string_view text = piece.substr(left.begin, left.size + right.size);
      const int32_t id = Find(text);
      if (id < 0) return std::optional<BpeMerge>();
      if (is_unused_[id]) word.parts_of_unused.insert_or_assign(text, left.size);
      return std::optional<BpeMerge>({.rank = ranks_[id], .id = id});
    });
    for (const BpeSymbol& symbol : scratch.symbols) {
      if (symbol.size == 0) continue;
      AddSymbol(piece.substr(symbol.begin, symbol.size), symbol.id, word, ids);
    }
    scratch.symbols.clear();
  }

  // As deep as the longest token has characters.
  void AddSymbol(std::string_view text, int32_t id, Word& word, std::vector<int32_t>& ids) const {
    if (id >= 0 && is_unused_[id]) {
      const auto parts = word.parts_of_unused.find(text);
      if (parts != word.parts_of_unused.end()) {
        const size_t left = parts->second;
        AddSymbol(text.substr(0, left), Find(text.substr(0, left)), word, ids);
        AddSymbol(text.substr(left), Find(text.substr(left)), word, ids);
        return;
      }
    }
    const bool is_unknown = id < 0 && !AddBytes(text, ids);
    if (id >= 0) ids.push_back(id);
    if (is_unknown && !word.was_unknown && unknown_ >= 0) ids.push_back(unknown_);
    word.was_unknown = is_unknown;
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
  const std::vector<bool> is_unused_;
  const bool has_unused_;
  const std::vector<uint32_t> ranks_;
  StringViewMap pieces_;  // keys live in the vocabulary
  BpeBorders borders_;
  size_t piece_bytes_max_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BpeModel>> MakeScoredBpe(const Vocabulary* vocabulary,
                                                        const ScoredBpeOptions& options) {
  const size_t n = static_cast<size_t>(vocabulary->size());
  if (options.scores.size() != n || options.is_mergeable.size() != n ||
      options.is_unused.size() != n) {
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
