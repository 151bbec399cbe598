// A linear's weights as integers with group scales: what GPTQ makes, the artifact stores and the
// kernels repack.
//
//   W[r, c] ≈ scale(r, g) · (code(r, c) − zero(r, g)),  g = c / group_size
//
// with a zero that is a code or any number; or by a table of its own for each group (a codebook):
//
//   W[r, c] ≈ level(r, g, code(r, c))
//
// Scales, zeros that are no codes, and levels are exactly representable in IEEE half precision,
// since that is how they are stored: the quantizer rounds them first and chooses the codes for what
// they were rounded to.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/tensor/matrix.h"

namespace walsh {

struct QuantizedMatrix {
  int64_t rows = 0;  // out
  int64_t cols = 0;  // in
  int bits = 0;      // 2, 3, 4 or 8
  // Columns of a group; divides cols; equals cols for one group per output channel.
  int64_t group_size = 0;
  bool symmetric = false;
  std::vector<uint8_t> codes;  // [rows, cols], each below 2^bits
  // Either a codebook or scales, and with the scales one of the two kinds of zeros.
  std::vector<float> scales;       // [rows, groups]
  std::vector<uint8_t> zeros;      // [rows, groups], each below 2^bits
  std::vector<float> float_zeros;  // [rows, groups]
  std::vector<float> levels;       // [rows, groups, 2^bits]

  bool has_codebook() const { return !levels.empty(); }
  bool has_float_zeros() const { return !float_zeros.empty(); }
  int64_t groups() const { return group_size == 0 ? 0 : cols / group_size; }
};

// [rows, cols], what the integers stand for, exactly.
inline Matrix Dequantize(const QuantizedMatrix& m) {
  Matrix dense(m.rows, m.cols);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) {
      const auto g = static_cast<size_t>(r * m.groups() + c / m.group_size);
      const int code = m.codes[static_cast<size_t>(r * m.cols + c)];
      if (m.has_codebook()) {
        dense(r, c) = m.levels[(g << m.bits) + static_cast<size_t>(code)];
      } else if (m.has_float_zeros()) {
        dense(r, c) = m.scales[g] * (static_cast<float>(code) - m.float_zeros[g]);
      } else {
        dense(r, c) = m.scales[g] * static_cast<float>(code - m.zeros[g]);
      }
    }
  }
  return dense;
}

}  // namespace walsh
