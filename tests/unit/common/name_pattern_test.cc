#include "common/name_pattern.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

bool Matches(const std::string& pattern, const std::string& name) {
  const auto parsed = NamePattern::Parse(pattern);
  EXPECT_OK(parsed) << pattern;
  return parsed.ok() && parsed->Matches(name);
}

struct Case {
  const char* pattern;
  std::vector<const char*> matches;
  std::vector<const char*> others;
};

TEST(NamePatternTest, MatchesWholeNames) {
  const std::vector<Case> cases = {
      {"layers.0.mlp.down_proj",
       {"layers.0.mlp.down_proj"},
       {"layers.0.mlp.down_proj2", "xlayers.0.mlp.down_proj", "layers_0.mlp.down_proj", ""}},
      {"layers.{0,1}.mlp.down_proj",
       {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"},
       {"layers.2.mlp.down_proj", "layers.10.mlp.down_proj", "layers..mlp.down_proj"}},
      {"*.down_proj",
       {"layers.0.mlp.down_proj", "layers.27.mlp.down_proj", ".down_proj"},
       {"down_proj", "layers.0.mlp.up_proj"}},
      {"*", {"", "a", "layers.0.mlp.up_proj"}, {}},
      {"*a*b*", {"ab", "xaybz", "aab", "abab"}, {"ba", "a", "b", ""}},
      {"layers.?.*", {"layers.3.mlp.up_proj"}, {"layers.10.mlp.up_proj", "layers.."}},
      {"layers.{2-11}.*",
       {"layers.2.a", "layers.9.a", "layers.11.a"},
       {"layers.1.a", "layers.12.a", "layers.02.a", "layers.2x.a", "layers..a"}},
      // A number is the whole number: 12 does not start with a layer of 0 to 3.
      {"layers.{0-3}*", {"layers.1.a", "layers.3"}, {"layers.12.a", "layers.30"}},
      {"*.{q,k,v}_proj", {"a.q_proj", "a.v_proj"}, {"a.o_proj", "a.qk_proj"}},
      {"l{0-1,7,x-y}", {"l0", "l1", "l7", "lx-y"}, {"l2", "lx", "l0-1"}},
      {"{a,ab}{c,bc}", {"ac", "abc", "abbc"}, {"ab", "abcc"}},
  };
  for (const Case& c : cases) {
    for (const char* name : c.matches) EXPECT_TRUE(Matches(c.pattern, name)) << c.pattern << name;
    for (const char* name : c.others) EXPECT_FALSE(Matches(c.pattern, name)) << c.pattern << name;
  }
}

TEST(NamePatternTest, SaysWhatIsWrongWithAPattern) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"", "empty"},
      {"a{0,1", "character 2: '{' without '}'"},
      {"a}b", "character 2: '}' without '{'"},
      {"{a,{b}}", "alternatives of '{'"},
      {"{a,*}", "character 4"},
      {"{}", "empty"},
      {"{a,}", "empty"},
      {"{3-1}", "range 3-1 has no number"},
      {"a b", "character 2"},
      {"caf\xc3\xa9", "character 4"},
  };
  for (const auto& [pattern, what] : cases) {
    EXPECT_THAT(NamePattern::Parse(pattern),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)))
        << pattern;
  }
}

// Backtracking would take longer than the universe has.
TEST(NamePatternTest, ManyStarsAreNoTrouble) {
  std::string pattern;
  for (int i = 0; i < 120; ++i) pattern += "*a";
  EXPECT_FALSE(Matches(pattern + "b", std::string(250, 'a')));
  EXPECT_TRUE(Matches(pattern, std::string(250, 'a')));
}

TEST(NamePatternTest, NumbersBeyondNineDigitsAreText) {
  EXPECT_FALSE(Matches("{0-999999999}", "1000000000"));
  EXPECT_TRUE(Matches("{0-999999999}", "999999999"));
  EXPECT_TRUE(Matches("{0-9999999999}", "0-9999999999"));
}

}  // namespace
}  // namespace walsh
