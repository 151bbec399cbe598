// Columns of text: two spaces between columns, no rules, so that cut and awk work on it.
#pragma once

#include <string>
#include <vector>

namespace walsh::client {

enum class Align { kLeft, kRight };

struct Column {
  std::string title;
  Align align = Align::kLeft;
};

class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  // As many cells as columns. An empty cell is shown as "-".
  void AddRow(std::vector<std::string> cells);
  // A line per row, titles first; `indent` spaces before each.
  std::string Text(int indent = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace walsh::client
