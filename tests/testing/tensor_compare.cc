#include "tests/testing/tensor_compare.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <sstream>

namespace walsh::testing {

Comparison CompareTensors(std::span<const float> actual, std::span<const float> expected,
                          const CompareLimits& limits) {
  Comparison result;
  std::ostringstream report;
  if (actual.size() != expected.size()) {
    report << actual.size() << " values, expected " << expected.size();
    result.report = report.str();
    return result;
  }
  double squared_error = 0;
  double squared = 0;
  double worst = -1;
  size_t worst_index = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(actual[i]) - expected[i]);
    const double magnitude = std::fabs(static_cast<double>(expected[i]));
    const double relative = difference / std::max(magnitude, limits.rel_floor);
    squared_error += difference * difference;
    squared += magnitude * magnitude;
    if (!std::isfinite(difference)) {
      result.max_abs = result.max_rel = std::numeric_limits<double>::infinity();
      if (std::isfinite(worst)) {
        worst = std::numeric_limits<double>::infinity();
        worst_index = i;
      }
      continue;
    }
    result.max_abs = std::max(result.max_abs, difference);
    result.max_rel = std::max(result.max_rel, relative);
    if (difference > worst) {
      worst = difference;
      worst_index = i;
    }
  }
  result.nmse = squared > 0 ? squared_error / squared : squared_error;
  result.close = result.max_abs <= limits.max_abs && result.max_rel <= limits.max_rel &&
                 result.nmse <= limits.nmse;
  report.precision(9);
  report << "max abs " << result.max_abs << " (limit " << limits.max_abs << "), max rel "
         << result.max_rel << " (" << limits.max_rel << "), NMSE " << result.nmse << " ("
         << limits.nmse << ")";
  if (!actual.empty()) {
    report << "; worst at " << worst_index << " of " << actual.size() << ": " << actual[worst_index]
           << ", expected " << expected[worst_index];
  }
  report << "; WALSH_SEED=" << TestSeed();
  result.report = report.str();
  return result;
}

uint64_t TestSeed() {
  static const uint64_t seed = [] {
    const char* text = std::getenv("WALSH_SEED");
    return text == nullptr ? uint64_t{1} : std::strtoull(text, nullptr, 10);
  }();
  return seed;
}

std::vector<float> RandomFloats(int64_t n, uint64_t stream, float deviation) {
  std::seed_seq sequence{TestSeed(), stream};
  std::mt19937_64 generator(sequence);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(generator);
  return values;
}

std::vector<float> PoisonedFloats(int64_t n) {
  return std::vector<float>(static_cast<size_t>(n), std::numeric_limits<float>::quiet_NaN());
}

}  // namespace walsh::testing
