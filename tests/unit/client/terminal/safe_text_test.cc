#include "client/terminal/safe_text.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(SafeTextTest, KeepsTextInAnyScript) {
  EXPECT_EQ(SafeText("Grüße, 世界 🙂\n\tx"), "Grüße, 世界 🙂\n\tx");
}

TEST(SafeTextTest, ReplacesWhatMovesTheTerminal) {
  EXPECT_EQ(SafeText("a\x1b[2Jb"), "a\uFFFD[2Jb");
  EXPECT_EQ(SafeText("a\rb\x07\x7f"), "a\uFFFDb\uFFFD\uFFFD");
  EXPECT_EQ(SafeText("\xc2\x9b"
                     "2J"),
            "\uFFFD2J");  // CSI as a C1 control
  EXPECT_EQ(SafeText("user\u202Egpj.exe"), "user\uFFFDgpj.exe");
  EXPECT_EQ(SafeText("\u2066x\u2069"), "\uFFFDx\uFFFD");
}

TEST(SafeTextTest, ReplacesInvalidUtf8) { EXPECT_EQ(SafeText("a\xff"), "a\uFFFD"); }

TEST(SafeTextTest, WidthCountsCodePoints) {
  EXPECT_EQ(DisplayWidth("Grüße"), 5u);
  EXPECT_EQ(DisplayWidth(""), 0u);
}

}  // namespace
}  // namespace walsh::client
