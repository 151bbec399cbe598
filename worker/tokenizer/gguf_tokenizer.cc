// The vocabulary inside a GGUF file.
//
// Source:  the GGUF specification (ggml-org/ggml, docs/gguf.md), section "tokenizer".
#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/io/pre_tokenizer_conventions.h"
#include "worker/tokenizer/bpe_tokenizer.h"
#include "worker/tokenizer/sentencepiece_vocabulary.h"

namespace walsh {
namespace {

enum TokenType : int32_t { kUnknown = 2, kControl = 3, kUserDefined = 4 };

absl::Status CheckSpecialId(std::string_view key, int32_t id, size_t n_tokens) {
  if (id >= -1 && id < static_cast<int64_t>(n_tokens)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.", std::string(key), " is ", id,
                                                 ", the vocabulary has ", n_tokens, " tokens"));
}

absl::Status CheckTokens(const GgufVocabulary& gguf) {
  const size_t n = gguf.tokens.size();
  if (n == 0 || n > static_cast<size_t>(limits::kVocabMax)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tokenizer.ggml.tokens has ", n, " tokens, allowed are 1 to ", limits::kVocabMax));
  }
  if (gguf.types.size() != n) {
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.token_type has ",
                                                   gguf.types.size(), " items for ", n, " tokens"));
  }
  for (size_t id = 0; id < n; ++id) {
    if (!IsValidUtf8(gguf.tokens[id])) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.tokens: token ", id, " is not valid UTF-8"));
    }
  }
  WALSH_RETURN_IF_ERROR(CheckSpecialId("bos_token_id", gguf.bos, n));
  WALSH_RETURN_IF_ERROR(CheckSpecialId("eos_token_id", gguf.eos, n));
  return CheckSpecialId("unknown_token_id", gguf.unknown, n);
}

// "left right": exactly one space, neither side empty.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> SplitMerges(
    const std::vector<std::string>& merges) {
  std::vector<std::pair<std::string, std::string>> pairs;
  pairs.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const size_t space = merges[i].find(' ');
    if (space == 0 || space == std::string::npos || space + 1 == merges[i].size() ||
        merges[i].find(' ', space + 1) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.merges: item ", i, ", '", merges[i], "', is not a pair"));
    }
    pairs.emplace_back(merges[i].substr(0, space), merges[i].substr(space + 1));
  }
  return pairs;
}

absl::Status AddSpecialIds(const GgufVocabulary& gguf, bool adds_bos, BpeTokenizerParts& parts) {
  parts.bos = gguf.bos;
  parts.eos = gguf.eos;
  // Some files have the type "normal" for them (GPT-2's own).
  for (const int32_t id : {gguf.bos, gguf.eos, gguf.unknown}) {
    if (id >= 0) parts.is_special[id] = true;
  }
  if (gguf.has_add_bos ? gguf.add_bos : adds_bos) {
    if (gguf.bos < 0) {
      return absl::InvalidArgumentError(
          "a BOS is to be added, but there is no "
          "tokenizer.ggml.bos_token_id");
    }
    parts.prefix.push_back(gguf.bos);
  }
  if (gguf.add_eos) {
    if (gguf.eos < 0) {
      return absl::InvalidArgumentError(
          "tokenizer.ggml.add_eos_token is set without "
          "tokenizer.ggml.eos_token_id");
    }
    parts.suffix.push_back(gguf.eos);
  }
  return absl::OkStatus();
}

absl::StatusOr<BpeTokenizerParts> ReadByteLevel(const GgufVocabulary& gguf) {
  WALSH_ASSIGN_OR_RETURN(const PreTokenizerConvention convention,
                         FindPreTokenizerConvention(gguf.pre));
  BpeTokenizerParts parts;
  parts.is_byte_level = true;
  parts.vocabulary = std::make_unique<Vocabulary>();
  RankedBpeOptions options{.is_byte_level = true, .ignores_merges = convention.ignores_merges};
  for (size_t i = 0; i < gguf.tokens.size(); ++i) {
    const int32_t id = static_cast<int32_t>(i);
    const int32_t type = gguf.types[i];
    WALSH_RETURN_IF_ERROR(parts.vocabulary->Add(gguf.tokens[i], id));
    const bool is_special = type == kControl || type == kUnknown;
    const bool is_added = is_special || type == kUserDefined;
    if (is_added) {
      WALSH_RETURN_IF_ERROR(
          parts.raw_added.Add({.id = id, .content = gguf.tokens[i], .is_special = is_special}));
    }
    parts.is_special.push_back(is_special);
    parts.is_added.push_back(is_added);
    // "Unused" ones are in the vocabulary of llama.cpp and of tokenizer.json like any other.
    options.is_model_token.push_back(!is_added);
  }
  WALSH_ASSIGN_OR_RETURN(const auto merges, SplitMerges(gguf.merges));
  WALSH_ASSIGN_OR_RETURN(parts.model, MakeRankedBpe(parts.vocabulary.get(), merges, options));
  for (const std::string_view pattern :
       {convention.splits_digits ? kDigitPattern : std::string_view(), convention.pattern}) {
    if (pattern.empty()) continue;
    WALSH_ASSIGN_OR_RETURN(RegexSplitter splitter, RegexSplitter::Create(pattern));
    parts.pre_tokenizer.splitters.push_back(std::move(splitter));
  }
  WALSH_RETURN_IF_ERROR(AddSpecialIds(gguf, convention.adds_bos, parts));
  return parts;
}

absl::StatusOr<BpeTokenizerParts> ReadScored(const GgufVocabulary& gguf) {
  // The types have SentencePiece's numbers.
  SentencePieceVocabulary pieces{.pieces = gguf.tokens,
                                 .scores = gguf.scores,
                                 .types = gguf.types,
                                 .unknown = gguf.unknown,
                                 .adds_dummy_prefix = gguf.add_space_prefix,
                                 .finds_user_defined_in_raw_text = true};
  // llama.cpp knows no difference between unused tokens and others, nor does tokenizer.json.
  std::replace(pieces.types.begin(), pieces.types.end(), static_cast<int32_t>(PieceType::kUnused),
               static_cast<int32_t>(PieceType::kNormal));
  WALSH_ASSIGN_OR_RETURN(BpeTokenizerParts parts, MakeSentencePieceParts(pieces));
  WALSH_RETURN_IF_ERROR(AddSpecialIds(gguf, /*adds_bos=*/true, parts));
  return parts;
}

}  // namespace

absl::StatusOr<BpeTokenizerParts> ReadGgufTokenizer(const GgufVocabulary& gguf) {
  WALSH_RETURN_IF_ERROR(CheckTokens(gguf));
  if (gguf.model == "gpt2") return ReadByteLevel(gguf);
  if (gguf.model == "llama") return ReadScored(gguf);
  return absl::UnimplementedError(
      absl::StrCat("tokenizer.ggml.model '", gguf.model, "' is neither gpt2 nor llama"));
}

}  // namespace walsh
