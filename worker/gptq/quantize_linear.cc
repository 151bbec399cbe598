#include "worker/gptq/quantize_linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/gptq/codebook.h"
#include "worker/gptq/tile.h"
#include "worker/kernels/kernels.h"

namespace walsh::gptq {
namespace {

constexpr int64_t kBlockColumns = 128;

int64_t Tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Blocks never cut a group in two: either a group is whole inside a block, or it starts with one.
// Where grids are chosen beforehand, groups do not matter.
int64_t BlockEnd(int64_t begin, int64_t in, const Options& options) {
  const int64_t group = options.group_size;
  if (HasStaticGroups(options)) return std::min(in, begin + kBlockColumns);
  if (group <= kBlockColumns) return std::min(in, begin + kBlockColumns / group * group);
  return std::min(begin + kBlockColumns, (begin / group + 1) * group);
}

GridForm FormOf(const Options& options) {
  if (options.grid == Grid::kCodebook) return GridForm::kCodebook;
  return options.zero_point == ZeroPoint::kFloat ? GridForm::kFloatZero : GridForm::kIntegerZero;
}

// Columns [begin, end) of kTileRows rows of a row-major matrix from `first_row`, to column-major;
// rows beyond the matrix are zero.
void LoadTile(const Matrix& m, int64_t first_row, int64_t begin, int64_t end, float* tile) {
  const int64_t rows = std::min(kTileRows, m.rows() - first_row);
  if (rows < kTileRows) std::fill_n(tile, (end - begin) * kTileRows, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = m.row(first_row + r);
    for (int64_t c = begin; c < end; ++c) tile[(c - begin) * kTileRows + r] = row[c];
  }
}

class LinearQuantizer {
 public:
  LinearQuantizer(std::string name, const Matrix& weights, const HessianFactor& factor,
                  const Options& options, ThreadPool& pool)
      : name_(std::move(name)),
        factor_(factor),
        options_(options),
        form_(FormOf(options)),
        pool_(pool),
        grids_per_tile_(HasStaticGroups(options) ? weights.cols() / options.group_size : 1),
        work_(weights.rows(), weights.cols()) {
    const int64_t rows = weights.rows();
    const int64_t in = weights.cols();
    QuantizedMatrix& q = result_.matrix;
    q.rows = rows;
    q.cols = in;
    q.bits = options.bits;
    q.group_size = options.group_size;
    q.symmetric = options.symmetric;
    q.codes.resize(static_cast<size_t>(rows * in));
    const auto n_groups = static_cast<size_t>(rows * q.groups());
    if (form_ == GridForm::kCodebook) {
      q.levels.resize(n_groups * kLevels);
    } else {
      q.scales.resize(n_groups);
      if (form_ == GridForm::kFloatZero) {
        q.float_zeros.resize(n_groups);
      } else {
        q.zeros.resize(n_groups);
      }
    }
    result_.dequantized = Matrix(rows, in);
    grids_.resize(static_cast<size_t>(Tiles(rows) * grids_per_tile_));
    // Columns in the order of the steps.
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < in; ++i) {
        const int32_t column = factor.order[static_cast<size_t>(i)];
        work_(r, i) = factor.is_dead[static_cast<size_t>(column)] != 0 ? 0.0f : weights(r, column);
      }
    }
  }

  absl::Status Run(const KeepGoing& keep_going) {
    const int64_t in = work_.cols();
    if (HasStaticGroups(options_)) ChooseStaticGrids();
    Matrix errors(work_.rows(), kBlockColumns);
    Matrix negated(factor_.correction.empty() ? 0 : work_.rows(), kBlockColumns);
    for (int64_t begin = 0; begin < in;) {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      const int64_t end = BlockEnd(begin, in, options_);
      pool_.ParallelFor(Tiles(work_.rows()),
                        [&](int64_t tile) { QuantizeTile(tile, begin, end, errors, negated); });
      if (!factor_.upper.empty() && end < in) {
        kernels::SubtractProductParams update;
        update.m = work_.rows();
        update.n = in - end;
        update.k = end - begin;
        update.a = errors.data();
        update.a_stride = errors.cols();
        update.b = factor_.upper.row(begin) + end;
        update.b_stride = in;
        update.c = work_.data() + end;
        update.c_stride = in;
        WALSH_RETURN_IF_ERROR(kernels::SubtractProduct(update, {kernels::Backend::kCpu, &pool_}));
        if (!negated.empty()) {
          update.a = negated.data();
          update.b = factor_.correction.row(begin) + end;
          WALSH_RETURN_IF_ERROR(kernels::SubtractProduct(update, {kernels::Backend::kCpu, &pool_}));
        }
      }
      begin = end;
    }
    result_.clamped_groups = clamped_groups_;
    if (!has_overflow_) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat(name_, ": a weight overflowed while it was updated"));
  }

  QuantizedLinear TakeResult() && { return std::move(result_); }

 private:
  // Steps [begin, end). `negated` gets the weights that were quantized, for the correction.
  void QuantizeTile(int64_t tile, int64_t begin, int64_t end, Matrix& errors, Matrix& negated) {
    const int64_t first_row = tile * kTileRows;
    const int64_t width = end - begin;
    const int64_t group = options_.group_size;
    Matrix weights(width, kTileRows), codes(width, kTileRows), tile_errors(width, kTileRows);
    LoadTile(work_, first_row, begin, end, weights.data());

    for (int64_t first = 0; first < width;) {
      int64_t last = first + 1;
      TileGrid& grid = GridOf(tile, begin + first);
      if (!HasStaticGroups(options_)) {
        last = std::min(width, (begin + first) / group * group + group - begin);
        if ((begin + first) % group == 0) {
          ChooseGrid(first_row, begin + first, weights.row(first), last - first, grid);
        }
      }
      QuantizeColumnsParams p;
      p.bits = options_.bits;
      p.n = width;
      p.first = first;
      p.last = last;
      p.grid = &grid;
      p.weights = weights.data();
      p.u = factor_.upper.empty() ? nullptr : factor_.upper.row(begin) + begin;
      p.u_stride = work_.cols();
      p.correction = factor_.correction.empty() ? nullptr : factor_.correction.row(begin) + begin;
      p.codes = codes.data();
      p.errors = tile_errors.data();
      p.form = form_;
      QuantizeColumns(p);
      StoreCodes(first_row, begin, first, last, codes, grid);
      first = last;
    }
    if (factor_.upper.empty()) return;
    const int64_t rows = std::min(kTileRows, work_.rows() - first_row);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        // Codes tell nothing: clamping makes a number of a NaN.
        if (!std::isfinite(tile_errors(i, r))) has_overflow_ = true;
        errors(first_row + r, i) = tile_errors(i, r);
        if (!negated.empty()) negated(first_row + r, i) = -weights(i, r);
      }
    }
  }

  // Of the column of `step`: with static groups its group's, else that of the running group.
  TileGrid& GridOf(int64_t tile, int64_t step) {
    const int64_t group =
        grids_per_tile_ == 1 ? 0 : factor_.order[static_cast<size_t>(step)] / options_.group_size;
    return grids_[static_cast<size_t>(tile * grids_per_tile_ + group)];
  }

  // A group's columns in the order of their steps: what their sums are rounded to does not depend
  // on their places in the group.
  void ChooseStaticGrids() {
    const int64_t group = options_.group_size;
    std::vector<std::vector<int64_t>> steps(static_cast<size_t>(grids_per_tile_));
    for (int64_t step = 0; step < work_.cols(); ++step) {
      steps[static_cast<size_t>(factor_.order[static_cast<size_t>(step)] / group)].push_back(step);
    }
    pool_.ParallelFor(Tiles(work_.rows()), [&](int64_t tile) {
      const int64_t first_row = tile * kTileRows;
      Matrix columns(group, kTileRows);
      for (const std::vector<int64_t>& of_group : steps) {
        for (int64_t i = 0; i < group; ++i) {
          const int64_t step = of_group[static_cast<size_t>(i)];
          LoadTile(work_, first_row, step, step + 1, columns.row(i));
        }
        TileGrid& grid = GridOf(tile, of_group.front());
        FindGridOf(of_group, columns.data(), grid);
        StoreGrid(first_row, of_group.front(), grid);
      }
    });
  }

  // `in_block` holds the group's columns, or as many of them as the block does.
  void ChooseGrid(int64_t first_row, int64_t first_step, const float* in_block, int64_t n,
                  TileGrid& grid) {
    const int64_t group = options_.group_size;
    std::vector<int64_t> steps(static_cast<size_t>(group));
    std::iota(steps.begin(), steps.end(), first_step);
    if (n == group) {
      FindGridOf(steps, in_block, grid);
    } else {
      // The group starts with the block, so that `work_` is as fresh as the block.
      Matrix columns(group, kTileRows);
      LoadTile(work_, first_row, first_step, first_step + group, columns.data());
      FindGridOf(steps, columns.data(), grid);
    }
    StoreGrid(first_row, first_step, grid);
  }

  // The grid of a group whose columns have these steps and weights.
  void FindGridOf(const std::vector<int64_t>& steps, const float* columns, TileGrid& grid) const {
    const auto n = static_cast<int64_t>(steps.size());
    if (form_ != GridForm::kCodebook) {
      FindGrid({options_.bits, options_.symmetric, options_.mse_clip, form_}, columns, n, grid);
      return;
    }
    std::vector<double> importance(steps.size(), 1.0);
    if (!factor_.upper.empty()) {
      for (size_t i = 0; i < steps.size(); ++i) {
        const double diagonal = factor_.upper(steps[i], steps[i]);
        importance[i] = 1 / (diagonal * diagonal);
      }
    }
    FindLevels(columns, n, importance, grid);
  }

  // The grid of the group that the column of `step` is in.
  void StoreGrid(int64_t first_row, int64_t step, const TileGrid& grid) {
    const int64_t g = factor_.order[static_cast<size_t>(step)] / options_.group_size;
    const int64_t rows = std::min(kTileRows, work_.rows() - first_row);
    QuantizedMatrix& q = result_.matrix;
    for (int64_t r = 0; r < rows; ++r) {
      const auto index = static_cast<size_t>((first_row + r) * q.groups() + g);
      if (form_ == GridForm::kCodebook) {
        for (size_t k = 0; k < kLevels; ++k) q.levels[index * kLevels + k] = grid.levels[k][r];
        const float largest = std::max(-grid.levels[0][r], grid.levels[kLevels - 1][r]);
        if (largest == kScaleMax) ++clamped_groups_;
        continue;
      }
      q.scales[index] = grid.scales[r];
      if (form_ == GridForm::kFloatZero) {
        q.float_zeros[index] = grid.zeros[r];
      } else {
        q.zeros[index] = static_cast<uint8_t>(grid.zeros[r]);
      }
      if (grid.scales[r] == kScaleMax) ++clamped_groups_;
    }
  }

  void StoreCodes(int64_t first_row, int64_t begin, int64_t first, int64_t last,
                  const Matrix& codes, const TileGrid& grid) {
    const int64_t rows = std::min(kTileRows, work_.rows() - first_row);
    const auto code_max = static_cast<float>((1 << options_.bits) - 1);
    QuantizedMatrix& q = result_.matrix;
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* code_row = q.codes.data() + (first_row + r) * q.cols;
      float* dequantized = result_.dequantized.row(first_row + r);
      for (int64_t i = first; i < last; ++i) {
        const float code = codes(i, r);
        if (!(code >= 0 && code <= code_max)) {  // NaN, where the CPU's clamping lets it through
          has_overflow_ = true;
          continue;
        }
        const int32_t column = factor_.order[static_cast<size_t>(begin + i)];
        code_row[column] = static_cast<uint8_t>(code);
        dequantized[column] = form_ == GridForm::kCodebook
                                  ? grid.levels[static_cast<int>(code)][r]
                                  : grid.scales[r] * (code - grid.zeros[r]);
      }
    }
  }

  const std::string name_;
  const HessianFactor& factor_;
  const Options& options_;
  const GridForm form_;
  ThreadPool& pool_;
  const int64_t grids_per_tile_;
  Matrix work_;                  // [out, in], columns in the order of the steps, updated
  std::vector<TileGrid> grids_;  // [tiles, grids_per_tile_]
  QuantizedLinear result_;
  std::atomic<int64_t> clamped_groups_ = 0;
  std::atomic<bool> has_overflow_ = false;
};

// tr(M H Mᵀ) for symmetric H.
absl::StatusOr<double> TraceForm(const Matrix& m, const Matrix& h, ThreadPool& pool) {
  Matrix product(m.rows(), m.cols());
  kernels::MatmulParams p;
  p.n_tokens = m.rows();
  p.in = m.cols();
  p.out = h.rows();
  p.x = m.data();
  p.x_stride = m.cols();
  p.weights = h.data();
  p.y = product.data();
  p.y_stride = product.cols();
  WALSH_RETURN_IF_ERROR(kernels::Matmul(p, {kernels::Backend::kCpu, &pool}));
  double trace = 0;
  for (int64_t i = 0; i < m.size(); ++i) trace += double{m.data()[i]} * product.data()[i];
  return trace;
}

absl::Status CheckWeights(std::string_view name, const Matrix& weights) {
  for (int64_t i = 0; i < weights.rows(); ++i) {
    for (int64_t j = 0; j < weights.cols(); ++j) {
      if (!std::isfinite(weights(i, j))) {
        return absl::DataLossError(
            absl::StrCat(std::string(name), ": weight [", i, ", ", j, "] is ", weights(i, j)));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<QuantizedLinear> QuantizeLinear(std::string_view name, const Matrix& weights,
                                               const HessianFactor& factor, const Options& options,
                                               ThreadPool& pool, const KeepGoing& keep_going) {
  const std::string label(name);
  WALSH_RETURN_IF_ERROR(ValidateOptions(options, weights.cols()));
  if (factor.hessian.rows() != weights.cols()) {
    return absl::InvalidArgumentError(absl::StrCat(
        label, " has ", weights.cols(), " inputs but its Hessian has ", factor.hessian.rows()));
  }
  WALSH_RETURN_IF_ERROR(CheckWeights(name, weights));

  LinearQuantizer quantizer(label, weights, factor, options, pool);
  WALSH_RETURN_IF_ERROR(quantizer.Run(keep_going));
  QuantizedLinear result = std::move(quantizer).TakeResult();

  WALSH_ASSIGN_OR_RETURN(const double output, TraceForm(weights, factor.hessian, pool));
  Matrix difference = weights.Copy();
  for (int64_t i = 0; i < difference.size(); ++i) {
    difference.data()[i] -= result.dequantized.data()[i];
  }
  WALSH_ASSIGN_OR_RETURN(const double error, TraceForm(difference, factor.hessian, pool));
  // Rounding can leave a tiny negative trace where H has no full rank.
  const double squared_error = std::max(error, 0.0);
  result.relative_error =
      squared_error == 0 ? 0 : (output == 0 ? 1 : squared_error / std::abs(output));
  if (!std::isfinite(result.relative_error)) {
    return absl::DataLossError(absl::StrCat(label, ": output error is ", result.relative_error));
  }
  return result;
}

}  // namespace walsh::gptq
