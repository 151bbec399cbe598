#include "client/terminal/table.h"

#include <algorithm>

#include "client/terminal/safe_text.h"
#include "common/check.h"

namespace walsh::client {
namespace {

constexpr size_t kGap = 2;

void AppendCell(const std::string& cell, size_t width, Align align, bool last, std::string& line) {
  const size_t padding = width - std::min(width, DisplayWidth(cell));
  if (align == Align::kRight) line.append(padding, ' ');
  line += cell;
  if (last) return;
  if (align == Align::kLeft) line.append(padding, ' ');
  line.append(kGap, ' ');
}

}  // namespace

void Table::AddRow(std::vector<std::string> cells) {
  WALSH_CHECK_EQ(cells.size(), columns_.size());
  for (std::string& cell : cells) cell = cell.empty() ? "-" : SafeText(cell);
  rows_.push_back(std::move(cells));
}

std::string Table::Text(int indent) const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    size_t width = DisplayWidth(columns_[c].title);
    for (const auto& row : rows_) width = std::max(width, DisplayWidth(row[c]));
    widths.push_back(width);
  }
  std::string text;
  const auto append_line = [&](const auto& cell_at) {
    text.append(static_cast<size_t>(indent), ' ');
    for (size_t c = 0; c < columns_.size(); ++c) {
      AppendCell(cell_at(c), widths[c], columns_[c].align, c + 1 == columns_.size(), text);
    }
    text += '\n';
  };
  append_line([&](size_t c) -> const std::string& { return columns_[c].title; });
  for (const auto& row : rows_) {
    append_line([&](size_t c) -> const std::string& { return row[c]; });
  }
  return text;
}

}  // namespace walsh::client
