// Reads one counter or gauge out of what this process exports.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "common/metrics.h"

namespace walsh::testing {

// The value of the first series of `name` that has all the labels, each written `key="value"`; 0
// when there is none yet. With no labels, of any series of that name.
inline double MetricValue(const std::string& name, const std::vector<std::string>& labels) {
  const std::vector<std::string> lines = absl::StrSplit(metrics::Render(), '\n');
  for (const std::string& line : lines) {
    bool is_it = line.starts_with(name + "{") || line.starts_with(name + " ");
    for (const std::string& label : labels) is_it = is_it && line.find(label) != std::string::npos;
    if (is_it) return std::atof(line.c_str() + line.rfind(' '));
  }
  return 0;
}

}  // namespace walsh::testing
