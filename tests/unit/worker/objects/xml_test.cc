#include "worker/objects/xml.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace walsh::objects {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(XmlTest, FindsTextAndResolvesEntities) {
  EXPECT_EQ(XmlText("<A><B>x</B></A>", "B"), "x");
  EXPECT_EQ(XmlText("<B></B>", "B"), "");
  EXPECT_EQ(XmlText("<B>&lt;&amp;lt;&quot;&#x2F;&#47;</B>", "B"), "<&lt;\"//");
  EXPECT_EQ(XmlText("<A>x</A>", "B"), std::nullopt);
  EXPECT_EQ(XmlText("<B>x", "B"), std::nullopt);
  EXPECT_EQ(XmlText("<BB>x</BB>", "B"), std::nullopt);
}

TEST(XmlTest, LeavesOtherEntitiesAlone) {
  for (const char* text :
       {"&", "&;", "&e;", "&#0;", "&#128;", "&#x;", "&#-5;", "&#99999999999;", "&averylongname;"}) {
    EXPECT_EQ(XmlText(std::string("<B>") + text + "</B>", "B"), text);
  }
}

TEST(XmlTest, FindsAllElements) {
  EXPECT_THAT(XmlElements("<L><C>1</C>x<C><D>2</D></C><C>3", "C"), ElementsAre("1", "<D>2</D>"));
  EXPECT_THAT(XmlElements("", "C"), IsEmpty());
}

TEST(XmlTest, WhatIsEscapedIsReadAgain) {
  const std::string text = "<&>\"' plain";
  EXPECT_EQ(XmlText("<B>" + XmlEscape(text) + "</B>", "B"), text);
}

}  // namespace
}  // namespace walsh::objects
