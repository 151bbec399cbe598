// Encoding takes time linear in the text (up to a logarithm), whatever the text is: row F1 of the
// failure catalogue. Counts where counting is possible; CPU time with a wide margin elsewhere.
#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <iostream>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/tokenizer/tokenizer_fixtures.h"
#include "worker/tokenizer/bpe_merge.h"

namespace walsh {
namespace {

// Any two neighbours merge, always: the most work that a vocabulary can ask for.
int64_t CountLookups(int32_t n_symbols) {
  BpeScratch scratch;
  for (int32_t i = 0; i < n_symbols; ++i) scratch.Add(0, static_cast<uint32_t>(i), 1);
  int64_t n_lookups = 0;
  MergeSymbols(scratch, [&](const BpeSymbol& left, const BpeSymbol& right) {
    ++n_lookups;
    return std::optional<BpeMerge>({.rank = left.size + right.size, .id = 0});
  });
  EXPECT_EQ(scratch.symbols[0].size, static_cast<uint32_t>(n_symbols));
  return n_lookups;
}

TEST(TokenizerScaleTest, MergingLooksUpAtMostThreePairsForEachSymbol) {
  for (const int32_t n : {1, 2, 3, 1 << 10, 1 << 14, 1 << 18}) {
    EXPECT_LE(CountLookups(n), int64_t{3} * n) << n;
  }
}

// Repeated units that have been slow in some tokenizer or other.
const std::vector<std::string>& Units() {
  static const std::vector<std::string> units = {
      "a",
      " ",
      "\n",
      "1",
      "é",
      "世",
      "😀",
      "\u0301",
      "▁",
      "a\u0301\u0323",
      "\u0301\u0323",
      " \t\n",
      "<|im_start",
      "'s'S",
      "Abc 12, ",
  };
  return units;
}

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double EncodeSeconds(const Tokenizer& tokenizer, const std::string& unit, size_t bytes,
                     int n_repeats) {
  std::string text;
  while (text.size() < bytes) text += unit;
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < n_repeats; ++i) {
    const double begin = CpuSeconds();
    EXPECT_OK(tokenizer.Encode(text, {}));
    best = std::min(best, CpuSeconds() - begin);
  }
  return best;
}

// 16 times the text: 16 times the work when it is linear, 256 times when it is quadratic.
void ExpectLinear(const Tokenizer& tokenizer, const std::string& name) {
  constexpr size_t kSmall = 64 << 10;
  constexpr size_t kLarge = 1 << 20;
  double worst = 0;
  for (const std::string& unit : Units()) {
    const double small = EncodeSeconds(tokenizer, unit, kSmall, 3);
    const double large = EncodeSeconds(tokenizer, unit, kLarge, 1);
    EXPECT_LT(large, 16 * 3 * small + 0.05) << name << ", unit '" << unit << "'";
    worst = std::max(worst, large);
  }
  std::cout << name << ": slowest MiB " << worst << " s\n";
}

TEST(TokenizerScaleTest, TinyStories) {
  WALSH_REQUIRE_DATA(folder, "models/TinyStories-656K");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, testing::LoadTokenizerJson(folder));
  ExpectLinear(*tokenizer, "TinyStories");
}

TEST(TokenizerScaleTest, Llama2) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama2/tokenizer.model");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, testing::LoadSentencePiece(path));
  ExpectLinear(*tokenizer, "Llama 2");
}

TEST(TokenizerScaleTest, SmolLm2) {
  WALSH_REQUIRE_SMOLLM2(path);
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, testing::LoadGguf(path));
  ExpectLinear(*tokenizer, "SmolLM2");
}

TEST(TokenizerScaleTest, Qwen3) {
  WALSH_REQUIRE_DATA(folder, "tokenizers/qwen3");
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, testing::LoadTokenizerJson(folder));
  ExpectLinear(*tokenizer, "Qwen3");
}

}  // namespace
}  // namespace walsh
