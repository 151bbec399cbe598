// A linear's weights as integers with group scales: what GPTQ makes, the artifact stores and the
// kernels repack.
//
//   W[r, c] ≈ scale(r, g) · (code(r, c) − zero(r, g)),  g = c / group_size
//
// Scales are exactly representable in IEEE half precision, since that is how they are stored: the
// quantizer rounds a scale first and chooses the codes for the rounded one.
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
  std::vector<float> scales;   // [rows, groups]
  std::vector<uint8_t> zeros;  // [rows, groups], each below 2^bits

  int64_t groups() const { return group_size == 0 ? 0 : cols / group_size; }
};

// [rows, cols], what the integers stand for, exactly.
inline Matrix Dequantize(const QuantizedMatrix& m) {
  Matrix dense(m.rows, m.cols);
  for (int64_t r = 0; r < m.rows; ++r) {
    for (int64_t c = 0; c < m.cols; ++c) {
      const auto g = static_cast<size_t>(r * m.groups() + c / m.group_size);
      const int level = m.codes[static_cast<size_t>(r * m.cols + c)] - m.zeros[g];
      dense(r, c) = m.scales[g] * static_cast<float>(level);
    }
  }
  return dense;
}

}  // namespace walsh
