// Ids against the reference implementations (tests/golden/tokenizer/make_tokenizer_golden.py) and
// against llama.cpp's vectors.
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/tokenizer/tokenizer_fixtures.h"
#include "worker/io/checkpoint.h"

namespace walsh {
namespace {

using ::walsh::testing::Golden;
using ::walsh::testing::Ids;
using ::walsh::testing::LoadGguf;
using ::walsh::testing::LoadSentencePiece;
using ::walsh::testing::LoadTokenizerJson;
using ::walsh::testing::ReadFileOrDie;

void ExpectGolden(const Tokenizer& tokenizer, const std::string& name) {
  const nlohmann::json golden = Golden(name);
  const std::vector<std::string> texts = Golden("texts");
  ASSERT_EQ(texts.size(), golden["ids"].size());
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::vector<int32_t> expected = golden["ids"][i];
    EXPECT_EQ(Ids(tokenizer, texts[i]), expected) << name << ", text " << i << ": " << texts[i];
    const std::string key = std::to_string(i);
    const std::vector<int32_t> plain =
        golden["plain"].contains(key) ? golden["plain"][key].get<std::vector<int32_t>>() : expected;
    EXPECT_EQ(Ids(tokenizer, texts[i], {.parse_special_tokens = false}), plain)
        << name << ", plain text " << i << ": " << texts[i];
  }
}

// Cases separated by a marker line, one line of ids each; without BOS. The last case is empty, and
// so has no line.
void ExpectVectors(const Tokenizer& tokenizer, const std::string& stem) {
  const std::string marker = "\n__ggml_vocab_test__\n";
  std::string inputs = ReadFileOrDie(stem + ".inp");
  std::istringstream outputs(ReadFileOrDie(stem + ".out"));
  int n_cases = 0;
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + marker.size()) {
    end = inputs.find(marker, begin);
    const std::string text = inputs.substr(begin, end - begin);
    std::string line;
    std::getline(outputs, line);
    std::istringstream words(line);
    const std::vector<int32_t> expected{std::istream_iterator<int32_t>(words), {}};
    EXPECT_EQ(Ids(tokenizer, text, {.add_special_tokens = false}), expected) << text;
    ++n_cases;
  }
  EXPECT_EQ(n_cases, 47);
}

// Unused pieces are merged on the way to others, and taken apart where they are left: what the
// reference gives for made-up vocabularies (tests/golden/tokenizer/make_unused_pieces.py).
TEST(TokenizerGoldenTest, UnusedPieces) {
  for (const auto& model : Golden("unused_pieces")) {
    TokenizerSource source;
    ASSERT_TRUE(
        absl::Base64Unescape(model["model"].get<std::string>(), &source.sentencepiece_model));
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
    for (const auto& text_and_ids : model["cases"]) {
      const std::string text = text_and_ids["text"];
      EXPECT_EQ(Ids(*tokenizer, text, {.add_special_tokens = false}),
                text_and_ids["ids"].get<std::vector<int32_t>>())
          << text;
    }
  }
}

TEST(TokenizerGoldenTest, TinyStories) {
  WALSH_REQUIRE_DATA(folder, "models/TinyStories-656K");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadTokenizerJson(folder));
  ExpectGolden(*tokenizer, "tinystories");
}

TEST(TokenizerGoldenTest, Llama3) {
  WALSH_REQUIRE_DATA(folder, "tokenizers/llama3");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadTokenizerJson(folder));
  ExpectGolden(*tokenizer, "llama3");
}

TEST(TokenizerGoldenTest, Qwen3) {
  WALSH_REQUIRE_DATA(folder, "tokenizers/qwen3");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadTokenizerJson(folder));
  ExpectGolden(*tokenizer, "qwen3");
}

TEST(TokenizerGoldenTest, SmolLm2FromGguf) {
  WALSH_REQUIRE_SMOLLM2(path);
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadGguf(path));
  ExpectGolden(*tokenizer, "smollm");
}

// The reference has no special tokens inside text, so neither have these.
void ExpectLlama2Golden(const Tokenizer& tokenizer) {
  const std::vector<std::string> texts = Golden("texts");
  const std::vector<std::vector<int32_t>> expected = Golden("llama2")["ids"];
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(Ids(tokenizer, texts[i], {.parse_special_tokens = false}), expected[i]) << texts[i];
  }
}

TEST(TokenizerGoldenTest, Llama2FromSentencePiece) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama2/tokenizer.model");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadSentencePiece(path));
  ExpectLlama2Golden(*tokenizer);
}

TEST(TokenizerGoldenTest, Llama2FromGguf) {
  WALSH_REQUIRE_DATA(path, "tokenizer-vectors/ggml-vocab-llama-spm.gguf");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadGguf(path));
  ExpectLlama2Golden(*tokenizer);
}

// Small tokenizers, each made to show an option of the format.
TEST(TokenizerGoldenTest, SyntheticTokenizers) {
  const nlohmann::json golden = Golden("synthetic");
  const std::vector<std::string> texts = golden["texts"];
  for (const auto& expected : golden["tokenizers"]) {
    const std::string name = expected["name"];
    TokenizerSource source;
    source.tokenizer_json = expected["json"].dump();
    ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
    for (size_t i = 0; i < texts.size(); ++i) {
      const std::vector<int32_t> ids = expected["ids"][i];
      EXPECT_EQ(Ids(*tokenizer, texts[i]), ids) << name << ": " << texts[i];
      EXPECT_EQ(tokenizer->Decode(ids, /*skip_special=*/true), expected["decoded"][i])
          << name << ": " << texts[i];
      const std::string key = std::to_string(i);
      if (expected["plain"].contains(key)) {
        EXPECT_EQ(Ids(*tokenizer, texts[i], {.parse_special_tokens = false}),
                  expected["plain"][key].get<std::vector<int32_t>>())
            << name << ", plain: " << texts[i];
      }
    }
  }
}

TEST(TokenizerGoldenTest, SentencePieceWithUserDefinedPieces) {
  const nlohmann::json golden = Golden("synthetic")["sentencepiece"];
  TokenizerSource source;
  const std::string encoded = golden["model"];
  ASSERT_TRUE(absl::Base64Unescape(encoded, &source.sentencepiece_model));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
  const std::vector<std::string> texts = golden["texts"];
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(
        Ids(*tokenizer, texts[i], {.add_special_tokens = false, .parse_special_tokens = false}),
        golden["ids"][i].get<std::vector<int32_t>>())
        << texts[i];
  }
}

TEST(TokenizerGoldenTest, VectorsOfLlamaBpe) {
  WALSH_REQUIRE_DATA(folder, "tokenizers/llama3");
  WALSH_REQUIRE_DATA(vectors, "tokenizer-vectors");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadTokenizerJson(folder));
  ExpectVectors(*tokenizer, vectors + "/ggml-vocab-llama-bpe.gguf");
}

TEST(TokenizerGoldenTest, VectorsOfGpt2FromGguf) {
  WALSH_REQUIRE_DATA(vectors, "tokenizer-vectors");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadGguf(vectors + "/ggml-vocab-gpt-2.gguf"));
  ExpectVectors(*tokenizer, vectors + "/ggml-vocab-gpt-2.gguf");
}

TEST(TokenizerGoldenTest, VectorsOfGpt2FromItsOwnFiles) {
  WALSH_REQUIRE_DATA(folder, "tokenizers/gpt2");
  WALSH_REQUIRE_DATA(vectors, "tokenizer-vectors");
  TokenizerSource source;
  GgufVocabulary& gguf = source.gguf.emplace();
  gguf.model = "gpt2";
  gguf.pre = "gpt-2";
  const auto ids = nlohmann::json::parse(ReadFileOrDie(folder + "/vocab.json"));
  gguf.tokens.resize(ids.size());
  gguf.types.assign(ids.size(), 1);
  for (const auto& [token, id] : ids.items()) gguf.tokens.at(id.get<size_t>()) = token;
  std::ifstream merges(folder + "/merges.txt");
  for (std::string line; std::getline(merges, line);) {
    if (!line.empty() && !line.starts_with("#version")) gguf.merges.push_back(line);
  }
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(source));
  ExpectVectors(*tokenizer, vectors + "/ggml-vocab-gpt-2.gguf");
}

TEST(TokenizerGoldenTest, TinyStoriesReferenceIds) {
  WALSH_REQUIRE_DATA(folder, "models/TinyStories-656K");
  WALSH_REQUIRE_DATA(corpus, "corpora/tinystories-train-1000.json");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadTokenizerJson(folder));
  const auto reference = nlohmann::json::parse(ReadFileOrDie(folder + "/reference.json"));
  EXPECT_EQ(Ids(*tokenizer, "Once upon a time"),
            reference["prompt_ids"].get<std::vector<int32_t>>());

  // The reference collapses blank lines and appends EOS.
  std::string story = nlohmann::json::parse(ReadFileOrDie(corpus))[0];
  for (size_t at = 0; (at = story.find("\n\n", at)) != std::string::npos;) story.erase(at, 1);
  std::vector<int32_t> ids = Ids(*tokenizer, story);
  ids.push_back(tokenizer->eos());
  EXPECT_EQ(ids, reference["first_doc_ids"].get<std::vector<int32_t>>());
  EXPECT_EQ(tokenizer->bos(), 1);
  EXPECT_EQ(tokenizer->eos(), 2);
}

TEST(TokenizerGoldenTest, Llama2RoundTripsWikiText) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama2/tokenizer.model");
  WALSH_REQUIRE_DATA(corpus, "corpora/wiki.test.raw");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, LoadSentencePiece(path));
  const std::string text = ReadFileOrDie(corpus);
  const std::vector<int32_t> ids = Ids(*tokenizer, text);
  EXPECT_EQ(ids.front(), tokenizer->bos());
  EXPECT_EQ(tokenizer->Decode(ids, /*skip_special=*/true), text);
}

}  // namespace
}  // namespace walsh
