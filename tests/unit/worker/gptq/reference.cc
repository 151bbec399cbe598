#include "tests/unit/worker/gptq/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "worker/tensor/half.h"

namespace walsh::gptq::reference {
namespace {

using Square = std::vector<std::vector<double>>;

struct Grid {
  double scale = 1;
  int zero = 0;
  double margin = 1;
};

double RoundScale(double scale) {
  const double clamped = std::min(scale, 65504.0);
  const float half = HalfToFloat(FloatToHalf(static_cast<float>(clamped)));
  return std::max(half, HalfToFloat(1));
}

Grid ChooseGrid(const std::vector<double>& w, const Options& options) {
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
  Grid best;
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

Result Quantize(const Matrix& weights, const Matrix& hessian, const Options& options) {
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

  double sum = 0;
  int64_t live = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += hessian(i, i);
    live += hessian(i, i) != 0 ? 1 : 0;
  }
  const double damping = options.damp * sum / static_cast<double>(live);
  Square inverse;
  if (options.method == Method::kGptq) {
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
      const bool dead = options.method == Method::kGptq && hessian(column, column) == 0;
      w[r].push_back(dead ? 0.0 : weights(r, column));
    }
    difference[r].resize(static_cast<size_t>(n));
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t column = result.order[i];
    const int64_t g = column / group;
    for (int64_t r = 0; r < rows; ++r) {
      const size_t grid_index = static_cast<size_t>(r * groups + g);
      if (i % group == 0) {
        const Grid grid =
            ChooseGrid(std::vector<double>(w[r].begin() + i, w[r].begin() + i + group), options);
        result.scales[grid_index] = grid.scale;
        result.zeros[grid_index] = grid.zero;
        result.grid_margin[grid_index] = grid.margin;
      }
      const double scale = result.scales[grid_index];
      const int zero = result.zeros[grid_index];
      const double scaled = w[r][i] / scale;
      const double code = std::clamp(std::nearbyint(scaled) + zero, 0.0, 1.0 * code_max);
      const size_t index = static_cast<size_t>(r * n + column);
      result.codes[index] = static_cast<uint8_t>(code);
      result.code_margin[index] = std::abs(scaled - std::floor(scaled) - 0.5);
      const double quantized = scale * (code - zero);
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
  }
  result.error = TraceForm(difference, hessian) / TraceForm(original, hessian);
  return result;
}

}  // namespace walsh::gptq::reference
