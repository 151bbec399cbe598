#include "tests/fuzz/json_mutator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>

// In the place of libFuzzer's: what strings must be kept whole after.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t size_max) {
  constexpr std::string_view kBytes = "\"\\\n\xff,]}{";
  const size_t n_bytes = std::min(kBytes.size(), size_max - size);
  std::copy_n(kBytes.begin(), n_bytes, data + size);
  return size + n_bytes;
}

namespace walsh::fuzz {
namespace {

constexpr std::string_view kDocument =
    R"( {"a": [1, -2.5, {"b": "x\n\"\\"}, []], "c" : {}, "d": [ {} , null,true ] ,"e":false} )";

TEST(JsonMutatorTest, WhatIsJsonStaysJson) {
  std::set<std::string> mutated;
  for (uint32_t seed = 0; seed < 2000; ++seed) {
    const std::optional<std::string> text = MutateJson(kDocument, seed);
    ASSERT_TRUE(text.has_value());
    EXPECT_TRUE(nlohmann::json::accept(*text)) << *text;
    mutated.insert(*text);
  }
  EXPECT_GT(mutated.size(), 200u);
}

TEST(JsonMutatorTest, ChangesADocumentOfOneValue) {
  for (const char* document : {"{}", "[]", "7", R"("")"}) {
    for (uint32_t seed = 0; seed < 100; ++seed) {
      const std::optional<std::string> text = MutateJson(document, seed);
      ASSERT_TRUE(text.has_value());
      EXPECT_TRUE(nlohmann::json::accept(*text)) << *text;
    }
  }
}

TEST(JsonMutatorTest, LeavesTheRestToLibFuzzer) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("{]"), std::string("[1 2]"),
        std::string(R"({"a"})"), std::string(R"({"a":1} x)"), std::string("\"\\"),
        std::string("[,]"), std::string(" 7\v"), std::string(100, '[') + std::string(100, ']')}) {
    EXPECT_EQ(MutateJson(text, 1), std::nullopt) << text;
  }
}

// Short texts of what JSON's syntax is made of.
TEST(JsonMutatorTest, TakesAnyText) {
  constexpr std::string_view kBytes = "{}[]\",:\\ \v7a\xff";
  std::minstd_rand random(1);
  int n_json = 0;
  for (uint32_t i = 0; i < 50'000; ++i) {
    std::string text(random() % 8, ' ');
    for (char& c : text) c = kBytes[random() % kBytes.size()];
    const std::optional<std::string> mutated = MutateJson(text, i);
    if (!nlohmann::json::accept(text)) continue;
    ++n_json;
    ASSERT_TRUE(mutated.has_value()) << text;
    EXPECT_TRUE(nlohmann::json::accept(*mutated)) << text << " became " << *mutated;
  }
  EXPECT_GT(n_json, 500);
}

}  // namespace
}  // namespace walsh::fuzz
