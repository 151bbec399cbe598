#include "worker/io/gptq_packing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "worker/io/not_finite.h"
#include "worker/tensor/half.h"

namespace walsh {
namespace {

constexpr int64_t kRun = kPackingRun;
constexpr int kBitsMax = 8;

using RunValues = std::array<uint8_t, kRun>;
using RunWords = std::array<uint32_t, kBitsMax>;  // the first `bits` count

RunWords PackRun(const RunValues& values, int bits) {
  RunWords words = {};
  for (int i = 0; i < kRun; ++i) {
    const int word = i * bits / 32;
    const int shift = i * bits % 32;
    const uint32_t value = values[static_cast<size_t>(i)];
    words[static_cast<size_t>(word)] |= value << shift;
    if (shift + bits > 32) words[static_cast<size_t>(word + 1)] |= value >> (32 - shift);
  }
  return words;
}

RunValues UnpackRun(const RunWords& words, int bits) {
  RunValues values;
  const uint32_t mask = (1u << bits) - 1u;
  for (int i = 0; i < kRun; ++i) {
    const int word = i * bits / 32;
    const int shift = i * bits % 32;
    uint32_t value = words[static_cast<size_t>(word)] >> shift;
    if (shift + bits > 32) value |= words[static_cast<size_t>(word + 1)] << (32 - shift);
    values[static_cast<size_t>(i)] = static_cast<uint8_t>(value & mask);
  }
  return values;
}

absl::Status CheckBits(const std::vector<uint8_t>& values, int bits, const char* what) {
  const auto limit = static_cast<unsigned>(1u << bits);
  for (const uint8_t value : values) {
    if (value >= limit) {
      return absl::InvalidArgumentError(
          absl::StrCat("a ", what, " is ", static_cast<int>(value), ", must be below ", limit));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMatrix(const QuantizedMatrix& m) {
  WALSH_RETURN_IF_ERROR(ValidateGptqShape(ShapeOf(m)));
  const auto n_codes = static_cast<size_t>(m.rows * m.cols);
  const auto n_groups = static_cast<size_t>(m.rows * m.groups());
  if (m.has_codebook()) {
    const size_t n_levels = n_groups << m.bits;
    if (m.codes.size() == n_codes && m.levels.size() == n_levels && m.scales.empty() &&
        m.zeros.empty() && m.float_zeros.empty()) {
      return CheckBits(m.codes, m.bits, "code");
    }
    return absl::InvalidArgumentError(absl::StrCat(
        m.codes.size(), " codes and ", m.levels.size(), " levels, with scales or zeros, for ",
        n_codes, " weights in ", n_groups, " groups of a codebook"));
  }
  const size_t n_zeros = m.zeros.size() + m.float_zeros.size();
  if (m.codes.size() != n_codes || m.scales.size() != n_groups || n_zeros != n_groups) {
    return absl::InvalidArgumentError(absl::StrCat(m.codes.size(), " codes, ", m.scales.size(),
                                                   " scales and ", n_zeros, " zeros for ", n_codes,
                                                   " weights in ", n_groups, " groups"));
  }
  WALSH_RETURN_IF_ERROR(CheckBits(m.codes, m.bits, "code"));
  return CheckBits(m.zeros, m.bits, "zero");
}

absl::Status CheckOrder(const OrderedMatrix& ordered) {
  const int64_t cols = ordered.matrix.cols;
  std::vector<bool> is_taken(static_cast<size_t>(cols), false);
  bool is_permutation = static_cast<int64_t>(ordered.input_order.size()) == cols;
  for (const int32_t input : ordered.input_order) {
    is_permutation =
        is_permutation && input >= 0 && input < cols && !is_taken[static_cast<size_t>(input)];
    if (!is_permutation) break;
    is_taken[static_cast<size_t>(input)] = true;
  }
  if (is_permutation) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the order of inputs is no permutation of ", cols, " columns"));
}

void PackCodes(const QuantizedMatrix& m, std::vector<uint32_t>& qweight) {
  RunValues run;
  for (int64_t out = 0; out < m.rows; ++out) {
    for (int64_t in = 0; in < m.cols; in += kRun) {
      std::copy_n(m.codes.begin() + out * m.cols + in, kRun, run.begin());
      const RunWords words = PackRun(run, m.bits);
      const int64_t first_word = in / kRun * m.bits;
      for (int w = 0; w < m.bits; ++w) {
        qweight[static_cast<size_t>((first_word + w) * m.rows + out)] =
            words[static_cast<size_t>(w)];
      }
    }
  }
}

void PackZeros(const QuantizedMatrix& m, std::vector<uint32_t>& qzeros) {
  const int64_t row_words = m.rows / kRun * m.bits;
  RunValues run;
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; out += kRun) {
      for (int64_t i = 0; i < kRun; ++i) {
        run[static_cast<size_t>(i)] = m.zeros[static_cast<size_t>((out + i) * m.groups() + group)];
      }
      const RunWords words = PackRun(run, m.bits);
      std::copy_n(words.begin(), m.bits, qzeros.begin() + group * row_words + out / kRun * m.bits);
    }
  }
}

// `n` numbers of each group, [rows, groups, n], as [groups, rows, n] in half precision. `what`
// names one of them.
absl::StatusOr<std::vector<uint16_t>> PackHalves(const char* what, const QuantizedMatrix& m,
                                                 const std::vector<float>& values, int64_t n) {
  std::vector<uint16_t> halves(values.size());
  if (values.empty()) return halves;
  for (int64_t out = 0; out < m.rows; ++out) {
    for (int64_t group = 0; group < m.groups(); ++group) {
      for (int64_t i = 0; i < n; ++i) {
        const float value = values[static_cast<size_t>((out * m.groups() + group) * n + i)];
        const uint16_t half = FloatToHalf(value);
        if (!std::isfinite(value) || HalfToFloat(half) != value) {
          return absl::InvalidArgumentError(absl::StrCat("the ", what, " of output ", out,
                                                         ", group ", group, " is ", value,
                                                         ", not a finite value of half precision"));
        }
        halves[static_cast<size_t>((group * m.rows + out) * n + i)] = half;
      }
    }
  }
  return halves;
}

// Tiles of 32 outputs: their words lie side by side, and each output's codes are written in runs.
void UnpackCodes(const std::vector<uint32_t>& qweight, QuantizedMatrix& m) {
  RunWords words = {};
  for (int64_t tile = 0; tile < m.rows; tile += kRun) {
    for (int64_t in = 0; in < m.cols; in += kRun) {
      const int64_t first_word = in / kRun * m.bits;
      for (int64_t out = tile; out < tile + kRun; ++out) {
        for (int w = 0; w < m.bits; ++w) {
          words[static_cast<size_t>(w)] =
              qweight[static_cast<size_t>((first_word + w) * m.rows + out)];
        }
        const RunValues run = UnpackRun(words, m.bits);
        std::copy(run.begin(), run.end(), m.codes.begin() + out * m.cols + in);
      }
    }
  }
}

void UnpackZeros(const std::vector<uint32_t>& qzeros, QuantizedMatrix& m) {
  const int64_t row_words = m.rows / kRun * m.bits;
  RunWords words = {};
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; out += kRun) {
      std::copy_n(qzeros.begin() + group * row_words + out / kRun * m.bits, m.bits, words.begin());
      const RunValues run = UnpackRun(words, m.bits);
      for (int64_t i = 0; i < kRun; ++i) {
        m.zeros[static_cast<size_t>((out + i) * m.groups() + group)] = run[static_cast<size_t>(i)];
      }
    }
  }
}

std::vector<float> UnpackHalves(const std::vector<uint16_t>& halves, const QuantizedMatrix& m,
                                int64_t n) {
  std::vector<float> values(halves.size());
  if (halves.empty()) return values;
  for (int64_t group = 0; group < m.groups(); ++group) {
    for (int64_t out = 0; out < m.rows; ++out) {
      for (int64_t i = 0; i < n; ++i) {
        values[static_cast<size_t>((out * m.groups() + group) * n + i)] =
            HalfToFloat(halves[static_cast<size_t>((group * m.rows + out) * n + i)]);
      }
    }
  }
  return values;
}

// DATA_LOSS names the first of `halves` [groups, row_values] that is not finite.
absl::Status CheckHalves(const char* what, std::span<const uint16_t> halves, int64_t row_values) {
  const std::optional<int64_t> bad = FirstNotFiniteHalf(halves);
  if (!bad.has_value()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat("the ", what, " at [", *bad / row_values, ", ", *bad % row_values, "] is ",
                   HalfToFloat(halves[static_cast<size_t>(*bad)]), ", must be finite"));
}

}  // namespace

absl::Status ValidateGptqShape(const GptqShape& shape) {
  if (shape.bits != 2 && shape.bits != 3 && shape.bits != 4 && shape.bits != 8) {
    return absl::InvalidArgumentError(absl::StrCat(shape.bits, " bits, must be 2, 3, 4 or 8"));
  }
  if (shape.rows < kRun || shape.rows % kRun != 0 || shape.cols < kRun || shape.cols % kRun != 0) {
    return absl::InvalidArgumentError(absl::StrCat("a matrix of ", shape.rows, " outputs and ",
                                                   shape.cols,
                                                   " inputs: both must be multiples of 32"));
  }
  if (shape.grid == StoredGrid::kCodebook && shape.bits != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("a codebook of ", shape.bits, " bits, must be of 2"));
  }
  if (shape.group_size < 1 || shape.cols % shape.group_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("groups of ", shape.group_size, " do not divide ", shape.cols, " inputs"));
  }
  return absl::OkStatus();
}

GptqShape ShapeOf(const QuantizedMatrix& m) {
  return {.rows = m.rows,
          .cols = m.cols,
          .bits = m.bits,
          .group_size = m.group_size,
          .symmetric = m.symmetric,
          .grid = m.has_codebook()      ? StoredGrid::kCodebook
                  : m.has_float_zeros() ? StoredGrid::kFloatZeros
                                        : StoredGrid::kGptq};
}

std::vector<int32_t> GroupIndex(const GptqShape& shape) {
  std::vector<int32_t> g_idx(static_cast<size_t>(shape.cols));
  for (int64_t in = 0; in < shape.cols; ++in) {
    g_idx[static_cast<size_t>(in)] = static_cast<int32_t>(in / shape.group_size);
  }
  return g_idx;
}

absl::StatusOr<std::vector<int32_t>> InputOrder(std::span<const int32_t> g_idx,
                                                const GptqShape& shape) {
  WALSH_CHECK_EQ(static_cast<int64_t>(g_idx.size()), shape.cols);
  std::vector<int32_t> order(g_idx.size());
  std::vector<int64_t> filled(static_cast<size_t>(shape.groups()), 0);
  bool is_in_order = true;
  for (size_t in = 0; in < g_idx.size(); ++in) {
    if (g_idx[in] < 0 || g_idx[in] >= shape.groups()) {
      return absl::InvalidArgumentError(absl::StrCat("g_idx is ", g_idx[in], " at [", in,
                                                     "], must be 0 to ", shape.groups() - 1));
    }
    const auto group = static_cast<size_t>(g_idx[in]);
    if (filled[group] == shape.group_size) {
      return absl::InvalidArgumentError(absl::StrCat("g_idx gives group ", g_idx[in],
                                                     " more than its ", shape.group_size,
                                                     " inputs, at [", in, "]"));
    }
    const int64_t column = g_idx[in] * shape.group_size + filled[group]++;
    order[static_cast<size_t>(column)] = static_cast<int32_t>(in);
    is_in_order &= column == static_cast<int64_t>(in);
  }
  if (is_in_order) order.clear();
  return order;
}

absl::Status CheckScales(std::span<const uint16_t> scales, const GptqShape& shape) {
  return CheckHalves("scale", scales, shape.rows);
}
absl::Status CheckZeros(std::span<const uint16_t> zeros, const GptqShape& shape) {
  return CheckHalves("zero", zeros, shape.rows);
}
absl::Status CheckLevels(std::span<const uint16_t> levels, const GptqShape& shape) {
  return CheckHalves("level", levels, shape.rows << shape.bits);
}

void PackValues(std::span<const uint8_t> values, int bits, std::span<uint32_t> words) {
  WALSH_CHECK_EQ(values.size() % kRun, 0u);
  WALSH_CHECK_EQ(words.size(), values.size() / kRun * static_cast<size_t>(bits));
  RunValues run;
  for (size_t i = 0; i < values.size() / kRun; ++i) {
    std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(i * kRun), kRun, run.begin());
    const RunWords packed = PackRun(run, bits);
    std::copy_n(packed.begin(), bits, words.begin() + static_cast<std::ptrdiff_t>(i) * bits);
  }
}

absl::StatusOr<GptqTensors> PackGptq(const QuantizedMatrix& matrix) {
  WALSH_RETURN_IF_ERROR(CheckMatrix(matrix));
  const GptqShape shape = ShapeOf(matrix);
  GptqTensors out;
  out.qweight.resize(static_cast<size_t>(shape.weight_words() * shape.rows));
  out.g_idx = GroupIndex(shape);
  PackCodes(matrix, out.qweight);
  WALSH_ASSIGN_OR_RETURN(out.levels, PackHalves("level", matrix, matrix.levels, 1 << matrix.bits));
  WALSH_ASSIGN_OR_RETURN(out.scales, PackHalves("scale", matrix, matrix.scales, 1));
  WALSH_ASSIGN_OR_RETURN(out.zeros, PackHalves("zero", matrix, matrix.float_zeros, 1));
  if (shape.grid == StoredGrid::kGptq) {
    out.qzeros.resize(static_cast<size_t>(shape.groups() * shape.zero_words()));
    PackZeros(matrix, out.qzeros);
  }
  return out;
}

absl::StatusOr<GptqTensors> PackGptq(const OrderedMatrix& ordered) {
  if (ordered.input_order.empty()) return PackGptq(ordered.matrix);
  WALSH_RETURN_IF_ERROR(CheckMatrix(ordered.matrix));
  WALSH_RETURN_IF_ERROR(CheckOrder(ordered));
  QuantizedMatrix by_input = ordered.matrix;
  for (int64_t row = 0; row < by_input.rows; ++row) {
    const uint8_t* columns = ordered.matrix.codes.data() + row * by_input.cols;
    uint8_t* inputs = by_input.codes.data() + row * by_input.cols;
    for (int64_t c = 0; c < by_input.cols; ++c) {
      inputs[ordered.input_order[static_cast<size_t>(c)]] = columns[c];
    }
  }
  WALSH_ASSIGN_OR_RETURN(GptqTensors out, PackGptq(by_input));
  for (int64_t c = 0; c < by_input.cols; ++c) {
    const int32_t input = ordered.input_order[static_cast<size_t>(c)];
    out.g_idx[static_cast<size_t>(input)] = static_cast<int32_t>(c / by_input.group_size);
  }
  return out;
}

absl::StatusOr<QuantizedMatrix> UnpackGptq(const GptqTensors& tensors, const GptqShape& shape) {
  WALSH_RETURN_IF_ERROR(ValidateGptqShape(shape));
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.qweight.size()), shape.weight_words() * shape.rows);
  const int64_t n_grids = shape.groups() * shape.rows;
  const bool has_codebook = shape.grid == StoredGrid::kCodebook;
  const bool has_float_zeros = shape.grid == StoredGrid::kFloatZeros;
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.levels.size()),
                 has_codebook ? n_grids << shape.bits : 0);
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.scales.size()), has_codebook ? 0 : n_grids);
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.zeros.size()), has_float_zeros ? n_grids : 0);
  WALSH_CHECK_EQ(static_cast<int64_t>(tensors.qzeros.size()),
                 shape.grid == StoredGrid::kGptq ? shape.groups() * shape.zero_words() : 0);
  WALSH_RETURN_IF_ERROR(CheckLevels(tensors.levels, shape));
  WALSH_RETURN_IF_ERROR(CheckScales(tensors.scales, shape));
  WALSH_RETURN_IF_ERROR(CheckZeros(tensors.zeros, shape));
  QuantizedMatrix out;
  out.rows = shape.rows;
  out.cols = shape.cols;
  out.bits = shape.bits;
  out.group_size = shape.group_size;
  out.symmetric = shape.symmetric;
  out.codes.resize(static_cast<size_t>(shape.rows * shape.cols));
  UnpackCodes(tensors.qweight, out);
  if (shape.grid == StoredGrid::kGptq) {
    out.zeros.resize(static_cast<size_t>(n_grids));
    UnpackZeros(tensors.qzeros, out);
  }
  out.scales = UnpackHalves(tensors.scales, out, 1);
  out.float_zeros = UnpackHalves(tensors.zeros, out, 1);
  out.levels = UnpackHalves(tensors.levels, out, 1 << shape.bits);
  return out;
}

absl::StatusOr<OrderedMatrix> UnpackOrdered(const GptqTensors& tensors, const GptqShape& shape) {
  OrderedMatrix out;
  WALSH_ASSIGN_OR_RETURN(out.matrix, UnpackGptq(tensors, shape));
  WALSH_ASSIGN_OR_RETURN(out.input_order, InputOrder(tensors.g_idx, shape));
  if (out.input_order.empty()) return out;
  std::vector<uint8_t> inputs(static_cast<size_t>(shape.cols));
  for (int64_t row = 0; row < shape.rows; ++row) {
    uint8_t* codes = out.matrix.codes.data() + row * shape.cols;
    std::copy_n(codes, shape.cols, inputs.begin());
    for (int64_t c = 0; c < shape.cols; ++c) {
      codes[c] = inputs[static_cast<size_t>(out.input_order[static_cast<size_t>(c)])];
    }
  }
  return out;
}

Matrix Dequantize(const OrderedMatrix& ordered) {
  Matrix columns = Dequantize(ordered.matrix);
  if (ordered.input_order.empty()) return columns;
  Matrix inputs(columns.rows(), columns.cols());
  for (int64_t row = 0; row < columns.rows(); ++row) {
    for (int64_t c = 0; c < columns.cols(); ++c) {
      inputs(row, ordered.input_order[static_cast<size_t>(c)]) = columns(row, c);
    }
  }
  return inputs;
}

}  // namespace walsh
