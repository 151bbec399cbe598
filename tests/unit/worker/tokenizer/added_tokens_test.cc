// The search for added tokens against one that tries every token at every byte.
#include "worker/tokenizer/added_tokens.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/random_seed.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using Segments = std::vector<std::pair<int32_t, std::string>>;

Segments Split(const AddedTokens& tokens, std::string_view text) {
  Segments out;
  for (const auto& [id, part] : tokens.Split(text, true)) out.emplace_back(id, std::string(part));
  return out;
}

Segments SlowSplit(const std::vector<std::string>& tokens, const std::string& text) {
  Segments out;
  std::string between;
  const auto flush = [&] {
    if (!between.empty()) out.emplace_back(-1, std::exchange(between, ""));
  };
  for (size_t at = 0; at < text.size();) {
    size_t longest = tokens.size();
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (text.compare(at, tokens[i].size(), tokens[i]) != 0) continue;
      if (longest == tokens.size() || tokens[i].size() > tokens[longest].size()) longest = i;
    }
    if (longest == tokens.size()) {
      between += text[at++];
      continue;
    }
    flush();
    out.emplace_back(static_cast<int32_t>(longest), tokens[longest]);
    at += tokens[longest].size();
  }
  flush();
  return out;
}

TEST(AddedTokensTest, LeftmostAndLongest) {
  std::mt19937_64 random(testing::RandomSeed());
  const auto text_of = [&](size_t size) {
    std::string text;
    while (text.size() < size) text += "aabc"[random() % 4];
    return text;
  };
  for (int round = 0; round < 500; ++round) {
    std::vector<std::string> contents;
    AddedTokens tokens;
    const size_t n_tokens = random() % 8;
    for (size_t i = 0; i < n_tokens; ++i) {
      contents.push_back(text_of(1 + random() % 9));
      ASSERT_OK(tokens.Add({.id = static_cast<int32_t>(i), .content = contents.back()}));
    }
    tokens.Finish();
    // Sometimes longer than what is searched at a time.
    const std::string text = text_of(round == 0 ? 300'000 : random() % 200);
    ASSERT_EQ(Split(tokens, text), SlowSplit(contents, text)) << text.substr(0, 200);
  }
}

TEST(AddedTokensTest, MatchesCrossTheBordersOfASearch) {
  const std::string token = std::string(1000, 'x') + "y";
  AddedTokens tokens;
  ASSERT_OK(tokens.Add({.id = 0, .content = token}));
  tokens.Finish();
  for (size_t before : {64 << 10, (64 << 10) - 1, (64 << 10) - 500, (64 << 10) - 1001}) {
    const std::string text = std::string(before, ' ') + token + "z";
    EXPECT_EQ(Split(tokens, text),
              (Segments{{-1, std::string(before, ' ')}, {0, token}, {-1, "z"}}));
  }
}

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

TEST(AddedTokensTest, HostileTokensTakeLinearTime) {
  constexpr double kSecondsMax = 3.0;  // under a sanitizer; otherwise a tenth
  const std::string run(1023, 'a');
  for (const std::vector<std::string>& contents : {std::vector<std::string>{run + "b"},
                                                   {"b" + run},
                                                   {"a", run + "b"},
                                                   {"a", "b" + run},
                                                   {run.substr(1) + "ba"},
                                                   {run + "a", "aa", "a"}}) {
    AddedTokens tokens;
    for (const std::string& content : contents) {
      ASSERT_OK(tokens.Add({.id = 1, .content = content}));
    }
    tokens.Finish();
    const std::string text(1 << 20, 'a');
    const double start = CpuSeconds();
    const auto segments = tokens.Split(text, true);
    EXPECT_LT(CpuSeconds() - start, kSecondsMax) << contents.size();
    EXPECT_FALSE(segments.empty());
  }
}

}  // namespace
}  // namespace walsh
