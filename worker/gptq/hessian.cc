#include "worker/gptq/hessian.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/kernels/kernels.h"

namespace walsh::gptq {
namespace {

constexpr double kDampMin = 0.001;
constexpr double kDampMax = 0.1;

absl::Status CheckElements(const Matrix& h, std::string_view name) {
  for (int64_t i = 0; i < h.rows(); ++i) {
    for (int64_t j = 0; j < h.cols(); ++j) {
      if (!std::isfinite(h(i, j)) || (i == j && h(i, j) < 0)) {
        return absl::DataLossError(absl::StrCat("Hessian of ", std::string(name), ": element [", i,
                                                ", ", j, "] is ", h(i, j)));
      }
    }
  }
  return absl::OkStatus();
}

std::vector<float> Diagonal(const Matrix& h) {
  std::vector<float> diagonal(static_cast<size_t>(h.rows()));
  for (int64_t i = 0; i < h.rows(); ++i) diagonal[static_cast<size_t>(i)] = h(i, i);
  return diagonal;
}

// U for H + λI in the order of `f`, or an empty matrix when it is not positive definite in `Real`.
template <typename Real>
Matrix UpperFactor(const HessianFactor& f, double mean_diagonal, double damp) {
  const int64_t n = f.hessian.rows();
  const auto column = [&](int64_t i) { return f.order[static_cast<size_t>(n - 1 - i)]; };
  std::vector<Real> a(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) {
    const float* row = f.hessian.row(column(i));
    for (int64_t j = 0; j < n; ++j) a[static_cast<size_t>(i * n + j)] = row[column(j)];
    double diagonal = row[column(i)] + damp * mean_diagonal;
    // A dead column is coupled to no other one; any positive number will do.
    if (f.is_dead[static_cast<size_t>(column(i))] != 0) diagonal = mean_diagonal;
    a[static_cast<size_t>(i * n + i)] = static_cast<Real>(diagonal);
  }
  if (!kernels::CholeskyLower(n, a.data()).ok()) return Matrix();
  if (!kernels::InvertLower(n, a.data()).ok()) return Matrix();
  Matrix upper(n, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      upper(i, j) = static_cast<float>(a[static_cast<size_t>((n - 1 - i) * n + n - 1 - j)]);
      if (!std::isfinite(upper(i, j))) return Matrix();
    }
    if (upper(i, i) <= 0) return Matrix();
  }
  return upper;
}

}  // namespace

std::vector<int32_t> ColumnSteps(std::span<const float> diagonal, const Options& options) {
  std::vector<int32_t> order(diagonal.size());
  std::iota(order.begin(), order.end(), 0);
  if (options.column_order == ColumnOrder::kNatural) return order;
  const auto by_diagonal = [&](int32_t a, int32_t b) {
    return diagonal[static_cast<size_t>(a)] > diagonal[static_cast<size_t>(b)];
  };
  if (options.column_order == ColumnOrder::kActOrder) {
    std::stable_sort(order.begin(), order.end(), by_diagonal);
    return order;
  }
  const int64_t group = options.group_size;
  const int64_t n_groups = static_cast<int64_t>(diagonal.size()) / group;
  std::vector<int32_t> groups(static_cast<size_t>(n_groups));
  std::iota(groups.begin(), groups.end(), 0);
  for (int64_t g = 0; g < n_groups; ++g) {
    std::stable_sort(order.begin() + g * group, order.begin() + (g + 1) * group, by_diagonal);
  }
  std::stable_sort(groups.begin(), groups.end(), [&](int32_t a, int32_t b) {
    return by_diagonal(order[static_cast<size_t>(a * group)],
                       order[static_cast<size_t>(b * group)]);
  });
  std::vector<int32_t> steps;
  steps.reserve(order.size());
  for (int32_t g : groups) {
    steps.insert(steps.end(), order.begin() + g * group, order.begin() + (g + 1) * group);
  }
  return steps;
}

std::vector<int32_t> ColumnsByGroup(std::vector<int32_t> steps, int64_t group_size) {
  std::stable_sort(steps.begin(), steps.end(),
                   [group_size](int32_t a, int32_t b) { return a / group_size < b / group_size; });
  return steps;
}

std::vector<double> DampingLadder(double damp) {
  std::vector<double> ladder = {damp};
  // Products of tens miss kDampMax by a rounding; the last step is kDampMax itself.
  for (double next = std::max(damp * 10, kDampMin); next < kDampMax * 0.999; next *= 10) {
    ladder.push_back(next);
  }
  if (damp < kDampMax) ladder.push_back(kDampMax);
  return ladder;
}

std::string NoInputFallback() {
  return "no calibration sample gave this linear an input other than zero";
}
std::string NotDefiniteFallback(double damp) {
  return absl::StrCat("Hessian is not positive definite, in double and with damping ", damp);
}

absl::StatusOr<HessianFactor> FactorizeHessian(Matrix hessian, const Options& options,
                                               std::string_view name, const KeepGoing& keep_going) {
  if (hessian.rows() != hessian.cols()) {
    return absl::InvalidArgumentError(absl::StrCat("Hessian of ", std::string(name), " is ",
                                                   hessian.rows(), " x ", hessian.cols(),
                                                   ", not square"));
  }
  const int64_t n = hessian.rows();
  WALSH_RETURN_IF_ERROR(ValidateOptions(options, n));
  WALSH_RETURN_IF_ERROR(CheckElements(hessian, name));

  HessianFactor factor;
  factor.hessian = std::move(hessian);
  factor.order = ColumnSteps(Diagonal(factor.hessian), options);
  factor.is_dead.assign(static_cast<size_t>(n), 0);
  if (options.method == Method::kRtn) return factor;

  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double diagonal = factor.hessian(i, i);
    factor.is_dead[static_cast<size_t>(i)] = diagonal == 0 ? 1 : 0;
    factor.dead_columns += diagonal == 0 ? 1 : 0;
    sum += diagonal;
  }
  if (factor.dead_columns == n) {
    // Zeroing every weight because no sample arrived here would be worse than rounding them.
    factor.is_dead.assign(static_cast<size_t>(n), 0);
    factor.dead_columns = 0;
    factor.fallback = NoInputFallback();
    return factor;
  }
  // Over live columns only: the reference counts the ones that it puts on dead diagonals, which
  // makes the damping depend on the units of the activations.
  const double mean_diagonal = sum / static_cast<double>(n - factor.dead_columns);
  const std::vector<double> ladder = DampingLadder(options.damp);
  for (const bool in_double : {false, true}) {
    for (double damp : ladder) {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      factor.upper = in_double ? UpperFactor<double>(factor, mean_diagonal, damp)
                               : UpperFactor<float>(factor, mean_diagonal, damp);
      factor.damp = damp;
      if (!factor.upper.empty()) return factor;
    }
  }
  factor.is_dead.assign(static_cast<size_t>(n), 0);
  factor.dead_columns = 0;
  factor.fallback = NotDefiniteFallback(factor.damp);
  return factor;
}

}  // namespace walsh::gptq
