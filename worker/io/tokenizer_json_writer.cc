#include "worker/io/tokenizer_json_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "common/utf8.h"
#include "worker/io/pre_tokenizer_conventions.h"

namespace walsh {
namespace {

using nlohmann::json;

enum TokenType : int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5 };

constexpr char kMetaspace[] = "\xE2\x96\x81";  // ▁, a space in SentencePiece's vocabularies

using TokenIds = std::unordered_map<std::string_view, int32_t>;

absl::StatusOr<TokenIds> IndexTokens(const GgufVocabulary& v) {
  TokenIds ids;
  ids.reserve(v.tokens.size());
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    if (ids.emplace(v.tokens[i], static_cast<int32_t>(i)).second) continue;
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.ggml.tokens: '", v.tokens[i],
                                                   "' appears twice, as ", ids[v.tokens[i]],
                                                   " and ", i));
  }
  return ids;
}

json ByteLevel(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

json Sequence(const char* list, std::initializer_list<json> parts) {
  return {{"type", "Sequence"}, {list, json(parts)}};
}

json SplitThenByteLevel(std::string_view pattern) {
  const json split = {{"type", "Split"},
                      {"pattern", {{"Regex", std::string(pattern)}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  return Sequence("pretokenizers", {split, ByteLevel(false)});
}

json PreTokenizer(const PreTokenizerConvention& convention) {
  // GPT-2's pattern is HF's own, inside the byte level.
  const json words =
      convention.pattern == kGpt2Pattern ? ByteLevel(true) : SplitThenByteLevel(convention.pattern);
  if (!convention.splits_digits) return words;
  return Sequence("pretokenizers", {json{{"type", "Digits"}, {"individual_digits", true}}, words});
}

size_t CodePoints(std::string_view text) {
  size_t n = 0;
  for (size_t at = 0; at < text.size(); ++n) NextCodePoint(text, &at);
  return n;
}

struct Merge {
  std::string_view left;
  std::string_view right;
  float score = 0;
  size_t left_length = 0;  // in code points
  size_t right_length = 0;
};

// Every split of a token into two that text can become, best scores first. Among equal scores
// longer parts come first, and then the order of the tokens: HF's generate_merges.
json MergesFromScores(const GgufVocabulary& v, const TokenIds& ids) {
  const auto is_text = [&](size_t id) { return v.types[id] == kNormal || v.types[id] == kUnused; };
  const auto part_id = [&](std::string_view token) {
    const auto it = ids.find(token);
    return it != ids.end() && is_text(static_cast<size_t>(it->second)) ? it->second : int32_t{-1};
  };
  std::vector<Merge> merges;
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    if (!is_text(i)) continue;
    const std::string_view token = v.tokens[i];
    const size_t first = merges.size();
    for (size_t at = 0; NextCodePoint(token, &at), at < token.size();) {
      const std::string_view left = token.substr(0, at);
      const std::string_view right = token.substr(at);
      if (part_id(left) < 0 || part_id(right) < 0) continue;
      merges.push_back({.left = left,
                        .right = right,
                        .score = v.scores[i],
                        .left_length = CodePoints(left),
                        .right_length = CodePoints(right)});
    }
    std::sort(merges.begin() + static_cast<std::ptrdiff_t>(first), merges.end(),
              [&](const Merge& a, const Merge& b) {
                return std::pair(part_id(a.left), part_id(a.right)) <
                       std::pair(part_id(b.left), part_id(b.right));
              });
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tuple(a.score, a.left_length, a.right_length) >
           std::tuple(b.score, b.left_length, b.right_length);
  });
  json list = json::array();
  for (const Merge& merge : merges) {
    list.push_back(absl::StrCat(std::string(merge.left), " ", std::string(merge.right)));
  }
  return list;
}

json Model(const GgufVocabulary& v, const json& merges, bool ignores_merges) {
  const bool is_scored = v.model == "llama";
  json vocab = json::object();
  for (size_t i = 0; i < v.tokens.size(); ++i) vocab[v.tokens[i]] = i;
  const bool has_unknown = is_scored && v.unknown >= 0;
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", has_unknown ? json(v.tokens[static_cast<size_t>(v.unknown)]) : json()},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", is_scored},
          {"byte_fallback", is_scored},
          {"ignore_merges", ignores_merges},
          {"vocab", std::move(vocab)},
          {"merges", merges}};
}

// Tokens that are found in a text before anything else is done to it.
json AddedTokens(const GgufVocabulary& v) {
  json added = json::array();
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    // Some files (GPT-2's own) have the type "normal" for these three.
    const bool is_named = id == v.bos || id == v.eos || id == v.unknown;
    const bool is_special = is_named || v.types[i] == kControl || v.types[i] == kUnknown;
    if (!is_special && v.types[i] != kUserDefined) continue;
    added.push_back({{"id", id},
                     {"content", v.tokens[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", is_special}});
  }
  return added;
}

json TemplatePiece(const char* kind, const std::string& id, int type_id) {
  return {{kind, {{"id", id}, {"type_id", type_id}}}};
}

// BOS and EOS around the text, as the source adds them.
absl::StatusOr<json> PostProcessor(const GgufVocabulary& v, bool adds_bos) {
  if ((adds_bos && v.bos < 0) || (v.add_eos && v.eos < 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the vocabulary adds ", adds_bos && v.bos < 0 ? "a BOS" : "an EOS", ", but names none"));
  }
  if (!adds_bos && !v.add_eos) return v.model == "gpt2" ? ByteLevel(true) : json();
  json single = json::array();
  json pair = json::array();
  json special = json::object();
  const auto add_special = [&](int32_t id, json& list, int type_id) {
    const std::string& token = v.tokens[static_cast<size_t>(id)];
    list.push_back(TemplatePiece("SpecialToken", token, type_id));
    special[token] = {{"id", token}, {"ids", json::array({id})}, {"tokens", json::array({token})}};
  };
  for (const auto& [sequence, type_id] : {std::pair("A", 0), std::pair("B", 1)}) {
    if (adds_bos) add_special(v.bos, pair, type_id);
    pair.push_back(TemplatePiece("Sequence", sequence, type_id));
    if (v.add_eos) add_special(v.eos, pair, type_id);
    if (type_id == 0) single = pair;
  }
  return json{{"type", "TemplateProcessing"},
              {"single", std::move(single)},
              {"pair", std::move(pair)},
              {"special_tokens", std::move(special)}};
}

json Replace(const char* from, const char* to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

json Document(const GgufVocabulary& v, json model, json post_processor) {
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", AddedTokens(v)},
          {"normalizer", nullptr},
          {"pre_tokenizer", nullptr},
          {"post_processor", std::move(post_processor)},
          {"decoder", nullptr},
          {"model", std::move(model)}};
}

absl::StatusOr<json> ByteLevelDocument(const GgufVocabulary& v) {
  WALSH_ASSIGN_OR_RETURN(const PreTokenizerConvention convention,
                         FindPreTokenizerConvention(v.pre));
  const bool adds_bos = v.has_add_bos ? v.add_bos : convention.adds_bos;
  WALSH_ASSIGN_OR_RETURN(json post_processor, PostProcessor(v, adds_bos));
  json document =
      Document(v, Model(v, json(v.merges), convention.ignores_merges), std::move(post_processor));
  document["pre_tokenizer"] = PreTokenizer(convention);
  document["decoder"] = ByteLevel(true);
  return document;
}

absl::StatusOr<json> ScoredDocument(const GgufVocabulary& v, const TokenIds& ids) {
  WALSH_ASSIGN_OR_RETURN(json post_processor,
                         PostProcessor(v, v.has_add_bos ? v.add_bos : v.bos >= 0));
  json document = Document(v, Model(v, MergesFromScores(v, ids), false), std::move(post_processor));
  const json to_metaspace = Replace(" ", kMetaspace);
  const json to_space = Replace(kMetaspace, " ");
  const json byte_fallback = {{"type", "ByteFallback"}};
  const json fuse = {{"type", "Fuse"}};
  if (v.add_space_prefix) {
    const json prepend = {{"type", "Prepend"}, {"prepend", kMetaspace}};
    const json strip = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
    document["normalizer"] = Sequence("normalizers", {prepend, to_metaspace});
    document["decoder"] = Sequence("decoders", {to_space, byte_fallback, fuse, strip});
  } else {
    document["normalizer"] = to_metaspace;
    document["decoder"] = Sequence("decoders", {to_space, byte_fallback, fuse});
  }
  return document;
}

json TokenizerConfig(const GgufVocabulary& v, const std::string& chat_template,
                     int64_t max_position) {
  const auto token = [&](int32_t id) {
    return id < 0 ? json() : json(v.tokens[static_cast<size_t>(id)]);
  };
  json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"bos_token", token(v.bos)},
                 {"eos_token", token(v.eos)},
                 {"unk_token", token(v.unknown)},
                 {"clean_up_tokenization_spaces", false},
                 {"model_max_length", max_position}};
  if (!chat_template.empty()) config["chat_template"] = chat_template;
  return config;
}

}  // namespace

absl::StatusOr<TokenizerFiles> MakeTokenizerFiles(const GgufVocabulary& vocabulary,
                                                  const std::string& chat_template,
                                                  int64_t max_position) {
  WALSH_ASSIGN_OR_RETURN(const TokenIds ids, IndexTokens(vocabulary));
  const bool is_scored = vocabulary.model == "llama";
  WALSH_ASSIGN_OR_RETURN(const json document, is_scored ? ScoredDocument(vocabulary, ids)
                                                        : ByteLevelDocument(vocabulary));
  return TokenizerFiles{
      .tokenizer_json = document.dump(1) + "\n",
      .tokenizer_config_json =
          TokenizerConfig(vocabulary, chat_template, max_position).dump(2) + "\n"};
}

}  // namespace walsh
