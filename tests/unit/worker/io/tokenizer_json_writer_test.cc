// The structure of what is written. That it encodes as the source does was checked with the Python
// package tokenizers (tests/golden/io/check_tokenizer_json.py).

#include "worker/io/tokenizer_json_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using walsh::testing::StatusIs;

GgufVocabulary ByteLevel(const char* pre) {
  GgufVocabulary v;
  v.model = "gpt2";
  v.pre = pre;
  v.tokens = {"<|a|>", "a", "b", "ab", "<tool>"};
  v.types = {3, 1, 1, 1, 4};
  v.merges = {"a b"};
  v.bos = 0;
  v.eos = 0;
  return v;
}

json Tokenizer(const GgufVocabulary& v) {
  const auto files = MakeTokenizerFiles(v, "template", 128);
  EXPECT_OK(files);
  return files.ok() ? json::parse(files->tokenizer_json) : json();
}

TEST(TokenizerJsonWriterTest, WritesByteLevelVocabularies) {
  const json t = Tokenizer(ByteLevel("smollm"));
  EXPECT_EQ(t["model"]["type"], "BPE");
  EXPECT_EQ(t["model"]["vocab"],
            json({{"<|a|>", 0}, {"a", 1}, {"b", 2}, {"ab", 3}, {"<tool>", 4}}));
  EXPECT_EQ(t["model"]["merges"], json::array({"a b"}));
  EXPECT_EQ(t["model"]["byte_fallback"], false);
  EXPECT_EQ(t["model"]["ignore_merges"], false);
  ASSERT_EQ(t["added_tokens"].size(), 2u);
  EXPECT_EQ(t["added_tokens"][0]["content"], "<|a|>");
  EXPECT_EQ(t["added_tokens"][0]["special"], true);
  EXPECT_EQ(t["added_tokens"][1]["id"], 4);
  EXPECT_EQ(t["added_tokens"][1]["special"], false);
  EXPECT_EQ(t["decoder"]["type"], "ByteLevel");
  EXPECT_EQ(t["post_processor"]["type"], "ByteLevel");
  EXPECT_TRUE(t["normalizer"].is_null());
}

TEST(TokenizerJsonWriterTest, KnowsThePreTokenizers) {
  EXPECT_EQ(Tokenizer(ByteLevel("gpt-2"))["pre_tokenizer"]["type"], "ByteLevel");
  EXPECT_EQ(Tokenizer(ByteLevel("gpt-2"))["pre_tokenizer"]["use_regex"], true);

  const json smollm = Tokenizer(ByteLevel("smollm"))["pre_tokenizer"];
  EXPECT_EQ(smollm["pretokenizers"][0], json({{"type", "Digits"}, {"individual_digits", true}}));
  EXPECT_EQ(smollm["pretokenizers"][1]["use_regex"], true);

  for (const char* pre : {"llama-bpe", "qwen2"}) {
    const json split = Tokenizer(ByteLevel(pre))["pre_tokenizer"]["pretokenizers"];
    EXPECT_EQ(split[0]["type"], "Split");
    EXPECT_EQ(split[0]["behavior"], "Isolated");
    EXPECT_EQ(split[1]["use_regex"], false);
    const std::string pattern = split[0]["pattern"]["Regex"];
    EXPECT_EQ(pattern.find("\\p{N}{1,3}") != std::string::npos, std::string(pre) == "llama-bpe");
  }
  EXPECT_EQ(Tokenizer(ByteLevel("llama-bpe"))["model"]["ignore_merges"], true);
  EXPECT_THAT(MakeTokenizerFiles(ByteLevel("deepseek-llm"), "", 128),
              StatusIs(absl::StatusCode::kUnimplemented,
                       HasSubstr("tokenizer.ggml.pre 'deepseek-llm' is not supported; supported: "
                                 "gpt-2, llama-bpe")));
  EXPECT_THAT(
      MakeTokenizerFiles(ByteLevel(""), "", 128),
      StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("tokenizer.ggml.pre is missing")));
}

TEST(TokenizerJsonWriterTest, AddsBosAsTheSourceDoes) {
  // Llama 3 adds one unless the file says otherwise.
  GgufVocabulary v = ByteLevel("llama-bpe");
  json post = Tokenizer(v)["post_processor"];
  EXPECT_EQ(post["type"], "TemplateProcessing");
  EXPECT_EQ(post["single"].size(), 2u);
  EXPECT_EQ(post["single"][0]["SpecialToken"]["id"], "<|a|>");
  EXPECT_EQ(post["pair"].size(), 4u);
  EXPECT_EQ(post["special_tokens"]["<|a|>"]["ids"], json::array({0}));
  v.has_add_bos = true;
  EXPECT_EQ(Tokenizer(v)["post_processor"]["type"], "ByteLevel");
  v.add_eos = true;
  post = Tokenizer(v)["post_processor"];
  EXPECT_EQ(post["single"][1]["SpecialToken"]["id"], "<|a|>");
  v.eos = -1;
  EXPECT_THAT(MakeTokenizerFiles(v, "", 128), StatusIs(absl::StatusCode::kInvalidArgument,
                                                       HasSubstr("adds an EOS, but names none")));
}

GgufVocabulary Scored() {
  GgufVocabulary v;
  v.model = "llama";
  //          0        1      2       3    4    5     6     7      8
  v.tokens = {"<unk>", "<s>", "</s>", "a", "b", "ab", "ba", "aba", "▁"};
  v.types = {2, 3, 3, 1, 1, 1, 1, 1, 1};
  v.scores = {0, 0, 0, -5, -6, -1, -2, -3, -7};
  v.unknown = 0;
  v.bos = 1;
  v.eos = 2;
  return v;
}

TEST(TokenizerJsonWriterTest, DerivesMergesFromScores) {
  const json t = Tokenizer(Scored());
  // By score; within "aba" (a, ba) has shorter parts first than (ab, a).
  EXPECT_EQ(t["model"]["merges"], json::array({"a b", "b a", "ab a", "a ba"}));
  EXPECT_EQ(t["model"]["unk_token"], "<unk>");
  EXPECT_EQ(t["model"]["byte_fallback"], true);
  EXPECT_EQ(t["model"]["fuse_unk"], true);
  EXPECT_TRUE(t["pre_tokenizer"].is_null());
  EXPECT_EQ(t["normalizer"]["normalizers"][0]["prepend"], "▁");
  EXPECT_EQ(t["decoder"]["decoders"].size(), 4u);
  EXPECT_EQ(t["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
  EXPECT_EQ(t["added_tokens"].size(), 3u);

  GgufVocabulary v = Scored();
  v.add_space_prefix = false;
  EXPECT_EQ(Tokenizer(v)["normalizer"]["type"], "Replace");
  EXPECT_EQ(Tokenizer(v)["decoder"]["decoders"].size(), 3u);
}

TEST(TokenizerJsonWriterTest, WritesTheConfiguration) {
  ASSERT_OK_AND_ASSIGN(const TokenizerFiles files, MakeTokenizerFiles(Scored(), "a template", 77));
  const json config = json::parse(files.tokenizer_config_json);
  EXPECT_EQ(config["bos_token"], "<s>");
  EXPECT_EQ(config["eos_token"], "</s>");
  EXPECT_EQ(config["unk_token"], "<unk>");
  EXPECT_EQ(config["chat_template"], "a template");
  EXPECT_EQ(config["model_max_length"], 77);
  GgufVocabulary v = ByteLevel("gpt-2");
  v.bos = -1;
  ASSERT_OK_AND_ASSIGN(const TokenizerFiles plain, MakeTokenizerFiles(v, "", 77));
  EXPECT_TRUE(json::parse(plain.tokenizer_config_json)["bos_token"].is_null());
  EXPECT_FALSE(json::parse(plain.tokenizer_config_json).contains("chat_template"));
}

TEST(TokenizerJsonWriterTest, RefusesATokenTwice) {
  GgufVocabulary v = ByteLevel("gpt-2");
  v.tokens[2] = "a";
  EXPECT_THAT(MakeTokenizerFiles(v, "", 1), StatusIs(absl::StatusCode::kInvalidArgument,
                                                     HasSubstr("'a' appears twice, as 1 and 2")));
}

}  // namespace
}  // namespace walsh
