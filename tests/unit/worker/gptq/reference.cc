#include "tests/unit/worker/gptq/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "worker/tensor/half.h"

namespace walsh::gptq::reference {
namespace {

using Square = std::vector<std::vector<double>>;

struct GroupGrid {
  double scale = 1;
  double zero = 0;
  double margin = 1;
  double levels[4] = {};
};

double RoundHalf(double x) { return HalfToFloat(FloatToHalf(static_cast<float>(x))); }

double RoundScale(double scale) {
  return std::max(RoundHalf(std::min(scale, 65504.0)), double{HalfToFloat(1)});
}

// The middle of a range that need not hold 0 stays where it is.
GroupGrid ChooseFloatZero(const std::vector<double>& w, const Options& options) {
  const int code_max = (1 << options.bits) - 1;
  const double low = *std::min_element(w.begin(), w.end());
  const double high = *std::max_element(w.begin(), w.end());
  const double middle = (low + high) / 2;
  GroupGrid best;
  if (low == 0 && high == 0) return best;
  double best_error = std::numeric_limits<double>::infinity(), second = best_error;
  for (int step = 0; step < (options.mse_clip ? 80 : 1); ++step) {
    const double p = 1 - step / 100.0;
    const double scale =
        RoundScale(std::max(p * (high - low) / code_max, std::abs(middle) / 32768));
    const double zero = RoundHalf(code_max / 2.0 - middle / scale);
    double error = 0;
    for (double x : w) {
      const double code = std::clamp(std::nearbyint(x / scale + zero), 0.0, 1.0 * code_max);
      error += std::pow(std::abs(scale * (code - zero) - x), 2.4);
    }
    if (error < best_error) {
      if (step > 0) second = best_error;
      best_error = error;
      best.scale = scale;
      best.zero = zero;
    } else {
      second = std::min(second, error);
    }
  }
  if (std::isfinite(second)) best.margin = second / best_error - 1;
  return best;
}

// By trying every way to cut the sorted weights in four.
GroupGrid ChooseLevels(const std::vector<double>& w, const std::vector<double>& importance) {
  const size_t n = w.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return w[a] < w[b]; });
  const auto mean = [&](size_t first, size_t end) {
    double sum = 0, mass = 0;
    for (size_t i = first; i < end; ++i) {
      sum += importance[order[i]] * w[order[i]];
      mass += importance[order[i]];
    }
    return sum / mass;
  };
  Square cost(n + 1, std::vector<double>(n + 1, 0));
  for (size_t first = 0; first < n; ++first) {
    for (size_t end = first + 1; end <= n; ++end) {
      const double level = mean(first, end);
      for (size_t i = first; i < end; ++i) {
        cost[first][end] += importance[order[i]] * std::pow(w[order[i]] - level, 2);
      }
    }
  }
  double best = std::numeric_limits<double>::infinity(), second = best;
  size_t cuts[5] = {0, 0, 0, 0, n};
  for (size_t a = 1; a + 3 <= n; ++a) {
    for (size_t b = a + 1; b + 2 <= n; ++b) {
      for (size_t c = b + 1; c + 1 <= n; ++c) {
        const double total = cost[0][a] + cost[a][b] + cost[b][c] + cost[c][n];
        if (total < best) {
          second = best;
          best = total;
          cuts[1] = a, cuts[2] = b, cuts[3] = c;
        } else {
          second = std::min(second, total);
        }
      }
    }
  }
  GroupGrid grid;
  grid.margin = second / best - 1;
  for (size_t k = 0; k < 4; ++k) grid.levels[k] = RoundHalf(mean(cuts[k], cuts[k + 1]));
  return grid;
}

GroupGrid ChooseGrid(const std::vector<double>& w, const std::vector<double>& importance,
                     const Options& options) {
  if (options.grid == gptq::Grid::kCodebook) return ChooseLevels(w, importance);
  if (options.zero_point == ZeroPoint::kFloat) return ChooseFloatZero(w, options);
  const int code_max = (1 << options.bits) - 1;
  double low = 0, high = 0;
  for (double x : w) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
  if (options.symmetric) {
    high = std::max(high, -low);
    low = -high;
  }
  GroupGrid best;
  if (low == high) {
    best.zero = options.symmetric ? (code_max + 1) / 2 : 0;
    return best;
  }
  double best_error = std::numeric_limits<double>::infinity(), second = best_error;
  for (int step = 0; step < (options.mse_clip ? 80 : 1); ++step) {
    const double p = 1 - step / 100.0;
    const double scale = RoundScale(p * (high - low) / code_max);
    const int zero =
        options.symmetric
            ? (code_max + 1) / 2
            : static_cast<int>(std::clamp(std::nearbyint(-p * low / scale), 0.0, 1.0 * code_max));
    double error = 0;
    for (double x : w) {
      const double code = std::clamp(std::nearbyint(x / scale) + zero, 0.0, 1.0 * code_max);
      error += std::pow(std::abs(scale * (code - zero) - x), 2.4);
    }
    if (error < best_error) {
      // Two steps that round to one scale are no alternative to each other.
      if (step > 0 && scale != best.scale) second = best_error;
      best_error = error;
      best.scale = scale;
      best.zero = zero;
    } else if (scale != best.scale || zero != best.zero) {
      second = std::min(second, error);
    }
  }
  if (std::isfinite(second)) best.margin = second / best_error - 1;
  return best;
}

std::vector<int32_t> Order(const Matrix& h, const Options& options) {
  std::vector<int32_t> order(static_cast<size_t>(h.cols()));
  std::iota(order.begin(), order.end(), 0);
  if (options.column_order == ColumnOrder::kNatural) return order;
  if (options.column_order == ColumnOrder::kActOrder) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return h(a, a) > h(b, b); });
    return order;
  }
  const auto group_max = [&](int32_t column) {
    float max = 0;
    const int64_t first = column / options.group_size * options.group_size;
    for (int64_t c = first; c < first + options.group_size; ++c) max = std::max(max, h(c, c));
    return max;
  };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int64_t group_a = a / options.group_size, group_b = b / options.group_size;
    if (group_a != group_b) {
      if (group_max(a) != group_max(b)) return group_max(a) > group_max(b);
      return group_a < group_b;
    }
    return h(a, a) > h(b, b);
  });
  return order;
}

Square Inverse(Square a) {
  const size_t n = a.size();
  Square inverse(n, std::vector<double>(n, 0));
  for (size_t i = 0; i < n; ++i) inverse[i][i] = 1;
  for (size_t i = 0; i < n; ++i) {
    size_t pivot = i;
    for (size_t r = i; r < n; ++r) {
      if (std::abs(a[r][i]) > std::abs(a[pivot][i])) pivot = r;
    }
    std::swap(a[i], a[pivot]);
    std::swap(inverse[i], inverse[pivot]);
    const double factor = 1 / a[i][i];
    for (size_t c = 0; c < n; ++c) {
      a[i][c] *= factor;
      inverse[i][c] *= factor;
    }
    for (size_t r = 0; r < n; ++r) {
      if (r == i || a[r][i] == 0) continue;
      const double multiple = a[r][i];
      for (size_t c = 0; c < n; ++c) {
        a[r][c] -= multiple * a[i][c];
        inverse[r][c] -= multiple * inverse[i][c];
      }
    }
  }
  return inverse;
}

double TraceForm(const std::vector<std::vector<double>>& m, const Matrix& h) {
  double trace = 0;
  for (const auto& row : m) {
    for (int64_t i = 0; i < h.rows(); ++i) {
      double dot = 0;
      for (int64_t j = 0; j < h.cols(); ++j) dot += h(i, j) * row[static_cast<size_t>(j)];
      trace += row[static_cast<size_t>(i)] * dot;
    }
  }
  return trace;
}

}  // namespace

Result Quantize(const Matrix& weights, const Matrix& hessian, const Options& options,
                const Matrix& cross) {
  const int64_t rows = weights.rows(), n = weights.cols();
  const int64_t group = options.group_size, groups = n / group;
  const int code_max = (1 << options.bits) - 1;
  Result result;
  result.order = Order(hessian, options);
  result.codes.resize(static_cast<size_t>(rows * n));
  result.code_margin.resize(static_cast<size_t>(rows * n));
  result.scales.resize(static_cast<size_t>(rows * groups));
  result.zeros.resize(static_cast<size_t>(rows * groups));
  result.grid_margin.resize(static_cast<size_t>(rows * groups));
  result.levels.resize(static_cast<size_t>(4 * rows * groups));

  double sum = 0;
  int64_t live = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += hessian(i, i);
    live += hessian(i, i) != 0 ? 1 : 0;
  }
  const double damping = options.damp * sum / static_cast<double>(live);
  Square inverse;
  if (options.method != Method::kRtn) {
    Square h(static_cast<size_t>(n), std::vector<double>(static_cast<size_t>(n)));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) h[i][j] = hessian(result.order[i], result.order[j]);
      if (h[i][i] == 0) h[i][i] = 1;
      h[i][i] += damping;
    }
    inverse = Inverse(h);
  }

  std::vector<std::vector<double>> w(static_cast<size_t>(rows)), original(w), difference(w);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t column = result.order[i];
      original[r].push_back(weights(r, i));
      const bool dead = options.method != Method::kRtn && hessian(column, column) == 0;
      w[r].push_back(dead ? 0.0 : weights(r, column));
    }
    difference[r].resize(static_cast<size_t>(n));
  }
  // Of columns at these steps, whose errors count by 1 / U(i, i)²: what is left of the inverse at
  // the column's step, which is found by eliminating the columns before it.
  std::vector<double> importance(static_cast<size_t>(n), 1.0);
  if (!inverse.empty()) {
    Square left = inverse;
    for (int64_t i = 0; i < n; ++i) {
      importance[i] = 1 / left[i][i];
      for (int64_t a = i + 1; a < n; ++a) {
        for (int64_t b = i + 1; b < n; ++b) {
          if (a != b) left[a][b] -= left[a][i] * left[i][b] / left[i][i];
        }
        left[a][a] -= left[a][i] * left[i][a] / left[i][i];
      }
    }
  }
  const auto choose_grid = [&](int64_t r, int64_t g, const std::vector<int64_t>& steps) {
    std::vector<double> of_group, counts;
    for (int64_t step : steps) {
      of_group.push_back(w[r][step]);
      counts.push_back(importance[step]);
    }
    const GroupGrid grid = ChooseGrid(of_group, counts, options);
    const size_t index = static_cast<size_t>(r * groups + g);
    result.scales[index] = grid.scale;
    result.zeros[index] = grid.zero;
    result.grid_margin[index] = grid.margin;
    std::copy_n(grid.levels, 4, result.levels.begin() + static_cast<int64_t>(4 * index));
  };
  const bool is_static = options.column_order == ColumnOrder::kActOrder;
  for (int64_t g = 0; is_static && g < groups; ++g) {
    std::vector<int64_t> steps;
    for (int64_t i = 0; i < n; ++i) {
      if (result.order[i] / group == g) steps.push_back(i);
    }
    for (int64_t r = 0; r < rows; ++r) choose_grid(r, g, steps);
  }
  std::vector<double> weight(static_cast<size_t>(rows));  // that the step quantizes
  for (int64_t i = 0; i < n; ++i) {
    const int32_t column = result.order[i];
    const int64_t g = column / group;
    for (int64_t r = 0; r < rows; ++r) {
      const size_t grid_index = static_cast<size_t>(r * groups + g);
      if (!is_static && i % group == 0) {
        std::vector<int64_t> steps(static_cast<size_t>(group));
        std::iota(steps.begin(), steps.end(), i);
        choose_grid(r, g, steps);
      }
      const double scale = result.scales[grid_index];
      const double zero = result.zeros[grid_index];
      weight[r] = w[r][i];
      const size_t index = static_cast<size_t>(r * n + column);
      double quantized = 0;
      if (options.grid == gptq::Grid::kCodebook) {
        const double* levels = &result.levels[4 * grid_index];
        int code = 0;
        for (int k = 1; k < 4; ++k) {
          if (std::abs(levels[k] - w[r][i]) < std::abs(levels[code] - w[r][i])) code = k;
        }
        double margin = 1;
        for (int k = 0; k < 3; ++k) {
          const double middle = (levels[k] + levels[k + 1]) / 2;
          margin = std::min(margin, std::abs(w[r][i] - middle) / (levels[3] - levels[0]));
        }
        result.codes[index] = static_cast<uint8_t>(code);
        result.code_margin[index] = margin;
        quantized = levels[code];
      } else {
        const bool has_float_zero = options.zero_point == ZeroPoint::kFloat;
        const double scaled = w[r][i] / scale + (has_float_zero ? zero : 0);
        const double code =
            std::clamp(std::nearbyint(scaled) + (has_float_zero ? 0 : zero), 0.0, 1.0 * code_max);
        result.codes[index] = static_cast<uint8_t>(code);
        result.code_margin[index] = std::abs(scaled - std::floor(scaled) - 0.5);
        quantized = scale * (code - zero);
      }
      difference[r][column] = original[r][column] - quantized;
      if (inverse.empty()) continue;
      const double error = (w[r][i] - quantized) / inverse[i][i];
      for (int64_t j = i + 1; j < n; ++j) w[r][j] -= error * inverse[i][j];
    }
    if (inverse.empty()) continue;
    for (int64_t a = i + 1; a < n; ++a) {
      for (int64_t b = i + 1; b < n; ++b) {
        if (a != b) inverse[a][b] -= inverse[a][i] * inverse[i][b] / inverse[i][i];
      }
      inverse[a][a] -= inverse[a][i] * inverse[i][a] / inverse[i][i];
    }
    if (options.method != Method::kGptaq) continue;
    for (int64_t b = i + 1; b < n; ++b) {
      double regression = 0;
      for (int64_t a = i + 1; a < n; ++a) {
        regression += cross(result.order[a], column) * inverse[a][b];
      }
      for (int64_t r = 0; r < rows; ++r) w[r][b] += options.gptaq_alpha * weight[r] * regression;
    }
  }
  result.error = TraceForm(difference, hessian) / TraceForm(original, hessian);
  return result;
}

}  // namespace walsh::gptq::reference
