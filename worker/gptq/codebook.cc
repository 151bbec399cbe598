#include "worker/gptq/codebook.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "worker/tensor/half.h"

namespace walsh::gptq {
namespace {

// Clusters the values of one row after another, in buffers that it keeps.
class LineClusters {
 public:
  explicit LineClusters(int64_t n)
      : n_(static_cast<size_t>(n)),
        order_(n_),
        values_(n_),
        mass_(n_ + 1),
        moment_(n_ + 1),
        square_(n_ + 1) {
    for (auto& starts : starts_) starts.resize(n_ + 1);
    for (auto& cost : cost_) cost.resize(n_ + 1);
  }

  // value(i) for i in 0 … n − 1.
  template <typename Value>
  std::array<double, kLevels> Fit(const Value& value, std::span<const double> importance) {
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::sort(order_.begin(), order_.end(), [&](size_t a, size_t b) {
      const double x = value(a), y = value(b);
      return x != y ? x < y : a < b;
    });
    // Around the median: differences of sums of squares would lose a small spread around a large
    // mean.
    const double center = value(order_[n_ / 2]);
    for (size_t i = 0; i < n_; ++i) {
      const double mass = importance[order_[i]];
      values_[i] = value(order_[i]) - center;
      mass_[i + 1] = mass_[i] + mass;
      moment_[i + 1] = moment_[i] + mass * values_[i];
      square_[i + 1] = square_[i] + mass * values_[i] * values_[i];
    }
    for (size_t end = 0; end <= n_; ++end) cost_[0][end] = Cost(0, end);
    for (size_t k = 1; k < kLevels; ++k) Split(k, 0, n_, 0, n_);
    std::array<double, kLevels> levels;
    size_t end = n_;
    for (size_t k = kLevels; k-- > 0;) {
      const size_t first = k == 0 ? 0 : starts_[k][end];
      // An empty cluster, of fewer values than levels, repeats its neighbour's level.
      if (first < end) {
        levels[k] = center + (moment_[end] - moment_[first]) / (mass_[end] - mass_[first]);
      } else {
        levels[k] = k + 1 < kLevels ? levels[k + 1] : center + values_[n_ - 1];
      }
      end = first;
    }
    return levels;
  }

 private:
  // Of one level for sorted values first … end − 1.
  double Cost(size_t first, size_t end) const {
    if (first >= end) return 0;
    const double mass = mass_[end] - mass_[first], moment = moment_[end] - moment_[first];
    return std::max(0.0, square_[end] - square_[first] - moment * moment / mass);
  }

  // The least cost of k + 1 clusters for the values before each end in [low, high], whose last
  // cluster starts in [first, last].
  void Split(size_t k, size_t low, size_t high, size_t first, size_t last) {
    if (low > high) return;
    const size_t end = low + (high - low) / 2;
    double best = std::numeric_limits<double>::infinity();
    size_t best_start = first;
    for (size_t start = first; start <= std::min(last, end); ++start) {
      const double cost = cost_[k - 1][start] + Cost(start, end);
      if (cost < best) {
        best = cost;
        best_start = start;
      }
    }
    cost_[k][end] = best;
    starts_[k][end] = best_start;
    if (end > low) Split(k, low, end - 1, first, best_start);
    if (end < high) Split(k, end + 1, high, best_start, last);
  }

  const size_t n_;
  std::vector<size_t> order_;                        // of the values
  std::vector<double> values_;                       // sorted, less the center
  std::vector<double> mass_, moment_, square_;       // sums before each place
  std::array<std::vector<size_t>, kLevels> starts_;  // of the last cluster, by end
  std::array<std::vector<double>, kLevels> cost_;
};

float RoundLevel(double level) {
  const double bound = kScaleMax;
  return HalfToFloat(FloatToHalf(static_cast<float>(std::clamp(level, -bound, bound))));
}

}  // namespace

void FindLevels(const float* weights, int64_t n, std::span<const double> importance,
                TileGrid& grid) {
  // Relative ones: products of the sums below must not leave the range of doubles.
  const double highest = *std::max_element(importance.begin(), importance.end());
  std::vector<double> relative(importance.begin(), importance.end());
  for (double& value : relative) value /= highest;
  LineClusters clusters(n);
  for (int64_t row = 0; row < kTileRows; ++row) {
    const auto weight = [&](size_t c) -> double {
      return weights[static_cast<int64_t>(c) * kTileRows + row];
    };
    std::array<double, kLevels> levels = {};
    bool is_finite = true;
    for (size_t c = 0; c < relative.size(); ++c) is_finite = is_finite && std::isfinite(weight(c));
    if (is_finite) levels = clusters.Fit(weight, relative);
    for (int k = 0; k < kLevels; ++k) {
      grid.levels[k][row] = RoundLevel(levels[static_cast<size_t>(k)]);
    }
  }
}

}  // namespace walsh::gptq
