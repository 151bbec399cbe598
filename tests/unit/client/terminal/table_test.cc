#include "client/terminal/table.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(TableTest, AlignsColumnsWithoutTrailingSpaces) {
  Table table({{"NAME"}, {"SIZE", Align::kRight}, {"NOTE"}});
  table.AddRow({"a", "1", "x"});
  table.AddRow({"längere", "12345", ""});
  EXPECT_EQ(table.Text(),
            "NAME      SIZE  NOTE\n"
            "a            1  x\n"
            "längere  12345  -\n");
  EXPECT_EQ(table.Text(2).substr(0, 6), "  NAME");
}

TEST(TableTest, CellsCannotMoveTheTerminal) {
  Table table({{"N"}});
  table.AddRow({"\x1b[2J"});
  EXPECT_EQ(table.Text(), "N\n\uFFFD[2J\n");
}

}  // namespace
}  // namespace walsh::client
