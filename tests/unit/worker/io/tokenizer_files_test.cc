// Tokenizer files written for an artifact against the GGUF vocabulary that they were written from:
// the same ids for the same text, and the same text back.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "common/utf8.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "worker/io/checkpoint.h"
#include "worker/io/tokenizer_json_writer.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh {
namespace {

std::vector<std::string> Samples() {
  std::vector<std::string> samples = {
      "",
      " ",
      "Hello world",
      "  two  spaces ",
      "1234567 89",
      "don't I'LL we've",
      "tab\there\n\n next",
      "naïve café 日本語 🙂 ½",
      "<s>x</s>",
      "<|im_start|>user\nhi<|im_end|>",
      "<|endoftext|>",
  };
  std::ifstream in(testing::TestData("corpora/wiki.test.raw"), std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  for (size_t at = 0; at < std::min<size_t>(text.size(), 100000);) {
    const std::string_view piece = Utf8Prefix(std::string_view(text).substr(at), 997);
    samples.emplace_back(piece);
    at += piece.size();
  }
  return samples;
}

void ExpectAlike(const GgufVocabulary& vocabulary) {
  ASSERT_OK_AND_ASSIGN(const TokenizerFiles files, MakeTokenizerFiles(vocabulary, "", 2048));
  TokenizerSource gguf_source;
  gguf_source.gguf = vocabulary;
  TokenizerSource json_source;
  json_source.tokenizer_json = files.tokenizer_json;
  json_source.tokenizer_config_json = files.tokenizer_config_json;
  ASSERT_OK_AND_ASSIGN(const auto gguf, Tokenizer::Create(gguf_source));
  ASSERT_OK_AND_ASSIGN(const auto json, Tokenizer::Create(json_source));
  EXPECT_EQ(json->vocab_size(), gguf->vocab_size());
  EXPECT_EQ(json->bos(), gguf->bos());
  EXPECT_EQ(json->eos(), gguf->eos());
  EXPECT_EQ(json->strips_leading_space(), gguf->strips_leading_space());
  for (const std::string& sample : Samples()) {
    ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> expected, gguf->Encode(sample, {}));
    ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, json->Encode(sample, {}));
    ASSERT_EQ(ids, expected) << sample;
    ASSERT_EQ(json->Decode(ids, true), gguf->Decode(ids, true)) << sample;
  }
}

TEST(TokenizerFilesTest, ByteLevelVocabularyEncodesAlike) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-gpt-2.gguf");
  ASSERT_OK_AND_ASSIGN(GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  // This file calls its end of text a normal token, so the GGUF tokenizer does not look for it in
  // texts; HF's files do.
  vocabulary.types[static_cast<size_t>(vocabulary.eos)] = 3;
  ExpectAlike(vocabulary);
}

TEST(TokenizerFilesTest, ScoredVocabularyEncodesAlike) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-llama-spm.gguf");
  ASSERT_OK_AND_ASSIGN(const GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  ExpectAlike(vocabulary);
}

// Type 5: every seventh token, single bytes and characters among them.
GgufVocabulary WithUnusedTokens(GgufVocabulary vocabulary) {
  for (size_t i = 0; i < vocabulary.types.size(); i += 7) {
    if (vocabulary.types[i] == 1) vocabulary.types[i] = 5;
  }
  return vocabulary;
}

TEST(TokenizerFilesTest, UnusedTokensOfAByteLevelVocabulary) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-gpt-2.gguf");
  ASSERT_OK_AND_ASSIGN(GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  vocabulary.types[static_cast<size_t>(vocabulary.eos)] = 3;
  ExpectAlike(WithUnusedTokens(vocabulary));
  vocabulary.pre = "llama-bpe";  // takes a word that is a token as it is
  ExpectAlike(WithUnusedTokens(vocabulary));
}

TEST(TokenizerFilesTest, UnusedTokensOfAScoredVocabulary) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-llama-spm.gguf");
  ASSERT_OK_AND_ASSIGN(const GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  ExpectAlike(WithUnusedTokens(vocabulary));
}

// Type 4: found in the text as it is; what follows begins like a text of its own, in llama.cpp.
TEST(TokenizerFilesTest, UserDefinedTokensOfAScoredVocabulary) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-llama-spm.gguf");
  ASSERT_OK_AND_ASSIGN(GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  for (size_t i = 300; i < vocabulary.types.size(); i += 11) {
    if (vocabulary.types[i] == 1) vocabulary.types[i] = 4;
  }
  ExpectAlike(vocabulary);

  ASSERT_OK_AND_ASSIGN(vocabulary, ReadGgufVocabulary(path));
  vocabulary.tokens.push_back("<sep>");
  vocabulary.types.push_back(4);
  vocabulary.scores.push_back(0.0f);
  ExpectAlike(vocabulary);
  TokenizerSource source;
  source.gguf = vocabulary;
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
  ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids,
                       tokenizer->Encode("a<sep>b", {.add_special_tokens = false}));
  EXPECT_EQ(ids, (std::vector<int32_t>{tokenizer->TokenId("\u2581a"), tokenizer->TokenId("<sep>"),
                                       tokenizer->TokenId("\u2581b")}));
}

TEST(TokenizerFilesTest, SmolLm2EncodesAlike) {
  WALSH_REQUIRE_SMOLLM2(path);
  ASSERT_OK_AND_ASSIGN(const GgufVocabulary vocabulary, ReadGgufVocabulary(path));
  ExpectAlike(vocabulary);
}

}  // namespace
}  // namespace walsh
