#include "worker/interop/gguf_vocabulary_writer.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/limits.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/io/pre_tokenizer_conventions.h"
#include "worker/io/tokenizer_json_writer.h"

namespace walsh::interop {
namespace {

using nlohmann::json;

constexpr char kTokenizerFile[] = "tokenizer.json";
constexpr char kMetaspace[] = "\xE2\x96\x81";  // ▁

enum TokenType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

absl::Status Malformed(const std::string& message) {
  return absl::InvalidArgumentError(absl::StrCat(kTokenizerFile, ": ", message));
}

absl::Status Unsupported(const std::string& message) {
  return absl::UnimplementedError(absl::StrCat(kTokenizerFile, ": ", message));
}

// A member, or null where there is none.
const json& Member(const json& object, const char* name) {
  static const json kNull;
  if (!object.is_object()) return kNull;
  const auto it = object.find(name);
  return it == object.end() ? kNull : *it;
}

bool Is(const json& value, const char* text) {
  return value.is_string() && value.get_ref<const std::string&>() == text;
}

bool IsTrue(const json& value) { return value.is_boolean() && value.get<bool>(); }

std::string TypeName(const json& stage) {
  const json& type = Member(stage, "type");
  return type.is_string() ? type.get<std::string>().substr(0, 64) : "without a type";
}

// The stages of a Sequence, or the one stage; none of null.
std::vector<json> Stages(const json& stage, const char* list) {
  if (stage.is_null()) return {};
  if (!Is(Member(stage, "type"), "Sequence")) return {stage};
  const json& stages = Member(stage, list);
  if (!stages.is_array()) return {};
  return stages.get<std::vector<json>>();
}

// -- Tokens

absl::Status SetToken(const json& id, const std::string& text, int32_t type, const ModelConfig& c,
                      GgufVocabulary& out) {
  if (!id.is_number_integer() || id < 0 || id >= c.vocab) {
    return Malformed(absl::StrCat("the id of token '", text.substr(0, 64), "' is ",
                                  id.dump().substr(0, 64), ", must be below ", c.vocab));
  }
  const auto at = id.get<size_t>();
  out.tokens[at] = text;
  out.types[at] = type;
  return absl::OkStatus();
}

// "<0x0A>"
bool IsByteToken(const std::string& text) {
  const auto is_hex = [](char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'F'); };
  return text.size() == 6 && text.starts_with("<0x") && is_hex(text[3]) && is_hex(text[4]) &&
         text[5] == '>';
}

absl::Status ReadTokens(const json& document, const ModelConfig& c, bool is_scored,
                        GgufVocabulary& out) {
  const json& model = Member(document, "model");
  const json& vocab = Member(model, "vocab");
  if (!vocab.is_object()) return Malformed("member 'model.vocab' is no object");
  out.tokens.assign(static_cast<size_t>(c.vocab), "");
  out.types.assign(static_cast<size_t>(c.vocab), kUnused);
  for (const auto& [text, id] : vocab.items()) {
    const int32_t type = is_scored && IsByteToken(text) ? kByte : kNormal;
    WALSH_RETURN_IF_ERROR(SetToken(id, text, type, c, out));
  }
  const json& added = Member(document, "added_tokens");
  if (!added.is_null() && !added.is_array()) return Malformed("member 'added_tokens' is no list");
  const json& unknown = Member(model, "unk_token");
  for (const json& token : added) {
    const json& content = Member(token, "content");
    if (!content.is_string()) return Malformed("an added token has no content");
    const int32_t type = IsTrue(Member(token, "special")) ? kControl : kUserDefined;
    WALSH_RETURN_IF_ERROR(SetToken(Member(token, "id"), content.get<std::string>(), type, c, out));
  }
  for (size_t i = 0; i < out.tokens.size(); ++i) {
    if (is_scored && unknown.is_string() && out.tokens[i] == unknown.get<std::string>()) {
      out.unknown = static_cast<int32_t>(i);
      out.types[i] = kUnknown;
    }
    if (out.tokens[i].empty()) {
      out.tokens[i] = absl::StrCat("[PAD", i, "]");
      out.types[i] = kUnused;
    }
  }
  return absl::OkStatus();
}

// "left right" of either spelling of a merge.
absl::StatusOr<std::pair<std::string, std::string>> ReadMerge(const json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
  if (merge.is_string()) {
    const auto& text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ', 1);
    if (space != std::string::npos && space + 1 < text.size()) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  }
  return Malformed("member 'model.merges' holds an entry that is not two tokens");
}

using Merges = std::vector<std::pair<std::string, std::string>>;

absl::StatusOr<Merges> ReadMerges(const json& model) {
  const json& list = Member(model, "merges");
  if (!list.is_array()) return Malformed("member 'model.merges' is no list");
  Merges merges;
  for (const json& entry : list) {
    WALSH_ASSIGN_OR_RETURN(auto merge, ReadMerge(entry));
    merges.push_back(std::move(merge));
  }
  return merges;
}

// -- What surrounds the merging

// BOS and EOS around a text; nothing else may be added.
absl::Status ReadPostProcessor(const json& document, GgufVocabulary& out) {
  out.has_add_bos = true;
  for (const json& stage : Stages(Member(document, "post_processor"), "processors")) {
    if (Is(Member(stage, "type"), "ByteLevel")) continue;
    if (!Is(Member(stage, "type"), "TemplateProcessing")) {
      return Unsupported(
          absl::StrCat("a GGUF file cannot say what post-processor '", TypeName(stage), "' does"));
    }
    bool is_after_text = false;
    for (const json& piece : Member(stage, "single")) {
      if (!Member(piece, "Sequence").is_null()) {
        is_after_text = true;
        continue;
      }
      const json& id = Member(Member(piece, "SpecialToken"), "id");
      const int32_t expected = is_after_text ? out.eos : out.bos;
      bool& is_added = is_after_text ? out.add_eos : out.add_bos;
      const bool is_expected = expected >= 0 && id.is_string() &&
                               id.get<std::string>() == out.tokens[static_cast<size_t>(expected)];
      if (!is_expected || is_added) {
        return Unsupported(absl::StrCat("it adds token ", id.dump().substr(0, 64),
                                        " to a text; a GGUF file can say BOS and EOS only"));
      }
      is_added = true;
    }
  }
  return absl::OkStatus();
}

// Readers of GGUF do not normalize. Tokenizers that compose (NFC: Qwen) are converted all the same,
// since texts hardly ever come decomposed.
absl::Status CheckNormalizer(const json& document, std::vector<std::string>& warnings) {
  for (const json& stage : Stages(Member(document, "normalizer"), "normalizers")) {
    if (!Is(Member(stage, "type"), "NFC")) {
      return Unsupported(
          absl::StrCat("a GGUF file cannot say what normalizer '", TypeName(stage), "' does"));
    }
    warnings.emplace_back(
        "the tokenizer composes characters (NFC), readers of GGUF do not: decomposed texts are cut "
        "into other tokens");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> PreTokenizerName(const json& document) {
  bool splits_digits = false;
  std::string pattern;
  for (const json& stage : Stages(Member(document, "pre_tokenizer"), "pretokenizers")) {
    const json& type = Member(stage, "type");
    const json& regex = Member(Member(stage, "pattern"), "Regex");
    if (Is(type, "Digits") && IsTrue(Member(stage, "individual_digits")) && pattern.empty()) {
      splits_digits = true;
    } else if (Is(type, "Split") && regex.is_string() && pattern.empty() &&
               Is(Member(stage, "behavior"), "Isolated") && !IsTrue(Member(stage, "invert"))) {
      pattern = regex.get<std::string>();
    } else if (Is(type, "ByteLevel") && !IsTrue(Member(stage, "add_prefix_space"))) {
      // Where it does not say, the byte level cuts by GPT-2's pattern.
      const json& uses_regex = Member(stage, "use_regex");
      if (pattern.empty() && (uses_regex.is_null() || IsTrue(uses_regex))) {
        pattern = std::string(kGpt2Pattern);
      }
    } else {
      return Unsupported(
          absl::StrCat("a GGUF file cannot say what pre-tokenizer '", TypeName(stage), "' does"));
    }
  }
  const bool ignores_merges = IsTrue(Member(Member(document, "model"), "ignore_merges"));
  for (const PreTokenizerConvention& known : kPreTokenizerConventions) {
    if (known.pattern == pattern && known.splits_digits == splits_digits &&
        known.ignores_merges == ignores_merges) {
      return std::string(known.name);
    }
  }
  return Unsupported(absl::StrCat("a GGUF file has no name for the pre-tokenizer with pattern '",
                                  pattern.substr(0, 128), "'"));
}

// Whether a space is put before a text, in either way in which HF's files say it.
absl::StatusOr<bool> AddsSpacePrefix(const json& document) {
  bool adds_prefix = false;
  bool replaces_spaces = false;
  for (const json& stage : Stages(Member(document, "normalizer"), "normalizers")) {
    if (Is(Member(stage, "type"), "Prepend") && Is(Member(stage, "prepend"), kMetaspace)) {
      adds_prefix = true;
    } else if (Is(Member(stage, "type"), "Replace") && Is(Member(stage, "content"), kMetaspace) &&
               Is(Member(Member(stage, "pattern"), "String"), " ")) {
      replaces_spaces = true;
    } else {
      return Unsupported(
          absl::StrCat("a GGUF file cannot say what normalizer '", TypeName(stage), "' does"));
    }
  }
  for (const json& stage : Stages(Member(document, "pre_tokenizer"), "pretokenizers")) {
    const bool is_metaspace = Is(Member(stage, "type"), "Metaspace") &&
                              Is(Member(stage, "replacement"), kMetaspace) &&
                              !IsTrue(Member(stage, "split"));
    if (!is_metaspace) {
      return Unsupported(
          absl::StrCat("a GGUF file cannot say what pre-tokenizer '", TypeName(stage), "' does"));
    }
    replaces_spaces = true;
    adds_prefix |= !Is(Member(stage, "prepend_scheme"), "never");
  }
  if (replaces_spaces) return adds_prefix;
  return Unsupported("it has byte fallback and leaves spaces as they are");
}

// -- The two models

// Scores that rank tokens as their merges do.
void SetScores(const Merges& merges, GgufVocabulary& out) {
  std::map<std::string, size_t, std::less<>> first_rank;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    first_rank.try_emplace(merges[rank].first + merges[rank].second, rank);
  }
  out.scores.assign(out.tokens.size(), 0.0f);
  for (size_t i = 0; i < out.tokens.size(); ++i) {
    if (out.types[i] != kNormal) continue;
    const auto found = first_rank.find(out.tokens[i]);
    // What no merge makes is a character, and comes last.
    const size_t rank = found == first_rank.end() ? merges.size() : found->second;
    out.scores[i] = -static_cast<float>(rank);
  }
}

// A reader of scores merges any two neighbours that make a token; a trained list has some of them.
absl::StatusOr<bool> ScoresGiveTheseMerges(const GgufVocabulary& vocabulary, const Merges& merges) {
  WALSH_ASSIGN_OR_RETURN(const TokenizerFiles files, MakeTokenizerFiles(vocabulary, "", 1));
  WALSH_ASSIGN_OR_RETURN(const json document,
                         ParseBoundedJson(kTokenizerFile, files.tokenizer_json,
                                          {.bytes_max = limits::kJsonFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  WALSH_ASSIGN_OR_RETURN(const Merges derived, ReadMerges(Member(document, "model")));
  return std::set(derived.begin(), derived.end()) == std::set(merges.begin(), merges.end());
}

absl::Status MakeScored(const json& document, const Merges& merges, WrittenVocabulary& out) {
  GgufVocabulary& v = out.vocabulary;
  v.model = "llama";
  v.pre = "default";
  WALSH_ASSIGN_OR_RETURN(v.add_space_prefix, AddsSpacePrefix(document));
  SetScores(merges, v);
  WALSH_ASSIGN_OR_RETURN(const bool is_same, ScoresGiveTheseMerges(v, merges));
  if (!is_same) {
    out.warnings.emplace_back(
        "readers of GGUF merge tokens by scores, which cannot say exactly the merges of this "
        "tokenizer.json: rare texts may be cut into other tokens");
  }
  return absl::OkStatus();
}

absl::Status MakeByteLevel(const json& document, const Merges& merges, WrittenVocabulary& out) {
  WALSH_RETURN_IF_ERROR(CheckNormalizer(document, out.warnings));
  GgufVocabulary& v = out.vocabulary;
  v.model = "gpt2";
  WALSH_ASSIGN_OR_RETURN(v.pre, PreTokenizerName(document));
  for (const auto& [left, right] : merges) v.merges.push_back(absl::StrCat(left, " ", right));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<WrittenVocabulary> MakeGgufVocabulary(const TokenizerSource& source,
                                                     const ModelConfig& config) {
  if (source.tokenizer_json.empty()) {
    return absl::UnimplementedError(
        "the model has a tokenizer.model and no tokenizer.json; a GGUF file is made from the "
        "latter");
  }
  WALSH_ASSIGN_OR_RETURN(const json document,
                         ParseBoundedJson(kTokenizerFile, source.tokenizer_json,
                                          {.bytes_max = limits::kJsonFileBytesMax,
                                           .depth_max = limits::kJsonDepthMax}));
  const json& model = Member(document, "model");
  if (!Is(Member(model, "type"), "BPE")) {
    return Unsupported(absl::StrCat("tokenizers of type '", TypeName(model),
                                    "' are not exported to GGUF, only BPE"));
  }
  const bool is_scored = IsTrue(Member(model, "byte_fallback"));
  WrittenVocabulary out;
  GgufVocabulary& v = out.vocabulary;
  WALSH_RETURN_IF_ERROR(ReadTokens(document, config, is_scored, v));
  v.bos = config.bos_token;
  v.eos = config.eos_tokens.empty() ? -1 : config.eos_tokens.front();
  WALSH_RETURN_IF_ERROR(ReadPostProcessor(document, v));
  WALSH_ASSIGN_OR_RETURN(const Merges merges, ReadMerges(model));
  if (is_scored) {
    WALSH_RETURN_IF_ERROR(MakeScored(document, merges, out));
  } else {
    WALSH_RETURN_IF_ERROR(MakeByteLevel(document, merges, out));
  }
  return out;
}

void AddVocabulary(const GgufVocabulary& v, const ModelConfig& config,
                   const std::string& chat_template, GgufMetadata& metadata) {
  metadata.SetString("tokenizer.ggml.model", v.model);
  metadata.SetString("tokenizer.ggml.pre", v.pre);
  metadata.SetStrings("tokenizer.ggml.tokens", v.tokens);
  if (!v.scores.empty()) metadata.SetFloats("tokenizer.ggml.scores", v.scores);
  metadata.SetInts("tokenizer.ggml.token_type", v.types);
  if (v.model == "gpt2") metadata.SetStrings("tokenizer.ggml.merges", v.merges);
  const auto set_id = [&](const char* key, int32_t id) {
    if (id >= 0) metadata.SetUint32(key, static_cast<uint32_t>(id));
  };
  set_id("tokenizer.ggml.bos_token_id", v.bos);
  const char* const kEndKeys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                  "tokenizer.ggml.eom_token_id"};
  for (size_t i = 0; i < std::min(std::size(kEndKeys), config.eos_tokens.size()); ++i) {
    set_id(kEndKeys[i], config.eos_tokens[i]);
  }
  set_id("tokenizer.ggml.unknown_token_id", v.unknown);
  metadata.SetBool("tokenizer.ggml.add_bos_token", v.add_bos);
  metadata.SetBool("tokenizer.ggml.add_eos_token", v.add_eos);
  if (v.model == "llama") {
    metadata.SetBool("tokenizer.ggml.add_space_prefix", v.add_space_prefix);
  }
  if (!chat_template.empty()) metadata.SetString("tokenizer.chat_template", chat_template);
}

}  // namespace walsh::interop
