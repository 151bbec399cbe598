#include "worker/interop/gguf_vocabulary_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/testing/golden.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::interop {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using walsh::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

ModelConfig ConfigWith(int64_t vocab, int32_t bos, std::vector<int32_t> eos) {
  ModelConfig config;
  config.vocab = vocab;
  config.bos_token = bos;
  config.eos_tokens = std::move(eos);
  return config;
}

// Texts on which the vocabulary, read back, gives other ids than the tokenizer.json.
int CountDifferences(const TokenizerSource& source, const ModelConfig& config,
                     const std::vector<std::string>& texts) {
  const auto written = MakeGgufVocabulary(source, config);
  EXPECT_OK(written);
  const auto ours = Tokenizer::Create(source);
  EXPECT_OK(ours);
  if (!written.ok() || !ours.ok()) return -1;
  TokenizerSource as_gguf;
  as_gguf.gguf = written->vocabulary;
  const auto theirs = Tokenizer::Create(as_gguf);
  EXPECT_OK(theirs);
  if (!theirs.ok()) return -1;
  int n = 0;
  for (const std::string& text : texts) {
    const auto expected = (*ours)->Encode(text, {});
    const auto actual = (*theirs)->Encode(text, {});
    EXPECT_OK(expected);
    EXPECT_OK(actual);
    if (*actual != *expected) ++n;
  }
  return n;
}

std::vector<std::string> GoldenTexts() {
  return json::parse(testing::GoldenFile("tokenizer/texts.json"));
}

TEST(GgufVocabularyWriterTest, ByteLevelVocabulariesEncodeTheSame) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama3/tokenizer.json");
  TokenizerSource source;
  source.tokenizer_json = ReadAll(path);
  const ModelConfig config = ConfigWith(128256, 128000, {128001});
  ASSERT_OK_AND_ASSIGN(const WrittenVocabulary written, MakeGgufVocabulary(source, config));
  EXPECT_EQ(written.vocabulary.pre, "llama-bpe");
  EXPECT_EQ(static_cast<int64_t>(written.vocabulary.tokens.size()), config.vocab);
  EXPECT_THAT(written.warnings, IsEmpty());
  EXPECT_EQ(CountDifferences(source, config, GoldenTexts()), 0);
}

TEST(GgufVocabularyWriterTest, TellsThatReadersDoNotNormalize) {
  WALSH_REQUIRE_DATA(path, "tokenizers/qwen3/tokenizer.json");
  TokenizerSource source;
  source.tokenizer_json = ReadAll(path);
  const ModelConfig config = ConfigWith(151936, -1, {151645});
  ASSERT_OK_AND_ASSIGN(const WrittenVocabulary written, MakeGgufVocabulary(source, config));
  EXPECT_EQ(written.vocabulary.pre, "qwen2");
  EXPECT_EQ(written.vocabulary.tokens.back(), "[PAD151935]");
  EXPECT_THAT(written.warnings, ElementsAre(HasSubstr("NFC")));
  std::vector<std::string> texts = GoldenTexts();
  std::erase_if(texts, [](const std::string& text) {
    return std::ranges::any_of(text, [](char c) { return static_cast<unsigned char>(c) >= 0x80; });
  });
  EXPECT_GT(texts.size(), 10u);
  EXPECT_EQ(CountDifferences(source, config, texts), 0);
}

// Trained as a list of merges, so scores cannot say all of it, which is told; stories come out the
// same all the same.
TEST(GgufVocabularyWriterTest, ScoredVocabulariesEncodeStoriesTheSame) {
  WALSH_REQUIRE_DATA(path, "models/TinyStories-656K/tokenizer.json");
  WALSH_REQUIRE_DATA(stories_path, "corpora/tinystories-train-1000.json");
  TokenizerSource source;
  source.tokenizer_json = ReadAll(path);
  const ModelConfig config = ConfigWith(2048, 1, {2});
  ASSERT_OK_AND_ASSIGN(const WrittenVocabulary written, MakeGgufVocabulary(source, config));
  EXPECT_EQ(written.vocabulary.model, "llama");
  EXPECT_TRUE(written.vocabulary.add_bos);
  EXPECT_TRUE(written.vocabulary.add_space_prefix);
  EXPECT_EQ(written.vocabulary.unknown, 0);
  std::vector<std::string> stories = json::parse(ReadAll(stories_path));
  stories.resize(100);
  EXPECT_EQ(CountDifferences(source, config, stories), 0);
}

// A tokenizer.json with some members replaced.
TokenizerSource Tiny(const json& changes) {
  json document = json::parse(testing::TinyModel({}).TokenizerJson());
  document.merge_patch(changes);
  TokenizerSource source;
  source.tokenizer_json = document.dump();
  return source;
}

ModelConfig TinyConfig() {
  const auto config = ParseModelConfig(testing::TinyModel({}).ConfigJson());
  EXPECT_OK(config);
  return *config;
}

TEST(GgufVocabularyWriterTest, FillsUpTheVocabulary) {
  ModelConfig config = TinyConfig();
  config.vocab = 330;
  ASSERT_OK_AND_ASSIGN(const WrittenVocabulary written,
                       MakeGgufVocabulary(Tiny(json::object()), config));
  const GgufVocabulary& v = written.vocabulary;
  EXPECT_EQ(v.tokens.size(), 330u);
  EXPECT_EQ(v.tokens[329], "[PAD329]");
  EXPECT_EQ(v.types[329], 5);
  EXPECT_EQ(v.pre, "gpt-2");
}

TEST(GgufVocabularyWriterTest, RefusesWhatGgufCannotSay) {
  const ModelConfig config = TinyConfig();
  const auto expect = [&](const json& changes, absl::StatusCode code, const char* message) {
    EXPECT_THAT(MakeGgufVocabulary(Tiny(changes), config), StatusIs(code, HasSubstr(message)));
  };
  expect({{"model", {{"type", "Unigram"}}}}, kUnimplemented, "tokenizers of type 'Unigram'");
  expect({{"normalizer", {{"type", "Lowercase"}}}}, kUnimplemented, "normalizer 'Lowercase'");
  expect({{"pre_tokenizer", {{"type", "Whitespace"}}}}, kUnimplemented,
         "pre-tokenizer 'Whitespace'");
  expect({{"model", {{"ignore_merges", true}}}}, kUnimplemented, "no name for the pre-tokenizer");
  expect({{"post_processor", {{"type", "BertProcessing"}}}}, kUnimplemented,
         "post-processor 'BertProcessing'");
  expect({{"post_processor",
           {{"type", "TemplateProcessing"},
            {"single", json::array({json{{"SpecialToken", {{"id", "?"}}}}})}}}},
         kUnimplemented, "it adds token \"?\"");
  expect({{"model", {{"vocab", 7}}}}, kInvalid, "'model.vocab' is no object");
  expect({{"model", {{"merges", json::array({"ab"})}}}}, kInvalid, "not two tokens");
  expect({{"model", {{"vocab", {{"too far", 320}}}}}}, kInvalid, "is 320, must be below 320");
  expect({{"model", {{"vocab", {{"negative", -1}}}}}}, kInvalid, "is -1, must be below 320");
  expect({{"added_tokens", {{"id", 3}}}}, kInvalid, "'added_tokens' is no list");
  EXPECT_THAT(MakeGgufVocabulary({.sentencepiece_model = "x"}, config),
              StatusIs(kUnimplemented, HasSubstr("no tokenizer.json")));
}

}  // namespace
}  // namespace walsh::interop
