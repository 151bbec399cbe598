#include "worker/tokenizer/sentencepiece_vocabulary.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh {
namespace {

absl::Status AddPiece(const SentencePieceVocabulary& source, size_t index, BpeTokenizerParts& parts,
                      ScoredBpeOptions& options) {
  const int32_t id = static_cast<int32_t>(index);
  const std::string& piece = source.pieces[index];
  const int32_t type_number = source.types[index];
  if (type_number < static_cast<int32_t>(PieceType::kNormal) ||
      type_number > static_cast<int32_t>(PieceType::kByte)) {
    return absl::InvalidArgumentError(absl::StrCat("piece ", id, " ('", piece, "') has type ",
                                                   type_number, ", known are 1 to 6"));
  }
  const PieceType type = static_cast<PieceType>(type_number);
  WALSH_RETURN_IF_ERROR(parts.vocabulary->Add(piece, id));
  const bool is_special = type == PieceType::kControl || type == PieceType::kUnknown;
  if (is_special) {
    // Spelt out in a rendered chat template.
    WALSH_RETURN_IF_ERROR(parts.raw_added.Add({.id = id, .content = piece, .is_special = true}));
  } else if (type == PieceType::kUserDefined) {
    AddedTokens& added =
        source.finds_user_defined_in_raw_text ? parts.raw_added : parts.normalized_added;
    WALSH_RETURN_IF_ERROR(added.Add({.id = id, .content = piece}));
  }
  parts.is_special.push_back(is_special);
  parts.is_added.push_back(is_special || type == PieceType::kUserDefined);
  // A user-defined piece is found before any merging. Bytes and control pieces are never made of
  // text. Unused ones are, on the way to others.
  options.is_mergeable.push_back(type == PieceType::kNormal || type == PieceType::kUnused);
  options.is_unused.push_back(type == PieceType::kUnused);
  options.has_byte_fallback |= type == PieceType::kByte;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<BpeTokenizerParts> MakeSentencePieceParts(const SentencePieceVocabulary& source) {
  if (source.scores.size() != source.pieces.size() || source.types.size() != source.pieces.size()) {
    return absl::InvalidArgumentError(absl::StrCat(source.pieces.size(), " pieces, ",
                                                   source.scores.size(), " scores, ",
                                                   source.types.size(), " types"));
  }
  BpeTokenizerParts parts;
  parts.vocabulary = std::make_unique<Vocabulary>();
  ScoredBpeOptions options{.scores = source.scores, .unknown = source.unknown};
  for (size_t i = 0; i < source.pieces.size(); ++i) {
    WALSH_RETURN_IF_ERROR(AddPiece(source, i, parts, options));
  }
  WALSH_ASSIGN_OR_RETURN(parts.model, MakeScoredBpe(parts.vocabulary.get(), options));
  if (source.adds_dummy_prefix) {
    parts.normalizer.steps.push_back(
        {.kind = NormalizerStep::Kind::kPrepend, .content = std::string(kMetaspace)});
  }
  parts.normalizer.steps.push_back(
      {.kind = NormalizerStep::Kind::kReplace, .pattern = " ", .content = std::string(kMetaspace)});
  parts.has_byte_fallback = options.has_byte_fallback;
  parts.strips_leading_space = source.adds_dummy_prefix;
  return parts;
}

}  // namespace walsh
