#include "worker/kernels/cpu/packed_storage.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/tensor/half.h"

namespace walsh::kernels {
namespace cpu {
namespace {

int ReadStep(const uint8_t* block, int bits, int64_t step, int64_t byte) {
  switch (bits) {
    case 2:
      return (block[step / 4 * kVectorBytes + byte] >> (2 * (step % 4))) & 3;
    case 3:
      return ReadStep(block, 2, step, byte) | (((block[2 * kVectorBytes + byte] >> step) & 1) << 2);
    case 4:
      return (block[step / 2 * kVectorBytes + byte] >> (4 * (step % 2))) & 15;
    default:
      return block[step * kVectorBytes + byte];
  }
}

// Adds `code` to a block that holds 0 there.
void WriteStep(uint8_t* block, int bits, int64_t step, int64_t byte, int code) {
  switch (bits) {
    case 2:
      block[step / 4 * kVectorBytes + byte] |= static_cast<uint8_t>((code & 3) << (2 * (step % 4)));
      break;
    case 3:
      WriteStep(block, 2, step, byte, code);
      block[2 * kVectorBytes + byte] |= static_cast<uint8_t>((code >> 2) << step);
      break;
    case 4:
      block[step / 2 * kVectorBytes + byte] |= static_cast<uint8_t>(code << (4 * (step % 2)));
      break;
    default:
      block[step * kVectorBytes + byte] = static_cast<uint8_t>(code);
  }
}

void WriteCode(uint8_t* block, int bits, int64_t row, int64_t col, int code) {
  WriteStep(block, bits, col / kStepCols, row * kStepCols + col % kStepCols, code);
}

}  // namespace

int ReadCode(const uint8_t* block, int bits, int64_t row, int64_t col) {
  return ReadStep(block, bits, col / kStepCols, row * kStepCols + col % kStepCols);
}

}  // namespace cpu

namespace {

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("PackedMatrix: ", parts...));
}

absl::Status CheckGridShape(const QuantizedMatrix& m) {
  const auto n_groups = static_cast<size_t>(m.rows * m.groups());
  if (m.has_codebook()) {
    if (m.bits != 2) return Invalid("a codebook is of 2 bits, not of ", m.bits);
    if (m.levels.size() != n_groups * cpu::kCodebookLevels) {
      return Invalid("levels has ", m.levels.size(), " values, needs ",
                     n_groups * cpu::kCodebookLevels);
    }
    if (!m.scales.empty() || !m.zeros.empty() || !m.float_zeros.empty()) {
      return Invalid("scales or zeros beside a codebook");
    }
    return absl::OkStatus();
  }
  if (m.scales.size() != n_groups) {
    return Invalid("scales has ", m.scales.size(), " values, needs ", n_groups);
  }
  if (m.has_float_zeros()) {
    if (m.float_zeros.size() == n_groups && m.zeros.empty()) return absl::OkStatus();
    return Invalid("float_zeros has ", m.float_zeros.size(), " values and zeros ", m.zeros.size(),
                   ", needs ", n_groups, " and 0");
  }
  if (m.zeros.size() != n_groups) {
    return Invalid("zeros has ", m.zeros.size(), " values, needs ", n_groups);
  }
  return absl::OkStatus();
}

absl::Status CheckShape(const QuantizedMatrix& m) {
  constexpr int64_t kSizeMax = std::numeric_limits<int32_t>::max();
  if (m.bits != 2 && m.bits != 3 && m.bits != 4 && m.bits != 8) {
    return Invalid("bits must be 2, 3, 4 or 8, is ", m.bits);
  }
  if (m.rows < 0 || m.rows > kSizeMax) return Invalid("rows is ", m.rows);
  if (m.cols < 0 || m.cols > kSizeMax) return Invalid("cols is ", m.cols);
  if (m.group_size < 1 || m.cols % m.group_size != 0) {
    return Invalid("group_size must divide cols ", m.cols, ", is ", m.group_size);
  }
  if (m.group_size % kActivationBlock != 0 && m.group_size < m.cols) {
    return Invalid("group_size must be a multiple of ", kActivationBlock, " or the whole row, is ",
                   m.group_size);
  }
  if (m.codes.size() != static_cast<size_t>(m.rows * m.cols)) {
    return Invalid("codes has ", m.codes.size(), " values for ", m.rows, " x ", m.cols);
  }
  return CheckGridShape(m);
}

absl::Status CheckHalves(const char* what, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]) || HalfToFloat(FloatToHalf(values[i])) != values[i]) {
      return Invalid(what, "[", i, "] must be a finite half-precision number, is ", values[i]);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckValues(const QuantizedMatrix& m) {
  const int end = 1 << m.bits;
  for (size_t i = 0; i < m.codes.size(); ++i) {
    if (m.codes[i] >= end) {
      return Invalid("codes[", i, "] must be below ", end, ", is ", m.codes[i]);
    }
  }
  for (size_t i = 0; i < m.zeros.size(); ++i) {
    if (m.zeros[i] >= end) {
      return Invalid("zeros[", i, "] must be below ", end, ", is ", m.zeros[i]);
    }
  }
  for (const auto& [what, values] :
       {std::pair("scales", &m.scales), std::pair("float_zeros", &m.float_zeros),
        std::pair("levels", &m.levels)}) {
    if (absl::Status status = CheckHalves(what, *values); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// `n` numbers of each group, [rows, groups, n], as [tiles, groups, n, 16] in half precision; none
// where there are none.
cpu::WeightArray<uint16_t> TileHalves(const std::vector<float>& values, int64_t n,
                                      const QuantizedMatrix& m, int64_t n_tiles) {
  if (values.empty()) return {};
  const int64_t n_groups = m.groups();
  cpu::WeightArray<uint16_t> halves(n_tiles * n_groups * n * cpu::kTileRows);
  for (int64_t row = 0; row < m.rows; ++row) {
    const int64_t tile = row / cpu::kTileRows, lane = row % cpu::kTileRows;
    for (int64_t i = 0; i < n_groups * n; ++i) {
      halves.data()[(tile * n_groups * n + i) * cpu::kTileRows + lane] =
          FloatToHalf(values[static_cast<size_t>(row * n_groups * n + i)]);
    }
  }
  return halves;
}

// Storage of the right sizes with all but codes and zeros that are codes, which are 0.
std::shared_ptr<PackedMatrix::Storage> MakeStorage(const QuantizedMatrix& m) {
  auto storage = std::make_shared<PackedMatrix::Storage>();
  storage->n_tiles = (m.rows + cpu::kTileRows - 1) / cpu::kTileRows;
  storage->n_blocks = (m.cols + cpu::kBlockCols - 1) / cpu::kBlockCols;
  storage->n_groups = m.groups();
  storage->blocks_per_group = (m.group_size + cpu::kBlockCols - 1) / cpu::kBlockCols;
  storage->codes =
      cpu::WeightArray<uint8_t>(storage->n_tiles * storage->n_blocks * cpu::BlockBytes(m.bits));
  storage->scales = TileHalves(m.scales, 1, m, storage->n_tiles);
  storage->float_zeros = TileHalves(m.float_zeros, 1, m, storage->n_tiles);
  storage->levels = TileHalves(m.levels, cpu::kCodebookLevels, m, storage->n_tiles);
  return storage;
}

// The power of two that brings `highest` into [2^14, 2^15): there half precision is at its best,
// and 28 binary orders of smaller scales are still normal numbers.
float ScaleFactor(float highest) {
  if (highest == 0) return 1.0f;
  return std::ldexp(1.0f, std::clamp(std::ilogb(highest) - 14, -126, 126));
}

}  // namespace

absl::StatusOr<PackedMatrix> PackedMatrix::Pack(const QuantizedMatrix& m) {
  if (absl::Status status = CheckShape(m); !status.ok()) return status;
  if (absl::Status status = CheckValues(m); !status.ok()) return status;
  auto storage = MakeStorage(m);
  for (int64_t row = 0; row < m.rows; ++row) {
    const int64_t tile = row / cpu::kTileRows;
    const int64_t lane = row % cpu::kTileRows;
    uint8_t* codes = storage->codes.data() + tile * storage->n_blocks * cpu::BlockBytes(m.bits);
    for (int64_t col = 0; col < m.cols; ++col) {
      cpu::WriteCode(codes + col / cpu::kBlockCols * cpu::BlockBytes(m.bits), m.bits, lane,
                     col % cpu::kBlockCols, m.codes[row * m.cols + col]);
    }
  }
  const bool uniform = std::all_of(m.zeros.begin(), m.zeros.end(),
                                   [&](uint8_t zero) { return zero == m.zeros.front(); });
  if (uniform) {
    storage->uniform_zero = m.zeros.empty() ? 0 : m.zeros.front();
  } else {
    storage->zeros = cpu::WeightArray<uint8_t>(storage->scales.size());
    for (int64_t row = 0; row < m.rows; ++row) {
      for (int64_t group = 0; group < storage->n_groups; ++group) {
        storage->zeros.data()[(row / cpu::kTileRows * storage->n_groups + group) * cpu::kTileRows +
                              row % cpu::kTileRows] = m.zeros[row * storage->n_groups + group];
      }
    }
  }
  PackedMatrix packed;
  packed.rows_ = m.rows;
  packed.cols_ = m.cols;
  packed.bits_ = m.bits;
  packed.group_size_ = m.group_size;
  packed.storage_ = std::move(storage);
  return packed;
}

absl::StatusOr<PackedMatrix> PackedMatrix::PackDense8(const Matrix& matrix) {
  constexpr int kZero = 128;
  constexpr float kCodeMax = 127.0f;
  QuantizedMatrix q;
  q.rows = matrix.rows();
  q.cols = matrix.cols();
  q.bits = 8;
  q.group_size = matrix.cols() % kActivationBlock == 0 ? kActivationBlock : matrix.cols();
  q.group_size = std::max<int64_t>(1, q.group_size);
  q.symmetric = true;
  float highest = 0;
  for (int64_t i = 0; i < matrix.size(); ++i) {
    const float magnitude = std::fabs(matrix.data()[i]);
    if (!std::isfinite(magnitude)) {
      return Invalid("matrix value ", i, " is not finite");
    }
    highest = std::max(highest, magnitude);
  }
  const float factor = ScaleFactor(highest / kCodeMax);
  q.codes.resize(static_cast<size_t>(matrix.size()));
  q.scales.resize(static_cast<size_t>(q.rows * q.groups()));
  q.zeros.assign(q.scales.size(), kZero);
  for (size_t group = 0; group < q.scales.size(); ++group) {
    const float* w = matrix.data() + group * q.group_size;
    float group_highest = 0;
    for (int64_t i = 0; i < q.group_size; ++i) {
      group_highest = std::max(group_highest, std::fabs(w[i]));
    }
    // The scale is rounded first, and the codes are chosen for the rounded one.
    const float scale = HalfToFloat(FloatToHalf(group_highest / kCodeMax / factor));
    q.scales[group] = scale;
    for (int64_t i = 0; i < q.group_size; ++i) {
      const float code = scale == 0 ? 0.0f : std::nearbyint(w[i] / (scale * factor));
      q.codes[group * q.group_size + i] =
          static_cast<uint8_t>(kZero + static_cast<int>(std::clamp(code, -kCodeMax, kCodeMax)));
    }
  }
  absl::StatusOr<PackedMatrix> packed = Pack(q);
  if (!packed.ok()) return packed.status();
  auto storage = std::const_pointer_cast<Storage>(packed->storage_);
  storage->factor = factor;
  return packed;
}

int64_t PackedMatrix::size_bytes() const {
  if (storage_ == nullptr) return 0;
  return storage_->codes.size_bytes() + storage_->scales.size_bytes() +
         storage_->zeros.size_bytes() + storage_->float_zeros.size_bytes() +
         storage_->levels.size_bytes();
}

Matrix PackedMatrix::Dequantize() const {
  Matrix dense(rows_, cols_);
  for (int64_t row = 0; row < rows_; ++row) {
    const int64_t tile = row / cpu::kTileRows;
    const int64_t lane = row % cpu::kTileRows;
    const uint8_t* zeros = storage_->tile_zeros(tile);
    const uint16_t* float_zeros = storage_->tile_float_zeros(tile);
    const uint16_t* levels = storage_->tile_levels(tile);
    for (int64_t col = 0; col < cols_; ++col) {
      const uint8_t* block =
          storage_->tile_codes(tile, bits_) + col / cpu::kBlockCols * cpu::BlockBytes(bits_);
      const int64_t group = col / group_size_;
      const int64_t at = group * cpu::kTileRows + lane;
      const int code = cpu::ReadCode(block, bits_, lane, col % cpu::kBlockCols);
      if (levels != nullptr) {
        dense(row, col) =
            HalfToFloat(levels[(group * cpu::kCodebookLevels + code) * cpu::kTileRows + lane]);
        continue;
      }
      const float scale = HalfToFloat(storage_->tile_scales(tile)[at]) * storage_->factor;
      if (float_zeros != nullptr) {
        dense(row, col) = scale * (static_cast<float>(code) - HalfToFloat(float_zeros[at]));
      } else {
        const int zero = zeros == nullptr ? storage_->uniform_zero : zeros[at];
        dense(row, col) = scale * static_cast<float>(code - zero);
      }
    }
  }
  return dense;
}

}  // namespace walsh::kernels
