#include "worker/tokenizer/bpe_tokenizer.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/tokenizer/byte_alphabet.h"

namespace walsh {
namespace {

// The bytes of every token, laid end to end.
class TokenByteTable {
 public:
  explicit TokenByteTable(const BpeTokenizerParts& parts) {
    begins_.push_back(0);
    const std::array<int32_t, 256> byte_tokens = FindByteTokens(*parts.vocabulary);
    std::vector<int> byte_of(static_cast<size_t>(parts.vocabulary->size()), -1);
    for (int byte = 0; byte < 256 && parts.has_byte_fallback; ++byte) {
      if (byte_tokens[byte] >= 0) byte_of[byte_tokens[byte]] = byte;
    }
    for (int32_t id = 0; id < parts.vocabulary->size(); ++id) {
      const auto normalized = parts.normalized_spellings.find(id);
      const std::string_view spelling = normalized != parts.normalized_spellings.end()
                                            ? std::string_view(normalized->second)
                                            : parts.vocabulary->Spelling(id);
      if (parts.is_byte_level) {
        // Added tokens are literal text; so is what the alphabet cannot spell.
        const auto bytes = parts.is_added[id] ? std::nullopt : BytesOfSpelling(spelling);
        bytes_ += bytes ? *bytes : spelling;
      } else if (byte_of[id] >= 0) {
        bytes_.push_back(static_cast<char>(byte_of[id]));
      } else {
        bytes_ += ReplaceAll(spelling, kMetaspace, " ");
      }
      begins_.push_back(bytes_.size());
    }
  }

  std::string_view operator[](int32_t id) const {
    return std::string_view(bytes_).substr(begins_[id], begins_[id + 1] - begins_[id]);
  }

 private:
  std::string bytes_;
  std::vector<size_t> begins_;
};

class BpeTokenizer final : public Tokenizer {
 public:
  explicit BpeTokenizer(BpeTokenizerParts parts) : parts_(std::move(parts)), bytes_(parts_) {}

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options) const override {
    if (static_cast<int64_t>(text.size()) > limits::kCalibrationFileBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat("text of ", text.size(), " bytes, at most ",
                                                     limits::kCalibrationFileBytesMax));
    }
    if (!IsValidUtf8(text)) return absl::InvalidArgumentError("the text is not valid UTF-8");
    Work work;
    if (options.add_special_tokens) work.ids = parts_.prefix;
    for (const auto& [id, stretch] : parts_.raw_added.Split(text, options.parse_special_tokens)) {
      if (id >= 0) {
        work.ids.push_back(id);
        continue;
      }
      WALSH_RETURN_IF_ERROR(EncodeStretch(stretch, stretch.data() == text.data(),
                                          options.parse_special_tokens, work));
    }
    if (options.add_special_tokens) {
      work.ids.insert(work.ids.end(), parts_.suffix.begin(), parts_.suffix.end());
    }
    return std::move(work.ids);
  }

  std::string TokenBytes(int32_t id, bool skip_special) const override {
    if (!IsKnown(id) || (skip_special && parts_.is_special[id])) return "";
    return std::string(bytes_[id]);
  }

  std::string Decode(std::span<const int32_t> ids, bool skip_special) const override {
    std::string out;
    for (const int32_t id : ids) {
      if (IsKnown(id) && !(skip_special && parts_.is_special[id])) out += bytes_[id];
    }
    if (parts_.strips_leading_space && out.starts_with(' ')) out.erase(0, 1);
    return ReplaceInvalidUtf8(out);
  }

  bool strips_leading_space() const override { return parts_.strips_leading_space; }
  int32_t vocab_size() const override { return parts_.vocabulary->size(); }
  int32_t bos() const override { return parts_.bos; }
  int32_t eos() const override { return parts_.eos; }
  bool IsSpecial(int32_t id) const override { return IsKnown(id) && parts_.is_special[id]; }
  int32_t TokenId(std::string_view token) const override { return parts_.vocabulary->Find(token); }

 private:
  // Space that one Encode call reuses from piece to piece.
  struct Work {
    std::vector<int32_t> ids;
    std::vector<std::string_view> pieces;
    std::string buffer;
    BpeScratch scratch;
  };

  bool IsKnown(int32_t id) const { return id >= 0 && id < vocab_size(); }

  // Text without raw added tokens.
  absl::Status EncodeStretch(std::string_view stretch, bool is_first, bool with_special,
                             Work& work) const {
    WALSH_ASSIGN_OR_RETURN(const std::string normalized, parts_.normalizer.Apply(stretch));
    for (const auto& [id, text] : parts_.normalized_added.Split(normalized, with_special)) {
      if (id >= 0) {
        work.ids.push_back(id);
        continue;
      }
      WALSH_RETURN_IF_ERROR(parts_.pre_tokenizer.Split(
          text, is_first && text.data() == normalized.data(), work.buffer, work.pieces));
      for (const std::string_view piece : work.pieces) {
        parts_.model->Encode(piece, work.scratch, work.ids);
      }
    }
    return absl::OkStatus();
  }

  const BpeTokenizerParts parts_;
  const TokenByteTable bytes_;
};

}  // namespace

std::unique_ptr<Tokenizer> MakeBpeTokenizer(BpeTokenizerParts parts) {
  parts.raw_added.Finish();
  parts.normalized_added.Finish();
  return std::make_unique<BpeTokenizer>(std::move(parts));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Create(const TokenizerSource& source) {
  absl::StatusOr<BpeTokenizerParts> parts =
      !source.tokenizer_json.empty()        ? ReadTokenizerJson(source)
      : !source.sentencepiece_model.empty() ? ReadSentencePieceModel(source)
      : source.gguf.has_value()
          ? ReadGgufTokenizer(*source.gguf)
          : absl::InvalidArgumentError(
                "no tokenizer: neither tokenizer.json, nor tokenizer.model, nor a GGUF vocabulary");
  WALSH_RETURN_IF_ERROR(parts.status());
  return MakeBpeTokenizer(*std::move(parts));
}

}  // namespace walsh
