// Malformed, hostile and unknown sources: each gives its code and names what is wrong.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "common/limits.h"
#include "common/utf8.h"
#include "tests/testing/random_seed.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/worker/tokenizer/tokenizer_fixtures.h"
#include "worker/tokenizer/text_stream.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::Ids;
using ::walsh::testing::StatusIs;
using Code = absl::StatusCode;

json SmallTokenizer() {
  return json::parse(R"({
    "version": "1.0",
    "added_tokens": [{"id": 4, "content": "<s>", "special": true, "normalized": false}],
    "normalizer": {"type": "Sequence", "normalizers": [
      {"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "pre_tokenizer": null,
    "post_processor": {"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
      "special_tokens": {"<s>": {"ids": [4]}}},
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
      {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "▁": 3}, "merges": ["a b"]}})");
}

absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(const std::string& text) {
  TokenizerSource source;
  source.tokenizer_json = text;
  return Tokenizer::Create(source);
}

TEST(TokenizerJsonTest, TheSmallOneWorks) {
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(SmallTokenizer().dump()));
  EXPECT_EQ(Ids(*tokenizer, "ab b"), (std::vector<int32_t>{4, 3, 2, 3, 1}));
  EXPECT_EQ(tokenizer->Decode(Ids(*tokenizer, "ab b"), true), "ab b");
  EXPECT_EQ(tokenizer->vocab_size(), 5);
  EXPECT_EQ(tokenizer->TokenId("<s>"), 4);
  EXPECT_EQ(tokenizer->TokenId("c"), -1);
  EXPECT_TRUE(tokenizer->IsSpecial(4));
  EXPECT_FALSE(tokenizer->IsSpecial(3));
  EXPECT_TRUE(tokenizer->strips_leading_space());
}

TEST(TokenizerJsonTest, AddedTokensMayBeMissing) {
  for (const bool is_null : {false, true}) {
    json changed = SmallTokenizer();
    changed.erase("added_tokens");
    if (is_null) changed["added_tokens"] = nullptr;
    changed.erase("post_processor");
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(changed.dump()));
    EXPECT_EQ(tokenizer->Decode(Ids(*tokenizer, "ab b"), true), "ab b");
    EXPECT_FALSE(tokenizer->IsSpecial(0));
  }
}

// transformers 4 and 5 differ here.
TEST(TokenizerJsonTest, AConfigurationThatContradictsThePostProcessorIsWarnedOf) {
  for (const bool adds_bos : {true, false}) {
    TokenizerSource source;
    source.tokenizer_json = SmallTokenizer().dump();
    source.tokenizer_config_json = json{
        {"tokenizer_class", "LlamaTokenizer"},
        {"bos_token", "<s>"},
        {"add_bos_token", adds_bos}}.dump();
    ::testing::internal::CaptureStderr();
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
    const bool is_warned =
        ::testing::internal::GetCapturedStderr().find("add_bos_token") != std::string::npos;
    EXPECT_EQ(is_warned, !adds_bos);
    EXPECT_EQ(Ids(*tokenizer, "a"), (std::vector<int32_t>{4, 3, 0}));
  }
}

TEST(TokenizerJsonTest, IdsOutsideTheVocabularyAreNothing) {
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(SmallTokenizer().dump()));
  for (const int32_t id :
       {-1, 5, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    EXPECT_EQ(tokenizer->TokenBytes(id, false), "");
    EXPECT_FALSE(tokenizer->IsSpecial(id));
    EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{id, 0}, false), "a");
  }
}

TEST(TokenizerJsonTest, TextMustBeUtf8) {
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(SmallTokenizer().dump()));
  EXPECT_THAT(tokenizer->Encode("a\xFF", {}),
              StatusIs(Code::kInvalidArgument, HasSubstr("not valid UTF-8")));
}

struct JsonCase {
  std::string name;
  std::function<void(json&)> change;
  Code code;
  std::string message;
};

TEST(TokenizerJsonTest, EachMistakeIsNamed) {
  const Code kBad = Code::kInvalidArgument;
  const Code kUnknown = Code::kUnimplemented;
  const std::vector<JsonCase> cases = {
      {"no model", [](json& j) { j.erase("model"); }, kBad, "model: is no object"},
      {"other model", [](json& j) { j["model"]["type"] = "Unigram"; }, kUnknown, "'Unigram'"},
      {"no vocab", [](json& j) { j["model"].erase("vocab"); }, kBad, "model.vocab"},
      {"text for an id", [](json& j) { j["model"]["vocab"]["a"] = "0"; }, kBad,
       "the id of 'a' is no integer"},
      {"real id", [](json& j) { j["model"]["vocab"]["a"] = 0.5; }, kBad, "the id of 'a'"},
      {"equal ids", [](json& j) { j["model"]["vocab"]["a"] = 1; }, kBad, "have one id, 1"},
      {"negative id", [](json& j) { j["model"]["vocab"]["a"] = -1; }, kBad, "id -1"},
      {"large id", [](json& j) { j["model"]["vocab"]["a"] = limits::kVocabMax; }, kBad,
       "allowed is 0 to 1048575"},
      {"huge id", [](json& j) { j["model"]["vocab"]["a"] = 18446744073709551615ULL; }, kBad, "id"},
      {"empty token", [](json& j) { j["model"]["vocab"][""] = 9; }, kBad, "token 9 is empty"},
      {"no merges", [](json& j) { j["model"].erase("merges"); }, kBad, "model.merges"},
      {"merge of one", [](json& j) { j["model"]["merges"] = {"ab"}; }, kBad,
       "item 0 is not a pair"},
      {"merge of three", [](json& j) { j["model"]["merges"] = {"a b c"}; }, kBad, "not a pair"},
      {"merge of numbers",
       [](json& j) {
         j["model"]["merges"] = {{1, 2}};
       },
       kBad, "not a pair"},
      {"unknown part", [](json& j) { j["model"]["merges"] = {"a z"}; }, kBad,
       "refers to 'z', which is no token"},
      {"unknown result", [](json& j) { j["model"]["merges"] = {"b a"}; }, kBad,
       "refers to 'ba', which is no token"},
      {"unknown unk", [](json& j) { j["model"]["unk_token"] = "<u>"; }, kBad, "'<u>' is no token"},
      {"prefix", [](json& j) { j["model"]["continuing_subword_prefix"] = "##"; }, kUnknown,
       "continuing_subword_prefix"},
      {"suffix", [](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }, kUnknown,
       "end_of_word_suffix"},
      {"dropout", [](json& j) { j["model"]["dropout"] = 0.1; }, kUnknown, "dropout"},
      {"added twice",
       [](json& j) {
         j["added_tokens"].push_back({{"id", 0}, {"content", "c"}});
       },
       kBad, "have one id, 0"},
      {"added elsewhere",
       [](json& j) {
         j["added_tokens"].push_back({{"id", 9}, {"content", "a"}});
       },
       kBad, "token 'a' has two ids, 0 and 9"},
      {"added without id", [](json& j) { j["added_tokens"][0].erase("id"); }, kBad,
       "'<s>' has no id"},
      {"added with a large id", [](json& j) { j["added_tokens"][0]["id"] = limits::kVocabMax; },
       kBad, "'<s>' has no id below 1048576"},
      {"added without content", [](json& j) { j["added_tokens"][0].erase("content"); }, kBad,
       "'content'"},
      {"empty added",
       [](json& j) {
         j["added_tokens"].push_back({{"id", 999}, {"content", ""}});
       },
       kBad, "token 999 is empty"},
      {"long added", [](json& j) { j["added_tokens"][0]["content"] = std::string(1025, 'x'); },
       kBad, "1025 bytes"},
      {"normalizer",
       [](json& j) {
         j["normalizer"] = {{"type", "Lowercase"}};
       },
       kUnknown, "normalizer 'Lowercase'"},
      {"normalizer without type",
       [](json& j) {
         j["normalizer"] = {{"kind", "NFC"}};
       },
       kBad, "normalizer: has no type"},
      {"regex replace",
       [](json& j) {
         j["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", " +"}}}, {"content", "_"}};
       },
       kUnknown, "pattern ' +'"},
      {"empty replace",
       [](json& j) {
         j["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", "_"}};
       },
       kBad, "empty pattern"},
      {"long replacement",
       [](json& j) {
         j["normalizer"] = {{"type", "Prepend"}, {"prepend", std::string(65, 'x')}};
       },
       kBad, "65 bytes, at most 64"},
      {"pre-tokenizer",
       [](json& j) {
         j["pre_tokenizer"] = {{"type", "Whitespace"}};
       },
       kUnknown, "pre_tokenizer 'Whitespace'"},
      {"pattern",
       [](json& j) {
         j["pre_tokenizer"] = {
             {"type", "Split"}, {"pattern", {{"Regex", "(a+)+$"}}}, {"behavior", "Isolated"}};
       },
       kUnknown, "\"(a+)+$\" is none of those"},
      {"behavior",
       [](json& j) {
         j["pre_tokenizer"] = {
             {"type", "Split"}, {"pattern", {{"Regex", "\\p{N}"}}}, {"behavior", "Removed"}};
       },
       kUnknown, "behavior 'Removed'"},
      {"post-processor",
       [](json& j) {
         j["post_processor"] = {{"type", "BertProcessing"}};
       },
       kUnknown, "post_processor 'BertProcessing'"},
      {"template id", [](json& j) { j["post_processor"]["special_tokens"]["<s>"]["ids"] = {99}; },
       kBad, "'<s>' has an id outside the vocabulary of 5"},
      {"template without ids", [](json& j) { j["post_processor"]["special_tokens"].clear(); }, kBad,
       "no ids for '<s>'"},
      {"template without text", [](json& j) { j["post_processor"]["single"].erase(1); }, kBad,
       "has no text"},
      {"decoder",
       [](json& j) {
         j["decoder"] = {{"type", "WordPiece"}};
       },
       kUnknown, "decoder 'WordPiece'"},
      {"other decoder",
       [](json& j) {
         j["decoder"] = {{"type", "ByteLevel"}};
       },
       kUnknown, "does not undo"},
      {"no decoder", [](json& j) { j["decoder"] = nullptr; }, kUnknown, "does not undo"},
  };
  for (const JsonCase& test : cases) {
    json changed = SmallTokenizer();
    test.change(changed);
    EXPECT_THAT(FromJson(changed.dump()), StatusIs(test.code, HasSubstr(test.message)))
        << test.name;
  }
}

TEST(TokenizerJsonTest, SizeDepthAndFormAreBounded) {
  EXPECT_THAT(FromJson(std::string(limits::kJsonFileBytesMax + 1, ' ')),
              StatusIs(Code::kInvalidArgument, HasSubstr("at most 67108864")));
  std::string deep = R"({"normalizer": )";
  for (int i = 0; i < 40; ++i) deep += R"({"type": "Sequence", "normalizers": [)";
  EXPECT_THAT(FromJson(deep), StatusIs(Code::kInvalidArgument, HasSubstr("32")));
  EXPECT_THAT(FromJson(R"({"model": {"vocab": {"a": 0, "a": 1}}})"),
              StatusIs(Code::kInvalidArgument, HasSubstr("twice")));
  EXPECT_THAT(FromJson("{\"a\": \"\xFF\"}"), HasCode(Code::kInvalidArgument));
  EXPECT_THAT(FromJson("[]"), HasCode(Code::kInvalidArgument));
}

TEST(TokenizerJsonTest, ReplacementsCannotMultiplyAText) {
  json changed = SmallTokenizer();
  json replace = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aaaaaaaa"}};
  changed["normalizer"] = {{"type", "Sequence"}, {"normalizers", {replace, replace, replace}}};
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(changed.dump()));
  EXPECT_THAT(tokenizer->Encode(std::string(10'000, 'a'), {}),
              StatusIs(Code::kResourceExhausted, HasSubstr("at most 164096")));
}

TEST(TokenizerJsonTest, ConfigurationNamesBosAndEos) {
  TokenizerSource source;
  source.tokenizer_json = SmallTokenizer().dump();
  source.tokenizer_config_json = R"({"bos_token": {"content": "<s>"}, "eos_token": "ab"})";
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
  EXPECT_EQ(tokenizer->bos(), 4);
  EXPECT_EQ(tokenizer->eos(), 2);
  source.tokenizer_config_json = R"({"bos_token": 5})";
  EXPECT_THAT(
      Tokenizer::Create(source),
      StatusIs(Code::kInvalidArgument, HasSubstr("tokenizer_config.json: field 'bos_token'")));
}

TEST(TokenizerSourceTest, NoneIsAnError) {
  EXPECT_THAT(Tokenizer::Create({}), StatusIs(Code::kInvalidArgument, HasSubstr("no tokenizer")));
}

// Goal: bytes from outside never crash a reader. Method: single-byte changes and cuts of good
// files; what still loads must also encode. (The fuzz targets go further.)
void ExpectSurvives(const std::string& good, std::function<TokenizerSource(std::string)> make) {
  std::mt19937_64 random(testing::RandomSeed());
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = good;
    if (round % 3 == 0) {
      bytes.resize(random() % bytes.size());
    } else {
      for (uint64_t n = 1 + random() % 3; n > 0; --n) {
        bytes[random() % bytes.size()] = static_cast<char>(random());
      }
    }
    const auto tokenizer = Tokenizer::Create(make(bytes));
    if (!tokenizer.ok()) {
      EXPECT_FALSE(tokenizer.status().message().empty());
      continue;
    }
    const auto ids = (*tokenizer)->Encode("ab <s> abc é 12\n", {});
    if (ids.ok()) (*tokenizer)->Decode(*ids, true);
  }
}

std::string SentencePieceModel() {
  std::string model;
  const std::string encoded = testing::Golden("synthetic")["sentencepiece"]["model"];
  EXPECT_TRUE(absl::Base64Unescape(encoded, &model));
  return model;
}

TEST(TokenizerSourceTest, DamagedJsonNeverCrashes) {
  ExpectSurvives(SmallTokenizer().dump(), [](std::string bytes) {
    TokenizerSource source;
    source.tokenizer_json = std::move(bytes);
    return source;
  });
}

TEST(TokenizerSourceTest, DamagedSentencePieceNeverCrashes) {
  ExpectSurvives(SentencePieceModel(), [](std::string bytes) {
    TokenizerSource source;
    source.sentencepiece_model = std::move(bytes);
    return source;
  });
}

absl::StatusOr<std::unique_ptr<Tokenizer>> FromModel(const std::string& model) {
  TokenizerSource source;
  source.sentencepiece_model = model;
  return Tokenizer::Create(source);
}

// Fields of the wire format: tag, then varint or length and bytes.
std::string Varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
  return out;
}
std::string Number(uint32_t field, uint64_t value) { return Varint(field << 3) + Varint(value); }
std::string Bytes(uint32_t field, const std::string& bytes) {
  return Varint(field << 3 | 2) + Varint(bytes.size()) + bytes;
}
std::string Piece(const std::string& text, uint64_t type = 1) {
  return Bytes(1, Bytes(1, text) + Number(3, type));
}
std::string Trainer(uint64_t model_type = 2) { return Bytes(2, Number(3, model_type)); }
std::string Normalizer(const std::string& more = "") { return Bytes(3, Number(4, 0) + more); }

TEST(SentencePieceModelTest, EachMistakeIsNamed) {
  const std::string pieces = Piece("<unk>", 2) + Piece("<s>", 3) + Piece("</s>", 3) + Piece("a");
  ASSERT_OK(FromModel(pieces + Trainer() + Normalizer()));
  const Code kBad = Code::kInvalidArgument;
  const Code kUnknown = Code::kUnimplemented;
  const std::vector<std::tuple<std::string, Code, std::string>> cases = {
      {pieces + Trainer(1) + Normalizer(), kUnknown, "model type 1 (unigram)"},
      {pieces + Trainer(4) + Normalizer(), kUnknown, "model type 4"},
      {pieces + Trainer(), kUnknown, "remove_extra_whitespaces"},
      {pieces + Trainer() + Normalizer(Bytes(1, "nmt_nfkc") + Bytes(2, "map")), kUnknown,
       "'nmt_nfkc' with a character map"},
      {pieces + Trainer() + Normalizer(Number(5, 0)), kUnknown, "unescaped white space"},
      {Trainer() + Normalizer(), kBad, "no pieces"},
      {Piece("a") + Trainer() + Normalizer(), kBad, "has the id 1, there are 1 pieces"},
      {pieces + Piece("a") + Trainer() + Normalizer(), kBad, "token 'a' has two ids"},
      {pieces + Piece("") + Trainer() + Normalizer(), kBad, "token 4 is empty"},
      {pieces + Piece("\xFF") + Trainer() + Normalizer(), kBad, "piece 4 is not valid UTF-8"},
      {pieces + Piece("b", 7) + Trainer() + Normalizer(), kBad, "type 7, known are 1 to 6"},
      {pieces + Piece("b", 1ULL << 40) + Trainer() + Normalizer(), kBad, "type 0"},
      {pieces + Piece(std::string(1025, 'x')) + Trainer() + Normalizer(), kBad, "1025 bytes"},
      {pieces + Bytes(1, Bytes(1, "b") + Varint(2 << 3 | 5) + std::string("\0\0\xC0\x7F", 4)) +
           Trainer() + Normalizer(),
       kBad, "score of token 4 is not finite"},
      {Varint(1 << 3 | 2) + Varint(1ULL << 62) + "x", kBad, "truncated"},
      {std::string(11, '\xFF'), kBad, "varint of more than 10 bytes"},
      {std::string(1, '\0'), kBad, "field number 0"},
      {Varint(9 << 3 | 3), kBad, "wire type 3"},
      {Number(1, 5), kBad, "model: field 1 has wire type 0"},
      {pieces + Bytes(2, Bytes(3, "x")) + Normalizer(), kBad, "trainer_spec: field 3"},
  };
  for (const auto& [model, code, message] : cases) {
    EXPECT_THAT(FromModel(model), StatusIs(code, HasSubstr(message))) << message;
  }
}

GgufVocabulary SmallGguf() {
  GgufVocabulary gguf;
  gguf.model = "gpt2";
  gguf.pre = "gpt-2";
  gguf.tokens = {"<s>", "a", "b", "ab", "1", "2", "12", "\xC4\xA0"};
  gguf.types = {3, 1, 1, 1, 1, 1, 1, 1};
  gguf.merges = {"a b", "1 2"};
  gguf.bos = 0;
  gguf.eos = 0;
  return gguf;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(GgufVocabulary gguf) {
  TokenizerSource source;
  source.gguf = std::move(gguf);
  return Tokenizer::Create(source);
}

TEST(GgufTokenizerTest, PreTokenizersDifferAsTheyShould) {
  const std::vector<std::pair<std::string, std::vector<int32_t>>> cases = {
      {"gpt-2", {3, 6}},     {"smollm", {3, 4, 5}},
      {"qwen2", {3, 4, 5}},  {"llama-bpe", {0, 3, 6}},  // adds BOS unless told otherwise
      {"llama3", {0, 3, 6}},
  };
  for (const auto& [pre, ids] : cases) {
    GgufVocabulary gguf = SmallGguf();
    gguf.pre = pre;
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromGguf(gguf));
    EXPECT_EQ(Ids(*tokenizer, "ab12"), ids) << pre;
  }
}

TEST(GgufTokenizerTest, BosAndEosFollowTheFile) {
  GgufVocabulary gguf = SmallGguf();
  gguf.has_add_bos = true;
  gguf.add_bos = true;
  gguf.add_eos = true;
  gguf.eos = 7;
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromGguf(gguf));
  EXPECT_EQ(Ids(*tokenizer, "a"), (std::vector<int32_t>{0, 1, 7}));
  EXPECT_EQ(Ids(*tokenizer, "a", {.add_special_tokens = false}), (std::vector<int32_t>{1}));
  EXPECT_TRUE(tokenizer->IsSpecial(7));  // EOS is special, whatever its type
}

TEST(GgufTokenizerTest, EachMistakeIsNamed) {
  const std::vector<std::tuple<std::function<void(GgufVocabulary&)>, Code, std::string>> cases = {
      {[](auto& g) { g.model = "bert"; }, Code::kUnimplemented, "tokenizer.ggml.model 'bert'"},
      {[](auto& g) { g.pre = "default"; }, Code::kUnimplemented, "tokenizer.ggml.pre 'default'"},
      {[](auto& g) { g.pre = ""; }, Code::kUnimplemented, "tokenizer.ggml.pre is missing"},
      {[](auto& g) { g.tokens.clear(); }, Code::kInvalidArgument, "has 0 tokens"},
      {[](auto& g) { g.types.pop_back(); }, Code::kInvalidArgument, "has 7 items for 8 tokens"},
      {[](auto& g) { g.tokens[1] = "\xFF"; }, Code::kInvalidArgument, "token 1 is not valid UTF-8"},
      {[](auto& g) { g.tokens[1] = "b"; }, Code::kInvalidArgument, "token 'b' has two ids"},
      {[](auto& g) { g.merges = {"a z"}; }, Code::kInvalidArgument, "refers to 'z'"},
      {[](auto& g) { g.merges = {"ab"}; }, Code::kInvalidArgument, "item 0, 'ab', is not a pair"},
      {[](auto& g) { g.bos = 8; }, Code::kInvalidArgument, "bos_token_id is 8"},
      {[](auto& g) { g.eos = -2; }, Code::kInvalidArgument, "eos_token_id is -2"},
      {[](auto& g) { g.has_add_bos = g.add_bos = true, g.bos = -1; }, Code::kInvalidArgument,
       "no tokenizer.ggml.bos_token_id"},
      {[](auto& g) { g.model = "llama"; }, Code::kInvalidArgument, "8 pieces, 0 scores"},
  };
  for (const auto& [change, code, message] : cases) {
    GgufVocabulary gguf = SmallGguf();
    change(gguf);
    EXPECT_THAT(FromGguf(gguf), StatusIs(code, HasSubstr(message))) << message;
  }
}

// A stream of tokens gives the text that decoding them at once gives, real tokenizers included.
TEST(TokenizerSourceTest, StreamEqualsDecode) {
  std::mt19937_64 random(testing::RandomSeed());
  const json golden = testing::Golden("synthetic");
  for (const auto& entry : golden["tokenizers"]) {
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, FromJson(entry["json"].dump()));
    for (int round = 0; round < 2000; ++round) {
      std::vector<int32_t> ids(random() % 12);
      for (int32_t& id : ids) {
        id = static_cast<int32_t>(random() % static_cast<uint64_t>(tokenizer->vocab_size() + 1));
      }
      TextStream stream(tokenizer.get(), {.continues_text = false});
      std::string text;
      for (const int32_t id : ids) text += stream.Append(id);
      text += stream.Finish();
      ASSERT_EQ(text, tokenizer->Decode(ids, true)) << entry["name"];
    }
  }
}

}  // namespace
}  // namespace walsh
