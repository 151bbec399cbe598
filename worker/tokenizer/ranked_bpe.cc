#include <limits>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/bpe_borders.h"
#include "worker/tokenizer/bpe_model.h"
#include "worker/tokenizer/byte_alphabet.h"

namespace walsh {

std::array<int32_t, 256> FindByteTokens(const Vocabulary& vocabulary) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::array<int32_t, 256> ids{};
  for (size_t byte = 0; byte < ids.size(); ++byte) {
    const std::string spelling = {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>'};
    ids[byte] = vocabulary.Find(spelling);
  }
  return ids;
}

namespace {

class RankedBpe final : public BpeModel {
 public:
  RankedBpe(const Vocabulary* vocabulary, const RankedBpeOptions& options)
      : vocabulary_(*vocabulary), options_(options), byte_tokens_(FindByteTokens(*vocabulary)) {
    if (!options.is_byte_level) {
      for (int32_t id = 0; id < vocabulary_.size(); ++id) {
        borders_.AddToken(vocabulary_.Spelling(id));
      }
      return;
    }
    for (size_t byte = 0; byte < byte_ids_.size(); ++byte) {
      byte_ids_[byte] = Find(ByteCharacter(static_cast<uint8_t>(byte)));
    }
  }

  absl::Status AddMerges(std::span<const std::pair<std::string, std::string>> merges) {
    merges_.reserve(merges.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const auto& [left, right] = merges[rank];
      const int32_t left_id = vocabulary_.Find(left);
      const int32_t right_id = vocabulary_.Find(right);
      const int32_t id = vocabulary_.Find(left + right);
      if (left_id < 0 || right_id < 0 || id < 0) {
        const std::string& unknown = left_id < 0 ? left : right_id < 0 ? right : left + right;
        return absl::InvalidArgumentError(absl::StrCat("merge ", rank, " ('", left, "' and '",
                                                       right, "') refers to '", unknown,
                                                       "', which is no token"));
      }
      // The last of equal pairs counts, as in HF's implementation.
      merges_[Key(left_id, right_id)] = {.rank = static_cast<uint32_t>(rank), .id = id};
    }
    return absl::OkStatus();
  }

  void Encode(std::string_view piece, BpeScratch& scratch,
              std::vector<int32_t>& ids) const override {
    WALSH_CHECK_LE(piece.size(), size_t{std::numeric_limits<int32_t>::max()});
    if (options_.ignores_merges) {
      if (const int32_t id = FindWhole(piece); id >= 0) {
        ids.push_back(id);
        return;
      }
    }
    scratch.symbols.clear();
    if (options_.is_byte_level) {
      AddBytes(piece, scratch);
      MergeWord(scratch, ids);
    } else {
      EncodeCharacters(piece, scratch, ids);
    }
  }

 private:
  static uint64_t Key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }

  int32_t Find(std::string_view spelling) const {
    const int32_t id = vocabulary_.Find(spelling);
    return id >= 0 && options_.is_model_token[id] ? id : -1;
  }

  int32_t FindWhole(std::string_view piece) const {
    if (!options_.is_byte_level) return Find(piece);
    std::string spelling;
    for (const char c : piece) spelling += ByteCharacter(static_cast<uint8_t>(c));
    return Find(spelling);
  }

  void AddBytes(std::string_view piece, BpeScratch& scratch) const {
    Unknown unknown;
    for (uint32_t i = 0; i < piece.size(); ++i) {
      const int32_t id = byte_ids_[static_cast<uint8_t>(piece[i])];
      if (id >= 0) {
        Flush(unknown, scratch);
        scratch.Add(id, i, 1);
      } else {
        AddUnknown(i, 1, unknown, scratch);
      }
    }
    Flush(unknown, scratch);
  }

  void EncodeCharacters(std::string_view piece, BpeScratch& scratch,
                        std::vector<int32_t>& ids) const {
    Unknown unknown;
    std::optional<uint32_t> previous;  // the character before, if it is a token
    for (size_t end = 0; end < piece.size();) {
      const uint32_t begin = static_cast<uint32_t>(end);
      const uint32_t character = NextCodePoint(piece, &end);
      const uint32_t size = static_cast<uint32_t>(end) - begin;
      const int32_t id = Find(piece.substr(begin, size));
      if (id >= 0) {
        Flush(unknown, scratch);
        if (previous && borders_.Separates(*previous, character)) MergeWord(scratch, ids);
        scratch.Add(id, begin, size);
        previous = character;
      } else {
        if (!AddFallback(piece, begin, size, scratch)) AddUnknown(begin, size, unknown, scratch);
        previous.reset();
      }
    }
    Flush(unknown, scratch);
    MergeWord(scratch, ids);
  }

  // Merges the symbols gathered so far and appends their ids.
  void MergeWord(BpeScratch& scratch, std::vector<int32_t>& ids) const {
    MergeSymbols(scratch, [this](const BpeSymbol& left, const BpeSymbol& right) {
      const auto found = merges_.find(Key(left.id, right.id));
      return found == merges_.end() ? std::nullopt : std::optional<BpeMerge>(found->second);
    });
    for (const BpeSymbol& symbol : scratch.symbols) {
      if (symbol.size > 0) ids.push_back(symbol.id);
    }
    scratch.symbols.clear();
  }

  bool AddFallback(std::string_view piece, uint32_t begin, uint32_t size,
                   BpeScratch& scratch) const {
    if (!options_.has_byte_fallback) return false;
    for (uint32_t i = begin; i < begin + size; ++i) {
      if (byte_tokens_[static_cast<uint8_t>(piece[i])] < 0) return false;
    }
    for (uint32_t i = begin; i < begin + size; ++i) {
      scratch.Add(byte_tokens_[static_cast<uint8_t>(piece[i])], i, 1);
    }
    return true;
  }

  // A run of unknown characters that waits to become one token, if `fuses_unknown`.
  struct Unknown {
    uint32_t begin = 0;
    uint32_t size = 0;
  };
  void AddUnknown(uint32_t begin, uint32_t size, Unknown& unknown, BpeScratch& scratch) const {
    if (!options_.fuses_unknown) Flush(unknown, scratch);
    if (unknown.size == 0) unknown.begin = begin;
    unknown.size += size;
  }
  void Flush(Unknown& unknown, BpeScratch& scratch) const {
    if (unknown.size > 0 && options_.unknown >= 0) {
      scratch.Add(options_.unknown, unknown.begin, unknown.size);
    }
    unknown = {};
  }

  const Vocabulary& vocabulary_;
  const RankedBpeOptions options_;
  const std::array<int32_t, 256> byte_tokens_;  // spelt <0x0A>
  std::array<int32_t, 256> byte_ids_{};         // spelt by GPT-2's alphabet
  absl::flat_hash_map<uint64_t, BpeMerge> merges_;
  BpeBorders borders_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<BpeModel>> MakeRankedBpe(
    const Vocabulary* vocabulary, std::span<const std::pair<std::string, std::string>> merges,
    const RankedBpeOptions& options) {
  WALSH_CHECK_EQ(options.is_model_token.size(), static_cast<size_t>(vocabulary->size()));
  auto model = std::make_unique<RankedBpe>(vocabulary, options);
  WALSH_RETURN_IF_ERROR(model->AddMerges(merges));
  return model;
}

}  // namespace walsh
